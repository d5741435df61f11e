"""Two kinds of rows in one batch, by exact counts: of every `group` consecutive rows the first `few` are of the first kind.

Rows are split so because each microbatch and each device then has the same share of both kinds.
"""

from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Split(NamedTuple):
    """The split of a batch in which `few` of every `group` rows are of the first kind."""

    few: int
    group: int

    def count(self, num: int) -> int:
        """Number of rows of the first kind among num rows, a multiple of `group`."""
        return num * self.few // self.group

    def join(self, first: jax.Array, second: jax.Array) -> jax.Array:
        """One batch [num, ...] of the rows of the first kind [count, ...] and of the second [num - count, ...]."""
        if self.few == 0:
            return second
        if self.few == self.group:
            return first
        parts = (a.reshape(-1, n, *a.shape[1:]) for a, n in ((first, self.few), (second, self.group - self.few)))
        return jnp.concatenate(list(parts), 1).reshape(-1, *first.shape[1:])

    def apart(self, batch: Any) -> tuple[Any, Any]:
        """(rows of the first kind, rows of the second kind) of a tree of arrays [B, ...]; None stays None."""

        def part(pick):
            return jax.tree.map(
                lambda a: a.reshape(-1, self.group, *a.shape[1:])[:, pick].reshape(-1, *a.shape[1:]), batch
            )

        return part(slice(0, self.few)), part(slice(self.few, None))


def split_of(share: float, key: str, below: bool = False) -> Split:
    """The split with this share. Raises ValueError unless `share` is a fraction with a denominator of at most 16.

    Args:
      share: share of the rows of the first kind.
      key: the setting's name in the message.
      below: whether the share must be less than 1.
    """
    exact = Fraction(share).limit_denominator(16)
    if abs(float(exact) - share) > 1e-6 or (below and exact == 1):
        near = exact if exact < 1 or not below else Fraction(15, 16)
        raise ValueError(
            f"objective.{key} {share} must be a fraction{' below 1' if below else ''} with a denominator of at most 16, such as "
            f"{near}: rows are split by exact counts"
        )
    return Split(exact.numerator, exact.denominator)
