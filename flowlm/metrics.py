"""Where numbers go: one JSON line a step, and TensorBoard if asked."""

import json
import math
import os

from flowlm import storage


class MetricWriter:
    """write(step, {name: value}) to `directory`/metrics.jsonl, in order, each line complete on disk when it returns.

    Args:
      start: a resumed run's step; lines beyond it, written by the interrupted run, are dropped, so each step stands once.
      tensorboard: also writes TensorBoard event files; ImportError naming the extra if tensorboardX is missing.
    """

    def __init__(self, directory, start: int = 0, tensorboard: bool = False):
        self._path = storage.path(directory) / "metrics.jsonl"
        kept = [line for line in read_metrics(directory) if line["step"] <= start] if start else []
        self._text = "".join(json.dumps(line) + "\n" for line in kept)
        storage.write(self._path, self._text)
        self._file = None if storage.in_bucket(self._path) else self._path.open("a")
        self._board = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as error:
                raise ImportError("TensorBoard output needs `pip install flowlm[tensorboard]`") from error
            self._board = SummaryWriter(os.fspath(self._path.parent / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line; non-finite values become null, which is what JSON has for them."""
        line = {"step": int(step)} | {k: float(v) if math.isfinite(v) else None for k, v in values.items()}
        text = json.dumps(line) + "\n"
        if self._file is None:  # a bucket has no appending
            self._text += text
            storage.write(self._path, self._text)
        else:
            self._file.write(text)
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, float(value), int(step))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(directory) -> list[dict]:
    """The lines written so far; a last line cut short by a kill is skipped."""
    path = storage.path(directory) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
