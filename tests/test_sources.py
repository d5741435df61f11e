"""Text from every kind of file: the same documents make the same rows, and what is wrong is said before anything is written."""

import bz2
import gzip
import json
import lzma
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from command_line import error_of, flowlm
from pyarrow import parquet
from test_own_text import by_split, shards, texts
from toy import NoEvaluation

from flowlm import training
from flowlm.cli import prepare as command
from flowlm.data import sources
from flowlm.data.prepare import prepare_text
from flowlm.evaluation import evaluator
from flowlm.runs.metrics import read_metrics

ROOT = Path(__file__).parents[1]
WRITTEN = [f"\u00c9tude: {text}" for text in texts(40)]


def zst(content):
    """Two frames, as a packer that works in parallel writes them."""
    half, codec = len(content) // 2, pa.Codec("zstd")
    return b"".join(codec.compress(part, asbytes=True) for part in (content[:half], content[half:]))


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zst}


def example(**features):
    """The bytes of a tf.train.Example, by the encoding of protocol buffers written by hand."""

    def field(number, content):
        size = len(content)
        assert size < 1 << 14
        length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
        return bytes([number << 3 | 2]) + length + content

    def feature(value):
        values = value if isinstance(value, list) else [value]
        return field(1, b"".join(field(1, each if isinstance(each, bytes) else each.encode()) for each in values))

    return field(1, b"".join(field(1, field(1, k.encode()) + field(2, feature(v))) for k, v in features.items()))


def write_records(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


class Sentences(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A set as users of tfds write it."""

    VERSION = tfds.core.Version("1.0.0")
    name = "sentences"

    def _info(self):
        features = tfds.features.FeaturesDict({"sentence": tfds.features.Text(), "number": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 30), "test": self._generate_examples(30, 40)}

    def _generate_examples(self, begin, end):
        for number in range(begin, end):
            yield number, {"sentence": WRITTEN[number], "number": number}


@pytest.fixture(scope="module")
def prepared_set(tmp_path_factory):
    """Where tfds prepared sets, and the folder of the one in it."""
    home = tmp_path_factory.mktemp("tensorflow_datasets")
    builder = Sentences(data_dir=home, file_format="array_record")
    builder.download_and_prepare()
    return home, builder.data_path


@pytest.fixture(scope="module")
def as_lines(tmp_path_factory):
    """(its rows, its manifest) of the text as plain lines of JSON, which test_own_text.py proves."""
    folder = tmp_path_factory.mktemp("lines")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in WRITTEN))
    manifest = prepare("jsonl", folder / "a.jsonl", folder / "out")
    return shards(folder / "out"), manifest


def prepare(source, path, out, **more):
    return prepare_text(source, None if path is None else str(path), "sotu_bpe_512", 16, str(out), "", **more)


def assert_the_same(out, manifest, as_lines):
    rows, truth = as_lines
    assert shards(out) == rows
    same = ("distinct_documents", "characters", "documents", "cuts", "rows")
    assert {name: manifest[name] for name in same} == {name: truth[name] for name in same}


def test_the_help_names_every_kind():
    assert command.SOURCES.split("|") == sources.forms()


@pytest.mark.parametrize("packed", PACKERS)
def test_packed_lines_make_the_same_rows(packed, tmp_path, as_lines):
    (tmp_path / "in").mkdir()
    lines = "".join(json.dumps({"content": text}) + "\n" for text in WRITTEN).encode()
    (tmp_path / f"in/a.JSONL.{packed}").write_bytes(PACKERS[packed](lines))
    manifest = prepare("jsonl", tmp_path / "in", tmp_path / "out", text_key="content")
    assert_the_same(tmp_path / "out", manifest, as_lines)


def test_a_link_is_read_as_its_own_name_says(tmp_path, as_lines):
    """As in the cache of Hugging Face's hub, where names of files are links to contents without an ending."""
    (tmp_path / "blob").write_bytes(
        gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in WRITTEN).encode())
    )
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/a.jsonl.gz").symlink_to(tmp_path / "blob")
    for number, path in enumerate((tmp_path / "snapshot", tmp_path / "snapshot/a.jsonl.gz")):
        out = tmp_path / str(number)
        assert_the_same(out, prepare("jsonl", path, out), as_lines)


