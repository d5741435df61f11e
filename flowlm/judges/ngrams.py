"""How far samples are from real text, by counting n-grams: a judge that no sample can fool as it can fool a language model.

    ngram_distance_n = 1/2 sum_g |p(g) - q(g)|,   n = 1 .. 5

the total variation between the laws of token n-grams of the samples and of held-out rows. It has a floor, because real text is
at some distance from other real text: a larger one for larger n and for fewer rows. The held-out row of every table shows that
floor (from as many rows of another split), and only a distance above it counts. ngram_distance_1 sees the marginals,
ngram_distance_2 adjacent pairs. A sampler that gets only pairs right has a low ngram_distance_2 and a high ngram_distance_5.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from flowlm.judges.statistics import ngram_codes

ORDERS = (1, 2, 3, 4, 5)
BASE = 2**32  # above every token id


class Table(NamedTuple):
    """The n-grams of some rows, in lexicographic order.

    Attributes:
      grams: [G] int64, sorted: (place of the first n - 1 tokens in the table of order n - 1) x BASE + last token.
      shares: [G] each n-gram's share of all n-grams.
    """

    grams: np.ndarray
    shares: np.ndarray

    def place(self, prefix: np.ndarray, known: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(place, there) of n-grams: the place where the table has or would have each one, and whether it has the n-gram.

        Args:
          prefix: places of their first n - 1 tokens in the table of order n - 1.
          known: whether that table has these.
          last: their last tokens.
        """
        wanted = prefix * BASE + np.where(known, last, 0)
        place = np.searchsorted(self.grams, wanted)
        there = (
            self.grams[np.minimum(place, len(self.grams) - 1)] == wanted if len(self.grams) else np.zeros_like(known)
        )
        return place, there & known


def tables(tokens: np.ndarray) -> list[Table]:
    """Tables of the ORDERS up to L, of rows of ids [N, L]; a negative id is no token."""
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


def framed(ids: np.ndarray, start: int, pad: int | None) -> np.ndarray:
    """ids [N, L] as int64, -1 in place of a start token in position 0 and of pads."""
    tokens = np.array(ids, np.int64)
    tokens[tokens[:, 0] == start, 0] = -1
    return tokens if pad is None else np.where(tokens == pad, -1, tokens)


class NGrams:
    """A judge with the metrics ngram_distance_1 .. ngram_distance_5, in [0, 1]. It ignores a start token in position 0, and pads.

    Samples are looked up in tables of the reference, which are counted once.
    """

    main = ("ngram_distance_2",)
    meanings: ClassVar[dict[str, str]] = {
        f"ngram_distance_{n}": f"how far {n}-grams are from real text's, 0 to 1; less is better" for n in ORDERS
    }

    def __init__(self, reference: Sequence[Table], start: int, pad: int | None = None):
        """Makes a judge of the reference's tables. `start`, `pad`: ids of the start token and of pads."""
        self.reference, self.start, self.pad = reference, start, pad

    @classmethod
    def fit(cls, rows: np.ndarray, start: int, pad: int | None = None) -> "NGrams":
        """Counts the held-out rows, ids int [M, L]."""
        return cls(tables(framed(rows, start, pad)), start, pad)

    def score(self, ids: np.ndarray, texts: Sequence[str]) -> dict[str, float]:
        tokens = framed(ids, self.start, self.pad)
        place, known = np.zeros(tokens.shape, np.int64), np.ones(tokens.shape, bool)
        distances = {}
        for n, table in zip(ORDERS, self.reference):
            last = tokens[:, n - 1 :]
            place, known = table.place(place[:, : last.shape[1]], known[:, : last.shape[1]], last)
            if n < ids.shape[1]:
                distances[f"ngram_distance_{n}"] = self._distance(table, ngram_codes(tokens, n), place, known)
        return distances

    @staticmethod
    def _distance(table: Table, codes: np.ndarray, place: np.ndarray, known: np.ndarray) -> float:
        """The total variation between a table's n-grams and the samples'; NaN if either has no n-grams.

        Args:
          table: of the reference.
          codes: numbers of the samples' n-grams in lexicographic order; -1 where a token is missing.
          place: `Table.place` of these n-grams.
          known: whether the table has them, likewise.
        """
        whole = codes >= 0
        _, first, counts = np.unique(codes[whole], return_index=True, return_counts=True)
        if not len(first) or not len(table.grams):
            return float("nan")
        shares, place, known = counts / counts.sum(), place[whole][first], known[whole][first]
        apart = table.shares.copy()
        apart[place[known]] = np.abs(table.shares[place[known]] - shares[known])
        # The sum runs in lexicographic order, so that its rounding does not depend on which side has an n-gram.
        return float(np.insert(apart, place[~known], shares[~known]).sum() / 2)
