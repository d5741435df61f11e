"""Text of one's own: no document on two sides, no token lost, an interrupted preparation taken up to the same bytes."""

import gzip
import hashlib
import json
import runpy
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from command_line import error_of, flowlm
from test_tokenizers import Spy
from toy import train_only

from flowlm import training
from flowlm.data import (
    builders,
    corpora,
    open_dataset,
    own_text,
    packing,
    round_trip,
    tokenizer_files,
    train_tokenizers,
    windows,
)
from flowlm.data import prepare as prepare_module
from flowlm.data.prepare import prepare_text
from flowlm.data.tokenizers import Tokenizer, shipped
from flowlm.runs.checkpoint import Checkpoints
from flowlm.runs.metrics import read_metrics
from flowlm.system.signals import Stopped

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
    manifest = prepare_text("textfiles", str(folder), "sotu_bpe_512", 16, str(out), "")
    assert manifest == own_text.load_manifest(out)
    truth = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.txt")}
    assert {source["file"]: source["sha256"] for source in manifest["sources"]} == truth
    assert manifest["distinct_documents"] == 60 and sum(manifest["documents"].values()) == 62
    assert manifest["duplicates"] == 2
    packing_told = {"rows": "concatenated", "between_documents": "<|start|>", "last_incomplete_row": "dropped"}
    assert manifest["packing"] == packing_told

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


def test_a_document_begins_a_row_and_pads_are_behind_it(folder, tmp_path, monkeypatch):
    """Long documents have several rows, which are cut nowhere else; the same text packed end to end is another data set."""
    (folder / "short.txt").write_text("A few words.")
    (folder / "full.txt").write_text("the " * 200)
    monkeypatch.setattr(builders, "SHARD_ROWS", 50)
    arguments = "textfiles", str(folder), "sotu_bpe_512", 32
    out = tmp_path / "out"
    manifest = prepare_text(*arguments, str(out), "", packing="documents")
    given, tokenizer = shipped("sotu_bpe_512"), Tokenizer.load(out / "tokenizer.json")
    assert (given.pad, tokenizer.pad, manifest["vocab_size"]) == (None, 512, 513)
    assert manifest == own_text.load_manifest(out)
    assert manifest["packing"] == {"rows": "documents", "longer_documents": "cut", "behind_documents": "[PAD]"}

    settings = own_text.settings(str(out))
    assert settings["name"] == "own_documents"
    dataset = open_dataset(settings["name"], settings["tokenizer"], settings["length"], settings["dir"])
    assert dataset.pad == 512 and not dataset.sentences and not dataset.unspelled
    for split, side in by_split(out).items():
        expected, longer = [], 0
        for text in side:
            ids = given.encode(text).tolist()
            pieces = [ids[begin : begin + 31] for begin in range(0, len(ids), 31)]
            expected += [[given.start, *piece, *[512] * (31 - len(piece))] for piece in pieces]
            longer += len(pieces) > 1
        rows = getattr(dataset, split)
        np.testing.assert_array_equal(rows.rows(0, len(rows)), expected)
        assert rows.text() == " ".join(map(given.decode, (np.array(row)[np.array(row) < 512] for row in expected)))
        assert manifest["rows"][split] == len(expected) and manifest["cut_documents"][split] == longer
        assert manifest["pads"][split] == sum(row.count(512) for row in expected) > 0
    assert sum(manifest["cut_documents"].values()) < sum(manifest["documents"].values()) == 64

    packed = prepare_text(*arguments, str(tmp_path / "packed"), "")
    assert "pads" not in packed and own_text.content(tmp_path / "packed") != own_text.content(out)
    with pytest.raises(ValueError, match=r"out was prepared from something else \(packing differ\)"):
        prepare_text(*arguments, str(out), "")


def test_lines_and_files_split_alike(folder, tmp_path):
    """The same documents, in another order and another form: each is on the same side."""
    lines = [json.dumps({"text": p.read_text(), "n": 1}) for p in sorted(folder.rglob("*.txt"), reverse=True)]
    (tmp_path / "one.jsonl").write_text("\n".join(lines) + "\n")
    sides = []
    for kind, path in (("textfiles", folder), ("jsonl", tmp_path / "one.jsonl")):
        prepare_text(kind, str(path), "sotu_bpe_512", 8, str(tmp_path / kind), "")
        sides.append({split: sorted(side) for split, side in by_split(tmp_path / kind).items()})
    assert sides[0] == sides[1]


