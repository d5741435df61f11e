"""Work in several processes: in order, in bounded memory, the same bytes for any number of them, and nothing left behind."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from test_own_text import texts, tree

from flowlm.data import builders, open_dataset, own_text, packing
from flowlm.data.prepare import prepare_text
from flowlm.data.tokenizers import Tokenizer
from flowlm.system import parallel


def test_results_come_in_the_order_of_the_items_and_few_items_wait():
    taken = []

    def items():
        for number in range(40):
            taken.append(number)
            yield number

    mine = []
    found = parallel.ordered(functools.partial(pow, 3), items(), 2, here=lambda item: mine.append(item) or item == 7)
    for number, power in enumerate(found):
        assert power == 3**number
        assert len(taken) <= number + 1 + 2 * 2 + 1
    assert number == 39 and mine == taken == [*range(40)]
    assert [*parallel.ordered(functools.partial(pow, 3), range(4), 1)] == [1, 3, 9, 27]
    assert parallel.cores() == len(os.sched_getaffinity(0))


def test_what_goes_wrong_in_a_process_is_said():
    found = parallel.ordered(int, ["1", "2", "three", "4"], 2)
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(ValueError, match="invalid literal for int.. with base 10: 'three'"):
        next(found)
    with pytest.raises(RuntimeError, match="one of 2 worker processes was killed.*: give fewer --workers"):
        [*parallel.ordered(os._exit, [1] * 9, 2)]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A folder of little text that is read and tokenised as if it were much."""
    monkeypatch.setattr(own_text, "_FEW_BYTES", 0)
    monkeypatch.setattr(packing, "_ALONE_CHARACTERS", 0)
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(builders, "_MANY_IDS", 0)
    monkeypatch.setattr(builders, "SHARD_ROWS", 50)
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts(60)):
        (tmp_path / f"texts/{number:02d}.txt").write_text(text)
    return tmp_path / "texts"


@pytest.mark.parametrize("how", ["concatenated", "documents"])
def test_any_number_of_processes_makes_the_same_bytes(how, small, tmp_path, monkeypatch):
    encoded, encode = [], Tokenizer.encode_counted
    monkeypatch.setattr(Tokenizer, "encode_counted", lambda *given: encoded.append(0) or encode(*given))
    made, calls = [], []
    for workers in (1, 3):  # two are in the test of a kill
        encoded.clear()
        out = str(tmp_path / str(workers))
        manifest = prepare_text("textfiles", str(small), "sotu_bpe_512", 16, out, "", workers=workers, packing=how)
        made.append((manifest, tree(tmp_path / str(workers))))
        calls.append(len(encoded))
    assert made[0] == made[1]
    # The other processes did all but the two calls of the round trip and the first batch.
    assert calls[0] > 9 and calls[1] == 3


def test_a_shard_has_the_records_that_tfds_would_write(small, tmp_path):
    out = tmp_path / "out"
    manifest = prepare_text("textfiles", str(small), "sotu_bpe_512", 16, str(out), "", workers=1)
    (folder,) = (path.parent for path in out.glob("tfds/**/dataset_info.json"))
    builder = tfds.builder_from_directory(folder)
    rows = open_dataset("own_text", str(out / "tokenizer.json"), 16, out).train.rows(0, manifest["rows"]["train"])
    features, begin = builder.info.features, 0
    for path, length in zip(builder.info.splits["train"].filepaths, builder.info.splits["train"].shard_lengths):
        records = ArrayRecordReader(str(path)).read_all()
        assert len(records) == length <= 50
        for record, ids in zip(records, rows[begin:], strict=False):
            assert record == features.serialize_example(features.encode_example({"ids": ids}))
        begin += length
    assert begin == len(rows) > 100


def test_a_long_text_is_encoded_by_the_process_whose_threads_are_free(tmp_path):
    long = "a" * (2 * packing.windows.WINDOW + 1)
    assert packing._has_a_long_text([("train", "b"), ("train", long)])
    assert not packing._has_a_long_text([("train", "b"), ("train", long[1:])])


def exists(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


KILLED = """
import multiprocessing, os, pathlib, signal, sys
from flowlm.data import own_text, packing
from flowlm.data.prepare import prepare_text
packing._BATCH_CHARACTERS, packing._ALONE_CHARACTERS = 1000, 0
genuine, calls = packing._append, []
def dies(*given):
    calls.append(0)
    if len(calls) == 6:
        pids = [str(child.pid) for child in multiprocessing.active_children()]
        pathlib.Path(sys.argv[3]).write_text(" ".join(pids))
        os.kill(os.getpid(), signal.SIGKILL)
    return genuine(*given)
packing._append = dies
if __name__ == "__main__":
    prepare_text("textfiles", sys.argv[1], "sotu_bpe_512", 16, sys.argv[2], "", workers=2)
"""


def test_killed_among_its_workers_it_goes_on_to_the_same_bytes_and_leaves_no_process(small, tmp_path):
    arguments = [str(small), str(tmp_path / "killed"), str(tmp_path / "pids")]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], timeout=300)
    assert done.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in Path(arguments[2]).read_text().split()]
    assert len(pids) == 2
    while any(map(exists, pids)):  # a worker that stays would stay until the end of the machine
        time.sleep(0.05)
    assert own_text.load_manifest(tmp_path / "killed")["rows"] is None
    made = [
        prepare_text("textfiles", str(small), "sotu_bpe_512", 16, str(tmp_path / name), "", workers=1)
        for name in ("killed", "whole")
    ]
    assert made[0] == made[1] and tree(tmp_path / "killed") == tree(tmp_path / "whole")


