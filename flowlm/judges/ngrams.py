"""How far samples are from real text by counting alone: no language model can be fooled where there is none.

    ngram_distance_n = 1/2 sum_g |p(g) - q(g)|,   n = 1 .. 5

the total variation between the laws of token n-grams of the samples and of held-out rows. It has a floor: real text is at
some distance from other real text, the more the larger n is and the fewer rows there are. That floor is the held-out row of
every table (as many rows of another split), and only what lies above it counts. ngram_distance_1 sees the marginals,
ngram_distance_2 adjacent pairs; a sampler with the right pairs and nothing more has a low one and a high ngram_distance_5.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from flowlm.judges.statistics import ngram_codes

ORDERS = (1, 2, 3, 4, 5)
BASE = 2**32  # above every token id


class Table(NamedTuple):
    """The n-grams of some rows, in lexicographic order: each the place of its first n - 1 tokens in their table, and its last one.

    Attributes:
      grams: [G] int64, sorted: place x BASE + last token.
      shares: [G] of all n-grams.
    """

    grams: np.ndarray
    shares: np.ndarray

    def place(self, prefix: np.ndarray, known: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(where n-grams are or would be, whether they are there).

        Args:
          prefix: where their first n - 1 tokens are in their own table.
          known: whether those are there.
          last: their last tokens.
        """
        wanted = prefix * BASE + np.where(known, last, 0)
        place = np.searchsorted(self.grams, wanted)
        there = (
            self.grams[np.minimum(place, len(self.grams) - 1)] == wanted if len(self.grams) else np.zeros_like(known)
        )
        return place, there & known


def tables(tokens: np.ndarray) -> list[Table]:
    """Tables of the orders 1, 2, ... of rows of ids [N, L] of which negative ones are no token, as many as L allows."""
    found: list[Table] = []
    place, whole = np.zeros(tokens.shape, np.int64), np.ones(tokens.shape, bool)
    for n in ORDERS:
        if n > tokens.shape[1]:
            break
        last = tokens[:, n - 1 :]
        place, whole = place[:, : last.shape[1]], whole[:, : last.shape[1]] & (last >= 0)
        grams, numbers, counts = np.unique(place[whole] * BASE + last[whole], return_inverse=True, return_counts=True)
        found.append(Table(grams, counts / max(len(numbers), 1)))
        place = np.zeros(last.shape, np.int64)
        place[whole] = numbers
    return found


class NGrams:
    """Metrics: ngram_distance_1 .. ngram_distance_5, in [0, 1]. A start token in position 0 and pads are left out.

    The reference is counted once, when the judge is made; samples are looked up in its tables.
    """

    main = ("ngram_distance_2",)
    meanings: ClassVar[dict[str, str]] = {
        f"ngram_distance_{n}": f"how far {n}-grams are from real text's, 0 to 1; less is better" for n in ORDERS
    }

    def __init__(self, reference: np.ndarray, start: int, pad: int | None = None):
        """`reference`: held-out ids int [M, L]. `start`, `pad`: ids of the start token and of pads."""
        self.start, self.pad = start, pad
        self._reference = tables(self._framed(reference))

    def _framed(self, ids: np.ndarray) -> np.ndarray:
        tokens = np.array(ids, np.int64)
        tokens[tokens[:, 0] == self.start, 0] = -1
        return tokens if self.pad is None else np.where(tokens == self.pad, -1, tokens)

    def score(self, ids: np.ndarray, texts: Sequence[str]) -> dict[str, float]:
        tokens = self._framed(ids)
        place, known = np.zeros(tokens.shape, np.int64), np.ones(tokens.shape, bool)
        distances = {}
        for n, table in zip(ORDERS, self._reference):
            last = tokens[:, n - 1 :]
            place, known = table.place(place[:, : last.shape[1]], known[:, : last.shape[1]], last)
            if n < ids.shape[1]:
                distances[f"ngram_distance_{n}"] = self._distance(table, ngram_codes(tokens, n), place, known)
        return distances

    @staticmethod
    def _distance(table: Table, codes: np.ndarray, place: np.ndarray, known: np.ndarray) -> float:
        """The total variation of `table` and samples' n-grams, of which `place` and `known` say where they are in it.

        codes: their numbers in lexicographic order, -1 for what is no n-gram. NaN where there is none on one side.
        """
        whole = codes >= 0
        _, first, counts = np.unique(codes[whole], return_index=True, return_counts=True)
        if not len(first) or not len(table.grams):
            return float("nan")
        shares, place, known = counts / counts.sum(), place[whole][first], known[whole][first]
        apart = table.shares.copy()
        apart[place[known]] = np.abs(table.shares[place[known]] - shares[known])
        # One order of summing, whichever side an n-gram is on.
        return float(np.insert(apart, place[~known], shares[~known]).sum() / 2)
