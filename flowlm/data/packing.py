"""Documents to rows of one length.

Documents are tokenised and laid end to end, a start token behind each (a corpus that is one text has none). The
stream is cut every `length - 1` tokens, and each piece gets a start token in front, so a row has `length` ids and
every document in it stands between start tokens. Only the last, incomplete piece of a split is dropped.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from flowlm.tokenizers import Tokenizer

# Characters handed to the tokenizer at once: enough to use all cores, little enough to be nothing in memory.
_BATCH_CHARACTERS = 4_000_000


def token_stream(texts: Iterable[str], tokenizer: Tokenizer, separated: bool) -> Iterator[np.ndarray]:
    """Yields int32 arrays that, end to end, are the token stream of the texts, start tokens between them included."""
    for batch in _batches(texts):
        for ids in tokenizer.encode_batch(batch):
            yield np.append(ids, np.int32(tokenizer.start)) if separated else ids


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def workspace(directory: Path) -> Iterator[Path]:
    """`directory`, which an interrupted process leaves for the next and which goes when all went well.

    While another process is in it, or where files cannot be locked, a temporary directory beside it takes its place.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context((directory / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have finished, and removed the directory, just before.
            held = os.path.samestat(os.fstat(lock.fileno()), (directory / "lock").stat())
        except OSError:
            held = False
        if held:
            yield directory
            shutil.rmtree(directory)
        else:
            yield Path(stack.enter_context(tempfile.TemporaryDirectory(dir=directory.parent)))


def write_stream(
    texts: Callable[[], Iterable[str]], tokenizer: Tokenizer, separated: bool, path: Path, width: int
) -> np.ndarray:
    """Writes the token stream of the texts to `path` and returns it as rows [num, width] that are read from it as needed.

    After every batch `path`.json says how many texts and tokens there are, and the digest of those texts: an interrupted call
    is taken up there if the texts still begin with these.
    """
    record = path.with_suffix(".json")
    texts_done = tokens_done = 0
    digest, stream = hashlib.sha256(), iter(texts())
    if record.exists() and path.exists():
        held = json.loads(record.read_text())
        for text in itertools.islice(stream, held["texts"]):
            digest.update(_mark(text))
        if digest.hexdigest() == held["sha256"] and path.stat().st_size >= 4 * held["tokens"]:
            texts_done, tokens_done = held["texts"], held["tokens"]
        else:
            digest, stream = hashlib.sha256(), iter(texts())
    path.touch()
    with path.open("r+b") as file:
        file.truncate(4 * tokens_done)
        file.seek(0, os.SEEK_END)
        for batch in _batches(stream):
            for ids in token_stream(batch, tokenizer, separated):
                file.write(ids.astype(np.int32).tobytes())
                tokens_done += len(ids)
            file.flush()
            os.fsync(file.fileno())  # before the record that counts on it
            texts_done += len(batch)
            for text in batch:
                digest.update(_mark(text))
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps({"texts": texts_done, "tokens": tokens_done, "sha256": digest.hexdigest()}))
            temporary.replace(record)
        if tokens_done < width:
            return np.empty((0, width), np.int32)
        return np.memmap(file, np.int32, "r", shape=(tokens_done // width, width))


def _mark(text: str) -> bytes:
    content = text.encode("utf-8")
    return len(content).to_bytes(8, "big") + content


def framed(rows: np.ndarray, start: int) -> np.ndarray:
    """Rows int32 [num, width + 1]: a start token in front of each of the rows [num, width]."""
    return np.concatenate([np.full((len(rows), 1), start, np.int32), rows], axis=1, dtype=np.int32)
