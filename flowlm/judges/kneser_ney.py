"""Interpolated Kneser-Ney over characters (Kneser & Ney 1995, in the form of Chen & Goodman 1999), as a judge.

Let c be the k - 1 characters before w, and c' be c without its first character. Then

    P_k(w | c) = max(N_k(c w) - D_k, 0) / N_k(c .) + D_k T_k(c) / N_k(c .) P_{k-1}(w | c'),      P_0 = 1 / (A + 1)

At the highest order N_k counts occurrences. At lower orders N_k counts the distinct characters seen before the k-gram, within
the distinct n-grams of the highest order; so k-grams at the very beginning of the text, which end no such n-gram, do not
count. N_k(c .) is the sum of N_k(c w) over w, and T_k(c) the number of distinct w seen after c. For a context never seen, P_k
is P_{k-1}. Each order has one discount, D_k = n_1 / (n_1 + 2 n_2), where n_r is the number of k-grams with count r. The
alphabet is the A characters of the training text and one symbol for all others, so P sums to one over A + 1 symbols.
"""

import functools
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from flowlm.judges.base import mean_with_stderr

ORDER = 5  # characters in the longest grams of the usual model


def code_points(text: str) -> np.ndarray:
    """The Unicode code points of a text, uint32 [len]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def lookup(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index, found) of each key in a sorted table; index is 0 where the key was not found."""
    index = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    found = table[index] == keys
    return np.where(found, index, 0), found


class Order(NamedTuple):
    """The tables of one order k. A k-gram is the integer whose digits in base A + 1 are its characters."""

    grams: np.ndarray  # [G] int64, sorted
    share: np.ndarray  # [G] max(N_k(c w) - D_k, 0) / N_k(c .)
    contexts: np.ndarray  # [C] int64, sorted
    backoff: np.ndarray  # [C] D_k T_k(c) / N_k(c .)

    @classmethod
    def from_counts(cls, grams: np.ndarray, counts: np.ndarray, base: int) -> "Order":
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        # If no k-gram has count 1 the formula gives 0, and then unseen characters would have no probability.
        discount = once / (once + 2 * twice) if once else 0.5
        contexts, first, types = np.unique(grams // base, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)
        share = np.maximum(counts - discount, 0) / np.repeat(totals, types)
        return cls(grams, share, contexts, discount * types / totals)


class KneserNey:
    """A fitted model: the alphabet and the counts of the highest order, from which the counts of all lower orders follow.

    Its metric is `nats_per_char`, total nats / total characters over all texts, with the delta method's standard error over
    texts. Every text is scored from its own beginning. Read the metric beside `Statistics`, because copies of the corpus
    score very low.
    """

    main = ("nats_per_char",)
    meanings: ClassVar[dict[str, str]] = {
        "nats_per_char": "a character model's surprise; less is better, but see entropy"
    }

    def __init__(self, order: int, alphabet: np.ndarray, grams: np.ndarray, counts: np.ndarray):
        """`alphabet` [A] sorted code points; `grams` [G] sorted codes of the `order`-grams with their `counts` [G]."""
        self.order, self.alphabet, self.grams, self.counts = order, alphabet, grams, counts

    @property
    def note(self) -> str | None:
        """A remark for tables if the alphabet is too large for the usual order; otherwise None."""
        if self.base**ORDER < 2**63:
            return None
        return (
            f"nats / char is of a {self.order}-gram model, not a {ORDER}-gram one: {len(self.alphabet):,} different "
            "characters are too many for that"
        )

    @property
    def base(self) -> int:
        """Number of symbols, A + 1."""
        return len(self.alphabet) + 1

    @classmethod
    def fit(cls, text: str, order: int = ORDER) -> "KneserNey":
        """Counts the `order`-grams of a text, or shorter ones if `order` digits of its alphabet do not fit in 63 bits.

        Raises:
          ValueError: the text is shorter than `order`.
        """
        if not 1 <= order <= len(text):
            raise ValueError(f"order must lie between 1 and the text's {len(text)} characters; got {order}.")
        points = code_points(text)
        alphabet = np.unique(points)
        codes = np.searchsorted(alphabet, points)
        base = len(alphabet) + 1
        order = max(k for k in range(1, order + 1) if base**k < 2**63)
        keys = np.zeros(len(codes) - order + 1, np.int64)
        for offset in range(order):
            keys *= base
            keys += codes[offset : offset + len(keys)]
        return cls(order, alphabet, *np.unique(keys, return_counts=True))

    @functools.cached_property
    def orders(self) -> list[Order]:
        """The tables of orders 1 to `order`."""
        orders, grams, counts = [], self.grams, self.counts
        for k in range(self.order, 0, -1):
            orders.insert(0, Order.from_counts(grams, counts, self.base))
            grams, counts = np.unique(grams % self.base ** (k - 1), return_counts=True)
        return orders

    def log_prob(self, text: str) -> np.ndarray:
        """ln P(character | up to order - 1 characters before it), nats, float64 [len(text)]."""
        return self.log_probs([text])[0]

    def log_probs(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`log_prob` of many texts, each from its own beginning; one pass over all texts keeps many short ones cheap."""
        sizes = [len(text) for text in texts]
        codes, known = lookup(self.alphabet, code_points("".join(texts)))
        codes = np.where(known, codes, len(self.alphabet))
        ends = np.cumsum(sizes)
        place = np.arange(len(codes)) - np.repeat(ends - sizes, sizes)
        keys = np.zeros(len(codes), np.int64)
        prob = np.full(len(codes), 1 / self.base)
        for k, table in enumerate(self.orders, 1):
            # keys[i] is the k-gram that ends at character i; a text's first k - 1 characters keep the lower order's.
            whole = np.flatnonzero(place >= k - 1)
            keys[whole] += codes[whole - (k - 1)] * self.base ** (k - 1)
            context, seen = lookup(table.contexts, keys[whole] // self.base)
            gram, hit = lookup(table.grams, keys[whole])
            lower = prob[whole] * np.where(seen, table.backoff[context], 1)
            prob[whole] = lower + np.where(hit, table.share[gram], 0)
        return np.split(np.log(prob), ends[:-1])

    def score(self, ids: np.ndarray, texts: Sequence[str]) -> dict[str, float]:
        """{nats_per_char, its _stderr}: NaN if all texts are empty. The ids are not read."""
        nats = [-each.sum() for each in self.log_probs(texts)]
        return mean_with_stderr("nats_per_char", nats, [len(text) for text in texts])
