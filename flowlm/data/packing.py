"""Documents to rows of one length.

Documents are tokenised and laid end to end, a start token behind each (a corpus that is one text has none). The
stream is cut every `length - 1` tokens, and each piece gets a start token in front, so a row has `length` ids and
every document in it stands between start tokens. Only the last, incomplete piece of a split is dropped.
"""

from collections.abc import Iterable, Iterator
from typing import BinaryIO

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


def write_stream(stream: Iterable[np.ndarray], file: BinaryIO, width: int) -> np.ndarray:
    """Writes a token stream to a file and returns it as rows [num, width] that are read from the file as needed."""
    num_tokens = 0
    for ids in stream:
        file.write(ids.astype(np.int32).tobytes())
        num_tokens += len(ids)
    file.flush()
    if num_tokens < width:
        return np.empty((0, width), np.int32)
    return np.memmap(file, np.int32, "r", shape=(num_tokens // width, width))


def framed(rows: np.ndarray, start: int) -> np.ndarray:
    """Rows int32 [num, width + 1]: a start token in front of each of the rows [num, width]."""
    return np.concatenate([np.full((len(rows), 1), start, np.int32), rows], axis=1, dtype=np.int32)
