"""Samplers that know no language: a measure that one of them wins is worth nothing (2606.08417)."""

import numpy as np


def unigram(rows: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Rows int32 [num, L] whose tokens are drawn one by one from all tokens of rows [N, L]; the first from first tokens."""
    rng = np.random.default_rng(seed)
    first = rng.choice(rows[:, 0], (num, 1))
    return np.concatenate([first, rng.choice(rows[:, 1:].reshape(-1), (num, rows.shape[1] - 1))], 1).astype(np.int32)


def trigram(rows: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Rows int32 [num, L]: each token follows the two before it as somewhere in rows [N, L], drawn by frequency.

    The first two are those of one row. After a pair that ends rows only, the next token is one of all.
    """
    rng = np.random.default_rng(seed)
    size = int(rows.max()) + 1
    pairs = (rows[:, :-2].astype(np.int64) * size + rows[:, 1:-1]).reshape(-1)
    order = np.argsort(pairs, kind="stable")
    pairs, following = pairs[order], rows[:, 2:].reshape(-1)[order]
    out = np.empty((num, rows.shape[1]), np.int32)
    out[:, :2] = rows[rng.integers(len(rows), size=num), :2]
    for i in range(2, rows.shape[1]):
        pair = out[:, i - 2].astype(np.int64) * size + out[:, i - 1]
        low, high = (np.searchsorted(pairs, pair, side) for side in ("left", "right"))
        picked = rng.integers(low, np.maximum(high, low + 1))
        out[:, i] = np.where(high > low, following[np.minimum(picked, len(following) - 1)], rng.choice(following, num))
    return out


SAMPLERS = {"unigram": unigram, "trigram": trigram}
