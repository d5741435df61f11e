"""A tokenizer of one's own text: made of the train split alone, the same every time, and what it loses is counted."""

import json
import random
import runpy
from pathlib import Path

import numpy as np
import pytest
from test_own_text import by_split, texts

from flowlm.data import own_text, round_trip, train_tokenizers, windows
from flowlm.data.prepare import prepare_text
from flowlm.data.tokenizers import Tokenizer, shipped

ROOT = Path(__file__).parents[1]


def write(path, documents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    return str(path)


@pytest.fixture
def lines(tmp_path):
    return write(tmp_path / "texts.jsonl", [f"{text}\n\u00c9tude, {i} \u4e2d!" for i, text in enumerate(texts(60))])


# --- what is made ------------------------------------------------------------------------------------------------


def test_bpe_of_own_text_gives_back_every_document_and_has_seen_the_train_split_alone(lines, tmp_path):
    out = tmp_path / "out"
    manifest = prepare_text("jsonl", lines, "bpe:300", 16, str(out), "")
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    assert tokenizer.vocab_size == manifest["vocab_size"] == 300 and manifest["recipe"] == "bpe:300"
    sides = by_split(out)
    for text in (text for side in sides.values() for text in side):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert json.loads(tokenizer.json) == json.loads(train_tokenizers.byte_level_bpe(sides["train"], 300).to_str())
    assert tokenizer.sha256 == manifest["tokenizer_sha256"]
    total = sum(len(text) for side in sides.values() for text in side)
    assert manifest["round_trip"] == {"characters": total, "changed": 0, "such_as": []}

    again = prepare_text("jsonl", lines, "bpe:300", 16, str(tmp_path / "again"), "")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    assert again == manifest
    config = runpy.run_path(str(ROOT / "experiments/my_text.py"))["get_config"](str(out))
    assert config.model.vocab_size == 300 and config.data.tokenizer == str(out / "tokenizer.json")


def test_words_are_the_most_frequent_with_their_blanks_and_the_rest_is_unknown():
    documents = ["the cat sat.\n", "the cat, the dog's bed.\n", "the cat's bed"]
    tokenizer = train_tokenizers.recipe("words:8")(documents)
    # " cat" twice, "the" thrice, " bed" and "." and "\n" twice; of equals the first by code points.
    assert tokenizer.pieces == ("<|start|>", "[UNK]", "the", "\n", " bed", " cat", ".", " cat's")
    assert (tokenizer.start, tokenizer.unknown) == (0, "[UNK]")
    ids = tokenizer.encode("the cat sat.\nthe bed <|start|>[UNK]")
    assert ids.tolist() == [2, 5, 1, 4 + 2, 3, 2, 4] + [1] * 8
    assert tokenizer.decode(ids[:7]) == "the cat[UNK].\nthe bed"
    everything = train_tokenizers.recipe("words:100")(documents)
    assert everything.vocab_size == 12
    assert [everything.decode(everything.encode(text)) for text in documents] == documents


def test_a_long_document_is_counted_in_pieces_and_makes_the_same_words(monkeypatch):
    text = " ".join(texts(40))
    whole = train_tokenizers.recipe("words:60")([text])
    monkeypatch.setattr(windows, "WINDOW", 500)
    most = max(map(len, windows.pieces(text)))
    assert "".join(windows.pieces(text)) == text and most < 1000 < len(text)
    assert train_tokenizers.recipe("words:60")([text]) == whole


def test_a_tokenizer_that_the_folder_holds_is_not_made_again(lines, tmp_path, monkeypatch):
    arguments = "jsonl", lines, "words:200", 16, str(tmp_path / "out"), ""
    manifest = prepare_text(*arguments)
    made = []
    genuine, least = train_tokenizers.RECIPES["words"]
    monkeypatch.setitem(train_tokenizers.RECIPES, "words", (lambda *of: made.append(0) or genuine(*of), least))
    assert prepare_text(*arguments) == manifest and not made
    (tmp_path / "out/tokenizer.json").unlink()
    assert prepare_text(*arguments) == manifest and len(made) == 1
    by_its_path = "jsonl", lines, str(tmp_path / "out/tokenizer.json"), 16, str(tmp_path / "out"), ""
    assert prepare_text(*by_its_path) == manifest


# --- what is lost ------------------------------------------------------------------------------------------------


def slowly(a, b):
    """Length of a longest common subsequence by the table of the textbook."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


def test_the_longest_common_subsequence_is_that_of_the_table():
    draw = random.Random(0)
    for _ in range(30):
        a, b = ("".join(draw.choices("abc ", k=draw.randrange(80))) for _ in range(2))
        assert round_trip.common(a, b) == slowly(a, b)


@pytest.mark.parametrize(
    "text, back, count",
    [
        ("The Cat", "the cat", 2),  # changed
        ("caf\u00e9 au lait", "caf au lait", 1),  # dropped
        ("a, b", "a , b", 1),  # added
        ("a\n\nb", "a b", 2),  # one changed, one dropped
        ("same", "same", 0),
    ],
)
def test_characters_that_do_not_come_back_are_counted(text, back, count):
    assert round_trip.changed(text, back) == count


def test_the_share_of_a_text_counted_by_hand():
    """Small letters for 2 of 11 characters; of the words, " sat" and " mat" are unknown: 8 of 22."""
    found = round_trip.measure(shipped("chars"), ["The Cat sat"])
    assert (found.characters, found.changed, found.such_as) == (11, 2, ["The Cat sat", "the cat sat"])
    tokenizer = train_tokenizers.recipe("words:7")(["the cat on the cat on a"] * 2)
    found = round_trip.measure(tokenizer, ["the cat sat on the mat"])
    assert (found.characters, found.changed) == (22, 8)
    assert found.such_as == ["the cat sat on the mat", "the cat[UNK] on the[UNK]"]
    assert found.share == 8 / 22


def test_a_long_text_is_measured_in_pieces_some_of_them():
    text = " ".join(["one Two three four"] * 3000)
    whole, part = (round_trip.measure(shipped("chars"), [text, "x Y"], every) for every in (1, 5))
    assert whole.changed == 3001 and len(text) - 40 < whole.characters <= len(text) + 3
    assert 0.15 < part.characters / whole.characters < 0.25 and abs(part.share - whole.share) < 1e-3


def test_a_tokenizer_that_loses_more_than_a_percent_is_refused_and_leaves_nothing(tmp_path):
    """Of 12 documents of 50 characters 6 or 7 end in a capital: 6 of 600 are 1 %, 7 are more."""
    out = tmp_path / "out"
    for capitals, taken in ((6, True), (7, False)):
        words = [f"{'ab' * 12} {chr(97 + i)} {'ba' * 11}{'c'}" for i in range(12)]
        documents = [word[:-1].ljust(49, "x") + ("C" if i < capitals else "c") for i, word in enumerate(words)]
        assert {len(text) for text in documents} == {50}
        path = write(tmp_path / f"{capitals}.jsonl", documents)
        arguments = "jsonl", path, "chars", 8, str(out / str(capitals)), ""
        if not taken:
            message = (
                r"--tokenizer=chars changes or drops 1\.2 % of the characters, such as '.*C', which comes back as '.*c'"
            )
            with pytest.raises(ValueError, match=message + ": give --allow_lossy"):
                prepare_text(*arguments)
            assert not (out / str(capitals)).exists()
        manifest = prepare_text(*arguments, allow_lossy=not taken)
        assert manifest["round_trip"]["characters"] == 600 and manifest["round_trip"]["changed"] == capitals
        assert own_text.load_manifest(out / str(capitals)) == manifest
        assert prepare_text(*arguments) == manifest  # what is whole is left as it is
