"""Samplers that know no language: a measure that one of them wins is worth nothing (2606.08417)."""

import functools
from collections.abc import Callable

import numpy as np


def unigram(rows: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Rows int32 [num, L] whose tokens are drawn one by one from all tokens of rows [N, L]; the first from first tokens."""
    rng = np.random.default_rng(seed)
    first = rng.choice(rows[:, 0], (num, 1))
    return np.concatenate([first, rng.choice(rows[:, 1:].reshape(-1), (num, rows.shape[1] - 1))], 1).astype(np.int32)


def chain(order: int, rows: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Rows int32 [num, L]: each token follows the `order` - 1 before it as somewhere in rows [N, L], drawn by frequency.

    The first `order` - 1 are those of one row. After tokens that only end rows the next one is drawn from all tokens.
    """
    rng = np.random.default_rng(seed)
    size, before = int(rows.max()) + 1, order - 1
    if size**before >= 2**63:
        raise ValueError(f"a chain of order {order} cannot number its contexts of {size:,} tokens: take a lower order")

    def codes(columns: list[np.ndarray]) -> np.ndarray:
        return functools.reduce(lambda code, column: code * size + column, columns[1:], columns[0].astype(np.int64))

    length = rows.shape[1]
    contexts = codes([rows[:, i : length - before + i] for i in range(before)]).reshape(-1)
    order_of = np.argsort(contexts, kind="stable")
    contexts, following = contexts[order_of], rows[:, before:].reshape(-1)[order_of]
    out = np.empty((num, length), np.int32)
    out[:, :before] = rows[rng.integers(len(rows), size=num), :before]
    for i in range(before, length):
        context = codes([out[:, j] for j in range(i - before, i)])
        low, high = (np.searchsorted(contexts, context, side) for side in ("left", "right"))
        picked = rng.integers(low, np.maximum(high, low + 1))
        out[:, i] = np.where(high > low, following[np.minimum(picked, len(following) - 1)], rng.choice(following, num))
    return out


bigram, trigram, four_gram = (functools.partial(chain, order) for order in (2, 3, 4))

SAMPLERS = {"unigram": unigram, "trigram": trigram}
# For rows that are sentences: they are so short that a chain which keeps three words in mind writes many real ones.
SENTENCE_SAMPLERS = {"bigram": bigram, "trigram": trigram, "4-gram": four_gram}
# Of rows whose tokens are letters, of which a chain must keep more in mind.
LETTER_SAMPLERS = {"trigram": trigram} | {f"{order}-gram": functools.partial(chain, order) for order in (6, 8)}
LETTERS = 128  # a vocabulary that is smaller is one of letters


def samplers(sentences: bool, vocab_size: int) -> dict[str, Callable[[np.ndarray, int, int], np.ndarray]]:
    """{name: (rows, num, seed) -> rows} of those that fit the data, of which `sentences` says whether each row is a text."""
    if not sentences:
        return SAMPLERS
    return LETTER_SAMPLERS if vocab_size < LETTERS else SENTENCE_SAMPLERS
