"""Corpora whose files a user brings: how they are cut, that nothing is lost, and that what is missing or damaged is named."""

import gzip
import json
import zipfile

import numpy as np
import pytest

from flowlm import data
from flowlm.data import corpora, windows


@pytest.mark.parametrize(
    ("name", "place", "mend"),
    [
        ("text8", "sources/text8", "put text8 or text8.zip"),
        ("lm1b", "sources/lm1b/training-monolingual.tokenized.shuffled", "news.en"),
        ("openwebtext", "sources/openwebtext", "jsonl"),
    ],
)
def test_missing_sources(tmp_path, name, place, mend):
    with pytest.raises(FileNotFoundError, match=f"{place} is missing: .*{mend}"):
        data.open_dataset(name, "chars", 16, tmp_path)
    assert not (tmp_path / "tfds" / "packed_text").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_text8_is_one_text_cut_in_three(tmp_path, packed, monkeypatch):
    """Of which no character is lost, however long it is: blanks too, which a tokenizer strips at the ends of a text."""
    monkeypatch.setattr(windows, "WINDOW", 2000)
    monkeypatch.setattr(windows, "CONTEXT", 100)
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("abcdefgh"), 20_000))
    text = "".join(c if i % 5 else " " for i, c in enumerate(text, 1))
    (tmp_path / "sources").mkdir()
    if packed:
        with zipfile.ZipFile(tmp_path / "sources" / "text8.zip", "w") as archive:
            archive.writestr("text8", text)
    else:
        (tmp_path / "sources" / "text8").write_text(text)
    cut = {"train": text[:18_000], "validation": text[18_000:19_000], "test": text[19_000:]}
    for split, truth in cut.items():
        assert [piece for _, piece in corpora.documents("text8", split, tmp_path)] == [truth]
    dataset = data.open_dataset("text8", "chars", 11, tmp_path)
    letters = "abcdefghijklmnopqrstuvwxyz "
    packed_text = "".join(letters[i] for i in dataset.train.rows(0, len(dataset.train))[:, 1:].reshape(-1))
    assert packed_text == cut["train"][: len(packed_text)] and len(packed_text) > 17_980


def test_lm1b(tmp_path):
    directory = tmp_path / "sources" / "lm1b"
    files = {
        "training-monolingual.tokenized.shuffled/news.en-00001-of-00100": "One .\nTwo !\n",
        "training-monolingual.tokenized.shuffled/news.en-00002-of-00100": "Three ?\n" * 9,
        "heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050": "Test one .\n\nTest two .\n",
        "heldout-monolingual.tokenized.shuffled/news.en.heldout-00001-of-00050": "Valid one .\nValid two .\n",
    }
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    dataset = data.open_dataset("lm1b", "sotu_bpe_512", 6, tmp_path)
    assert dataset.train.text(30) == "One . Two ! Three ? Three ? Th"
    assert dataset.test.text(10) == "Test one ."
    assert dataset.validation.text(11) == "Valid one ."


def test_openwebtext_holds_out_the_last_documents(tmp_path):
    directory = tmp_path / "sources" / "openwebtext"
    directory.mkdir(parents=True)
    for part in range(2):
        lines = [json.dumps({"text": f"document\n{part * 20 + i}"}) + "\n" for i in range(20)]
        if part:
            (directory / f"{part}.jsonl.gz").write_bytes(
                gzip.compress("\n".join(lines).encode())
            )  # blank lines between
        else:
            (directory / f"{part}.jsonl").write_text("".join(lines))
    texts = {split: [text for _, text in corpora.documents("openwebtext", split, tmp_path)] for split in corpora.SPLITS}
    assert texts["train"] == [f"document\n{i}" for i in range(36)]
    assert texts["validation"] == ["document\n36", "document\n37"]
    assert texts["test"] == ["document\n38", "document\n39"]
    dataset = data.open_dataset("openwebtext", "sotu_bpe_512", 8, tmp_path)
    assert dataset.train.text(21) == "document\n0 document\n1"


def test_openwebtext_of_more_documents_than_wait(tmp_path, monkeypatch):
    """As many wait in memory as are held out; the others go on at once."""
    monkeypatch.setattr(corpora, "_OPENWEBTEXT_HELD_OUT", 5)
    directory = tmp_path / "sources" / "openwebtext"
    directory.mkdir(parents=True)
    (directory / "0.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(60)))
    found = [*corpora.read_corpus("openwebtext", tmp_path)]
    assert [(number, text) for _, number, text in found] == [(str(i), f"document {i}") for i in range(60)]
    assert [split for split, _, _ in found] == ["train"] * 55 + ["validation"] * 3 + ["test"] * 2


@pytest.mark.parametrize(
    ("corpus", "name", "line"),
    [
        ("text8", "text8", b"one \xff two"),
        ("lm1b", "training-monolingual.tokenized.shuffled/news.en-1", b"one \xff two"),
        ("openwebtext", "0.jsonl", b'{"txt": "one"}'),
    ],
)
def test_a_damaged_source_is_named(tmp_path, corpus, name, line):
    directory = tmp_path / "sources" / ("" if corpus == "text8" else corpus)
    for i in range(2):
        (directory / f"heldout-monolingual.tokenized.shuffled/news.en-{i}").parent.mkdir(parents=True, exist_ok=True)
        (directory / f"heldout-monolingual.tokenized.shuffled/news.en-{i}").write_text("fine\n")
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(line)
    with pytest.raises(ValueError, match=f"{name}(, line 1)? is (damaged|not a JSON object)"):
        [*corpora.read_corpus(corpus, tmp_path)]
