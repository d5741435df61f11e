"""Packs documents into rows of one length.

Documents are tokenised and laid end to end, with a start token behind each one (not in a corpus that is one text). The
stream is cut every `length - 1` tokens, and each piece gets a start token in front, so a row has `length` ids and
every document in it stands between start tokens. Only the last, incomplete piece of a split is dropped.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flowlm.data.tokenizers import Tokenizer

SPLITS = ("train", "validation", "test")
_RECORD = "record.json"
# Characters handed to the tokenizer at once: enough to use all cores, and few enough to need little memory.
_BATCH_CHARACTERS = 1_000_000

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
    """

    texts: int = 0
    sha256: str = ""
    tokens: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    unspelled: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    such_as: list[str] = dataclasses.field(default_factory=list)


def write_streams(
    documents: Callable[[], Iterable[Document]], tokenizer: Tokenizer, separated: bool, folder: Path, width: int
) -> tuple[dict[str, np.ndarray], Record]:
    """Writes the token stream of each split under `folder`, in one pass over the documents.

    Goes on where an interrupted call stopped, if the documents still begin with those that the interrupted call had written.

    Returns:
      (rows, record): the rows [num, width] by split, which are read from the disk as needed, and the record.
    """
    record, digest, rest = _taken_up(documents, folder)
    with contextlib.ExitStack() as stack:
        files = {}
        for split in SPLITS:
            _place(folder, split).touch()
            files[split] = stack.enter_context(_place(folder, split).open("r+b"))
            files[split].truncate(4 * record.tokens[split])
            files[split].seek(0, os.SEEK_END)
        for batch in _batches(rest):
            _append(batch, tokenizer, separated, files, record, digest)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())  # now, because the record must not count tokens that a crash could lose
            temporary = folder / "record.tmp"
            temporary.write_text(json.dumps(dataclasses.asdict(record)))
            temporary.replace(folder / _RECORD)
        rows = {split: _rows(files[split], record.tokens[split], width) for split in SPLITS}
    return rows, record


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


def _append(batch: list[Document], tokenizer: Tokenizer, separated: bool, files: dict, record: Record, digest) -> None:
    found, unspelled = tokenizer.encode_counted([text for _, text in batch])
    for (split, text), ids, count in zip(batch, found, unspelled, strict=True):
        files[split].write(ids.astype(np.int32).tobytes())
        if separated:
            files[split].write(np.int32(tokenizer.start).tobytes())
        record.tokens[split] += len(ids) + separated
        record.unspelled[split] += count
        if count and not record.such_as:
            record.such_as = tokenizer.unspelled(text)
        digest.update(_mark((split, text)))
    record.texts += len(batch)
    record.sha256 = digest.hexdigest()


def _rows(file: BinaryIO, tokens: int, width: int) -> np.ndarray:
    if tokens < width:
        return np.empty((0, width), np.int32)
    return np.memmap(file, np.int32, "r", shape=(tokens // width, width))


def _mark(document: Document) -> bytes:
    split, text = document
    content = text.encode("utf-8")
    return split.encode() + len(content).to_bytes(8, "big") + content


def framed(rows: np.ndarray, start: int) -> np.ndarray:
    """Rows int32 [num, width + 1]: a start token in front of each of the rows [num, width]."""
    return np.concatenate([np.full((len(rows), 1), start, np.int32), rows], axis=1, dtype=np.int32)
