"""Run directories and data in a bucket: the same numbers as on the local disk, and nothing half written is taken for whole."""

import csv
import dataclasses
import gzip
import hashlib
import importlib.util
import itertools
import json
import runpy
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from command_line import error_of, flowlm
from pyarrow import parquet
from test_hosts import together
from test_own_text import shards, texts
from test_sources import example, write_records
from toy import run_config, train_only

from flowlm.data import builders, corpora, fitted, open_dataset, own_text, packing, ranges
from flowlm.data.prepare import prepare_text
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.evaluation import results
from flowlm.runs.checkpoint import Checkpoints
from flowlm.runs.metrics import MetricWriter, read_metrics
from flowlm.runs.trained import load_trained
from flowlm.studies import report
from flowlm.system import hosts, storage
from flowlm.training import train

# Not imported: gcsfs reads its environment when it is, and the emulator has to be there first.
for _package in ("gcsfs", "gcp_storage_emulator"):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"{_package} is not installed: pip install -e .[dev]", allow_module_level=True)

BUCKET = "gs://bucket"


@pytest.fixture(scope="module", autouse=True)
def bucket(tmp_path_factory):
    from bucket_emulator import running

    with running(tmp_path_factory.mktemp("mirror")):
        yield


def names_in(directory):
    return sorted(path.name for path in storage.path(directory).iterdir())


# --- runs --------------------------------------------------------------------------------------------------------


def test_a_run_in_a_bucket_is_the_run_on_disk(tmp_path, data_dir, capsys):
    """Taken up in the middle, evaluated, and read back by what needs only its directory."""
    there = f"{BUCKET}/runs/flow"
    train_only(run_config(data_dir), tmp_path)
    train_only(run_config(data_dir, steps=3), there)
    assert names_in(f"{there}/checkpoints") == ["3"]
    train(run_config(data_dir), there)

    layout = Layout(make_mesh(data=1))
    ours, theirs = load_trained(there, layout), load_trained(tmp_path, layout)
    assert ours.step == theirs.step == 6
    assert jax.tree.structure(ours.params) == jax.tree.structure(theirs.params)
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params)):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    losses = [[(m["step"], m["loss"]) for m in read_metrics(workdir)] for workdir in (there, tmp_path)]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [1, 2, 3, 4, 5, 6]

    found = json.loads((storage.path(there) / "evaluation.json").read_text())
    assert found["step"] == 6 and found["metrics"]["samples/held_out/grammatical"] == 1.0
    for picture in ("curves.png", "evaluation.png"):
        assert (storage.path(there) / picture).read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    results.compare([there])
    assert "flow euler@1\n" in capsys.readouterr().out
    report.write_report([f"{BUCKET}/runs"], f"{BUCKET}/report")
    assert names_in(f"{BUCKET}/report") == ["index.html", "runs.csv", "runs.md"]
    rows = list(csv.DictReader((storage.path(BUCKET) / "report/runs.csv").read_text().splitlines()))
    assert {"euler", "held_out"} <= {row["sampler"] for row in rows} and rows[0]["run"] == "flow"

    with pytest.raises(ValueError, match=f"workdir {there} holds a run of another experiment .*seed = 0 there, 1 here"):
        train_only(run_config(data_dir, seed=1), there)
    with pytest.raises(FileNotFoundError, match=f"{BUCKET}/runs is not a run directory"):
        load_trained(f"{BUCKET}/runs", layout)


STATE = {"a": jnp.arange(12.0).reshape(3, 4)}
ABSTRACT = jax.eval_shape(lambda: STATE)


def saved(directory, steps):
    checkpoints = Checkpoints(directory, keep_latest=2)
    for step in steps:
        checkpoints.save(step, {"a": STATE["a"] + step})
    checkpoints.close()
    return storage.path(directory)


