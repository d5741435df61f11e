"""The grammar against a fixture made by another implementation, and its sampler against its own exact law."""

import collections
import json
import math
import pathlib

import numpy as np
import pytest

from flowlm.data.grammar import Grammar

FIXTURE = pathlib.Path(__file__).parent / "data" / "grammar98"


@pytest.fixture(scope="module")
def grammar():
    return Grammar.load("grammar98")


@pytest.fixture(scope="module")
def fixture():
    return np.load(FIXTURE / "rows.npz")


def write_grammar(path, rules, words=("_", "a", "b", "c"), length=3):
    table = {
        "words": list(words),
        "pad": "_",
        "length": length,
        "start": "S",
        "parameters": {},
        "rules": rules,
    }
    path.write_text(json.dumps(table))
    return str(path)


def test_words_and_ids(grammar):
    assert list(grammar.words) == (FIXTURE / "words.txt").read_text().split()
    assert (grammar.pad, grammar.length) == (0, 18)


def test_log_prob_equals_fixture(grammar, fixture):
    np.testing.assert_allclose(grammar.log_prob(fixture["ids"]), fixture["logp"], rtol=0, atol=1e-9)
    assert np.isneginf(grammar.log_prob(fixture["ungrammatical"])).all()


def test_bad_padding_and_foreign_ids_are_impossible(grammar, fixture):
    row = fixture["ids"][np.argmin((fixture["ids"] != 0).sum(1))].astype(np.int32)
    end = int((row != 0).sum())
    junk_behind_pad, pad_first, foreign = row.copy(), np.roll(row, 1), row.copy()
    junk_behind_pad[end + 1] = row[end - 1]
    foreign[0] = 98
    negative = row.copy()
    negative[0] = -1
    assert np.isfinite(grammar.log_prob(row[None]))
    assert np.isneginf(grammar.log_prob(np.stack([junk_behind_pad, pad_first, foreign, negative]))).all()


def test_entropy_is_mean_surprise(grammar, fixture):
    """Rules give 17.95; rows of the sampler and of the fixture, judged exactly, must average to it."""
    assert abs(grammar.entropy - 17.95) < 0.005
    for ids in (grammar.sample(np.random.default_rng(3), 20_000), fixture["ids"]):
        surprise = -grammar.log_prob(ids)
        assert abs(surprise.mean() - grammar.entropy) < 5 * surprise.std() / math.sqrt(len(ids))


def test_sampler_draws_the_law(tmp_path):
    """Chi-square of all rows of a small ambiguous grammar against enumerated probabilities, and log_prob too."""
    rules = {"S": {"X X": 0.5, "X": 0.3, "a Y": 0.2}, "X": {"a": 0.25, "b": 0.75}, "Y": ["a", "b", ""]}
    grammar = Grammar.load(write_grammar(tmp_path / "ambiguous.json", rules))
    law = {"a": 0.075 + 0.2 / 3, "b": 0.225}
    law |= {"a a": 0.5 / 16 + 0.2 / 3, "a b": 1.5 / 16 + 0.2 / 3, "b a": 1.5 / 16, "b b": 4.5 / 16}
    rows = [[grammar.words.index(word) for word in text.split()] for text in law]
    padded = np.array([row + [grammar.pad] * (grammar.length - len(row)) for row in rows])
    np.testing.assert_allclose(np.exp(grammar.log_prob(padded)), list(law.values()), rtol=1e-12)

    num = 60_000
    counts = collections.Counter(map(tuple, grammar.sample(np.random.default_rng(0), num).tolist()))
    expected = {tuple(row): num * p for row, p in zip(padded.tolist(), law.values())}
    assert set(counts) == set(expected)
    chi_square = sum((counts[row] - mean) ** 2 / mean for row, mean in expected.items())
    assert chi_square < 20.5  # 99.9 % of chi-square with 5 degrees of freedom.


def test_parameters_stand_for_one_rule_a_value(tmp_path):
    table = {
        "words": ["_ a b x y"],
        "pad": "_",
        "length": 2,
        "start": "S",
        "parameters": {"g": ["m", "f"], "c": ["1", "2"]},
        "rules": {
            "S": ["P.m.1", "P.f.2"],
            "P.{g}.{c}": ["N.{g} V.{c}"],
            "N.m": ["a"],
            "N.f": ["b"],
            "V.1": ["x"],
            "V.2": ["y"],
        },
    }
    path = tmp_path / "agreement.json"
    path.write_text(json.dumps(table))
    probabilities = np.exp(Grammar.load(str(path)).log_prob(np.array([[1, 3], [2, 4], [1, 4], [2, 3]])))
    np.testing.assert_allclose(probabilities, [0.5, 0.5, 0, 0], atol=1e-12)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"S": ["a S", "a"]}, "derives itself"),
        ({"S": ["a a a a"]}, "more than its 3 words"),
        ({"S": {"a": 0.5, "b": 0.4}}, "sum to 1"),
        ({"S": ["a d"]}, "'d' is neither a word nor a rule"),
    ],
)
def test_bad_tables_are_refused(tmp_path, rules, message):
    with pytest.raises(ValueError, match=message):
        Grammar.load(write_grammar(tmp_path / "bad.json", rules))


def test_unknown_name_and_wrong_length(grammar):
    with pytest.raises(ValueError, match="known are grammar98"):
        Grammar.load("grammar99")
    with pytest.raises(ValueError, match=r"\[N, 18\]"):
        grammar.log_prob(np.zeros((2, 19), int))
