"""What an evaluation found: the files it leaves in a directory, and how they are shown and compared."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.table import Table
from rich.text import Text

from flowlm import storage
from flowlm.curves import draw_evaluation
from flowlm.terminal import console

UNSHOWN = ("ngram_distance_1", "ngram_distance_3", "ngram_distance_5")  # in evaluation.json all the same
SHOWN = 16  # samples of each kind in samples.txt


@dataclass(frozen=True)
class Evaluation:
    """Attributes:
    metrics: as evaluation.py lists them. texts: {sampler@steps: samples as text}.
    trajectories: {sampler@steps: the likeliest token of every position at every step, as text [sample][step][position]}.
    notes: what a reader of the metrics must know, a sentence each.
    """

    step: int
    metrics: dict[str, float]
    texts: dict[str, list[str]]
    trajectories: dict[str, list] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def save(self, directory) -> None:
        """Writes samples.txt, trajectories.json, evaluation.json and evaluation.png; each file appears whole."""
        directory = storage.path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        blocks = [f"== {name}\n" + "\n".join(texts[:SHOWN]) + "\n" for name, texts in self.texts.items()]
        storage.write(directory / "samples.txt", "\n".join(blocks))
        storage.write(directory / "trajectories.json", json.dumps(self.trajectories) + "\n")
        report = {
            "step": self.step,
            "metrics": {k: v if np.isfinite(v) else None for k, v in self.metrics.items()},
            "samples": {name: texts[0] for name, texts in self.texts.items()},
        }
        if self.notes:
            report["notes"] = list(self.notes)
        # After the others, because a directory with an evaluation.json counts as evaluated.
        storage.write(directory / "evaluation.json", json.dumps(report, indent=2) + "\n")
        draw_evaluation(directory)

    def show(self) -> None:
        """Prints three tables: time grid, likelihood, samples; and two samples of each kind."""
        screen = console()
        for table in self._tables():
            screen.print(table)
        for name, texts in self.texts.items():
            screen.print(Text(name, style="bold"), *(f"  {t}" for t in texts[:2]), sep="\n")

    def _tables(self) -> list[Table]:
        held = {k.removeprefix("held_out/"): v for k, v in self.metrics.items() if k.startswith("held_out/")}
        grid = Table(title=f"Held-out nats per token at step {self.step}")
        taus = sorted({k.split("@")[1] for k in held if "@" in k}, key=float)
        for column in ("tau", *taus, "mean"):
            grid.add_column(column, justify="right")
        for row in ("cross_entropy", "context_free"):
            if row in held:
                grid.add_row(row.replace("_", " "), *(f"{held[f'{row}@{t}']:.3f}" for t in taus), f"{held[row]:.3f}")
        tables = [grid] if taus else []
        if "bound_nats_per_token" in held:
            bound = Table(title="Likelihood bound")
            bound.add_column("nats per token", justify="right")
            bound.add_column("bits per token", justify="right")
            nats, bits = ("bound_nats_per_token", "bound_bits_per_token")
            bound.add_row(*(f"{held[k]:.3f} ± {held[f'{k}_stderr']:.3f}" for k in (nats, bits)))
            tables.append(bound)
        return [*tables, judged_table({"": self.metrics}, notes=self.notes)]


def judged_table(
    runs: Mapping[str, Mapping[str, float]],
    samples: Mapping[str, Mapping[str, str]] | None = None,
    notes: Sequence[str] = (),
) -> Table:
    """One line for each sampler of each run, tokens without a model and held-out rows last; with one sample of each if given.

    Args:
      runs: {name of the run: metrics of an evaluation}. samples: {name of the run: {sampler: text}}. notes: go below the table.
    """
    lines: dict[tuple[str, str], dict[str, float]] = {}
    for run, metrics in runs.items():
        for key, value in metrics.items():
            if key.startswith("samples/"):
                _, name, metric = key.split("/")
                lines.setdefault((run if "@" in name else "", name), {})[metric] = value
    columns = [m for m in next(iter(lines.values()), {}) if not m.endswith("_stderr") and m not in UNSHOWN]
    table = Table(title="Samples before the judges", caption="\n".join(notes) or None)
    table.add_column("sampler @ steps")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    if samples is not None:
        table.add_column("one sample", overflow="fold")
    for (run, name), row in sorted(lines.items(), key=lambda line: "@" not in line[0][1]):
        show = lambda v: "" if v is None else f"{v:.3f}"
        text = [] if samples is None else [samples[run or next(iter(samples))].get(name, "")]
        table.add_row(f"{run} {name}".strip().replace("_", " "), *(show(row.get(c)) for c in columns), *text)
    return table


def read(directory) -> dict:
    """The evaluation.json of a directory. Raises FileNotFoundError: there is none. ValueError: it is cut or damaged."""
    path = storage.path(directory) / "evaluation.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory} has no evaluation.json: run `flowlm evaluate --checkpoint={directory}`")
    return storage.read_json(path)


def compare(directories: Sequence[str]) -> None:
    """Prints one table of the samples of several evaluated runs. Raises FileNotFoundError, ValueError as `read`."""
    found = {storage.path(directory).name: read(directory) for directory in directories}
    metrics, samples = ({name: report[key] for name, report in found.items()} for key in ("metrics", "samples"))
    notes = dict.fromkeys(f"{name}: {note}" for name, report in found.items() for note in report.get("notes", ()))
    console().print(judged_table(metrics, samples, tuple(notes)))