def test_an_unfinished_checkpoint_is_not_taken():
    """A save that was cut short has its arrays and no commit_success.txt; the step is saved again."""
    directory = saved(f"{BUCKET}/unfinished", (1, 2, 3))
    assert names_in(directory) == ["2", "3"]
    (directory / "3/commit_success.txt").unlink()
    checkpoints = Checkpoints(directory, keep_latest=2)
    assert checkpoints.steps == [2]
    np.testing.assert_array_equal(checkpoints.restore(ABSTRACT)["a"], STATE["a"] + 2)
    checkpoints.save(3, STATE)
    checkpoints.close()
    assert Checkpoints(directory, read_only=True).steps == [2, 3]


def test_a_damaged_checkpoint_is_set_aside():
    directory = saved(f"{BUCKET}/damaged/checkpoints", (1, 2))
    for arrays in (directory / "2/state/d").iterdir():
        arrays.unlink()
    checkpoints = Checkpoints(directory, keep_latest=2)
    np.testing.assert_array_equal(checkpoints.restore(ABSTRACT)["a"], STATE["a"] + 1)
    checkpoints.close()
    assert names_in(directory) == ["1"]
    assert "_METADATA" in names_in(f"{BUCKET}/damaged/unreadable_checkpoints/2/state")


def test_every_metric_is_there_at_once():
    """A process that is killed has written all of its lines; one that goes on from step 2 keeps two."""
    MetricWriter(f"{BUCKET}/metrics").close()
    killed = MetricWriter(f"{BUCKET}/metrics")
    for step in (1, 2, 3):
        killed.write(step, {"loss": 1 / step})
    assert [m["step"] for m in read_metrics(f"{BUCKET}/metrics")] == [1, 2, 3]
    MetricWriter(f"{BUCKET}/metrics", start=2).write(3, {"loss": 0.5})
    assert [m["loss"] for m in read_metrics(f"{BUCKET}/metrics")] == [1.0, 0.5, 0.5]


