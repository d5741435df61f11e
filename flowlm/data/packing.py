"""Packs documents into rows of one length.

Documents are tokenised and laid end to end, with a start token behind each one (not in a corpus that is one text). The
stream is cut every `length - 1` tokens, and each piece gets a start token in front, so a row has `length` ids and
every document in it stands between start tokens. Only the last, incomplete piece of a split is dropped.

Or each document begins a row (`padded`): pads behind it fill up its last row, and one that is longer than a row has several. The
stream is then cut at the same places, none of which is within a document that fits.
"""

import collections
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from flowlm.data import windows
from flowlm.data.tokenizers import Tokenizer
from flowlm.system import parallel, storage
from flowlm.system.hosts import ALONE, Hosts

SPLITS = ("train", "validation", "test")
_RECORD = "record.json"
# Characters handed to the tokenizer at once: enough to use all cores, and few enough to need little memory.
_BATCH_CHARACTERS = 1_000_000
# Characters that are tokenised before other processes are started, because starting them takes as long.
_ALONE_CHARACTERS = 8_000_000

Document = tuple[str, str]  # (split, text)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document[1])
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def workspace(directory: Path) -> Iterator[Path]:
    """Yields `directory`, and removes it on success; an interrupted process leaves it, so that the next one can go on from there.

    If another process works in it, or if files cannot be locked, a temporary directory beside it is used instead.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context((directory / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have finished and removed the directory before the lock was taken.
            held = os.path.samestat(os.fstat(lock.fileno()), (directory / "lock").stat())
        except OSError:
            held = False
        if held:
            yield directory
            shutil.rmtree(directory)
        else:
            yield Path(stack.enter_context(tempfile.TemporaryDirectory(dir=directory.parent)))


@dataclasses.dataclass
class Record:
    """How far the streams are written. It is stored beside them, so that a later call can go on where one was interrupted.

    Attributes:
      texts: number of documents that are written.
      sha256: digest of these documents and of their splits.
      tokens: number of tokens by split.
      unspelled: by split, how often the vocabulary could not spell the text (`Tokenizer.encode_counted`).
      such_as: examples of what it could not spell.
      pads: number of pads by split, which `tokens` includes.
      cut: by split, number of documents that have rows of their own, and more than one.
    """

    texts: int = 0
    sha256: str = ""
    tokens: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    unspelled: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    such_as: list[str] = dataclasses.field(default_factory=list)
    pads: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    cut: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SPLITS, 0))


class Streams(NamedTuple):
    """What the documents have become.

    Attributes:
      rows: this host's rows [num, width] by split, which are read from the disk as needed.
      counts: for each host its number of rows by split.
      record: that of all hosts together.
    """

    rows: dict[str, np.ndarray]
    counts: list[dict[str, int]]
    record: Record


def write_streams(
    documents: Callable[[], Iterable[Document]],
    tokenizer: Tokenizer,
    separated: bool,
    folder: Path,
    width: int,
    workers: int = 1,
    hosts: Hosts = ALONE,
    padded: bool = False,
) -> Streams:
    """Writes the token stream of each split under `folder`, in one pass over the documents.

    With `padded` each document begins a row, and the tokenizer must have a pad; `separated` then says nothing.

    Goes on where an interrupted call stopped, if the documents still begin with those that the interrupted call had written. Any
    number of `workers`, processes that tokenise, writes the same.

    Of several hosts each has its part of the documents. The stream is that of all of them, one behind the other, so its rows do not
    depend on their number: a row that begins in one part and ends in the next is of the host where it begins.
    """
    record, digest, rest = _taken_up(documents, folder)
    with contextlib.ExitStack() as stack:
        files = {}
        for split in SPLITS:
            _place(folder, split).touch()
            files[split] = stack.enter_context(_place(folder, split).open("r+b"))
            files[split].truncate(4 * record.tokens[split])
            files[split].seek(0, os.SEEK_END)
        encode = functools.partial(_encode, tokenizer, separated, width if padded else None)
        for batch, found in _encoded(_batches(rest), encode, workers):
            with storage.writing(folder):
                _append(batch, found, tokenizer, files, record, digest)
                if padded:
                    _count(batch, found, tokenizer.pad, width, record)
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())  # now, because the record must not count tokens that a crash could lose
                temporary = folder / "record.tmp"
                temporary.write_text(json.dumps(dataclasses.asdict(record)))
                temporary.replace(folder / _RECORD)
        return _streams(hosts, record, files, folder, width)


def _streams(hosts: Hosts, record: Record, files: dict[str, BinaryIO], folder: Path, width: int) -> Streams:
    """Tells the other hosts how many tokens there are here, and hears where the rows of each begin."""
    heads = {split: _head(folder, split, record.tokens[split], width) for split in SPLITS}
    told = hosts.all("tokens", dataclasses.asdict(record) | {"heads": heads})
    rows, counts = {}, [{} for _ in told]
    for split in SPLITS:
        firsts = _firsts([each["tokens"][split] for each in told], width)
        for count, (first, last) in zip(counts, itertools.pairwise(firsts), strict=True):
            count[split] = last - first
        begin = firsts[hosts.index] * width - sum(each["tokens"][split] for each in told[: hosts.index])
        behind = itertools.chain(*(each["heads"][split] for each in told[hosts.index + 1 :]))
        rows[split] = _rows(files[split], begin, counts[hosts.index][split], width, behind)
    return Streams(rows, counts, _total(told))


def _place(folder: Path, split: str) -> Path:
    return folder / f"{split}.tokens"


def _taken_up(documents: Callable[[], Iterable[Document]], folder: Path) -> tuple[Record, Any, Iterator[Document]]:
    """(record, digest, documents): what an interrupted call had written, its digest, and the documents that are left."""
    stream = iter(documents())
    if (folder / _RECORD).exists():
        record, digest = Record(**json.loads((folder / _RECORD).read_text())), hashlib.sha256()
        for document in itertools.islice(stream, record.texts):
            digest.update(_mark(document))
        whole = all(
            _place(folder, split).exists() and _place(folder, split).stat().st_size >= 4 * tokens
            for split, tokens in record.tokens.items()
        )
        if whole and digest.hexdigest() == record.sha256:
            return record, digest, stream
        stream = iter(documents())
    return Record(), hashlib.sha256(), stream


# The ids of all texts of a batch, each with what is behind it; by text, how many these are and how often it could not be spelled.
Encoded = tuple[np.ndarray, np.ndarray, np.ndarray]


def _encoded(
    batches: Iterator[list[Document]], encode: Callable[[list[Document]], Encoded], workers: int
) -> Iterator[tuple[list[Document], Encoded]]:
    """(batch, what `encode` makes of it) of each batch, in their order."""
    done, waiting = 0, collections.deque()
    for batch in batches:
        yield batch, encode(batch)
        done += sum(len(text) for _, text in batch)
        if workers > 1 and done >= _ALONE_CHARACTERS:
            break

    def kept() -> Iterator[list[Document]]:
        for batch in batches:
            waiting.append(batch)
            yield batch

    for found in parallel.ordered(encode, kept(), workers, here=_has_a_long_text):
        yield waiting.popleft(), found


def _encode(tokenizer: Tokenizer, separated: bool, filled: int | None, batch: list[Document]) -> Encoded:
    """`filled`: the number of ids that each text is filled up to a multiple of; None where texts lie end to end."""
    found, unspelled = tokenizer.encode_counted([text for _, text in batch])
    behind = np.full(int(separated), tokenizer.start, np.int32)
    if filled:
        pads = np.full(filled, tokenizer.pad, np.int32)
        parts = [(ids, pads[: -len(ids) % filled]) for ids in found]
    else:
        parts = [(ids, behind) for ids in found]
    lengths = np.asarray([len(ids) + len(end) for ids, end in parts])
    return np.concatenate([*itertools.chain(*parts)], dtype=np.int32), lengths, np.asarray(unspelled)


def _has_a_long_text(batch: list[Document]) -> bool:
    """Whether the windows of one text are encoded in parallel, for which one process is enough."""
    return any(len(text) > 2 * windows.WINDOW for _, text in batch)


def _count(batch: list[Document], found: Encoded, pad: int, width: int, record: Record) -> None:
    ids, lengths, _ = found
    sides = np.asarray([SPLITS.index(split) for split, _ in batch])
    is_pad = ids == pad  # no text is encoded as one
    for side, split in enumerate(SPLITS):
        record.pads[split] += int(is_pad[np.repeat(sides, lengths) == side].sum())
        record.cut[split] += int((lengths[sides == side] > width).sum())


def _append(batch: list[Document], found: Encoded, tokenizer: Tokenizer, files: dict, record: Record, digest) -> None:
    ids, lengths, unspelled = found
    sides = np.asarray([SPLITS.index(split) for split, _ in batch])
    side_of_id = np.repeat(sides, lengths)
    for side, split in enumerate(SPLITS):
        files[split].write(ids[side_of_id == side].tobytes())
        record.tokens[split] += int(lengths[sides == side].sum())
        record.unspelled[split] += int(unspelled[sides == side].sum())
    for place in np.flatnonzero(unspelled):
        if not record.such_as:
            record.such_as = tokenizer.unspelled(batch[place][1])
    digest.update(b"".join(map(_mark, batch)))
    record.texts += len(batch)
    record.sha256 = digest.hexdigest()


def _head(folder: Path, split: str, tokens: int, width: int) -> list[int]:
    return np.fromfile(_place(folder, split), np.int32, min(tokens, width)).tolist()


def _firsts(tokens: Sequence[int], width: int) -> list[int]:
    """The first row that begins in the part of each host, given how many tokens each has; behind them, the number of all rows."""
    num = sum(tokens) // width
    return [min(-(-begin // width), num) for begin in itertools.accumulate(tokens[:-1], initial=0)] + [num]


def _rows(file: BinaryIO, begin: int, num: int, width: int, behind: Iterable[int]) -> np.ndarray:
    """Rows [num, width] from token `begin` of a file on; what the last one lacks comes from `behind`, and is appended."""
    if num == 0:
        return np.empty((0, width), np.int32)
    missing = begin + num * width - file.seek(0, os.SEEK_END) // 4
    file.write(np.fromiter(itertools.islice(behind, max(0, missing)), np.int32).tobytes())
    file.flush()
    return np.memmap(file, np.int32, "r", offset=4 * begin, shape=(num, width))


def _total(told: Sequence[dict]) -> Record:
    """The records of all hosts as one, but for the digest, which changes when any of theirs does."""
    names = ("tokens", "unspelled", "pads", "cut")
    sums = {name: {split: sum(each[name][split] for each in told) for split in SPLITS} for name in names}
    such_as = next((each["such_as"] for each in told if each["such_as"]), [])
    digests = [each["sha256"] for each in told]
    digest = digests[0] if len(told) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
    return Record(sum(each["texts"] for each in told), digest, such_as=such_as, **sums)


def _mark(document: Document) -> bytes:
    split, text = document
    content = text.encode("utf-8")
    return split.encode() + len(content).to_bytes(8, "big") + content


def framed(rows: np.ndarray, start: int) -> np.ndarray:
    """Rows int32 [num, width + 1]: a start token in front of each of the rows [num, width]."""
    return np.concatenate([np.full((len(rows), 1), start, np.int32), rows], axis=1, dtype=np.int32)
