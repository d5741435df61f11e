"""Several hosts that share one preparation: the rows of one alone, whoever is killed or late; none waits for one that failed."""

import json
import threading

import numpy as np
import pytest
from absl import logging
from test_own_text import texts, tree

from flowlm.data import builders, corpora, open_dataset, own_text, packing
from flowlm.data.prepare import prepare_text
from flowlm.data.tokenizers import Tokenizer
from flowlm.system import hosts as module
from flowlm.system import storage
from flowlm.system.hosts import Hosts, which


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(builders, "SHARD_ROWS", 50)
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 1000)


@pytest.fixture
def folder(tmp_path):
    """Five files of very different size, one document in two of them."""
    (tmp_path / "in").mkdir()
    written = texts(60)
    for number, part in enumerate((written[:1], written[1:40], written[40:41], written[41:], written[3:5])):
        (tmp_path / f"in/{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return tmp_path / "in"


def prepare(folder, out, host=None, tokenizer="sotu_bpe_512", **more):
    return prepare_text("jsonl", str(folder), tokenizer, 16, str(out), "", workers=1, host=host, **more)


def together(number, work):
    """What `work(host)` returns or raises, on so many hosts at once."""
    out = [None] * number

    def one(index):
        try:
            out[index] = work(f"{index}/{number}")
        except BaseException as error:
            out[index] = error

    threads = [threading.Thread(target=one, args=(index,), name=f"{index}/{number}") for index in range(number)]
    said = logging.get_verbosity()  # which is of the process, and dataset.py changes it for a while
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
        assert not thread.is_alive()
    logging.set_verbosity(said)
    return out


def rows_of(out):
    dataset = open_dataset(own_text.settings(str(out))["name"], str(out / "tokenizer.json"), 16, out)
    return {split: getattr(dataset, split).rows(0, len(getattr(dataset, split))) for split in corpora.SPLITS}


def test_who_is_who():
    assert which(None) == (0, 1) and which("2/5") == (2, 5)
    assert which("cluster", {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}) == (3, 4)
    assert which("cluster", {"JAX_NUM_PROCESSES": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "9"}) == (
        0,
        9,
    )
    for told in ("2", "2/2", "3/2", "-1/2", "a/b", "/", ""):
        with pytest.raises(ValueError, match=f"--host={told} is not I/N"):
            which(told)
    with pytest.raises(ValueError, match="neither JAX_PROCESS_ID and JAX_NUM_PROCESSES or .* is set: give --host=I/N"):
        which("cluster", {"JAX_NUM_PROCESSES": "2"})


@pytest.mark.parametrize("number", [1, 2, 5, 9])
def test_parts_are_neighbours_and_nearly_even(number):
    rng = np.random.default_rng(number)
    for sizes in ([0, 0, 0], [7], rng.integers(1, 100, 300).tolist(), [1, 1000, 1, 1]):
        parts = [Hosts(index, number).part(sizes) for index in range(number)]
        assert [each for part in parts for each in [*range(len(sizes))][part]] == [*range(len(sizes))]
        if len(sizes) == 300:
            shares = [sum(sizes[part]) for part in parts]
            assert max(shares) - min(shares) <= 2 * max(sizes)


@pytest.mark.parametrize(
    ("number", "tokenizer", "packing"),
    [(2, "bpe:300", "documents"), (3, "sotu_bpe_512", "concatenated"), (7, "sotu_bpe_512", "concatenated")],
)
def test_several_hosts_make_the_rows_of_one(number, tokenizer, packing, folder, tmp_path):
    """And its manifest; seven are more than there are files."""
    whole = prepare(folder, tmp_path / "one", tokenizer=tokenizer, packing=packing)
    assert whole["duplicates"] == 2 and whole["distinct_documents"] == 60
    encoded, lock, encode = [], threading.Lock(), Tokenizer.encode_counted

    def counted(self, texts):
        with lock:
            encoded.extend(texts)
        return encode(self, texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokenizer, "encode_counted", counted)
        made = together(number, lambda host: prepare(folder, tmp_path / "all", host, tokenizer, packing=packing))
    assert made[0] == whole == own_text.load_manifest(tmp_path / "all")
    assert all(each["rows"] is None for each in made[1:])
    found, truth = rows_of(tmp_path / "all"), rows_of(tmp_path / "one")
    for split in corpora.SPLITS:
        np.testing.assert_array_equal(found[split], truth[split])
    # Twice: to measure what is lost, and for the rows. So no host did another one's documents.
    assert sorted(encoded) == sorted(2 * [text for text in [*texts(60), *texts(60)[3:5]]])
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"manifest.json", "tokenizer.json", "tfds", "tokens"}
    # The same line again finds all done, on every host.
    again = together(number, lambda host: prepare(folder, tmp_path / "all", host, tokenizer, packing=packing))
    assert again == [whole] * number