def test_a_long_run_does_not_write_its_metrics_again_with_every_line(monkeypatch):
    """Of 1,000 equal lines a part of 100 is written 1 + 2 + ... + 100 lines long: 50,500 lines in all, not 500,500."""
    written = []
    write = storage.write_text
    monkeypatch.setattr(storage, "write_text", lambda place, text: written.append(len(text)) or write(place, text))
    there = f"{BUCKET}/long"
    writer = MetricWriter(there)
    for step in range(1001, 2001):
        writer.write(step, {"loss": 0.25})
    writer.close()
    line = len('{"step": 1001, "loss": 0.25}\n')
    assert sum(written) == 10 * (100 * 101 // 2) * line
    assert [m["step"] for m in read_metrics(there)] == [*range(1001, 2001)]
    assert len(names_in(f"{there}/metrics")) == 10
    # Taken up at a step inside the last part but one: what lies beyond it goes, and nothing else is touched.
    written.clear()
    writer = MetricWriter(there, start=1850)
    assert sum(written) == 50 * line
    writer.write(1851, {"loss": 0.5})
    assert [m["step"] for m in read_metrics(there)] == [*range(1001, 1852)]
    assert [m["loss"] for m in read_metrics(there)][-2:] == [0.25, 0.5]
    # Begun anew, it has no line of before.
    MetricWriter(there).close()
    assert read_metrics(there) == []


def test_metrics_go_with_a_run_between_a_bucket_and_a_disk(tmp_path):
    there, here = f"{BUCKET}/moved", tmp_path / "moved"

    def steps(place):
        return [m["step"] for m in read_metrics(place)]

    writer = MetricWriter(there)
    for step in range(1, 131):
        writer.write(step, {"loss": 1.0})
    storage.copy(storage.path(there), storage.path(here))
    assert steps(here) == [*range(1, 131)]
    writer = MetricWriter(here, start=120)
    writer.write(121, {"loss": 1.0})
    writer.close()
    assert steps(here) == [*range(1, 122)] and names_in(here) == ["metrics.jsonl"]
    storage.copy(storage.path(here), storage.path(f"{BUCKET}/back"))
    MetricWriter(f"{BUCKET}/back", start=110).write(111, {"loss": 1.0})
    assert steps(f"{BUCKET}/back") == [*range(1, 112)]


# --- data --------------------------------------------------------------------------------------------------------


def test_one_host_prepares_for_all(data_dir, tmp_path, monkeypatch):
    """A set is made on one host's disk and copied to the bucket; other hosts fetch it, if it is whole."""
    arguments = ("grammar98", "grammar98", 19)
    rows = open_dataset(*arguments, data_dir).validation.rows(0, 50)
    there = f"{BUCKET}/data"
    np.testing.assert_array_equal(open_dataset(*arguments, there).validation.rows(0, 50), rows)

    monkeypatch.setattr(storage, "MIRROR", str(tmp_path / "another host"))
    with monkeypatch.context() as patch:
        patch.setattr("flowlm.data.dataset._prepare", None)
        np.testing.assert_array_equal(open_dataset(*arguments, there).validation.rows(0, 50), rows)

    (whole,) = storage.path(there).glob("tfds/grammar_rows/*/*/dataset_info.json")
    whole.unlink()  # as in a copy that was cut short
    monkeypatch.setattr(storage, "MIRROR", str(tmp_path / "a third"))
    np.testing.assert_array_equal(open_dataset(*arguments, there).validation.rows(0, 50), rows)
    assert whole.exists()


def test_sources_in_a_bucket(tmp_path):
    text = "the quick brown fox " * 5000
    for place in (storage.path(tmp_path), storage.path(f"{BUCKET}/texts")):
        (place / "sources").mkdir(parents=True, exist_ok=True)
        (place / "sources/text8").write_text(text)
    rows = [open_dataset("text8", "chars", 32, place).test.rows(0, 100) for place in (f"{BUCKET}/texts", tmp_path)]
    np.testing.assert_array_equal(*rows)

    def read(place):
        return "".join(t for split in corpora.SPLITS for _, t in corpora.documents("text8", split, place))

    assert read(f"{BUCKET}/texts") == read(tmp_path) == text
    with pytest.raises(FileNotFoundError, match=f"{BUCKET}/texts/sources/openwebtext is missing"):
        corpora.check_corpus("openwebtext", f"{BUCKET}/texts")


def lines(num_bytes, seed):
    rng = np.random.default_rng(seed)
    words = "".join(rng.choice(list("abcdefgh "), 4000))
    while num_bytes > 0:
        start, size = rng.integers(2000), rng.integers(500, 2000)
        num_bytes -= size
        yield words[start : start + size] + "."


SOURCES = {
    "openwebtext": {
        f"openwebtext/{i}.jsonl": lambda i=i: "".join(json.dumps({"text": t}) + "\n" for t in lines(24 << 20, i))
        for i in range(2)
    },
    "lm1b": {
        f"lm1b/{directory}.tokenized.shuffled/news.en-{i}": lambda i=i, size=size: "\n".join(lines(size << 20, i))
        for directory, i, size in (
            ("training-monolingual", 0, 24),
            ("training-monolingual", 1, 24),
            ("heldout-monolingual", 2, 8),
            ("heldout-monolingual", 3, 8),
        )
    },
    "text8": {"text8": lambda: " ".join(lines(40 << 20, 0)).replace(".", "")},
}


@pytest.mark.parametrize("corpus", SOURCES)
def test_a_corpus_in_a_bucket_is_read_once_and_in_large_parts(corpus, tmp_path, monkeypatch):
    """Every byte once, in requests of 4 MB or more; a few others look what is there, and how large a file is."""
    from bucket_emulator import TRAFFIC

    there, here, size = storage.path(f"{BUCKET}/large"), storage.path(tmp_path), 0
    for name, content in SOURCES[corpus].items():
        for place in (there, here):
            (place / "sources" / name).parent.mkdir(parents=True, exist_ok=True)
            (place / "sources" / name).write_text(text := content())
        size += len(text)

    def texts(place):
        found = {split: hashlib.sha256() for split in corpora.SPLITS}

        def documents(documents, *others):
            for split, text in documents():
                found[split].update(text.encode() + b"\n")
            raise KeyboardInterrupt  # what comes after does not read the bucket

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(packing, "write_streams", documents)
            open_dataset(corpus, "sotu_bpe_512", 32, place)
        return {split: digest.hexdigest() for split, digest in found.items()}

    TRAFFIC.reset()
    found = texts(there)
    assert TRAFFIC.read <= 1.1 * size
    assert TRAFFIC.contents <= size / (4 << 20)
    assert TRAFFIC.requests - TRAFFIC.contents <= 20
    assert found == texts(here)


def test_own_text_that_was_copied_to_a_bucket(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    for i in range(9):
        (tmp_path / f"texts/{i}.txt").write_text(f"The report of year {i} was laid before both houses. " * 20)
    prepare_text("textfiles", str(tmp_path / "texts"), "sotu_bpe_512", 16, str(tmp_path / "own"), "")
    there = storage.path(f"{BUCKET}/own")
    storage.copy(storage.path(tmp_path / "own"), there)
    shutil.rmtree(tmp_path / "texts")
    monkeypatch.setattr(storage, "MIRROR", str(tmp_path / "another host"))
    get_config = runpy.run_path(Path(__file__).parents[1] / "experiments/my_text.py")["get_config"]
    rows = []
    for place in (there, tmp_path / "own"):
        config = get_config(f"{place}:flow_map")
        assert config.objective.family == "flow_map"
        data = config.data
        rows.append(open_dataset(data.name, data.tokenizer, data.length, data.dir).train.rows(0, 20))
    np.testing.assert_array_equal(*rows)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "array_record"])
