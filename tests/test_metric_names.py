"""Names of evaluated metrics: made and read in one place, and the same as in everything that was published."""

import json
from pathlib import Path

import pytest

from flowlm.runs.metrics import (
    by_row,
    held_out_key,
    is_evaluated,
    of_held_out,
    parse_held_out_key,
    parse_row,
    parse_sample_key,
    row_name,
    sample_key,
)

ROOT = Path(__file__).parents[1]


def kept_metrics(record):
    """The metrics of every evaluation in a record, however deep it lies."""
    if isinstance(record, dict):
        if isinstance(record.get("metrics"), dict):
            yield record["metrics"]
        for inside in record.values():
            yield from kept_metrics(inside)


def test_every_published_key_is_read_and_made_again():
    keys = {
        key
        for file in (ROOT / "results").rglob("*.json")
        for metrics in kept_metrics(json.loads(file.read_text()))
        for key in metrics
    }
    assert len(keys) > 500
    for key in keys:
        sample, held_out = parse_sample_key(key), parse_held_out_key(key)
        assert (sample is None) != (held_out is None), key
        assert (sample_key(*sample) if sample else held_out_key(*held_out)) == key


@pytest.mark.parametrize(
    ("key", "sample", "held_out"),
    [
        ("samples/map-noise0.5@16/entropy_stderr", ("map-noise0.5", 16, "entropy_stderr"), None),
        ("samples/held_out/grammatical", ("held_out", None, "grammatical"), None),
        ("samples/4-gram/nats", ("4-gram", None, "nats"), None),
        ("samples/map@1/folder/judge_nats", ("map", 1, "folder/judge_nats"), None),
        ("held_out/cross_entropy@0.25", None, ("cross_entropy", "0.25")),
        ("held_out/bound_nats_per_token", None, ("bound_nats_per_token", None)),
        ("loss", None, None),
        ("samples", None, None),
        ("learning_rate", None, None),
    ],
)
def test_a_key_says_what_it_is_of(key, sample, held_out):
    assert (parse_sample_key(key), parse_held_out_key(key)) == (sample, held_out)
    assert is_evaluated(key) == (sample is not None or held_out is not None)


def test_a_row_is_a_sampler_at_its_steps_or_one_of_reference():
    for name, row in (("map@8", ("map", 8)), ("trigram", ("trigram", None)), ("map temp0.5@2", ("map temp0.5", 2))):
        assert parse_row(name) == row and row_name(*row) == name
    assert parse_row("a@b") == ("a@b", None)


def test_metrics_by_row_and_by_warped_time():
    metrics = {
        "loss": 9.0,
        "held_out/cross_entropy@0.5": 2.0,
        "held_out/cross_entropy@0.05": 3.0,
        "held_out/cross_entropy": 2.5,
        "samples/map@1/entropy": 1.0,
        "samples/map@1/nats": None,
        "samples/held_out/entropy": 4.0,
    }
    assert by_row(metrics) == {"map@1": {"entropy": 1.0, "nats": None}, "held_out": {"entropy": 4.0}}
    whole, at = of_held_out(metrics)
    assert whole == {"cross_entropy": 2.5}
    assert list(at.items()) == [("0.05", {"cross_entropy": 3.0}), ("0.5", {"cross_entropy": 2.0})]


def test_no_other_file_makes_or_reads_them():
    marks = ('"samples/', '"held_out/', 'partition("@")', 'split("@")', '"@" in')
    files = [*(ROOT / "flowlm").rglob("*.py"), *(ROOT / "docs/hooks").rglob("*.py")]
    found = {file.relative_to(ROOT).as_posix() for file in files if any(mark in file.read_text() for mark in marks)}
    assert found == {"flowlm/runs/metrics.py"}