def test_copies_that_differ_in_no_word_are_on_one_side(tmp_path):
    """A byte-order mark, other line breaks, blanks at the ends, accents spelled otherwise: as files and as lines."""
    written = [f"\u00c9tude {text}\nline two" for text in texts(40)]

    def forms(text):
        yield text.encode()
        yield b"\xef\xbb\xbf" + text.encode()
        yield text.replace("\n", "\r\n").encode()
        yield text.replace("\n", "\r").encode()
        yield (text + "\n").encode()
        yield unicodedata.normalize("NFD", text).encode()

    (tmp_path / "files").mkdir()
    lines = []
    for i, text in enumerate(written):
        for j, form in enumerate(forms(text)):
            (tmp_path / f"files/{i:02d}-{j}.txt").write_bytes(form)
            lines.append(json.dumps({"text": form.decode()}))
    (tmp_path / "lines.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    for kind, path in (("textfiles", tmp_path / "files"), ("jsonl", tmp_path / "lines.jsonl")):
        manifest = prepare_text(kind, str(path), "sotu_bpe_512", 8, str(tmp_path / kind), "")
        assert manifest["distinct_documents"] == 40 and sum(manifest["documents"].values()) == 240
        numbers = [{text.split()[2] for text in side} for side in by_split(tmp_path / kind).values()]
        assert [len(side) for side in numbers] == [36, 2, 2] and len(set().union(*numbers)) == 40
    assert not any("\ufeff" in text for side in by_split(tmp_path / "textfiles").values() for text in side)


def test_every_file_is_taken_or_counted_and_named(tmp_path, monkeypatch):
    """Names in capitals, folders behind links (also those that lead back), packed files; the rest is said."""
    inside, outside = tmp_path / "texts", tmp_path / "elsewhere"
    inside.mkdir()
    outside.mkdir()
    written = texts(12)
    for i, text in enumerate(written[:3]):
        (inside / f"{i}.txt").write_text(text)
    (inside / "BIG.TXT").write_text(written[3])
    (inside / "packed.txt.gz").write_bytes(gzip.compress(written[4].encode()))
    for i, text in enumerate(written[5:]):
        (outside / f"{i}.txt").write_text(text)
    (inside / "link").symlink_to(outside)
    (inside / "again").symlink_to(outside)
    (outside / "back").symlink_to(inside)
    (inside / "gone").symlink_to(tmp_path / "nowhere")
    (inside / "notes.md").write_text("not a document")
    monkeypatch.chdir(ROOT)
    line = ["prepare", "--source=textfiles", f"--path={inside}", "--tokenizer=sotu_bpe_512", "--length=8"]
    printed = flowlm(*line, f"--out={tmp_path / 'out'}").out
    assert sorted(text for side in by_split(tmp_path / "out").values() for text in side) == sorted(written)
    assert "left out: 2 other files, such as gone, notes.md" in printed
    assert own_text.load_manifest(tmp_path / "out")["left_out"]["files"] == 2


def test_lines_under_another_key_packed_and_blank(tmp_path):
    written = texts(12)
    lines = [json.dumps({"id": i, "content": text}) for i, text in enumerate(written)]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.jsonl").write_text("\n\n".join(lines[:6]) + "\n  \n")
    (tmp_path / "texts/b.JSONL.gz").write_bytes(gzip.compress("\r\n".join(lines[6:]).encode()))
    arguments = "jsonl", str(tmp_path / "texts"), "sotu_bpe_512", 8, str(tmp_path / "out"), ""
    manifest = prepare_text(*arguments, "content")
    assert sorted(text for side in by_split(tmp_path / "out").values() for text in side) == sorted(written)
    assert prepare_text(*arguments, "content") == manifest and manifest["left_out"]["files"] == 0
    with pytest.raises(ValueError, match=r'a.jsonl, line 1 .* under "text": its keys are \[.content., .id.\]'):
        prepare_text(*arguments)


def test_what_a_tokenizer_cannot_spell_is_reported(tmp_path, caplog):
    """Characters that a BPE drops, and words that become [UNK]: in the log and, later too, in the manifest."""
    (tmp_path / "texts").mkdir()
    for i in range(12):
        (tmp_path / f"texts/{i}.txt").write_text(f"ab{'ba' * i} \u00e9")
    vocabulary = {"a": 0, "b": 1, " ": 2}
    dropping = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    unknown = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary | {"[UNK]": 3}, [], unk_token="[UNK]"))
    lines = {
        "dropping": "own_text: 12 characters were dropped, beside 180 tokens, because the tokenizer cannot spell all of the text",
        "unknown": "own_text: 12 of 192 tokens are [UNK], because the tokenizer cannot spell all of the text, such as '\u00e9'",
    }
    for name, model in (("dropping", dropping), ("unknown", unknown)):
        model.add_special_tokens(["<|start|>"])
        model.save(str(tmp_path / f"{name}.json"))
        arguments = "textfiles", str(tmp_path / "texts"), str(tmp_path / f"{name}.json"), 3, str(tmp_path / name), ""
        caplog.clear()
        manifest = prepare_text(*arguments, allow_lossy=True)
        assert lines[name] in caplog.text
        assert manifest["unspelled"]["such_as"] == ["\u00e9"]
        assert manifest["unspelled"]["count"] == {split: manifest["documents"][split] for split in corpora.SPLITS}
        assert prepare_text(*arguments) == manifest
    whole = prepare_text(
        "textfiles", str(tmp_path / "texts"), "chars", 3, str(tmp_path / "chars"), "", allow_lossy=True
    )
    assert whole["unspelled"] == {}