def test_text_in_a_bucket_makes_the_rows_of_the_text_on_disk(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MIRROR", str(tmp_path / "mirror"))
    (tmp_path / "texts/deep").mkdir(parents=True)
    for part, folder in enumerate(("texts", "texts/deep")):
        rows = [f"The report of year {part}{i} was laid before both houses." for i in range(20)]
        if kind == "parquet":
            parquet.write_table(pa.table({"text": rows, "id": range(20)}), tmp_path / folder / "a.parquet")
        elif kind == "jsonl":
            lines = "".join(json.dumps({"text": text}) + "\n" for text in rows)
            (tmp_path / folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        else:
            write_records(tmp_path / folder / "a.array_record", [example(text=text) for text in rows])
    (tmp_path / "texts/notes.md").write_text("not a document")
    there = f"{BUCKET}/{kind}"
    storage.copy(storage.path(tmp_path / "texts"), storage.path(there))
    made = [
        prepare_text(kind, str(place), "sotu_bpe_512", 16, str(tmp_path / name), "")
        for name, place in (("one", there), ("two", tmp_path / "texts"))
    ]
    assert [manifest["path"] for manifest in made] == [there, str(tmp_path / "texts")]
    assert made[0] | {"path": ""} == made[1] | {"path": ""} and made[0]["left_out"]["such_as"] == ["notes.md"]
    assert shards(tmp_path / "one") == shards(tmp_path / "two")


def in_folder(place, without=()):
    """{name: content} of all files below a place; of what tfds writes of itself, without where it was made."""
    place = storage.path(place)
    found = {}
    every = storage.objects_below(place) if storage.in_bucket(place) else Path(place).rglob("*")
    for file in (each for each in every if each.is_file()):
        name = str(file).partition(f"{place.name}/")[2]
        found[name] = file.read_bytes().replace(str(place).encode(), b"PLACE")
    return found


def test_text_is_prepared_straight_into_a_bucket(tmp_path, monkeypatch):
    """Every shard is sent once and kept nowhere else; what failed is gone on with, and what is finished stays."""
    from bucket_emulator import TRAFFIC

    monkeypatch.setattr(builders, "SHARD_ROWS", 50)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(60)))
    arguments = "jsonl", str(tmp_path / "a.jsonl"), "sotu_bpe_512", 16
    there, here, mirror = f"{BUCKET}/straight/data", tmp_path / "data", Path(storage.MIRROR)
    whole = prepare_text(*arguments, str(here), "")
    put, sent, most = storage.put, [], []

    def counted(file, target):
        most.append(len(list((mirror / "bucket/straight").rglob("*.array_record*"))))
        if len(sent) == 3:
            raise OSError("the network is gone")
        put(file, target)
        sent.append(target.name)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the network is gone"):
        patch.setattr(storage, "put", counted)
        prepare_text(*arguments, there, "")
    assert own_text.load_manifest(storage.path(there))["rows"] is None and max(most) == 1
    before, shards_of = len(sent), [name for name in in_folder(here) if "array_record" in name]
    monkeypatch.setattr(storage, "put", lambda file, target: put(file, target) or sent.append(target.name))
    TRAFFIC.reset()
    assert prepare_text(*arguments, there, "") == whole
    names = [name for name in sent if "array_record" in name]
    assert before == 3 and sorted(names) == sorted(Path(name).name for name in shards_of)
    assert in_folder(there) == in_folder(here)
    rest = sum(len(content) for name, content in in_folder(here).items() if Path(name).name not in names[:3])
    assert rest <= TRAFFIC.written <= 1.1 * rest + 20_000  # with the forms of the requests
    assert not [path for path in (mirror / "bucket/straight").rglob("*") if path.is_file()]
    rows = [
        open_dataset("own_text", f"{place}/tokenizer.json", 16, place).train.rows(0, 100) for place in (there, here)
    ]
    np.testing.assert_array_equal(*rows)


