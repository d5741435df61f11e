"""Judges without a language model, against brute force and closed forms."""

import collections
import itertools
import math

import numpy as np
import pytest

from flowlm.judges.base import mean_with_stderr, score_all, shown
from flowlm.judges.exact import GrammarJudge
from flowlm.judges.kneser_ney import KneserNey
from flowlm.judges.language_model import LanguageModel
from flowlm.judges.ngrams import NGrams
from flowlm.judges.sentences import Sentences
from flowlm.judges.statistics import Statistics, distinct_share, entropies, longest_repeats, self_bleu, words

TEXT = (
    "The abundant fruits of another year have blessed our country with plenty and with the means of a flourishing "
    "commerce. The progress of public credit is witnessed by a considerable rise of American stock abroad as well as "
    "at home, and the revenues allotted for this and other national purposes have been productive beyond the "
    "calculations by which they were regulated. Aaah: abababab, aaaaaa.\n\n"
)
START = 9


class Fixed:
    """A judge that returns what it is given."""

    def __init__(self, **scores):
        self.scores = scores

    def score(self, ids, texts):
        return self.scores


def test_pooled_mean_and_its_standard_error():
    rng = np.random.default_rng(0)
    values = rng.normal(3, 2, 50)
    plain = mean_with_stderr("m", values)
    assert plain == pytest.approx({"m": values.mean(), "m_stderr": values.std(ddof=1) / 50**0.5})

    # The delta method against many repetitions of the experiment itself.
    sizes = rng.integers(1, 20, (4000, 200))
    values = sizes * 1.5 + rng.normal(0, 1, sizes.shape) * sizes**0.5
    runs = [mean_with_stderr("m", v, s) for v, s in zip(values, sizes, strict=True)]
    spread = np.std([run["m"] for run in runs])
    assert np.mean([run["m_stderr"] for run in runs]) == pytest.approx(spread, rel=0.05)
    assert runs[0]["m"] == pytest.approx(values[0].sum() / sizes[0].sum())

    assert all(math.isnan(x) for x in mean_with_stderr("m", [0, 0], [0, 0]).values())
    assert math.isnan(mean_with_stderr("m", [2.0])["m_stderr"])


def test_every_metric_says_what_it_is_in_one_line_and_the_main_ones_are_metrics():
    rows = np.array([[START, 1, 2, 1, 2, 3], [START, 3, 3, 1, 4, 5]])
    texts = ["aaa bbb ccc", "bbb ccc ddd"]
    judges = [
        (Statistics(frozenset(["bbb"]), START), ("entropy", "distinct_rows", "distinct_2")),
        (KneserNey.fit(TEXT), ("nats_per_char",)),
        (NGrams.fit(rows, START), ("ngram_distance_2",)),
        (Sentences(rows[:1], rows[1:], START, 0), ("found", "copied")),
        (GrammarJudge(Coins(), START), ("grammatical", "nll_minus_entropy")),
        (
            LanguageModel("smollm2", lambda texts: [[1]] * len(texts), lambda ids: np.ones((len(ids), 8)), 0, 8),
            ("smollm2_nats_per_token",),
        ),
    ]
    for judge, main in judges:
        scores = judge.score(rows[:, :4] if isinstance(judge, GrammarJudge) else rows, texts)
        metrics = [metric for metric in scores if not metric.endswith("_stderr")]
        assert set(metrics) == set(judge.meanings) >= set(judge.main) and judge.main == main
        assert all(len(f"{shown(metric)}  {meaning}") <= 80 for metric, meaning in judge.meanings.items())


def test_many_texts_are_read_each_from_its_own_beginning():
    model = KneserNey.fit(TEXT)
    texts = ["The public credit.", "", "a", "xyz is new", TEXT[:40]]
    for text, found in zip(texts, model.log_probs(texts), strict=True):
        np.testing.assert_array_equal(found, model.log_prob(text))


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("nats_per_char", "nats / char"),
        ("nll_minus_entropy", "nll - entropy"),
        ("distinct_rows", "distinct rows"),
        ("smollm2_nats_per_token", "smollm2 nats / token"),
        ("seconds_per_100", "seconds / 100"),
    ],
)
def test_a_metric_as_people_read_it(metric, name):
    assert shown(metric) == name


def test_score_all_keeps_order_and_refuses_clashes():
    ids, texts = np.zeros((2, 3), int), ["a", "b"]
    merged = score_all([Fixed(z=1.0, a=2.0), Fixed(m=3.0)], ids, texts)
    assert list(merged.items()) == [("z", 1.0), ("a", 2.0), ("m", 3.0)]
    with pytest.raises(ValueError, match="'a'"):
        score_all([Fixed(z=1.0, a=2.0), Fixed(a=3.0)], ids, texts)
    with pytest.raises(ValueError, match="2 rows, 1 texts"):
        score_all([], ids, texts[:1])


def brute_longest_repeat(row):
    for length in range(len(row) - 1, 0, -1):
        grams = [tuple(row[i : i + length]) for i in range(len(row) - length + 1)]
        if len(set(grams)) < len(grams):
            return length
    return 0


