"""Quality at equal diversity: a perplexity moves with the entropy of the samples, so only figures at one entropy compare.

A sampler's knob (temperature, noise scale, gamma) is swept; each setting is a point (entropy, value). Between the two points next
to the target entropy the value is interpolated linearly. Values are in nats, so this interpolates the logarithm of a perplexity
(2609.40235). A target that no setting reaches is not extrapolated to: the nearest point is given, with its entropy. The error is
a parametric bootstrap's: entropies and values are drawn anew within their standard errors, and the interpolation is repeated.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

REPEATS = 1000


class Point(NamedTuple):
    """An entropy in nats and a value, each with its standard error."""

    entropy: float
    value: float
    stderr: float
    entropy_stderr: float = 0.0


def interpolate(points: Sequence[tuple[float, float]], target: float) -> tuple[float, float]:
    """(entropy, value): at the target on the line between the points next to it, or the nearest point there is."""
    points = sorted(points)
    for (low, below), (high, above) in itertools.pairwise(points):
        if low <= target <= high:
            share = (target - low) / (high - low) if high > low else 0.5
            return target, (1 - share) * below + share * above
    return min(points, key=lambda point: abs(point[0] - target))


def at_entropy(points: Sequence[Point], target: float) -> Point:
    """The point at the target entropy, or the nearest one there is: `entropy` says which. Raises ValueError without points."""
    if not points:
        raise ValueError("no sampler setting was evaluated: there is nothing to match")
    entropy, value = interpolate([point[:2] for point in points], target)
    centres = np.array([point[:2] for point in points])
    spreads = np.array([(point.entropy_stderr, point.stderr) for point in points])
    draws = np.random.default_rng(0).normal(centres, spreads, (REPEATS, *centres.shape))
    values = [interpolate([(e, v) for e, v in draw], target)[1] for draw in draws.tolist()]
    return Point(entropy, value, float(np.std(values, ddof=1)))
