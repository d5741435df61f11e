"""Text of one's own: no document on two sides, no token lost, an interrupted preparation taken up to the same bytes."""

import hashlib
import json
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl.testing import flagsaver
from test_bad_input import error_of
from toy import train_only

from flowlm import main
from flowlm.checkpoint import Checkpoints
from flowlm.data import builders, corpora, open_dataset, own_text, packing
from flowlm.data.prepare import prepare
from flowlm.metrics import read_metrics
from flowlm.tokenizers import shipped

ROOT = Path(__file__).parents[1]


def texts(num, seed=0):
    rng = np.random.default_rng(seed)
    return [f"Document {i}: " + " ".join(f"w{rng.integers(50)}" for _ in range(40)) for i in range(num)]


@pytest.fixture
def folder(tmp_path):
    """Sixty documents, a file each, two of them twice, one file empty."""
    written = texts(60)
    for i, text in enumerate([*written, written[3], written[50], "  \n"]):
        (tmp_path / f"texts/{i % 4}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"texts/{i % 4}/{i:02d}.txt").write_text(text)
    return tmp_path / "texts"


def by_split(out):
    return {split: [text for _, text in corpora.documents("own_text", split, out)] for split in corpora.SPLITS}


def shards(out):
    found = {file.name: file.read_bytes() for file in sorted(out.glob("tfds/**/*.array_record*"))}
    assert found
    return found


# --- splits and rows ---------------------------------------------------------------------------------------------


def test_prepared_from_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(builders, "SHARD_ROWS", 50)
    out = tmp_path / "out"
    manifest = prepare("textfiles", str(folder), "sotu_bpe_512", 16, str(out), "")
    assert manifest == own_text.load(out)
    truth = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.txt")}
    assert {source["file"]: source["sha256"] for source in manifest["sources"]} == truth
    assert manifest["distinct_documents"] == 60 and sum(manifest["documents"].values()) == 62

    sides = by_split(out)
    assert sorted(text for side in sides.values() for text in side) == sorted([*texts(60), texts(60)[3], texts(60)[50]])
    distinct = {split: set(side) for split, side in sides.items()}
    assert sum(map(len, distinct.values())) == 60  # no document on two sides
    assert {split: len(side) for split, side in distinct.items()} == {"train": 54, "validation": 3, "test": 3}

    tokenizer = shipped("sotu_bpe_512")
    dataset = open_dataset("own_text", str(out / "tokenizer.json"), 16, out)
    assert dataset.tokenizer == tokenizer
    for split in corpora.SPLITS:
        rows = getattr(dataset, split)
        assert manifest["rows"][split] == len(rows)
        stream = np.concatenate([np.append(tokenizer.encode(text), tokenizer.start) for text in sides[split]])
        packed = rows.rows(0, len(rows))
        assert (packed[:, 0] == tokenizer.start).all()
        np.testing.assert_array_equal(packed[:, 1:].reshape(-1), stream[: 15 * len(rows)])
        assert len(stream) - 15 * len(rows) < 15
        assert " ".join(sides[split]).startswith(rows.text())
    assert len(list(out.glob("tfds/**/*train.array_record*"))) == -(-len(dataset.train) // 50)
    assert builders.RowsConfig.of("x", tokenizer, 16, "").name and not (out / "tokens" / "own_text").exists()


def test_lines_and_files_split_alike(folder, tmp_path):
    """The same documents, in another order and another form: each is on the same side."""
    lines = [json.dumps({"text": p.read_text(), "n": 1}) for p in sorted(folder.rglob("*.txt"), reverse=True)]
    (tmp_path / "one.jsonl").write_text("\n".join(lines) + "\n")
    sides = []
    for kind, path in (("textfiles", folder), ("jsonl", tmp_path / "one.jsonl")):
        prepare(kind, str(path), "sotu_bpe_512", 8, str(tmp_path / kind), "")
        sides.append({split: sorted(side) for split, side in by_split(tmp_path / kind).items()})
    assert sides[0] == sides[1]


# --- resume ------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from flowlm.data import packing
from flowlm.data.prepare import prepare
packing._BATCH_CHARACTERS = 1000
genuine, calls = packing.token_stream, []
def dies(*arguments):
    calls.append(0)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return genuine(*arguments)
packing.token_stream = dies
prepare("textfiles", sys.argv[1], "sotu_bpe_512", 16, sys.argv[2], "")
"""


def test_killed_and_taken_up(folder, tmp_path, monkeypatch):
    """The same bytes as without the kill, and what was tokenised before it is not tokenised again."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(tmp_path / "killed")], timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert own_text.load(tmp_path / "killed")["rows"] is None
    message = error_of("train", f"--config=experiments/own_text.py:{tmp_path / 'killed'}", "--workdir=x")
    assert "was cut: run the same `flowlm prepare` again" in message

    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 1000)
    genuine, calls = packing.token_stream, []
    monkeypatch.setattr(packing, "token_stream", lambda *arguments: calls.append(0) or genuine(*arguments))
    manifest = prepare("textfiles", str(folder), "sotu_bpe_512", 16, str(tmp_path / "whole"), "")
    whole = len(calls)
    assert whole > 8
    assert prepare("textfiles", str(folder), "sotu_bpe_512", 16, str(tmp_path / "killed"), "") == manifest
    assert len(calls) == whole + whole - 7
    assert shards(tmp_path / "killed") == shards(tmp_path / "whole")
    assert not list((tmp_path / "killed/tokens").iterdir())
    # What is whole is left as it is.
    assert prepare("textfiles", str(folder), "sotu_bpe_512", 16, str(tmp_path / "whole"), "") == manifest
    assert len(calls) == whole + whole - 7


def test_a_stream_of_other_texts_is_not_taken_up(tmp_path, monkeypatch):
    """Other texts, or a file shorter than its record: all is written anew."""
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 500)
    tokenizer, path = shipped("sotu_bpe_512"), tmp_path / "x.tokens"

    def write(texts, path):
        return packing.write_stream(lambda: iter(texts), tokenizer, True, path, 15)

    before, after = texts(20), [*texts(10), *texts(20, seed=1)]
    write(before, path)
    rows = write(after, path)
    np.testing.assert_array_equal(rows, write(after, tmp_path / "fresh.tokens"))
    path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(write(after, path), rows)
    # A stream that only grew goes on.
    monkeypatch.setattr(
        tokenizer.__class__, "encode_batch", lambda self, batch: [np.arange(len(batch[0]), dtype=np.int32)]
    )
    assert len(write([*after, "0123456789" * 3], path)) == (len(path.read_bytes()) // 4) // 15


def test_one_process_in_a_workspace(tmp_path):
    """A second one works beside it; what is left by one that failed is there for the next; success leaves nothing."""
    place = tmp_path / "tokens/x"
    with packing.workspace(place) as first, packing.workspace(place) as second:
        assert first == place != second and second.is_dir()
    assert not list((tmp_path / "tokens").iterdir())
    with pytest.raises(KeyboardInterrupt), packing.workspace(place) as first:
        (first / "kept").touch()
        raise KeyboardInterrupt
    with packing.workspace(place) as again:
        assert again == place and (again / "kept").exists()
    assert not place.exists()


# --- training ----------------------------------------------------------------------------------------------------


def test_the_command_and_the_experiment(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    argv = ["flowlm", "prepare", "--source=textfiles", f"--path={folder}", "--tokenizer=sotu_bpe_512", "--length=16"]
    with flagsaver.flagsaver():
        main._main(main._parse([*argv, f"--out={tmp_path / 'data'}"]))
    printed = capsys.readouterr().out
    assert f"flowlm train --config=experiments/own_text.py:{tmp_path / 'data'} --workdir=DIR" in printed
    get_config = runpy.run_path("experiments/own_text.py")["get_config"]
    for family in ("", ":flow_map"):
        config = get_config(f"{tmp_path / 'data'}{family}")
        config.update_from_flattened_dict(
            {
                "steps": 2,
                "batch_size": 8,
                "log_every": 1,
                "optimizer.schedule": "constant",
                "model.width": 16,
                "model.blocks": 1,
                "model.heads": 2,
                "mesh.data": 1,
                "teacher": str(tmp_path / "run") if family else None,
            }
        )
        train_only(config, tmp_path / f"run{family}")
        losses = [line["loss"] for line in read_metrics(tmp_path / f"run{family}") if "loss" in line]
        assert len(losses) == 2 and np.isfinite(losses).all()
    assert Checkpoints(tmp_path / "run/checkpoints", read_only=True).steps[-1] == 2


# --- what is wrong -----------------------------------------------------------------------------------------------


def bad(tmp_path, kind="jsonl", **changes):
    given = (
        dict(source=kind, path=tmp_path / "texts", tokenizer="sotu_bpe_512", length=8, out=tmp_path / "out") | changes
    )
    return error_of("prepare", *(f"--{name}={value}" for name, value in given.items()))


def test_what_is_wrong_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "texts").mkdir()
    assert "flowlm prepare needs --source" in error_of("prepare", "--source=jsonl")
    assert "unknown --source 'pdf': choose one of ['textfiles', 'jsonl']" in bad(tmp_path, "pdf")
    assert f"no *.jsonl under {tmp_path / 'texts'}" in bad(tmp_path)
    assert "unknown tokenizer 'words'" in bad(tmp_path, tokenizer="words")
    lines = [json.dumps({"text": text}) for text in texts(10)]
    for wrong in ("{", '{"txt": "a"}', '{"text": 3}', "[1]"):
        (tmp_path / "texts/a.jsonl").write_text("\n".join([*lines[:4], wrong]))
        assert "a.jsonl, line 5 is not a JSON object with text under" in bad(tmp_path)
    (tmp_path / "texts/a.txt").write_bytes(b"\xff\xfe")
    assert "a.txt, line 1 is not text in UTF-8" in bad(tmp_path, "textfiles")
    (tmp_path / "texts/a.jsonl").write_text("\n".join(lines[:1] * 9 + lines[1:2]))
    assert "has 2 distinct documents, and each split needs one" in bad(tmp_path)
    (tmp_path / "texts/a.jsonl").write_text("\n".join(lines))
    assert "shorter than one row of 4000 ids" in bad(tmp_path, length=4000)
    assert not list(tmp_path.glob("out/tfds/**/*.array_record*"))
    assert "was prepared from something else (length differ)" in bad(tmp_path)
    config = "--config=experiments/own_text.py"
    assert "own_text takes DATA or DATA:flow_map" in error_of("train", config, "--workdir=x")
    assert "out:map has no manifest.json" in error_of("train", f"{config}:{tmp_path / 'out'}:map", "--workdir=x")
    assert "text is prepared on a disk; prepare it there and copy the folder" in bad(tmp_path, out="gs://b/out")
    assert "--path=gs://b/texts: text is prepared on a disk" in bad(tmp_path, path="gs://b/texts")
    assert "nowhere has no manifest.json: make it with `flowlm prepare" in error_of(
        "train", f"{config}:nowhere", "--workdir=x"
    )
