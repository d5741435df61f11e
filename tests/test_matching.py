"""Interpolation at a diversity, and its error against repetitions of the experiment."""

import numpy as np
import pytest

from flowlm.studies.matching import Point, at_diversity, matched

POINTS = [Point(3.0, 4.0, 0.1, 0.02), Point(2.0, 1.0, 0.2, 0.03), Point(2.5, 2.0, 0.05, 0.01)]


def test_between_two_points_and_beyond_them():
    assert at_diversity(POINTS, 2.75)[:2] == (2.75, 3.0)
    assert at_diversity(POINTS, 2.125)[:2] == (2.125, 1.25)
    assert at_diversity(POINTS, 3.5)[:2] == (3.0, 4.0)
    assert at_diversity(POINTS[:1], 2.0)[:2] == (3.0, 4.0)
    with pytest.raises(ValueError, match="nothing to match"):
        at_diversity([], 2.0)


def test_the_error_counts_values_and_diversities():
    """Of a line through two points, by the delta method: the value's errors, and the diversities' times the slope."""
    low, high = Point(2.0, 1.0, 0.03, 0.02), Point(3.0, 5.0, 0.05, 0.01)
    ends = [(0.75 * point.stderr, 0.75 * 4 * point.diversity_stderr) for point in (low,)]
    ends += [(0.25 * high.stderr, 0.25 * 4 * high.diversity_stderr)]
    expected = np.sqrt(np.square(ends).sum())
    assert at_diversity([low, high], 2.25).stderr == pytest.approx(expected, rel=0.1)
    assert at_diversity([low], 2.0).stderr == pytest.approx(0.03, rel=0.1)


@pytest.mark.parametrize(("metric", "kept"), [("grammatical", 0.5), ("nats_per_char", 0.3)])
def test_which_of_two_settings_of_one_diversity_is_the_better_one(metric, kept):
    """More grammatical rows are better, and fewer nats."""
    record = {"method": "m", "seed": 0, "sampler": "map", "sampling_steps": 1, "nll_minus_entropy": -0.7}
    rows = [record | {metric: value} for value in (0.3, 0.5)]
    (point,) = matched(rows, [metric], -0.7, "nll_minus_entropy")["m, map", 1]
    assert point[:2] == (-0.7, kept)