def test_rows_are_read_from_a_bucket_by_range(tmp_path, monkeypatch):
    """The rows of the same set on the disk, of which its own reader is the truth; each is asked for once and nothing is copied."""
    from bucket_emulator import TRAFFIC

    monkeypatch.setattr(builders, "SHARD_ROWS", 1000)
    monkeypatch.setattr(storage, "MIRROR", str(tmp_path / "mirror"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(2000)))
    arguments = "jsonl", str(tmp_path / "a.jsonl"), "sotu_bpe_512", 128
    there, here = f"{BUCKET}/ranges", str(tmp_path / "data")
    for place in (there, here):
        prepare_text(*arguments, place, "", workers=1)
    far, near = (open_dataset("own_text", f"{place}/tokenizer.json", 128, place, copy=False) for place in (there, here))
    files = {file.name: file.stat().st_size for file in Path(here).rglob("*train.array_record*")}
    assert len(files) > 1 and min(files.values()) > 2 * ranges.BLOCK and len(far.train) == len(near.train)

    TRAFFIC.reset()
    stream = far.train.shuffled(5)
    np.testing.assert_array_equal(stream(0, 64), near.train.shuffled(5)(0, 64))
    at_first = dataclasses.replace(TRAFFIC)
    assert at_first.read <= len(files) * ranges._END + 64 * 400 and at_first.requests <= len(files) + 64 + 2
    TRAFFIC.reset()
    np.testing.assert_array_equal(stream(64, 128), near.train.shuffled(5)(64, 128))
    assert TRAFFIC.requests == TRAFFIC.contents <= 64 and TRAFFIC.read < 64 * 600
    TRAFFIC.reset()
    for split in corpora.SPLITS:
        rows = getattr(near, split).rows(0, len(getattr(near, split)))
        np.testing.assert_array_equal(getattr(far, split).rows(0, len(rows)), rows)
    assert TRAFFIC.contents <= len(files) + 4 and TRAFFIC.read <= 1.2 * sum(
        file.stat().st_size for file in Path(here).rglob("*.array_record*")
    )
    assert not list((tmp_path / "mirror").rglob("*.array_record*"))