def test_one_long_document_is_not_tokenised_at_once(tmp_path, monkeypatch):
    """What the library works on takes a hundred bytes a character: of 300,000 it is never handed more than 5 %."""
    monkeypatch.setattr(windows, "WINDOW", 2000)
    monkeypatch.setattr(windows, "CONTEXT", 200)
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 4000)
    monkeypatch.setattr(round_trip, "_AT_ONCE", 4000)
    long = " ".join(texts(2000))
    written = [*texts(9, seed=1), long]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in written))
    genuine, spies = tokenizer_files.noticing, []

    def noticing(file):
        model, unknown = genuine(file)
        spies.append(Spy(model))
        return spies[-1], unknown

    monkeypatch.setattr(tokenizer_files, "noticing", noticing)
    prepare_text("jsonl", str(tmp_path / "a.jsonl"), "sotu_bpe_512", 16, str(tmp_path / "out"), "")
    assert len(long) > 300_000 and 0 < max(spy.most for spy in spies) < 15_000
    tokenizer = shipped("sotu_bpe_512")
    (side,) = [split for split, side in by_split(tmp_path / "out").items() if long in side]
    rows = getattr(open_dataset("own_text", str(tmp_path / "out/tokenizer.json"), 16, tmp_path / "out"), side)
    packed = rows.rows(0, len(rows))[:, 1:].reshape(-1)
    ids = tokenizer._model.encode(long, add_special_tokens=False).ids
    where = packed.tobytes().find(np.asarray(ids[:1000], np.int32).tobytes()) // 4
    np.testing.assert_array_equal(packed[where : where + len(ids)], ids[: len(packed) - where])
    assert len(packed) - where > len(ids) - 16


def test_a_folder_of_an_older_version_is_left_as_it_is(folder, tmp_path):
    """Its manifest says less and its sides were chosen by the bytes of the text."""
    arguments = "textfiles", str(folder), "sotu_bpe_512", 16, str(tmp_path / "out"), ""
    manifest = prepare_text(*arguments)
    old = {name: manifest[name] for name in manifest if name not in ("text_key", "left_out", "unspelled")}
    old["cuts"] = [cut - 1 for cut in old["cuts"]]
    (tmp_path / "out/manifest.json").write_text(json.dumps(old))
    before = shards(tmp_path / "out")
    again = prepare_text(*arguments)
    assert again | old == again and shards(tmp_path / "out") == before


