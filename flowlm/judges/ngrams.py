"""How far samples are from real text by counting alone: no language model can be fooled where there is none.

    ngram_distance_n = 1/2 sum_g |p(g) - q(g)|,   n = 1 .. 5

the total variation between the laws of token n-grams of the samples and of held-out rows. It has a floor: real text is at
some distance from other real text, the more the larger n is and the fewer rows there are. That floor is the held-out row of
every table (as many rows of another split), and only what lies above it counts. ngram_distance_1 sees the marginals,
ngram_distance_2 adjacent pairs; a sampler with the right pairs and nothing more has a low one and a high ngram_distance_5.
"""

from collections.abc import Sequence

import numpy as np

from flowlm.judges.statistics import ngram_codes

ORDERS = (1, 2, 3, 4, 5)


def numbered(a: np.ndarray, b: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """A number for every n-gram inside the rows of a [N, L] and b [M, L], the same for the same n-gram; -1 joins none."""
    codes = ngram_codes(np.concatenate([a, b]), n)
    first, second = (part[part >= 0] for part in (codes[: len(a)], codes[len(a) :]))
    numbers = np.unique(np.concatenate([first, second]), return_inverse=True)[1]
    return numbers[: len(first)], numbers[len(first) :]


def total_variation(a: np.ndarray, b: np.ndarray) -> float:
    """Half the summed difference between the shares of numbers in a and in b; NaN where one is empty."""
    if not len(a) or not len(b):
        return float("nan")
    size = max(a.max(), b.max()) + 1
    shares = [np.bincount(x, minlength=size) / len(x) for x in (a, b)]
    return float(np.abs(shares[0] - shares[1]).sum() / 2)


class NGrams:
    """Metrics: ngram_distance_1 .. ngram_distance_5, in [0, 1]. A start token in position 0 is left out."""

    def __init__(self, reference: np.ndarray, start: int):
        """`reference`: held-out ids int [M, L]. `start`: id of the start token."""
        self.start = start
        self.reference = self._framed(reference)

    def _framed(self, ids: np.ndarray) -> np.ndarray:
        tokens = np.array(ids, np.int64)
        tokens[tokens[:, 0] == self.start, 0] = -1
        return tokens

    def score(self, ids: np.ndarray, texts: Sequence[str]) -> dict[str, float]:
        tokens = self._framed(ids)
        return {
            f"ngram_distance_{n}": total_variation(*numbered(tokens, self.reference, n))
            for n in ORDERS
            if n < ids.shape[1]
        }