KILLED_AMONG_SHARDS = """
import os, signal, sys
from flowlm.data import builders
from flowlm.data.prepare import prepare_text
builders.SHARD_ROWS = 50
genuine, calls = builders._write_shard, []
def dies(*given):
    calls.append(0)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return genuine(*given)
builders._write_shard = dies
prepare_text("textfiles", sys.argv[1], "sotu_bpe_512", 16, sys.argv[2], "", workers=1)
"""


def test_killed_among_its_shards_it_writes_only_those_that_are_missing(small, tmp_path, monkeypatch):
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AMONG_SHARDS, str(small), str(tmp_path / "killed")], timeout=300
    )
    assert done.returncode == -signal.SIGKILL
    written, write = [], builders._write_shard
    monkeypatch.setattr(builders, "_write_shard", lambda *given: written.append(given[-1].name) or write(*given))
    monkeypatch.setattr(packing, "_encode", lambda *given: 1 / 0)  # nor is any text tokenised again
    (folder,) = {path.parent for path in (tmp_path / "killed").rglob("*.array_record*") if path.parent.name == "1.0.0"}
    (folder / "packed_text-train.array_record-00000-of-00099").touch()  # of a call for other rows
    arguments = "textfiles", str(small), "sotu_bpe_512", 16
    made = prepare_text(*arguments, str(tmp_path / "killed"), "", workers=1)
    monkeypatch.undo()
    monkeypatch.setattr(builders, "SHARD_ROWS", 50)
    assert made == prepare_text(*arguments, str(tmp_path / "whole"), "", workers=1)
    whole = tree(tmp_path / "whole")
    assert tree(tmp_path / "killed") == whole
    assert len(written) == len(set(written)) == sum("array_record" in name for name in whole) - 3
    left = tmp_path / "killed/tokens" / folder.parent.name  # as of a call that was killed when all was done
    left.mkdir()
    assert made == prepare_text(*arguments, str(tmp_path / "killed"), "", workers=1)
    assert tree(tmp_path / "killed") == whole and not left.exists()


ALL_THE_TIME = """
import sys
from flowlm.data import builders, own_text, packing
from flowlm.data.prepare import prepare_text
own_text._FEW_BYTES = packing._ALONE_CHARACTERS = builders._MANY_IDS = 0
packing._BATCH_CHARACTERS, builders.SHARD_ROWS = 4000, 50
if __name__ == "__main__":
    print("begun", flush=True)
    prepare_text("textfiles", sys.argv[1], "bpe:300", 16, sys.argv[2], "", workers=4)
"""


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_makes_the_same_bytes(tmp_path):
    """Reading, making the tokenizer, measuring, tokenising and writing, by four workers; each call goes on where one was killed."""
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts(600)):
        (tmp_path / f"texts/{number:03d}.txt").write_text(text)

    def begun(out):
        line = [sys.executable, "-c", ALL_THE_TIME, str(tmp_path / "texts"), str(out)]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout.readline() == "begun\n"
        return process, time.monotonic()

    process, since = begun(tmp_path / "whole")
    assert process.wait(300) == 0
    lasts, whole = time.monotonic() - since, tree(tmp_path / "whole")
    rng, killed, out = np.random.default_rng(0), 0, tmp_path / "killed"
    while killed < 10:
        process, _ = begun(out)
        try:
            process.wait(rng.uniform(0, lasts))
            assert tree(out) == whole  # it was faster than the signal
            shutil.rmtree(out)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    process, _ = begun(out)
    assert process.wait(300) == 0 and tree(out) == whole


FULL = """
import resource, sys
from flowlm.data import builders
from flowlm import main
from flowlm.system import processes
builders.SHARD_ROWS = 50
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
main.run()
"""


def test_where_the_disk_takes_no_more_one_line_says_so_and_what_is_finished_stays(small, tmp_path):
    """Files that may not grow any further stand for a full disk: while tokens are written, and in a shard."""
    out = tmp_path / "out"
    line = ["prepare", "--source=textfiles", f"--path={small}", "--tokenizer=sotu_bpe_512", "--length=16"]
    line += [f"--out={out}", "--workers=1"]
    arguments = "textfiles", str(small), "sotu_bpe_512", 16
    whole = prepare_text(*arguments, str(tmp_path / "whole"), "", workers=1)
    (tokens,) = [len(content) for name, content in tree(tmp_path / "whole").items() if name == "tokenizer.json"]
    for most in (tokens + 1000,):
        done = subprocess.run(
            [sys.executable, "-c", FULL, str(most), *line], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        told = [each for each in done.stderr.splitlines() if each.startswith("flowlm: ")]
        assert (
            len(told) == 1
            and f"flowlm: {out}" in told[0]
            and "cannot be written (File too large): make room" in told[0]
        )
    assert prepare_text(*arguments, str(out), "", workers=1) == whole
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_shard_on_a_full_disk_is_no_shard(tmp_path):
    shard = builders._Shard("train", "a.array_record-00000-of-00001", 0, 3000)
    (tmp_path / f"{shard.name}-{os.getpid()}").symlink_to("/dev/full")
    rows = {"train": lambda: np.random.default_rng(0).integers(0, 10**6, (3000, 15)).astype(np.int32)}
    with pytest.raises(
        OSError, match=f"^{tmp_path}/a.array_record.* cannot be written .*No space left on device.*: make room"
    ):
        builders._write_shard(rows, 0, tmp_path, str(tmp_path / "out"), shard)
    assert not (tmp_path / "out").exists()