@pytest.mark.parametrize("vocab", [1, 2, 5, 40])
def test_statistics_against_brute_force(vocab):
    rng = np.random.default_rng(vocab)
    inner = rng.integers(10, 10 + vocab, (37, 23))
    inner[0, 12:] = inner[0, 1:12]
    inner[5] = inner[4]
    rows = inner.tolist()

    longest = [brute_longest_repeat(row) for row in rows]
    assert longest[0] >= 11
    np.testing.assert_array_equal(longest_repeats(inner), longest)

    expected = []
    for row in rows:
        shares = [count / len(row) for count in collections.Counter(row).values()]
        expected.append(-sum(share * math.log(share) for share in shares))
    np.testing.assert_allclose(entropies(inner), expected, atol=1e-12)

    distinct = {}
    for n in (1, 2, 4):
        grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
        distinct[n] = len(set(grams)) / len(grams)
        assert distinct_share(inner, n) == distinct[n]
        large = inner + (2**31 - 1 - inner.max())  # three such ids do not fit in 63 bits
        assert distinct_share(large, n) == distinct[n]

    # The start token changes nothing, though it occurs in every row.
    framed = np.concatenate([np.full((37, 1), START), inner], 1)
    scores = Statistics(None, START).score(framed, [""] * 37)
    assert list(scores) == (
        ["entropy", "entropy_stderr", "distinct_1", "distinct_2", "distinct_4"]
        + ["self_bleu", "longest_repeat", "longest_repeat_stderr", "distinct_rows"]
    )
    precisions = []
    for n in (1, 2, 3, 4):
        grams = [collections.Counter(tuple(row[i : i + n]) for i in range(len(row) - n + 1)) for row in rows]
        clipped = sum(
            min(count, max(other[gram] for j, other in enumerate(grams) if j != i))
            for i, mine in enumerate(grams)
            for gram, count in mine.items()
        )
        precisions.append(clipped / sum(sum(mine.values()) for mine in grams))
    assert scores["self_bleu"] == pytest.approx(math.prod(precisions) ** 0.25)
    assert self_bleu(large) == scores["self_bleu"]
    assert scores["entropy"] == pytest.approx(np.mean(expected))
    assert scores["longest_repeat"] == np.mean(longest)
    assert [scores[f"distinct_{n}"] for n in (1, 2, 4)] == list(distinct.values())
    assert scores["distinct_rows"] == len(set(map(tuple, rows))) / 37


def test_a_start_token_is_left_out_only_where_it_is_the_frame():
    ids = np.array([[START, 1, 1, START], [1, 1, START, 1]])
    scores = Statistics(None, START).score(ids, ["", ""])

    def of(*shares):
        return -sum(share * math.log(share) for share in shares)

    assert scores["entropy"] == pytest.approx((of(1 / 3, 2 / 3) + of(1 / 4, 3 / 4)) / 2)
    assert scores["distinct_1"] == 2 / 7
    assert scores["distinct_2"] == 3 / 5  # 1 1, 1 S | 1 1, 1 S, S 1
    assert scores["longest_repeat"] == 1


def test_words_in_corpus():
    vocabulary = frozenset(words('The cat sat -- on "the" mat. Don\'t!'))
    assert vocabulary == {"the", "cat", "sat", "on", "mat", "don't"}
    texts = [
        "he CAT, (sat) xx o",
        "zz don't y",
        "zz zz",
        "",
    ]  # inner words: CAT, (sat) xx | don't | none | none
    scores = Statistics(vocabulary, START).score(np.ones((4, 2), int), texts)
    assert scores["words_in_corpus"] == 3 / 4
    deviations = [2 - 0.75 * 3, 1 - 0.75, 0, 0]
    stderr = math.sqrt(4 / 3 * sum(d * d for d in deviations)) / 4
    assert scores["words_in_corpus_stderr"] == pytest.approx(stderr)


class SlowKneserNey:
    """The same model from its definition: sets of strings and recursion."""

    def __init__(self, text, order):
        self.order, self.symbols = order, len(set(text)) + 1
        self.counts = {order: collections.Counter(text[i : i + order] for i in range(len(text) - order + 1))}
        for k in range(order - 1, 0, -1):
            seen = {gram[order - k - 1 :] for gram in self.counts[order]}  # (k + 1)-grams
            self.counts[k] = collections.Counter(gram[1:] for gram in seen)
        self.discount = {}
        for k, table in self.counts.items():
            once, twice = (sum(count == r for count in table.values()) for r in (1, 2))
            self.discount[k] = once / (once + 2 * twice) if once else 0.5

    def prob(self, context, char):
        k = len(context) + 1
        lower = self.prob(context[1:], char) if context else 1 / self.symbols
        following = [count for gram, count in self.counts[k].items() if gram[:-1] == context]
        if not following:
            return lower
        total, discount = sum(following), self.discount[k]
        own = max(self.counts[k][context + char] - discount, 0)
        return own / total + discount * len(following) / total * lower

    def log_prob(self, text):
        return [math.log(self.prob(text[max(0, i - self.order + 1) : i], c)) for i, c in enumerate(text)]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("text", [TEXT, "ab" * 30, "aaaaaaaa", "a\U0001f600b\U0001f600ba"])