@pytest.mark.parametrize("sizes", [[3], [65_000, 40, 200_000, 0, 7]], ids=str)
def test_records_of_any_size_are_found_by_their_offsets(sizes, tmp_path):
    """Also those that lie across several blocks of a file, and bytes that cannot be packed."""
    written = [np.random.default_rng(size).bytes(size) for size in sizes]
    write_records(tmp_path / "a", written)
    content = (tmp_path / "a").read_bytes()
    footer = ranges.footer_at(content[-ranges.BLOCK :])
    begins = ranges.chunks(ranges.records(ranges.unblocked(content[footer : -ranges.BLOCK], footer)))
    found = [ranges.records(ranges.unblocked(content[a:b], a)) for a, b in itertools.pairwise([*begins, footer])]
    assert found == [[record] for record in written]
    for cut in (content[: begins[0] + 50], b"x" * 100):
        with pytest.raises(ValueError, match="no chunk of array_record"):
            ranges.records(ranges.unblocked(cut[begins[0] if len(cut) != 100 else 0 :], begins[0]))


def test_hosts_share_a_bucket(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "POLL_SECONDS", 0.01)
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts(20)):
        (tmp_path / f"texts/{number:02d}.txt").write_text(text)
    arguments = "textfiles", str(tmp_path / "texts"), "sotu_bpe_512", 16
    whole = prepare_text(*arguments, str(tmp_path / "one"), "")
    made = together(2, lambda host: prepare_text(*arguments, f"{BUCKET}/shared", "", host=host))
    assert made[0] == whole
    rows = [
        open_dataset("own_text", f"{place}/tokenizer.json", 16, place).train.rows(0, whole["rows"]["train"])
        for place in (f"{BUCKET}/shared", tmp_path / "one")
    ]
    np.testing.assert_array_equal(*rows)


def test_a_bucket_that_refuses_what_is_written_is_one_line(tmp_path):
    from bucket_emulator import TRAFFIC

    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(20)))
    line = "--source=jsonl", f"--path={tmp_path / 'a.jsonl'}", "--tokenizer=sotu_bpe_512", "--length=16"
    TRAFFIC.read_only = True
    try:
        said = error_of("prepare", *line, f"--out={BUCKET}/refused", "--workers=1")
    finally:
        TRAFFIC.read_only = False
    assert "\n" not in said and f"{BUCKET}/refused/tokenizer.json cannot be written (Forbidden: " in said
    assert flowlm("prepare", *line, f"--out={BUCKET}/refused", "--workers=1").status == 0


def test_without_the_extra(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gcsfs" else find_spec(name))
    with pytest.raises(ImportError, match=r"gs:// paths need gcsfs: .*\.\[gcp\]"):
        load_trained(f"{BUCKET}/runs/flow", None)


def test_what_is_fitted_on_a_set_in_a_bucket_is_read_by_the_next_host(monkeypatch, tmp_path):
    place, asked, made = storage.path(f"{BUCKET}/tfds/a/1.0.0"), {"rows": 3}, []

    def fit():
        made.append(1)
        return {"law": np.arange(5.0), "empty": np.zeros((0, 2), np.int64)}

    for host in ("one", "two", "two"):
        monkeypatch.setattr(storage, "MIRROR", str(tmp_path / host))
        found = fitted.fitted(place, "marginals", asked, fit)
        np.testing.assert_array_equal(found["law"], np.arange(5.0))
        assert found["empty"].shape == (0, 2)
    assert made == [1] and names_in(place / "fitted/marginals") == ["empty.npy", "law.npy", "manifest.json"]
