"""Encodes texts to token ids in bounded memory.

The `tokenizers` library needs about a hundred bytes for each character that it encodes. So a long text is encoded in overlapping
windows and cut where two windows give the same tokens. Tokens at a window's edge, which may be wrong, are taken from its neighbour.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import tokenizers

WINDOW = 250_000  # characters from cut to cut
CONTEXT = 1_000  # characters read beyond each cut
BLANKS = " \n"
_AT_ONCE = 4  # windows that are encoded together


def encode(model: tokenizers.Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids int32 [number of tokens] of each text, in parallel over the cores."""
    short = [text for text in texts if len(text) <= 2 * WINDOW]
    found = iter(model.encode_batch_fast(short, add_special_tokens=False))
    return [np.asarray(next(found).ids, np.int32) if len(text) <= 2 * WINDOW else _long(model, text) for text in texts]


def _long(model: tokenizers.Tokenizer, text: str) -> np.ndarray:
    pieces, before = [], None
    spans = [*itertools.pairwise([0, *cuts(text, WINDOW), len(text)])]
    for group in range(0, len(spans), _AT_ONCE):
        windows = [(max(0, begin - CONTEXT), begin, end) for begin, end in spans[group : group + _AT_ONCE]]
        encodings = model.encode_batch([text[a : end + CONTEXT] for a, _, end in windows], add_special_tokens=False)
        for (a, begin, end), encoding in zip(windows, encodings, strict=True):
            ids = np.asarray(encoding.ids, np.int32)
            starts = a + np.fromiter((start for start, _ in encoding.offsets), np.int64, len(ids))
            around = _tokens_around(begin, starts, ids)
            if before is not None and before != around:
                # The windows disagree (as in a word of a million letters), so the text is not cut.
                return np.asarray(model.encode(text, add_special_tokens=False).ids, np.int32)
            before = _tokens_around(end, starts, ids)
            pieces.append(ids[((starts >= begin) | (begin == 0)) & ((starts < end) | (end == len(text)))])
    return np.concatenate(pieces)


def cuts(text: str, every: int) -> list[int]:
    """Places about `every` characters apart, in front of blanks where possible, because few tokenizers join text across these."""
    near = min(CONTEXT, every // 2)
    aims = range(every, len(text) - near, every)
    blanks = [max(text.rfind(blank, aim - near, aim) for blank in BLANKS) for aim in aims]
    return [aim if blank < 0 else blank for aim, blank in zip(aims, blanks, strict=True)]


def pieces(text: str) -> list[str]:
    """A text in pieces (`cuts`), for uses that tolerate other tokens at the cuts."""
    return [text[begin:end] for begin, end in itertools.pairwise([0, *cuts(text, WINDOW), len(text)])]


def _tokens_around(cut: int, starts: np.ndarray, ids: np.ndarray) -> tuple[bytes, bytes]:
    near = np.abs(starts - cut) < CONTEXT // 2
    return starts[near].tobytes(), ids[near].tobytes()