def test_packed_files_make_the_same_rows(tmp_path, as_lines):
    (tmp_path / "in").mkdir()
    for number, (text, packed) in enumerate(zip(WRITTEN, ["", *PACKERS] * 8, strict=True)):
        ending, content = f".{packed}" if packed else "", text.encode()
        (tmp_path / f"in/{number:02d}.txt{ending}").write_bytes(PACKERS[packed](content) if packed else content)
    assert_the_same(tmp_path / "out", prepare("textfiles", tmp_path / "in", tmp_path / "out"), as_lines)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_a_column_of_parquet_makes_the_same_rows(kind, tmp_path, as_lines):
    """In several files and groups of rows, as Hugging Face's sets are; the other columns may be anything."""
    (tmp_path / "in/data").mkdir(parents=True)
    for part in range(2):
        rows = WRITTEN[20 * part :][:20]
        table = pa.table({"id": range(20), "body": pa.array(rows).cast(kind), "tags": [[1, 2]] * 20})
        parquet.write_table(table, tmp_path / f"in/data/train-{part:05d}-of-00002.parquet", row_group_size=7)
    manifest = prepare("parquet", tmp_path / "in", tmp_path / "out", text_key="body")
    assert_the_same(tmp_path / "out", manifest, as_lines)
    assert [source["file"] for source in manifest["sources"]] == [
        f"data/train-0000{part}-of-00002.parquet" for part in range(2)
    ]


def test_records_make_the_same_rows(tmp_path, as_lines):
    (tmp_path / "in").mkdir()
    for part in range(2):
        records = [example(text=text, source="here") for text in WRITTEN[20 * part :][:20]]
        write_records(tmp_path / f"in/a.array_record-0000{part}-of-00002", records)
    manifest = prepare("array_record", tmp_path / "in", tmp_path / "out")
    assert_the_same(tmp_path / "out", manifest, as_lines)


def test_a_set_of_tfds_gives_its_documents_in_its_order(prepared_set, tmp_path, monkeypatch):
    """By folder and by name, whole and by split; its own reader is the truth."""
    home, folder = prepared_set
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(home))
    builder = tfds.builder_from_directory(folder)
    truth = {
        split: [record["sentence"].decode() for record in builder.as_data_source(split)] for split in ("test", "train")
    }
    assert sorted(truth["test"] + truth["train"]) == sorted(WRITTEN)

    for where, wanted in (
        (str(folder), truth["test"] + truth["train"]),
        (f"{folder}:train", truth["train"]),
        ("sentences", truth["test"] + truth["train"]),
        ("sentences:1.0.0:train", truth["train"]),
    ):
        out = tmp_path / re.sub(r"\W", "_", where)
        manifest, sides = prepare(f"tfds:{where}", None, out, text_key="sentence"), by_split(out)
        assert manifest["path"] == str(folder)
        assert sorted(text for side in sides.values() for text in side) == sorted(wanted)
        for side in sides.values():
            assert side == [text for text in wanted if text in side]


# --- from raw files to a training step ---------------------------------------------------------------------------

PADDED = "--packing=documents"


def as_files(folder, prepared_set):
    for number, text in enumerate(WRITTEN):
        (folder / f"{number}.txt").write_text(text)
    return "--source=textfiles", f"--path={folder}"


def as_lines_of_json(folder, prepared_set):
    (folder / "a.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"body": t}) + "\n" for t in WRITTEN).encode())
    )
    return "--source=jsonl", f"--path={folder}", "--text_key=body", PADDED