# --- resume ------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from flowlm.data import packing
from flowlm.data.prepare import prepare_text
packing._BATCH_CHARACTERS = 1000
genuine, calls = packing.Tokenizer.encode_counted, []
def dies(*arguments):
    calls.append(0)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return genuine(*arguments)
packing.Tokenizer.encode_counted = dies
prepare_text("textfiles", sys.argv[1], "sotu_bpe_512", 16, sys.argv[2], "")
"""


def test_killed_and_taken_up(folder, tmp_path, monkeypatch):
    """The same bytes as without the kill, and what was tokenised before it is not tokenised again."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(tmp_path / "killed")], timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert own_text.load_manifest(tmp_path / "killed")["rows"] is None
    message = error_of("train", f"--config=experiments/my_text.py:{tmp_path / 'killed'}", "--workdir=x")
    assert "was cut: run the same `flowlm prepare` again" in message

    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 1000)
    genuine, calls = Tokenizer.encode_counted, []
    monkeypatch.setattr(Tokenizer, "encode_counted", lambda *arguments: calls.append(0) or genuine(*arguments))
    manifest = prepare_text("textfiles", str(folder), "sotu_bpe_512", 16, str(tmp_path / "whole"), "")
    whole = len(calls)
    assert whole > 8
    assert prepare_text("textfiles", str(folder), "sotu_bpe_512", 16, str(tmp_path / "killed"), "") == manifest
    assert len(calls) == whole + whole - 7
    assert shards(tmp_path / "killed") == shards(tmp_path / "whole")
    assert not list((tmp_path / "killed/tokens").iterdir())
    # What is whole is left as it is.
    assert prepare_text("textfiles", str(folder), "sotu_bpe_512", 16, str(tmp_path / "whole"), "") == manifest
    assert len(calls) == whole + whole - 7


def tree(out):
    """Every file of a folder; of what tfds writes of itself, without the place where it was made."""
    files = {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}
    return {name: content.replace(str(out).encode(), b"OUT") for name, content in files.items()}


def test_told_to_stop_it_leaves_nothing_half_made_and_goes_on_to_the_same_bytes(folder, tmp_path, monkeypatch):
    """While the tokenizer is made, between two batches of text, in a shard, and between the rows and their number."""
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(builders, "SHARD_ROWS", 50)
    encoded, encode = [], Tokenizer.encode_counted
    monkeypatch.setattr(Tokenizer, "encode_counted", lambda *given: encoded.append(0) or encode(*given))
    arguments = "textfiles", str(folder), "bpe:300", 16
    whole = prepare_text(*arguments, str(tmp_path / "whole"), "")
    once = len(encoded)  # the first time to measure what is lost, then a batch each
    assert once > 5
    places = {  # what stops, at which call
        "tokenizer": (train_tokenizers, "byte_level_bpe", 1),
        "tokens": (packing, "_encode", 3),
        "shard": (packing, "framed", 2),
        "end": (prepare_module, "_write", 2),
    }
    for place, (module, name, number) in places.items():
        out, calls, genuine = tmp_path / place, [], getattr(module, name)

        def stops(*given, calls=calls, genuine=genuine, number=number):
            calls.append(0)
            if len(calls) == number:
                raise Stopped
            return genuine(*given)

        encoded.clear()
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(module, name, stops)
            patch.setitem(train_tokenizers.RECIPES, "bpe", (train_tokenizers.byte_level_bpe, 257))
            prepare_text(*arguments, str(out), "")
        assert not list(out.rglob("*incomplete*")) and not list(out.rglob("*.tmp")), place
        assert (place == "tokenizer" and not out.exists()) or own_text.load_manifest(out)["rows"] is None
        assert prepare_text(*arguments, str(out), "") == whole
        assert tree(out) == tree(tmp_path / "whole") and len(encoded) == once, place  # nothing twice


