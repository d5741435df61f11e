"""Judges of generated text. A judge reads samples, as token ids and as text, and returns named numbers.

    score(ids: int [N, L], texts: N strings) -> {metric: float}

Row i of `ids` and text i are the same sample. Keys come in a fixed order. A metric that is a mean over samples is
followed by its standard error under `<metric>_stderr`. A metric that cannot be computed on the given samples is NaN,
never absent.

A metric's key is its name in evaluation.json, metrics.jsonl and the CSV of a study or a report; tables and pictures show
`shown(key)`. The judge that computes a metric is the only place that says what it means.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np


class Judge(Protocol):
    """Any object with this `score` is a judge; it may lack `main` and `meanings`.

    Attributes:
      main: the metrics to read first, in order; a table shows these if it has no room for all.
      meanings: {metric: what it is, and what is better}, each short enough for one line of 80 columns behind its name.
    """

    main: Sequence[str]
    meanings: Mapping[str, str]

    def score(self, ids: np.ndarray, texts: Sequence[str]) -> dict[str, float]: ...


def shown(metric: str) -> str:
    """A metric's name as people read it: `nats_per_char` is "nats / char", `nll_minus_entropy` is "nll - entropy"."""
    return metric.replace("_per_", " / ").replace("_minus_", " - ").replace("_", " ")


def mean_with_stderr(name: str, values: np.ndarray, sizes: np.ndarray | None = None) -> dict[str, float]:
    """The pooled mean sum(values) / sum(sizes) over N independent samples, and its standard error.

    The error is the delta method's for a ratio of means, sqrt(N / (N - 1) sum_i (values_i - mean sizes_i)^2) / sum(sizes).
    Both are NaN if the sizes sum to zero; the error is NaN also for fewer than two samples.

    Args:
      values: [N] totals per sample.
      sizes: [N] divisors of the totals. Without them every size is 1, and the result is the plain mean with s / sqrt(N).
    """
    values = np.asarray(values, np.float64)
    sizes = np.ones_like(values) if sizes is None else np.asarray(sizes, np.float64)
    count, size = len(values), sizes.sum()
    mean = values.sum() / size if size > 0 else np.nan
    spread = np.square(values - mean * sizes).sum()
    stderr = np.sqrt(count / (count - 1) * spread) / size if count > 1 and size > 0 else np.nan
    return {name: float(mean), f"{name}_stderr": float(stderr)}


def score_all(
    judges: Sequence[Judge], ids: np.ndarray, texts: Sequence[str], before: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Every judge's metrics in one dict, in the order of the judges. Calls `before` before each judge.

    Raises:
      ValueError: `ids` and `texts` differ in number, there are no samples, or two judges report the same metric.
    """
    if len(ids) != len(texts) or len(ids) == 0:
        raise ValueError(f"Judges need one text a row and at least one row; got {len(ids)} rows, {len(texts)} texts.")
    scores = {}
    for judge in judges:
        before()
        new = judge.score(ids, texts)
        if clash := sorted(scores.keys() & new.keys()):
            raise ValueError(
                f"{type(judge).__name__} reports {clash}, which an earlier judge reported already: "
                "pass each judge once, or give one of the metrics another name."
            )
        scores |= new
    return scores