def as_parquet(folder, prepared_set):
    for part in range(2):
        table = pa.table({"id": range(20), "text": WRITTEN[20 * part :][:20]})
        parquet.write_table(table, folder / f"train-0000{part}-of-00002.parquet")
    return "--source=parquet", f"--path={folder}"


def as_set_of_tfds(folder, prepared_set):
    return f"--source=tfds:{prepared_set[1]}:train", "--text_key=sentence", PADDED


def as_records(folder, prepared_set):
    write_records(folder / "a.array_record", [example(text=text) for text in WRITTEN])
    return "--source=array_record", f"--path={folder}"


def as_set_of_hugging_face(folder, prepared_set):
    parquet.write_table(pa.table({"text": WRITTEN}), folder / "train-00000-of-00001.parquet")
    return (f"--source=hf:{folder}:train",)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(as_files, marks=pytest.mark.slow),  # a test of own text trains on them
        as_lines_of_json,
        as_parquet,
        as_set_of_tfds,
        as_records,
        pytest.param(as_set_of_hugging_face, marks=pytest.mark.needs("datasets")),
    ],
)
def test_from_raw_files_to_a_training_step_by_the_commands(layout, prepared_set, tmp_path, monkeypatch):
    """What `prepare` prints last is the line that trains; only its settings are smaller here."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(evaluator, "Evaluator", NoEvaluation)
    monkeypatch.setattr(training, "draw_curves", lambda workdir: None)
    (tmp_path / "raw").mkdir()
    raw = layout(tmp_path / "raw", prepared_set)
    made = flowlm("prepare", *raw, "--tokenizer=bpe:300", "--length=8", "--workers=1", f"--out={tmp_path / 'data'}")
    assert made.status == 0, made.err
    padded = PADDED in raw
    assert (
        len(re.findall(r"rows of 8, [0-9.]+ % of their ids pads; 100 % of documents have several\n", made.out))
        == 3 * padded
    )
    line = made.out.splitlines()[-1].replace("DIR", str(tmp_path / "run")).split()
    assert line[1] == "train"
    small = "batch_size=8 steps=1 log_every=1 mesh.data=1 model.width=16 model.blocks=1 model.heads=2 model.cond=16"
    assert flowlm(*line[1:], *(f"--config.{setting}" for setting in small.split())).status == 0
    (loss,) = [each["loss"] for each in read_metrics(tmp_path / "run") if "loss" in each]
    assert 0 < loss < 2 * np.log(300)
    told = json.loads((tmp_path / "run/config.json").read_text())["data"]
    assert told["name"] == ("own_documents" if padded else "own_text") and told["dir"] == str(tmp_path / "data")


# --- what is wrong -----------------------------------------------------------------------------------------------


def wrong(tmp_path, source, path=None, **more):
    """What is said, and that nothing was written."""
    given = dict(source=source, tokenizer="sotu_bpe_512", length=8, out=tmp_path / "out") | more
    given |= {} if path is None else {"path": path}
    said = error_of("prepare", *(f"--{name}={value}" for name, value in given.items()))
    assert not (tmp_path / "out").exists() and "\n" not in said
    return said


@pytest.mark.parametrize("packed", PACKERS)
def test_a_packed_file_that_is_cut_or_is_none_is_named(packed, tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in WRITTEN).encode()
    file, whole = tmp_path / f"a.jsonl.{packed}", PACKERS[packed](lines)
    for content in (whole[: len(whole) // 3], whole[:-3], b"not packed at all"):
        file.write_bytes(content)
        assert f"{file} is cut or damaged (" in wrong(tmp_path, "jsonl", file)
    file.write_bytes(PACKERS[packed](b"\xff\xfe"))
    assert f"{file} is not text in UTF-8" in wrong(tmp_path, "textfiles", file)


def test_what_is_wrong_with_parquet_is_named(tmp_path):
    file = tmp_path / "a.parquet"
    table = pa.table({"id": range(40), "body": WRITTEN, "raw": [text.encode("latin-1") for text in WRITTEN]})
    parquet.write_table(table, file, compression="none")
    assert f"{file}: no column 'text'; give --text_key=NAME, where columns of text are ['body']" in wrong(
        tmp_path, "parquet", file
    )
    for name, kind in (("id", "int64"), ("raw", "binary")):
        assert f"column '{name}' is {kind}, not text; give --text_key" in wrong(
            tmp_path, "parquet", file, text_key=name
        )
    parquet.write_table(table.select(["body"]), file, compression="none")
    whole = file.read_bytes()
    for content in (whole[:-9], whole[:100], b"", b"no parquet", whole[:4] + b"\xff" * 40 + whole[44:]):
        file.write_bytes(content)
        said = wrong(tmp_path, "parquet", file, text_key="body")
        assert f"{file} is cut" in said and "fetch it again" in said
    parquet.write_table(pa.table({"text": [*WRITTEN[:30], None]}), file, row_group_size=8)
    assert f"{file}, row 31 has no text in column 'text'" in wrong(tmp_path, "parquet", file)
    column = pa.Array.from_buffers(pa.string(), 2, pa.array([b"fine", b"\xff"]).buffers())
    parquet.write_table(pa.table({"text": column}), file)
    assert f"{file}, rows 1 to 2: not all are text in UTF-8" in wrong(tmp_path, "parquet", file)


def test_what_is_wrong_with_a_record_is_named(tmp_path):
    file = tmp_path / "a.array_record"
    fine = [example(text=text) for text in WRITTEN[:9]]
    for record, said in (
        (b"plain text", "is no tf.train.Example, which records of --source=array_record are"),
        (example(body="a", title="b"), "has no 'text': give --text_key=NAME, one of ['body', 'title']"),
        (example(text=b"\xff"), "'text' is not one text in UTF-8"),
        (example(text=["a", "b"]), "'text' is not one text in UTF-8"),
    ):
        write_records(file, [*fine, record])
        found = wrong(tmp_path, "array_record", file)
        assert f"{file}, record 10" in found and said in found
    write_records(file, fine * 200)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no records", whole[:2000] + b"XXXXXXXX" + whole[2008:]):
        file.write_bytes(content)
        assert f"{file} is cut or damaged, or not an array_record file" in wrong(tmp_path, "array_record", file)


def test_what_is_wrong_with_a_set_of_tfds_is_named(prepared_set, tmp_path, monkeypatch):
    home, folder = prepared_set
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(home))
    assert "there is no split 'dev' in " in (said := wrong(tmp_path, f"tfds:{folder}:dev"))
    assert "which has ['test', 'train']" in said
    assert "record 1 has no 'text': give --text_key=NAME, one of ['number', 'sentence']" in wrong(
        tmp_path, f"tfds:{folder}"
    )
    for name in ("lm1b", str(home), str(tmp_path / "nowhere")):
        said = wrong(tmp_path, f"tfds:{name}")
        assert f"--source=tfds:{name}: neither a folder with dataset_info.json nor a set in {home}" in said
    assert "give --source=tfds:SET" in wrong(tmp_path, "tfds")
    assert f"--path={tmp_path} is not for --source=tfds:lm1b" in wrong(tmp_path, "tfds:lm1b", tmp_path)
    told = (folder / "dataset_info.json").read_text()
    (tmp_path / "set").mkdir()
    (tmp_path / "set/dataset_info.json").write_text(told.replace('"array_record"', '"tfrecord"'))
    (tmp_path / "set/features.json").write_text((folder / "features.json").read_text())
    assert "is in tfrecord, not array_record: `tfds build NAME --file_format=array_record` makes one" in wrong(
        tmp_path, f"tfds:{tmp_path / 'set'}"
    )
    assert "unknown --source=jsonl:here" in wrong(tmp_path, "jsonl:here", tmp_path)
