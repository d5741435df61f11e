"""Rows of two kinds in one batch, by exact counts: of every `group` rows that lie together the first `few` are of the one kind.

So each microbatch and each device has the same share of both.
"""

from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Split(NamedTuple):
    """few of group: the share of the first kind."""

    few: int
    group: int

    def count(self, num: int) -> int:
        """Rows of the first kind among num, a multiple of `group`."""
        return num * self.few // self.group

    def join(self, first: jax.Array, second: jax.Array) -> jax.Array:
        """[count, ...] and [num - count, ...] laid out as one batch [num, ...]."""
        if self.few == 0:
            return second
        if self.few == self.group:
            return first
        parts = (a.reshape(-1, n, *a.shape[1:]) for a, n in ((first, self.few), (second, self.group - self.few)))
        return jnp.concatenate(list(parts), 1).reshape(-1, *first.shape[1:])

    def apart(self, batch: Any) -> tuple[Any, Any]:
        """(rows of the first kind, the others) of a tree of arrays [B, ...]; None stays None."""

        def part(pick):
            return jax.tree.map(
                lambda a: a.reshape(-1, self.group, *a.shape[1:])[:, pick].reshape(-1, *a.shape[1:]), batch
            )

        return part(slice(0, self.few)), part(slice(self.few, None))


def split_of(share: float, key: str, below: bool = False) -> Split:
    """The split of a setting called `key`. Raises ValueError unless it is a fraction with a denominator of at most 16.

    Args:
      below: it must be less than 1.
    """
    exact = Fraction(share).limit_denominator(16)
    if abs(float(exact) - share) > 1e-6 or (below and exact == 1):
        near = exact if exact < 1 or not below else Fraction(15, 16)
        raise ValueError(
            f"objective.{key} {share} must be a fraction{' below 1' if below else ''} with a denominator of at most 16, such as "
            f"{near}: rows are split by exact counts"
        )
    return Split(exact.numerator, exact.denominator)