def test_a_stream_of_other_texts_is_not_taken_up(tmp_path, monkeypatch):
    """Other texts, the same on other sides, or a file shorter than its record: all is written anew."""
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 500)
    tokenizer = shipped("sotu_bpe_512")

    def write(texts, folder, sides=("train", "test")):
        (tmp_path / folder).mkdir(exist_ok=True)
        documents = [(sides[i % len(sides)], text) for i, text in enumerate(texts)]
        return packing.write_streams(lambda: iter(documents), tokenizer, True, tmp_path / folder, 15)[0]

    def same(rows, truth):
        for split in corpora.SPLITS:
            np.testing.assert_array_equal(rows[split], truth[split])
        return len(rows["train"]) > 10

    before, after = texts(20), [*texts(10), *texts(20, seed=1)]
    write(before, "x")
    rows = write(after, "x")
    assert same(rows, write(after, "fresh"))
    for split in ("train", "test"):
        path = tmp_path / f"x/{split}.tokens"
        path.write_bytes(path.read_bytes()[:100])
        assert same(write(after, "x"), rows)
    turned = ("test", "train")
    assert same(write(after, "x", turned), write(after, "turned", turned))
    # A stream that only grew goes on.
    encoded = []
    genuine = Tokenizer.encode_counted
    monkeypatch.setattr(Tokenizer, "encode_counted", lambda self, batch: encoded.extend(batch) or genuine(self, batch))
    write([*after, "0123456789"], "x", turned)
    assert encoded == ["0123456789"]


def test_pads_and_documents_of_several_rows_are_counted_once_when_it_is_taken_up(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 500)
    tokenizer = shipped("sotu_bpe_512").with_pad()
    documents = [("train", text[: 40 * (1 + number % 9)]) for number, text in enumerate(texts(20))]

    def write(folder, documents):
        (tmp_path / folder).mkdir(exist_ok=True)
        return packing.write_streams(documents, tokenizer, True, tmp_path / folder, 31, padded=True)

    def cut():
        yield from documents[:12]
        raise OSError("cut")

    with pytest.raises(OSError, match="cut"):
        write("cut", cut)
    found, truth = write("cut", lambda: iter(documents)), write("whole", lambda: iter(documents))
    np.testing.assert_array_equal(found.rows["train"], truth.rows["train"])
    assert found.record == truth.record
    lengths = [len(tokenizer.encode(text)) for _, text in documents]
    assert found.record.cut["train"] == sum(length > 31 for length in lengths) and min(lengths) < 31 < max(lengths)
    assert found.record.pads["train"] == sum(-length % 31 for length in lengths)


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


def test_the_command_and_the_experiment(folder, tmp_path, monkeypatch):
    """What the command prints trains on a tokenizer made of the text, and the flow map on the flow that it made."""
    monkeypatch.chdir(ROOT)
    line = ["prepare", "--source=textfiles", f"--path={folder}", "--tokenizer=bpe:300", "--length=8"]
    printed = flowlm(*line, f"--out={tmp_path / 'data'}").out
    assert "documents: 62, of which 2 are copies of others\n" in printed
    assert "tokenizer: 300 ids; 0 % of the characters change or are dropped" in printed
    assert f"flowlm train --config=experiments/my_text.py:{tmp_path / 'data'} --workdir=DIR" in printed
    get_config = runpy.run_path("experiments/my_text.py")["get_config"]
    small = {"steps": 2, "batch_size": 8, "log_every": 1, "mesh.data": 1, "optimizer.schedule": "constant"}
    small |= {"model.width": 16, "model.blocks": 1, "model.heads": 2}
    config, student = get_config(str(tmp_path / "data")), get_config(f"{tmp_path / 'data'}:flow_map")
    config.update_from_flattened_dict(small)
    train_only(config, tmp_path / "run")
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert Checkpoints(tmp_path / "run/checkpoints", read_only=True).steps[-1] == 2
    student.update_from_flattened_dict(small | {"teacher": str(tmp_path / "run")})
    _, _, dataset, _, teacher, _ = training._prepare(student, tmp_path / "student")  # all but its steps
    assert student.model.vocab_size == dataset.tokenizer.vocab_size == 300 and teacher is not None


# --- what is wrong -----------------------------------------------------------------------------------------------


def bad(tmp_path, kind="jsonl", **changes):
    given = (
        dict(source=kind, path=tmp_path / "texts", tokenizer="sotu_bpe_512", length=8, out=tmp_path / "out") | changes
    )
    return error_of("prepare", *(f"--{name}={value}" for name, value in given.items()))


