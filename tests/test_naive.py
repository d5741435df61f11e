"""The distance by n-grams and the samplers without a language model, against counting by hand."""

from collections import Counter

import numpy as np
import pytest

from flowlm.evaluation import naive
from flowlm.judges.ngrams import NGrams


def law(rows, n):
    grams = Counter(tuple(r[i : i + n]) for r in rows.tolist() for i in range(len(r) - n + 1) if -1 not in r[i : i + n])
    total = sum(grams.values())
    return {g: c / total for g, c in grams.items()}


@pytest.mark.parametrize("size", [5, 60_000])
def test_distance_is_the_total_variation_of_counters(size):
    """Also where five tokens of a large vocabulary do not fit an integer. The start token is no text."""
    rng = np.random.default_rng(0)
    pool = rng.integers(1, size, 4)
    a, b = (np.concatenate([np.zeros((n, 1), int), rng.choice(pool, (n, 9))], 1) for n in (40, 70))
    scores = NGrams.fit(b, start=0).score(a, [""] * 40)
    assert list(scores) == [f"ngram_distance_{n}" for n in range(1, 6)]
    for n in range(1, 6):
        p, q = law(a[:, 1:], n), law(b[:, 1:], n)
        expected = sum(abs(p.get(g, 0) - q.get(g, 0)) for g in p.keys() | q.keys()) / 2
        np.testing.assert_allclose(scores[f"ngram_distance_{n}"], expected)


def test_the_reference_is_counted_once_and_every_digit_stays(monkeypatch):
    """Half the summed difference over all n-grams in lexicographic order, by a sort of both sides for every score."""
    rng = np.random.default_rng(1)
    for trial in range(60):
        length, pool = rng.integers(1, 12), rng.integers(0, rng.choice([3, 60_000]), rng.choice([2, 4, 50]))
        a, b = (rng.choice(pool, (rng.integers(1, 40), length)) for _ in range(2))
        judge = NGrams.fit(b, start=int(pool[0]))
        with monkeypatch.context() as patch:
            patch.setattr("flowlm.judges.ngrams.tables", None)  # what counts the reference
            scores = judge.score(a, [""] * len(a))
        assert list(scores) == [f"ngram_distance_{n}" for n in range(1, min(length, 6))]
        for rows in (a, b):
            rows[rows[:, 0] == pool[0], 0] = -1
        for n in range(1, min(length, 6)):
            p, q = law(a, n), law(b, n)
            apart = np.abs(np.array([q.get(g, 0.0) - p.get(g, 0.0) for g in sorted(p.keys() | q.keys())]))
            expected = float(apart.sum() / 2) if p and q else float("nan")
            np.testing.assert_array_equal(scores[f"ngram_distance_{n}"], expected, err_msg=f"{trial} {n}")


def test_of_the_same_rows_it_is_zero_and_of_others_one():
    a = np.arange(40).reshape(4, 10)
    for reference, expected in ((a, 0), (a + 100, 1)):
        np.testing.assert_allclose(
            list(NGrams.fit(reference, start=-5).score(a, [""] * 4).values()), expected, atol=1e-12
        )


def grammar(num, seed):
    """Rows of a law with memory three, which neither single tokens nor pairs show."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((num, 12), np.int64)
    rows[:, 1:4] = rng.integers(1, 4, (num, 3))
    for i in range(4, 12):
        rows[:, i] = np.where(rng.random(num) < 0.5, rows[:, i - 1] % 3 + 1, rows[:, i - 3])
    return rows


def test_naive_samplers_have_the_laws_they_are_named_for_and_no_more():
    rows, held = grammar(4000, 0), grammar(4000, 1)
    judge = NGrams.fit(held, start=0)
    real = judge.score(grammar(2000, 2), [""] * 2000)
    words, chain = (judge.score(f(rows, 2000, 3), [""] * 2000) for f in (naive.unigram, naive.trigram))
    assert words["ngram_distance_1"] < real["ngram_distance_1"] + 0.01
    assert chain["ngram_distance_3"] < real["ngram_distance_3"] + 0.03
    assert words["ngram_distance_3"] > real["ngram_distance_3"]
    assert chain["ngram_distance_5"] > 2 * real["ngram_distance_5"]
    for sampler in naive.SAMPLERS.values():
        out = sampler(rows, 500, 3)
        assert out.dtype == np.int32 and (out[:, 0] == 0).all()
        np.testing.assert_array_equal(out, sampler(rows, 500, 3))


def test_a_chain_goes_on_after_a_pair_without_successor():
    rows = np.array([[0, 1, 2, 3]])
    out = naive.trigram(np.concatenate([rows, [[0, 2, 3, 4]]]), 50, 0)
    assert set(out[:, 1:].ravel()) <= {1, 2, 3, 4}
