"""Where numbers go: one JSON line a step, and TensorBoard if asked.

They go to metrics.jsonl. A bucket has no appending, so there they go to parts, metrics/000000.jsonl and so on, of which only the
last one is written anew with a line. Reading joins whatever of both is there.
"""

import json
import math
import os

from flowlm.system import storage

PART = 100  # lines in a part that is full


class MetricWriter:
    """write(step, {name: value}) to `directory`/metrics.jsonl, or its parts, in order; each line is complete there when it returns.

    Args:
      start: a resumed run's step; lines beyond it, written by the interrupted run, are dropped, so each step stands once.
      tensorboard: also writes TensorBoard event files; ImportError naming the extra if tensorboardX is missing.
    """

    def __init__(self, directory, start: int = 0, tensorboard: bool = False):
        directory = storage.path(directory)
        self._lines = (_Parts if storage.in_bucket(directory) else _File)(directory, start)
        self._board = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as error:
                raise ImportError("TensorBoard output needs tensorboardX: pip install -e .[tensorboard]") from error
            self._board = SummaryWriter(os.fspath(directory / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line; non-finite values become null, which is what JSON has for them."""
        self._lines.append({"step": int(step)} | {k: float(v) if math.isfinite(v) else None for k, v in values.items()})
        if self._board is not None:
            for name, value in values.items():
                if math.isfinite(value):  # of others TensorBoard draws nothing, and warns at each
                    self._board.add_scalar(name, float(value), int(step))

    def close(self) -> None:
        self._lines.close()
        if self._board is not None:
            self._board.close()


class _File:
    """On a disk: metrics.jsonl, to which lines are appended."""

    def __init__(self, directory, start: int):
        path, parts = directory / "metrics.jsonl", directory / "metrics"
        storage.write(path, _text(_until(read_metrics(directory), start)))
        if parts.is_dir():  # of a run that was copied from a bucket; its lines are in the file now
            parts.rmtree()
        self._file = path.open("a")

    def append(self, line: dict) -> None:
        self._file.write(_text([line]))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _Parts:
    """In a bucket: parts, in the order of their names. A metrics.jsonl is what a run brought from elsewhere, and comes first."""

    def __init__(self, directory, start: int):
        self._directory, self._last = directory / "metrics", []
        files = _files(directory)
        for path in reversed(files):
            lines = _lines(path)
            kept = _until(lines, start)
            if kept:
                if kept != lines:
                    storage.write(path, _text(kept))
                break  # those before it are of earlier steps
            path.unlink()
        self._number = max((int(path.stem) + 1 for path in files if path.stem.isdigit()), default=0)

    def append(self, line: dict) -> None:
        self._last.append(line)
        storage.write(self._directory / f"{self._number:06d}.jsonl", _text(self._last))
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


def read_metrics(directory) -> list[dict]:
    """The lines written so far; a last line cut short by a kill is skipped."""
    return [line for path in _files(storage.path(directory)) for line in _lines(path)]
