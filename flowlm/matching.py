"""Quality at equal diversity: a perplexity moves with the entropy of the samples, so only figures at one entropy compare.

A sampler's knob (temperature, noise scale, gamma) is swept; each setting is a point (entropy, value). Between the two points next
to the target entropy the value is interpolated linearly. Values are in nats, so this interpolates the logarithm of a perplexity
(2609.40235). A target that no setting reaches is not extrapolated to: the nearest point is given, with its entropy. The error is
a parametric bootstrap's: entropies and values are drawn anew within their standard errors, and the interpolation is repeated.
"""

import itertools
from collections import defaultdict
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


def matched(records: Sequence[dict], metrics: Sequence[str], entropy: float) -> dict[tuple, list[Point | None]]:
    """{(method, steps): a point for each metric}, each method's at this entropy in nats, or the nearest it reaches.

    Of several seeds mean and standard deviation, of one the bootstrap's error. Held-out rows and the naive samplers, which have
    no knob, stand as they are. A method may have several knobs: a setting that another one beats in the first metric, at no
    less entropy, is left out.

    Args:
      records: one for each method, seed, setting of the sampler and number of steps.
    """
    curves: dict[tuple, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        sampler = record["sampler"].split(" ")[0]
        method = f"{record['method']}, {sampler}" if sampler else record["method"]
        curves[method, record["steps"] or ""][record["seed"]].append(record)
    return {
        cell: [_at([_best(rows, metrics[0]) for rows in seeds.values()], metric, entropy) for metric in metrics]
        for cell, seeds in curves.items()
    }


def _best(records: Sequence[dict], metric: str) -> list[dict]:
    """The settings of a sampler that none of the others beats: lower in the metric, and at least as diverse."""
    known = [row for row in records if row.get(metric) is not None and row.get("entropy") is not None]
    beaten = [row for row in known if any(o[metric] < row[metric] and o["entropy"] >= row["entropy"] for o in known)]
    return [row for row in records if row not in beaten]


def _at(seeds: Sequence[Sequence[dict]], metric: str, target: float) -> Point | None:
    """Of every seed the records of one sampler at all its settings."""
    points = []
    for records in seeds:
        usable = [row for row in records if row.get(metric) is not None and row.get("entropy") is not None]
        keys = ("entropy", metric, f"{metric}_stderr", "entropy_stderr")
        if usable:
            points.append(at_entropy([Point(*(row.get(key) or 0.0 for key in keys)) for row in usable], target))
    if not points:
        return None
    values, entropy = [point.value for point in points], float(np.mean([point.entropy for point in points]))
    spread = np.std(values, ddof=1) if len(points) > 1 else points[0].stderr
    return Point(entropy, float(np.mean(values)), float(spread))