def test_hosts_that_were_killed_go_on_to_the_same_bytes(folder, tmp_path, monkeypatch):
    """One between two batches of text, then one between two shards; each time the other waits, and is interrupted."""
    together(2, lambda host: prepare(folder, tmp_path / "whole", host))
    write, encode, written = builders._write_shard, packing._encode, []
    gone = threading.Event()

    def dies(host, function, at):
        calls = []

        def wrapped(*given):
            if threading.current_thread().name == host:
                calls.append(0)
                if len(calls) == at:
                    gone.set()
                    raise KeyboardInterrupt
            return function(*given)

        return wrapped

    def waits(seconds):
        if gone.wait(seconds):
            raise KeyboardInterrupt

    def counted(*given):
        write(*given)
        written.append(given[-1].name)

    monkeypatch.setattr(builders, "_write_shard", counted)
    for place, function, host in ((packing, "_encode", "0/2"), (builders, "_write_shard", "1/2")):
        gone.clear()
        with monkeypatch.context() as patch:
            patch.setattr(place, function, dies(host, getattr(place, function), 3))
            patch.setattr(module.time, "sleep", waits)
            ended = together(2, lambda host: prepare(folder, tmp_path / "cut", host))
        assert KeyboardInterrupt in map(type, ended) and own_text.load_manifest(tmp_path / "cut")["rows"] is None
    assert packing._encode is encode and len(written) >= 2
    done = together(2, lambda host: prepare(folder, tmp_path / "cut", host))
    assert done[0]["rows"] and tree(tmp_path / "cut") == tree(tmp_path / "whole")
    assert len(written) == len(set(written))  # no shard twice


def test_a_host_that_fails_tells_the_others(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "NOTICE_SECONDS", 0.1)
    (folder / "4.jsonl").write_text('{"text": "fine"}\nnot JSON\n')
    first, last = together(2, lambda host: prepare(folder, tmp_path / "out", host))
    errors = {type(each): str(each) for each in (first, last)}
    assert "4.jsonl, line 2 is not a JSON object" in errors[ValueError]
    assert "of 2 has failed: " in errors[RuntimeError] and "4.jsonl, line 2" in errors[RuntimeError]
    (folder / "4.jsonl").write_text(json.dumps({"text": texts(1)[0]}) + "\n" * 9)
    assert together(2, lambda host: prepare(folder, tmp_path / "out", host))[0]["rows"]


def test_who_waits_says_for_whom(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "NOTICE_SECONDS", 0.05)
    place = storage.path(tmp_path / "words")
    waiting = threading.Thread(target=lambda: Hosts(0, 2, place).all("read", 1))
    waiting.start()
    said = ""
    while not said:
        said = capsys.readouterr().err
    assert said == f"host 0 of 2 waits for host 1 (read), which leaves word in {place}\n"
    assert Hosts(1, 2, place).all("read", [2]) == [1, [2]]
    waiting.join(60)
