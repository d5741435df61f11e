"""Quality at equal diversity: samples become likelier as they become more alike, so only figures at one diversity compare.

A sampler's knob (temperature, noise scale, gamma) is swept; each setting is a point (diversity, value). Diversity is the samples'
entropy on text, and on a grammar -log p minus the law's entropy. Between the two points next to the target the value is
interpolated linearly; values in nats are so interpolated as the logarithm of a perplexity (2609.40235). A target that no setting
reaches is not extrapolated to: the nearest point is given, with its diversity. The error is a parametric bootstrap's:
diversities and values are drawn anew within their standard errors, and the interpolation is repeated.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

REPEATS = 1000
# Metrics of which more is better; of all others less is.
MORE_IS_BETTER = ("grammatical", "distinct_rows", "words_in_corpus")


class Point(NamedTuple):
    """A diversity and a value, each with its standard error."""

    diversity: float
    value: float
    stderr: float
    diversity_stderr: float = 0.0


def interpolate(points: Sequence[tuple[float, float]], target: float) -> tuple[float, float]:
    """(diversity, value): at the target on the line between the points next to it, or the nearest point there is."""
    points = sorted(points)
    for (low, below), (high, above) in itertools.pairwise(points):
        if low <= target <= high:
            share = (target - low) / (high - low) if high > low else 0.5
            return target, (1 - share) * below + share * above
    return min(points, key=lambda point: abs(point[0] - target))


def at_diversity(points: Sequence[Point], target: float) -> Point:
    """The point at the target, or the nearest one there is: its `diversity` says which. Raises ValueError without points."""
    if not points:
        raise ValueError("no sampler setting was evaluated: there is nothing to match")
    diversity, value = interpolate([point[:2] for point in points], target)
    centres = np.array([point[:2] for point in points])
    spreads = np.array([(point.diversity_stderr, point.stderr) for point in points])
    draws = np.random.default_rng(0).normal(centres, spreads, (REPEATS, *centres.shape))
    values = [interpolate([(e, v) for e, v in draw], target)[1] for draw in draws.tolist()]
    return Point(diversity, value, float(np.std(values, ddof=1)))


def matched(
    records: Sequence[dict], metrics: Sequence[str], target: float, diversity: str = "entropy"
) -> dict[tuple, list[Point | None]]:
    """{(method, steps): a point for each metric}, each method's at this diversity, or the nearest it reaches.

    A point has the mean and standard deviation over seeds, or of one seed the bootstrap's error. Held-out rows and the naive
    samplers have no knob, so their figures are not interpolated. A method may have several knobs: a setting that another one
    beats in the first metric, at no less diversity, is left out.

    Args:
      records: one for each method, seed, setting of the sampler and number of steps.
      diversity: the metric, nats, that is made equal.
    """
    curves: dict[tuple, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        sampler = re.split("[- ]", record["sampler"])[0]  # earlier releases wrote a blank before a setting
        method = f"{record['method']}, {sampler}" if sampler else record["method"]
        curves[method, record["sampling_steps"] or ""][record["seed"]].append(record)
    return {
        cell: [
            _at([_unbeaten(rows, metrics[0], diversity) for rows in seeds.values()], metric, target, diversity)
            for metric in metrics
        ]
        for cell, seeds in curves.items()
    }


def _usable(records: Sequence[dict], *metrics: str) -> list[dict]:
    return [row for row in records if all(row.get(metric) is not None for metric in metrics)]


def _unbeaten(records: Sequence[dict], metric: str, diversity: str) -> list[dict]:
    """The settings of a sampler that none of the others beats: better in the metric, and at least as diverse."""
    sign = -1 if metric in MORE_IS_BETTER else 1
    known = _usable(records, metric, diversity)

    def beats(a, b):
        return sign * a[metric] < sign * b[metric] and a[diversity] >= b[diversity]

    beaten = [row for row in known if any(beats(other, row) for other in known)]
    return [row for row in records if row not in beaten]


def _at(seeds: Sequence[Sequence[dict]], metric: str, target: float, diversity: str) -> Point | None:
    """The point of one sampler in one metric; seeds: for each seed the records of all its settings."""
    points = []
    for records in seeds:
        keys = (diversity, metric, f"{metric}_stderr", f"{diversity}_stderr")
        usable = [Point(*(row.get(key) or 0.0 for key in keys)) for row in _usable(records, metric, diversity)]
        if usable:
            points.append(at_diversity(usable, target))
    if not points:
        return None
    values, reached = [point.value for point in points], float(np.mean([point.diversity for point in points]))
    spread = np.std(values, ddof=1) if len(values) > 1 else points[0].stderr
    return Point(reached, float(np.mean(values)), float(spread))
