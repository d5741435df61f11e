"""The context-free reference: the law of a token given only its position in the row.

Token v occurs n_lv times at position l of N rows. With u the law of tokens at all positions behind the start token, smoothed
by half a token of each kind,
    p_l(v) = (n_lv + s u(v)) / (N + s),
where the strength s of the shrinkage is the one of `STRENGTHS` that maximises the leave-one-out likelihood: the sum
over tokens of log p_l(v), where each token is left out of n_lv, N and u for its own term. The positions behind the start
token share one strength. The start token's position has another, because u does not count the tokens there.
"""

import numpy as np

STRENGTHS = (*(10.0**k for k in range(7)), np.inf)

_PRIOR_COUNT = 0.5


def log_marginals(counts: np.ndarray) -> np.ndarray:
    """Logs float32 [length, V] of the marginals, in nats, never -inf, from counts int [length, V] of 2 or more rows."""
    unigrams = counts[1:].sum(0, dtype=np.int64) + _PRIOR_COUNT
    law = unigrams / unigrams.sum()
    num_rows = counts[0].sum()
    strengths = [_best_strength(counts[:1], unigrams, num_rows, 0)]
    strengths += [_best_strength(counts[1:], unigrams, num_rows, 1)] * (len(counts) - 1)
    logs = np.empty(counts.shape, np.float32)
    for log, count, strength in zip(logs, counts, strengths):
        log[:] = np.log(_shrunk(count, num_rows, law, strength))
    return logs


def _shrunk(count: np.ndarray, total: int, law: np.ndarray, strength: float) -> np.ndarray:
    return law if np.isinf(strength) else (count + strength * law) / (total + strength)


def _best_strength(counts: np.ndarray, unigrams: np.ndarray, num_rows: int, share: int) -> float:
    """The strength with the best leave-one-out likelihood; `share` is what one token adds to `unigrams`: 0 or 1."""
    total = dict.fromkeys(STRENGTHS, 0.0)
    for count in counts:  # one position at a time, because all that were ever seen may be a gigabyte
        (tokens,) = np.nonzero(count)
        seen, law = count[tokens], (unigrams[tokens] - share) / (unigrams.sum() - share)
        for strength in STRENGTHS:
            total[strength] += seen @ np.log(_shrunk(seen - 1, num_rows - 1, law, strength))
    return max(STRENGTHS, key=total.get)
