"""Data sets of Hugging Face: from a folder without a script, by their own library, the rows are those of the same text as lines."""

import json
import re

import pyarrow as pa
import pytest
from command_line import error_of, flowlm
from pyarrow import parquet
from test_own_text import by_split, texts

from flowlm.data import hf_sets
from flowlm.data.prepare import prepare_text

WRITTEN = [f"\u00c9tude: {text}" for text in texts(40)]
needs_datasets = pytest.mark.needs("datasets")


@pytest.fixture
def folder(tmp_path):
    """Three files of the train split and one of the test split, as on the hub."""
    (tmp_path / "set/data").mkdir(parents=True)
    for part in range(4):
        split = "test" if part == 3 else "train"
        table = pa.table({"id": range(10), "body": WRITTEN[10 * part :][:10]})
        number, of = (0, 1) if part == 3 else (part, 3)
        parquet.write_table(table, tmp_path / f"set/data/{split}-{number:05d}-of-{of:05d}.parquet")
    return tmp_path / "set"


def prepare(source, path, out, **more):
    return prepare_text(source, path, "sotu_bpe_512", 16, str(out), "", **more)


@needs_datasets
def test_a_set_makes_the_rows_of_its_documents(folder, tmp_path):
    """All splits of it, in the order of their names, and one alone; the same line again finds it whole."""
    lines = WRITTEN[30:] + WRITTEN[:30]
    for name, written, split in (("all", lines, ""), ("train", WRITTEN[:30], ":train")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in written))
        truth = prepare("jsonl", str(tmp_path / f"{name}.jsonl"), tmp_path / f"{name}-lines")
        made = prepare(f"hf:{folder}{split}", None, tmp_path / name, text_key="body")
        same = ("distinct_documents", "characters", "documents", "cuts", "rows")
        assert {key: made[key] for key in same} == {key: truth[key] for key in same}
        assert by_split(tmp_path / name) == by_split(tmp_path / f"{name}-lines")
        assert [each["file"] for each in made["sources"]][-3:] == [f"train-{i:05d}-of-00003" for i in range(3)]
    assert prepare(f"hf:{folder}:train", None, tmp_path / "train", text_key="body") == made


@needs_datasets
def test_the_command_takes_a_set(folder, tmp_path):
    line = f"--source=hf:{folder}:train", "--text_key=body", "--tokenizer=bpe:300", "--length=8", "--workers=1"
    assert "train: 26 documents" in flowlm("prepare", *line, f"--out={tmp_path / 'out'}").out


@needs_datasets
def test_what_is_wrong_with_a_set_is_one_line(folder, tmp_path):
    def wrong(place, **more):
        given = dict(source=f"hf:{place}", tokenizer="sotu_bpe_512", length=8, out=tmp_path / "out") | more
        said = error_of("prepare", *(f"--{name}={value}" for name, value in given.items()))
        assert "\n" not in said and not (tmp_path / "out").exists()
        return said

    assert "there is no split 'dev', but ['test', 'train']" in wrong(f"{folder}:dev")
    assert "no column 'text'; give --text_key=NAME, one of ['body', 'id']" in wrong(folder)
    assert "test-00000-of-00001, row 1: column 'id' is int, not text" in wrong(folder, text_key="id")
    assert f"--source=hf:{tmp_path / 'nothing'} cannot be opened: " in wrong(tmp_path / "nothing")


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(hf_sets.importlib.util, "find_spec", lambda name: None)
    assert "--source=hf needs datasets: `pip install -e .[hf]`" in error_of(
        "prepare", "--source=hf:a/b", "--tokenizer=bpe:300", "--length=8", "--out=out"
    )


def test_how_a_set_is_written():
    for told, parts in (
        ("a/b", ("a/b", None, None)),
        ("a/b:train", ("a/b", None, "train")),
        ("a/b,c-1:train", ("a/b", "c-1", "train")),
        ("/a/b.c,d", ("/a/b.c", "d", None)),
    ):
        assert re.fullmatch(hf_sets._FORM, told).groups() == parts
