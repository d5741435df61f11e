"""Where numbers go: one JSON line a step, and boards (boards.py) if asked.

They go to metrics.jsonl. A bucket has no appending, so there they go to parts, metrics/000000.jsonl and so on, of which only the
last one is written anew with a line. Reading joins whatever of both is there.

The names of what an evaluation measures are made and read here alone, because files and tables are keyed by them:

    samples/SAMPLER@STEPS/METRIC   of a sampler's samples, drawn in so many steps
    samples/ROWS/METRIC            of rows of reference, which take no steps: real ones (held_out), and counted ones
    held_out/METRIC@TAU            of held-out rows at one warped time; held_out/METRIC where there is none
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flowlm.runs.boards import Board
from flowlm.system import storage

PART = 100  # lines in a part that is full


def row_name(sampler: str, steps: int | None = None) -> str:
    """SAMPLER@STEPS, or what rows of reference are called: it names a block of samples, and a line of a table."""
    return sampler if steps is None else f"{sampler}@{steps}"


def parse_row(name: str) -> tuple[str, int | None]:
    """(sampler, steps) of a `row_name`; (name, None) of a name that does not end in steps."""
    found = re.fullmatch(r"(.*)@(\d+)", name)
    return (name, None) if found is None else (found[1], int(found[2]))


def sample_key(sampler: str, steps: int | None, metric: str) -> str:
    """The name of a metric of samples, or with steps None of rows of reference."""
    return f"samples/{row_name(sampler, steps)}/{metric}"


def parse_sample_key(key: str) -> tuple[str, int | None, str] | None:
    """(sampler or rows of reference, steps or None, metric) of a `sample_key`; None of any other key."""
    found = re.fullmatch(r"samples/([^/]+)/(.+)", key)
    return None if found is None else (*parse_row(found[1]), found[2])


def held_out_key(metric: str, tau: float | str | None = None) -> str:
    """The name of a metric of held-out rows, at one warped time if there is one."""
    return f"held_out/{metric}" if tau is None else f"held_out/{metric}@{tau}"


def parse_held_out_key(key: str) -> tuple[str, str | None] | None:
    """(metric, warped time as it is spelled, or None) of a `held_out_key`; None of any other key."""
    found = re.fullmatch(r"held_out/([^/@]+)(?:@([^/@]+))?", key)
    return None if found is None else (found[1], found[2])


def is_evaluated(key: str) -> bool:
    """Whether a key is one of an evaluation's, and not of a training step."""
    return parse_sample_key(key) is not None or parse_held_out_key(key) is not None


def by_row(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{SAMPLER@STEPS or rows of reference: {metric: value}} of what `metrics` has of samples."""
    rows: dict[str, dict[str, Any]] = {}
    for key, value in metrics.items():
        if (parsed := parse_sample_key(key)) is not None:
            sampler, steps, metric = parsed
            rows.setdefault(row_name(sampler, steps), {})[metric] = value
    return rows


def of_held_out(metrics: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """({metric: value}, {tau: {metric: value}}) of what `metrics` has of held-out rows; taus ascend, as they are spelled."""
    whole: dict[str, Any] = {}
    at: dict[str, dict[str, Any]] = {}
    for key, value in metrics.items():
        if (parsed := parse_held_out_key(key)) is not None:
            metric, tau = parsed
            (whole if tau is None else at.setdefault(tau, {}))[metric] = value
    return whole, {tau: at[tau] for tau in sorted(at, key=float)}


class MetricWriter:
    """write(step, {name: value}) to `directory`/metrics.jsonl, or its parts, in order; each line is complete there when it returns.

    Args:
      start: a resumed run's step; lines beyond it, written by the interrupted run, are dropped, so each step stands once.
      boards: they are given the same numbers, and are closed with this.
    """

    def __init__(self, directory: str | os.PathLike, start: int = 0, boards: Iterable[Board] = ()) -> None:
        directory = storage.path(directory)
        self._lines = (_Parts if storage.in_bucket(directory) else _File)(directory, start)
        self._boards = list(boards)

    def write(self, step: int, values: Mapping[str, float], texts: Mapping[str, Sequence[str]] = {}) -> None:
        """Appends one line; non-finite values become null, which is what JSON has for them. Boards are given `texts` too.

        Args:
          texts: {SAMPLER@STEPS: samples}.
        """
        self._lines.append({"step": int(step)} | {k: float(v) if math.isfinite(v) else None for k, v in values.items()})
        finite = {
            name: float(value) for name, value in values.items() if math.isfinite(value)
        }  # others cannot be drawn
        for board in self._boards:
            board.write(int(step), finite, texts)

    def close(self) -> None:
        self._lines.close()
        for board in self._boards:
            board.close()


class _File:
    """On a disk: metrics.jsonl, to which lines are appended."""

    def __init__(self, directory, start: int):
        path, parts = directory / "metrics.jsonl", directory / "metrics"
        storage.write_text(path, _text(_until(read_metrics(directory), start)))
        if parts.is_dir():  # a run that was copied from a bucket has them; their lines are in the file now
            parts.rmtree()
        self._file = path.open("a")

    def append(self, line: dict) -> None:
        self._file.write(_text([line]))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _Parts:
    """In a bucket: parts, in the order of their names. A metrics.jsonl comes first: a run that was copied from a disk has one."""

    def __init__(self, directory, start: int):
        self._directory, self._last = directory / "metrics", []
        files = _files(directory)
        for path in reversed(files):
            lines = _lines(path)
            kept = _until(lines, start)
            if kept:
                if kept != lines:
                    storage.write_text(path, _text(kept))
                break  # those before it are of earlier steps
            path.unlink()
        self._number = max((int(path.stem) + 1 for path in files if path.stem.isdigit()), default=0)

    def append(self, line: dict) -> None:
        self._last.append(line)
        storage.write_text(self._directory / f"{self._number:06d}.jsonl", _text(self._last))
        if len(self._last) == PART:
            self._number, self._last = self._number + 1, []

    def close(self) -> None:
        pass


def _until(lines: list[dict], start: int) -> list[dict]:
    return [line for line in lines if line["step"] <= start] if start else []


def _text(lines: list[dict]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _files(directory) -> list:
    """metrics.jsonl and the parts that are there, in order."""
    whole, parts = directory / "metrics.jsonl", directory / "metrics"
    found = [whole] if whole.exists() else []
    return found + (sorted(parts.glob("*.jsonl")) if parts.is_dir() else [])


def _lines(path) -> list[dict]:
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def read_metrics(directory: str | os.PathLike) -> list[dict]:
    """The lines written so far; a last line cut short by a kill is skipped."""
    return [line for path in _files(storage.path(directory)) for line in _lines(path)]