def test_what_is_wrong_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "texts").mkdir()
    line = "prepare", "--tokenizer=chars", "--length=8", f"--out={tmp_path / 'out'}"
    assert "prepare needs --path=PATH with --source=jsonl" in error_of(*line, "--source=jsonl")
    assert "unknown --source=pdf: choose one of textfiles, jsonl, parquet" in bad(tmp_path, "pdf")
    assert f"no *.jsonl under {tmp_path / 'texts'}" in bad(tmp_path)
    assert "unknown tokenizer 'words'" in bad(tmp_path, tokenizer="words")
    for size in ("256", "4k", "", "-1"):
        assert f"--tokenizer=bpe:{size}: bpe takes a number of ids from 257 on" in bad(
            tmp_path, tokenizer=f"bpe:{size}"
        )
    assert "--tokenizer=words:2: words takes a number of ids from 3 on" in bad(tmp_path, tokenizer="words:2")
    lines = [json.dumps({"text": text}) for text in texts(10)]
    for wrong in ("{", '{"txt": "a"}', '{"text": 3}', "[1]"):
        (tmp_path / "texts/a.jsonl").write_text("\n".join([*lines[:4], wrong]))
        assert "a.jsonl, line 5 is not a JSON object with text under" in bad(tmp_path)
    assert """under "text": its keys are ['txt']""" in (
        (tmp_path / "texts/a.jsonl").write_text('{"txt": "a"}') and bad(tmp_path)
    )
    assert "--text_key=txt is for --source=jsonl, parquet, array_record, tfds, hf, not textfiles" in bad(
        tmp_path, "textfiles", text_key="txt"
    )
    (tmp_path / "texts/a.txt").write_bytes(b"\xff\xfe")
    assert "a.txt is not text in UTF-8" in bad(tmp_path, "textfiles")
    (tmp_path / "texts/a.jsonl").write_text("\n".join(lines[:1] * 9 + lines[1:2]))
    assert "has 2 distinct documents, and each split needs one" in bad(tmp_path)
    (tmp_path / "texts/a.jsonl").write_text("\n".join(lines))
    assert "shorter than one row of 4000 ids" in bad(tmp_path, length=4000)
    assert not (tmp_path / "out").exists()  # so another length can be asked for at once
    prepare_text("jsonl", str(tmp_path / "texts"), "sotu_bpe_512", 8, str(tmp_path / "out"), "")
    assert "was prepared from something else (length differ)" in bad(tmp_path, length=9)
    assert "was prepared from something else (tokenizer_sha256 differ)" in bad(tmp_path, tokenizer="bpe:300")
    with pytest.raises(ValueError, match="unknown --packing=pages: choose one of concatenated, documents"):
        prepare_text("jsonl", str(tmp_path / "texts"), "chars", 8, str(tmp_path / "new"), "", packing="pages")
    (tmp_path / "texts").rename(tmp_path / "moved")
    for setting in ("data.length=9", "data.tokenizer=chars", "data.name=own_documents"):
        more = f"--config.{setting}", f"--config.model.vocab_size={28 if 'chars' in setting else 512}"
        said = error_of(
            "train", f"--config=experiments/my_text.py:{tmp_path / 'out'}", f"--workdir={tmp_path}/x", *more
        )
        if setting == "data.name=own_documents":
            assert "has no [PAD] to fill it up: set --config.data.tokenizer=DIR/tokenizer.json" in said
        else:
            assert f"{tmp_path / 'out'} has own_text in rows of 8 by its tokenizer.json alone, and its text " in said
            assert f"{tmp_path / 'texts'} is gone: leave data.name, data.length and data.tokenizer as" in said
        assert "\n" not in said
    (tmp_path / "moved").rename(tmp_path / "texts")
    config = "--config=experiments/my_text.py"
    assert "my_text takes DATA or DATA:flow_map" in error_of("train", config, "--workdir=x")
    assert "out:map has no manifest.json" in error_of("train", f"{config}:{tmp_path / 'out'}:map", "--workdir=x")
    assert "nowhere has no manifest.json: make it with `flowlm prepare" in error_of(
        "train", f"{config}:nowhere", "--workdir=x"
    )
