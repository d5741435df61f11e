"""Grammars: grammar98 against a fixture made by another implementation, grammar1k against counting by hand and in full.

Each sampler is judged by its own exact law.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import math
import pathlib

import numpy as np
import pytest

from flowlm.data.grammar import Grammar, Rule
from flowlm.evaluation import naive

FIXTURE = pathlib.Path(__file__).parent / "data" / "grammar98"


@pytest.fixture(scope="module")
def grammar():
    return Grammar.load("grammar98")


@pytest.fixture(scope="module")
def fixture():
    return np.load(FIXTURE / "rows.npz")


@pytest.fixture(scope="module")
def large():
    return Grammar.load("grammar1k")


@pytest.fixture(scope="module")
def large_rows(large):
    return large.sample(np.random.default_rng(3), 20_000)


def as_row(grammar, text):
    ids = [grammar.words.index(word) for word in text.split()]
    return np.array(ids + [grammar.pad] * (grammar.length - len(ids)), np.int32)


def write_grammar(path, rules, words=("_", "a", "b", "c"), length=3, parameters=()):
    table = {
        "words": list(words),
        "pad": "_",
        "length": length,
        "start": "S",
        "parameters": dict(parameters),
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


def test_draws_are_those_of_the_runs_that_were_published(grammar):
    """The data of a run follows from a seed, so that what was trained on can be had again."""
    ids = grammar.sample(np.random.default_rng(7), 5000)
    assert (
        hashlib.sha256(ids.tobytes()).hexdigest() == "f8879e9ef7f9fd57a1b2f0f4dee6206cff59972bd7e9c49b8ad75bae9169cf8c"
    )


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


def test_a_parameter_of_the_alternatives_alone_stands_for_each_of_its_values(tmp_path):
    """They share one probability; a list stays uniform over all. The values may depend on another parameter, and be nothing."""
    parameters = {"k": ["1", "2"], "s": ["", "s"], "v.1": ["a", "b"], "v.2": ["c"]}
    rules = {"S": {"P.{k}": 0.9, "b b": 0.1}, "P.{k}": ["{v.{k}}{s} Q.{k}", "a"], "Q.{k}": ["{v.{k}}"]}
    grammar = Grammar.load(write_grammar(tmp_path / "a.json", rules, ["_ a b c as bs cs"], 2, parameters))
    law = {f"{v}{s} {w}": 0.45 / 5 / 2 for v, w, s in itertools.product("ab", "ab", ("", "s"))}
    law |= {"c c": 0.45 / 3, "cs c": 0.45 / 3, "a": 0.45 / 5 + 0.45 / 3}
    law["b b"] += 0.1
    rows = np.array([as_row(grammar, text) for text in law])
    np.testing.assert_allclose(np.exp(grammar.log_prob(rows)), list(law.values()), rtol=1e-12)
    assert sum(law.values()) == pytest.approx(1)


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
    with pytest.raises(ValueError, match="known are grammar1k, grammar98"):
        Grammar.load("grammar99")
    with pytest.raises(ValueError, match=r"\[N, 18\]"):
        grammar.log_prob(np.zeros((2, 19), int))


# --- grammar1k ---------------------------------------------------------------------------------------------------

STORY = (
    "the king whom the brave sailors hate finds two long letters . in the evening he gives the letters to his sister "
    ", and he reads them slowly . finally , the king does not sleep , but he is happy ."
)
ASIDE = (
    "shy Anna , who lives near the river , buys a warm coat in the hall . her cousins like the coat , so she lends it to them "
    "at night . today , Anna , who is tired , makes herself some tea ."
)


def test_the_large_grammar_is_large(large, large_rows):
    used = {i for rule in large.rules.values() for symbols in rule.alternatives for i in symbols if isinstance(i, int)}
    assert len(large.words) - 1 == len(used) == 1375
    assert used <= set(large_rows.ravel().tolist())  # no word is so rare that it is not learnt
    sizes = (large_rows != large.pad).sum(1)
    assert large.length == sizes.max() == 48 and sizes.mean() > 40


def test_the_large_grammar_has_one_derivation_a_row_and_its_entropy(large, large_rows):
    """With ones for probabilities the sum over derivations is their number, so the entropy of derivations is that of rows."""
    rows = large_rows[:1000]
    surprise = -large.log_prob(rows)
    assert abs(large.entropy - 62.93) < 0.005
    assert abs(surprise.mean() - large.entropy) < 4 * surprise.std() / math.sqrt(len(rows))
    ones = {name: Rule(np.ones(len(rule.alternatives)), rule.alternatives) for name, rule in large.rules.items()}
    np.testing.assert_allclose(dataclasses.replace(large, rules=ones).log_prob(rows), 0, atol=1e-9)


def test_the_large_grammar_gives_the_probability_that_is_counted_by_hand(large):
    """Choices from left to right, as the table says them."""
    story = [
        1 / 3,
        0.6,
        0.2,
        0.4,
        1 / 30,
        0.7,
        0.3,
        1 / 46,
        1 / 3,
        1 / 60,
        1 / 15,
    ]  # the king whom the brave sailors hate
    story += [1 / 16, 1 / 2, 1 / 15, 1 / 13, 0.6, 1 / 10, 1 / 18, 0.5]  # finds two long letters .
    story += [1 / 3, 0.7, 0.25, 1 / 3, 1 / 12, 0.4, 1 / 3, 1 / 7, 1 / 9, 1 / 27]  # in the evening he gives .. slowly .
    story += [1 / 12, 1 / 4, 1 / 15, 1 / 20]  # finally , the king does not sleep , but he is happy .
    aside = [1 / 3, 0.4, 0.6, 1 / 46, 1 / 30, 0.7, 0.4, 1 / 14, 1 / 7, 1 / 54]  # shy Anna , who lives near the river ,
    aside += [1 / 16, 1 / 2, 0.4, 1 / 13, 0.6, 1 / 10, 1 / 21, 0.5, 1 / 28]  # buys a warm coat in the hall .
    aside += [1 / 3, 0.4, 1 / 3, 1 / 14, 1 / 15, 1 / 12, 0.7, 0.2, 1 / 7]  # her cousins like the coat .. at night .
    aside += [1 / 12, 1 / 4, 1 / 20, 1 / 8, 1 / 10]  # today , Anna , who is tired , makes herself some tea .
    found = large.log_prob(np.array([as_row(large, STORY), as_row(large, ASIDE)]))
    np.testing.assert_allclose(found, [np.log(story).sum(), np.log(aside).sum()], rtol=1e-12)


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        (STORY, "hate finds", "hates finds"),  # the verb of those in the relative clause
        (STORY, "hate finds", "hate find"),  # the verb behind them is the king's
        (STORY, "evening he", "evening she"),
        (STORY, "gives the letters", "gives the letter"),
        (STORY, "gives the letters", "gives the poems"),
        (STORY, "his sister", "her sister"),
        (STORY, "reads them", "reads it"),
        (STORY, "reads them", "eats them"),
        (STORY, ", the king", ", the duke"),
        (STORY, "does not", "do not"),
        (STORY, "but he is", "but she is"),
        (STORY, "two long", "a long"),
        (ASIDE, ", Anna", ", Emma"),
        (ASIDE, "river , buys", "river buys"),
        (ASIDE, "lends it to them", "lends it to her"),
        (ASIDE, "lends it", "lends them"),
        (ASIDE, "cousins like", "cousins likes"),
        (ASIDE, "herself", "himself"),
        (ASIDE, "Anna , who is tired , makes", "Anna , who is tired makes"),
    ],
)
def test_one_fault_anywhere_is_impossible(large, text, right, wrong):
    assert right in text and np.isfinite(large.log_prob(as_row(large, text)[None]))
    assert np.isneginf(large.log_prob(as_row(large, text.replace(right, wrong))[None]))


def test_a_word_in_place_of_another_is_nearly_always_impossible(large, large_rows):
    rng, rows = np.random.default_rng(0), large_rows[:1000].copy()
    places = (rng.random(len(rows)) * (rows != large.pad).sum(1)).astype(int)
    rows[np.arange(len(rows)), places] = rng.integers(1, len(large.words), len(rows))
    assert np.isfinite(large.log_prob(rows)).mean() < 0.03


def test_a_small_part_of_the_large_grammar_is_right_in_full(large):
    """Its rows by writing out every choice, with their probabilities."""
    whole = ("Story", "MaybeWho.m", "Who.f", "Beloved", "Deal.p", "Item.m.fruit.pear", "Ending.f", "Number")

    def cut(name, rule):
        kept = len(rule.alternatives) if name in whole else 1
        return Rule(rule.probabilities[:kept] / rule.probabilities[:kept].sum(), rule.alternatives[:kept])

    part = dataclasses.replace(large, rules={name: cut(name, rule) for name, rule in large.rules.items()})

    def written(symbols):
        if not symbols:
            return {(): 1.0}
        first, *rest = symbols
        heads = {(first,): 1.0}
        if isinstance(first, str):
            heads = collections.Counter()
            for p, inner in zip(part.rules[first].probabilities, part.rules[first].alternatives):
                for text, q in written(inner).items():
                    heads[text] += p * q
        return {head + tail: p * q for head, p in heads.items() for tail, q in written(rest).items()}

    law = written((part.start,))
    rows = np.array([row + (part.pad,) * (part.length - len(row)) for row in law])
    shares = np.array(list(law.values()))
    assert len(rows) > 500 and shares.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(part.log_prob(rows), np.log(shares), rtol=0, atol=1e-9)
    assert part.entropy == pytest.approx(-(shares * np.log(shares)).sum(), abs=1e-9)
    drawn = part.sample(np.random.default_rng(0), 5000)
    assert {tuple(row) for row in drawn.tolist()} <= {tuple(row) for row in rows.tolist()}


def test_a_trigram_chain_writes_no_story(large, large_rows):
    """Fitted on as many rows as evaluations fit it on."""
    framed = np.pad(large_rows, ((0, 0), (1, 0)), constant_values=len(large.words))
    assert np.isfinite(large.log_prob(naive.trigram(framed, 2000, 0)[:, 1:])).mean() < 0.05


def test_no_vowel_follows_a(large, large_rows):
    """The rows are English: there is no `an`."""
    rows = [[large.words[i] for i in row] for row in large_rows.tolist()]
    behind = {after for row in rows for word, after in itertools.pairwise(row) if word == "a"}
    assert {word for word in behind if word[0] in "aeiou"} == {"useful"}
