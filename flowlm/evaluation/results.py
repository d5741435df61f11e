"""What an evaluation found: the files it leaves in a directory, and how several are shown together."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from flowlm.runs import directory as run_directory
from flowlm.runs import tables
from flowlm.runs.curves import draw_evaluation
from flowlm.runs.metrics import parse_row
from flowlm.system import storage

SHOWN = 16  # samples of each kind in samples.txt
PRINTED = 2  # of those, how many are printed


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
      metrics: as evaluation.py lists them.
      texts: {sampler@steps: samples as text}.
      trajectories: {sampler@steps: the likeliest token of every position at every step, as text, by sample, step and position}.
      notes: what a reader of the metrics must know, a sentence each.
      main: the judges' metrics to read first.
      meanings: {metric of a judge: what it is}.
      num: how many samples of each sampler were judged; None where it is not told.
    """

    step: int
    metrics: dict[str, float]
    texts: dict[str, list[str]]
    trajectories: dict[str, list] = field(default_factory=dict)
    notes: Sequence[str] = ()
    main: Sequence[str] = ()
    meanings: Mapping[str, str] = field(default_factory=dict)
    num: int | None = None

    def record(self) -> dict:
        """What evaluation.json holds."""
        return {
            "step": self.step,
            "metrics": {k: v if np.isfinite(v) else None for k, v in self.metrics.items()},
            "samples": {name: texts[0] for name, texts in self.texts.items()},
            "main": list(self.main),
            "meanings": dict(self.meanings),
            **({} if self.num is None else {"num": self.num}),
            **({"notes": list(self.notes)} if self.notes else {}),
        }

    def save(self, directory: str | os.PathLike, run: str | os.PathLike | None = None) -> None:
        """Writes samples.txt, trajectories.json, evaluation.json and evaluation.png; each file appears whole.

        Args:
          run: the run directory that was evaluated, where it is not `directory` itself.
        """
        directory = storage.path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        blocks = [f"== {name}\n" + "\n".join(texts[:SHOWN]) + "\n" for name, texts in self.texts.items()]
        storage.write_text(directory / "samples.txt", "\n".join(blocks))
        storage.write_text(directory / "trajectories.json", json.dumps(self.trajectories) + "\n")
        record = self.record() | {"data": run_directory.data_name(run or directory)}
        # After the others, because a directory with an evaluation.json counts as evaluated.
        storage.write_text(directory / "evaluation.json", json.dumps(record, indent=2) + "\n")
        draw_evaluation(directory)

    def show(self, wide: bool = False) -> None:
        """Prints the held-out likelihood, the judges' table with all columns if `wide`, and two samples of each kind."""
        tables.print_likelihood(self.metrics, self.step)
        tables.print_samples({"": self.record()}, {"": {k: v[:PRINTED] for k, v in self.texts.items()}}, wide)


def read_evaluation(directory: str | os.PathLike) -> dict:
    """The evaluation.json of a directory. Raises FileNotFoundError: there is none. ValueError: it is cut or damaged."""
    path = storage.path(directory) / "evaluation.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory} has no evaluation.json: run `flowlm evaluate --checkpoint={directory}`")
    return storage.read_json(path)


def short_names(directories: Sequence[str]) -> dict[str, str]:
    """{directory: as little of its end as tells it from the others}; a directory that is given twice is there once."""
    names: dict[tuple[str, ...], str] = {}
    for name in directories:
        names.setdefault(storage.path(name).resolve().parts, name)
    depth = 1
    while len({path[-depth:] for path in names}) < len(names):
        depth += 1
    return {name: "/".join(path[-depth:]) for path, name in names.items()}


def lines_of_samples(directory: str | os.PathLike, num: int) -> dict[str, list[str]]:
    """{sampler@steps or held_out: the first `num` lines of its samples}, of each run's sampler as it is set, and of real rows.

    Raises FileNotFoundError: the directory has no samples.txt.
    """
    path = storage.path(directory) / "samples.txt"
    if not path.exists():
        raise FileNotFoundError(f"{directory} has no samples.txt: run `flowlm evaluate --checkpoint={directory}`")
    blocks = path.read_text("utf-8").removeprefix("== ").split("\n== ")
    every = {
        name: [line for line in rest.split("\n") if line][:num] for name, _, rest in (b.partition("\n") for b in blocks)
    }
    # Of two samplers with the same number of steps the plain one comes first, so the one that is set stays.
    as_set = {steps: name for name in every if (steps := parse_row(name)[1]) is not None}
    return {name: every[name] for name in (*as_set.values(), "held_out") if name in every}


def compare(directories: Sequence[str], wide: bool = False, samples: int | None = None) -> None:
    """Prints the samples' metrics of several evaluated runs, a table for each set of data, and a sample of each kind.

    Args:
      samples: how many lines are shown of the samplers as they are set and of real rows, in place of one sample of each kind.

    Raises:
      FileNotFoundError, ValueError: as `read_evaluation` and `lines_of_samples`.
    """
    by_data: dict[str | None, dict[str, dict]] = {}
    lines = {}
    for directory, name in short_names(directories).items():
        record = read_evaluation(directory)
        if samples is not None:
            lines[name] = lines_of_samples(directory, samples)
        by_data.setdefault(record.get("data") or run_directory.data_name(directory), {})[name] = record
    for runs in by_data.values():
        for name in [*runs][:-1]:  # real rows stand once, behind all that is beside them
            lines.get(name, {}).pop("held_out", None)
    for number, (data, runs) in enumerate(by_data.items()):
        texts = {run: lines.get(run) or {k: [v] for k, v in record["samples"].items()} for run, record in runs.items()}
        title = f"Samples before the judges{f': {data}' if data else ''}"
        tables.print_samples(runs, texts, wide, f"\n{title}" if number else title)
