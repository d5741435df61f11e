"""Where numbers go: one JSON line a step, and TensorBoard if asked."""

import json
import math
import os

from etils import epath


class MetricWriter:
    """write(step, {name: value}) to `directory`/metrics.jsonl, in order, each line complete on disk when it returns.

    Args:
      start: a resumed run's step; lines beyond it, written by the interrupted run, are dropped, so each step stands once.
      tensorboard: also writes TensorBoard event files; ImportError naming the extra if tensorboardX is missing.
    """

    def __init__(self, directory, start: int = 0, tensorboard: bool = False):
        self._path = epath.Path(directory) / "metrics.jsonl"
        kept = [line for line in read_metrics(directory) if line["step"] <= start] if start else []
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self._path)
        self._file = self._path.open("a")
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
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, float(value), int(step))

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(directory) -> list[dict]:
    """The lines written so far; a last line cut short by a kill is skipped."""
    path = epath.Path(directory) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