def test_kneser_ney_against_the_definition(text, order):
    held_out = "The fruits of Zanzibar: aaab abab, \u20ac\u20ac at home with \U0001f600 the thethe commerce.\n"
    fast, slow = KneserNey.fit(text, order), SlowKneserNey(text, order)
    for case in (held_out, text[:200], "T", ""):
        np.testing.assert_allclose(fast.log_prob(case), slow.log_prob(case), rtol=1e-10)


@pytest.mark.parametrize("text", [TEXT, "ab" * 30])
def test_kneser_ney_sums_to_one(text):
    model = KneserNey.fit(text)
    symbols = [*sorted(set(text)), "\u20ac"]
    for context in (
        "",
        "a",
        "ab",
        "the",
        "with",
        "comm",
        "bbbb",
        "zzzz",
        "\u20acthe",
        "th\u20ac",
        "wi\u20acth",
        "xyzwith",
    ):
        total = sum(math.exp(model.log_prob(context + symbol)[-1]) for symbol in symbols)
        assert total == pytest.approx(1, abs=1e-12), context


def test_kneser_ney_judges_texts():
    model = KneserNey.fit(TEXT)
    texts = ["the commerce", "", "qqqq", "of a considerable rise", "abab"]
    scores = model.score(np.zeros((5, 1), int), texts)
    nats = [-model.log_prob(text).sum() for text in texts]
    sizes = [len(text) for text in texts]
    assert scores == mean_with_stderr("nats_per_char", nats, sizes)
    assert scores["nats_per_char"] == pytest.approx(sum(nats) / sum(sizes))
    assert math.isnan(model.score(np.zeros((1, 1), int), [""])["nats_per_char"])


def test_kneser_ney_refuses_what_it_cannot_fit():
    with pytest.raises(ValueError, match="4 characters; got 5"):
        KneserNey.fit("abcd", 5)


def test_a_large_alphabet_takes_a_lower_order():
    """6,207 characters are the most of which five fit into 63 bits; with more the model is the 4-gram one, and says so."""
    letters = "".join(map(chr, range(0x4E00, 0x4E00 + 6207)))
    text = letters + "the commerce of the country; the country" + letters[::7]
    fits = KneserNey.fit(letters)
    assert fits.order == 5 and fits.note is None
    model, slow = KneserNey.fit(text), SlowKneserNey(text, 4)
    assert model.order == 4
    held_out = "the commerces of\u4e00\u4e07 \u20ac the" + letters[21:33]
    np.testing.assert_allclose(model.log_prob(held_out), slow.log_prob(held_out), rtol=1e-10)
    count = len(set(text))
    assert count > 6207
    assert model.note.startswith("nats / char is of a 4-gram model, not a 5-gram one: 6,2")
    assert f"{count:,} different characters" in model.note


class Coins:
    """Rows of three tokens: 0 with probability 1/4, 1 with 3/4; anything else is ungrammatical."""

    entropy = -3 * (0.25 * math.log(0.25) + 0.75 * math.log(0.75))

    def log_prob(self, ids):
        assert ids.shape[1] == 3
        table = np.log([0.25, 0.75] + [1e-300] * 8)
        return np.where((ids < 2).all(1), table[ids].sum(1), -np.inf)


def test_grammar_judge():
    rows = np.array([[START, 1, 1, 0], [START, 0, 0, 0], [START, 1, 2, 0], [3, 1, 1, 1]])
    scores = GrammarJudge(Coins(), START).score(rows, [""] * 4)
    assert list(scores) == [
        "grammatical",
        "grammatical_stderr",
        "nll_minus_entropy",
        "nll_minus_entropy_stderr",
    ]
    nll = [-2 * math.log(0.75) - math.log(0.25), -3 * math.log(0.25)]
    assert scores["grammatical"] == 0.5
    assert scores["grammatical_stderr"] == pytest.approx(math.sqrt(0.5 * 0.5 / 3))
    assert scores["nll_minus_entropy"] == pytest.approx(sum(nll) / 2 - Coins.entropy)
    assert scores["nll_minus_entropy_stderr"] == pytest.approx(abs(nll[1] - nll[0]) / 2)

    none = GrammarJudge(Coins(), START).score(rows[2:], [""] * 2)
    assert none["grammatical"] == 0 and math.isnan(none["nll_minus_entropy"])

    # All eight rows, each as often as the grammar makes it, have exactly its entropy.
    every = [row for row in itertools.product([0, 1], repeat=3) for _ in range(3 ** sum(row))]
    framed = np.concatenate([np.full((64, 1), START), every], 1)
    assert GrammarJudge(Coins(), START).score(framed, [""] * 64)["nll_minus_entropy"] == pytest.approx(0, abs=1e-12)
