"""Quality at equal diversity: a perplexity moves with the entropy of the samples, so only figures at one entropy compare.

A sampler's knob (temperature, noise scale, gamma) is swept; each setting is a point (entropy, value). Between the two points next
to the target entropy the value is interpolated linearly. Values are in nats, so this interpolates the logarithm of a perplexity
(2609.40235). A target that no setting reaches is not extrapolated to: the nearest point is given, with its entropy.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple


class Point(NamedTuple):
    """entropy, value and the value's standard error, all in nats."""

    entropy: float
    value: float
    stderr: float


def at_entropy(points: Sequence[Point], target: float) -> Point:
    """The point at the target entropy, or the nearest one there is: `entropy` says which. Raises ValueError without points."""
    if not points:
        raise ValueError("no sampler setting was evaluated: there is nothing to match")
    points = sorted(points)
    for low, high in itertools.pairwise(points):
        if low.entropy <= target <= high.entropy:
            share = (target - low.entropy) / (high.entropy - low.entropy) if high.entropy > low.entropy else 0.5
            value = (1 - share) * low.value + share * high.value
            return Point(target, value, (((1 - share) * low.stderr) ** 2 + (share * high.stderr) ** 2) ** 0.5)
    return min(points, key=lambda point: abs(point.entropy - target))
