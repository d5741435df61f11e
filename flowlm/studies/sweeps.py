"""Sweeps: points in the space of settings, made by four operations; each point is an ordinary run of a study.

    sweep("objective.target", ("psd", "lsd"))   one point for each value
    product(a, b)                               every point of a with every one of b, the last varying fastest
    zipped(a, b)                                the i-th of a with the i-th of b
    chain(a, b)                                 those of a, then those of b

A point is {key: value}; its key is a setting's path in the experiment, or `teacher`, which names a run of the same study.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from flowlm.studies.study import Run

Point = Mapping[str, object]


def sweep(key: str, values: Iterable[object]) -> list[Point]:
    """{key: value} for each of the values."""
    return [{key: value} for value in values]


def _merged(points: Iterable[Point]) -> Point:
    out: dict[str, object] = {}
    for point in points:
        if both := out.keys() & point.keys():
            raise ValueError(f"{', '.join(sorted(both))} is set by two of the sweeps that are joined")
        out |= point
    return out


def product(*sweeps: Sequence[Point]) -> list[Point]:
    """Every choice of one point from each. Raises ValueError where two set one key."""
    return [_merged(points) for points in itertools.product(*sweeps)]


def zipped(*sweeps: Sequence[Point]) -> list[Point]:
    """Points side by side. Raises ValueError where there are not as many in each, or two set one key."""
    if len({len(points) for points in sweeps}) > 1:
        raise ValueError(f"sweeps of {', '.join(str(len(points)) for points in sweeps)} points cannot be zipped")
    return [_merged(points) for points in zip(*sweeps, strict=True)]


def chain(*sweeps: Sequence[Point]) -> list[Point]:
    """One after the other."""
    return [point for points in sweeps for point in points]


def name(point: Point) -> str:
    """The point's name, and its run's directory: the last part of each key with its value, in the order they were joined."""
    parts = (
        f"{key.rpartition('.')[2]}={str(value).lower() if value is None else value}" for key, value in point.items()
    )
    return "+".join(re.sub(r"[^\w.=-]+", "_", part) for part in parts)


def runs(
    points: Sequence[Point],
    config: str,
    settings: Mapping[str, object] | None = None,
    teacher: str | None = None,
    seeds: tuple[int, ...] = (0,),
) -> list[Run]:
    """A run of each point over the common settings of an experiment. A point's own `teacher` takes the place of `teacher`.

    A point that has None for it says so to its run, because an experiment that distils wants a teacher or that word.
    """
    made = []
    for point in points:
        own = {key: value for key, value in point.items() if key != "teacher" or value is None}
        made.append(Run(name(point), config, {**(settings or {}), **own}, point.get("teacher", teacher), seeds))
    return made
