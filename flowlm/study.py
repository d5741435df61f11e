"""A study: many runs under one budget, each an ordinary `flowlm train`, then one table and one picture of all of them.

Runs are taken one after another, seed 0 of all before seed 1 of any, so a study that is cut short is whole as far as it went.
A run that is finished is left alone, one that was cut is taken up where it was, and one that fails is reported at the end
while the others go on; a student waits for its teacher and is skipped without it.
"""

import csv
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flowlm.curves import draw_panels


@dataclass(frozen=True)
class Run:
    """One method.

    Attributes:
      name: of the method, the same for all seeds.
      config: `experiments/NAME.py[:arg]`.
      settings: {key: value} over the experiment's own.
      teacher: name of another run of the study, which comes before this one.
      seeds: training seeds; a student's teacher has the same one, or its first where it has not that.
    """

    name: str
    config: str
    settings: Mapping[str, object] = field(default_factory=dict)
    teacher: str | None = None
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Study:
    """runs, teachers first; metrics: what the table and the pictures show."""

    runs: Sequence[Run]
    metrics: Sequence[str]


def directory(workdir: Path, run: Run, seed: int) -> Path:
    return workdir / run.name / f"seed{seed}"


def finished(path: Path) -> bool:
    """Whether the run in `path` was evaluated after its last step."""
    if not (path / "evaluation.json").exists():
        return False
    steps = json.loads((path / "config.json").read_text())["steps"]
    return json.loads((path / "evaluation.json").read_text())["step"] == steps


def teacher_of(run: Run, seed: int, workdir: Path, runs: Mapping[str, Run]) -> Path:
    """The directory of a student's teacher."""
    teacher = runs[run.teacher]
    return directory(workdir, teacher, seed if seed in teacher.seeds else teacher.seeds[0])


def command(run: Run, seed: int, workdir: Path, runs: Mapping[str, Run], extra: Sequence[str]) -> list[str]:
    """The command line of one run."""
    line = [sys.executable, "-m", "flowlm.main", "train", f"--config={run.config}", f"--config.seed={seed}"]
    line += [f"--config.{key}={value}" for key, value in run.settings.items()]
    if run.teacher is not None:
        line.append(f"--config.teacher={teacher_of(run, seed, workdir, runs)}")
    return [*line, *extra, f"--workdir={directory(workdir, run, seed)}"]


def carry_out(study: Study, workdir: Path, results: Path, extra: Sequence[str] = ()) -> None:
    """Runs what is left of the study and writes `results`/study.{csv,md,png} and study_time.png, anew after every run.

    Args:
      extra: further flags of every run, such as --config.steps=10.

    Raises:
      ValueError: a teacher that is no earlier run of the study.
      RuntimeError: runs that failed, by name, after all others were done.
    """
    runs, failed = {}, []
    for run in study.runs:
        if run.teacher is not None and run.teacher not in runs:
            raise ValueError(f"the teacher {run.teacher!r} of {run.name!r} is no earlier run: there are {sorted(runs)}")
        runs[run.name] = run
    for seed in sorted({seed for run in study.runs for seed in run.seeds}):
        for run in (run for run in study.runs if seed in run.seeds):
            path = directory(workdir, run, seed)
            if run.teacher is not None and not finished(teacher_of(run, seed, workdir, runs)):
                failed.append(f"{path} (without its teacher)")
            elif not finished(path):
                print(f"== {path}", file=sys.stderr, flush=True)
                if subprocess.run(command(run, seed, workdir, runs, extra), check=False).returncode:
                    failed.append(str(path))
                write(study, workdir, results)
    write(study, workdir, results)
    if failed:
        raise RuntimeError(f"these runs failed, their own errors are above: {', '.join(failed)}")


def gather(study: Study, workdir: Path) -> list[dict]:
    """One record for each finished run, sampler and number of steps, and one for each row of reference of seed 0."""
    records = []
    for run in study.runs:
        for seed in run.seeds:
            path = directory(workdir, run, seed)
            if not finished(path):
                continue
            metrics = json.loads((path / "evaluation.json").read_text())["metrics"]
            samples: dict[str, dict] = defaultdict(dict)
            for key, value in metrics.items():
                if key.startswith("samples/"):
                    _, sampler, metric = key.split("/")
                    samples[sampler][metric] = value
            bound = {"bound_nats_per_token": metrics.get("held_out/bound_nats_per_token")}
            for sampler, values in samples.items():
                name, _, steps = sampler.partition("@")
                record = {"method": run.name, "seed": seed, "sampler": name, "steps": int(steps or 0)}
                records.append(record | (bound if steps else {}) | values)
    references = {}
    for record in records:
        if record["steps"] == 0:
            references.setdefault(record["sampler"], record | {"method": record["sampler"], "sampler": ""})
    return [record for record in records if record["steps"]] + list(references.values())


def write(study: Study, workdir: Path, results: Path) -> None:
    """study.csv: every record. study.md: mean over seeds, with spread. study*.png: against steps, against time."""
    records = gather(study, workdir)
    if not records:
        return
    results.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for record in records for key in record))
    with (results / "study.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(records)

    cells: dict[tuple, list[dict]] = defaultdict(list)
    for record in records:
        cells[record["method"], record["sampler"], record["steps"]].append(record)
    head = ["method", "steps", "seeds", *study.metrics]
    lines = [f"| {' | '.join(name.replace('_', ' ') for name in head)} |", "|---" * len(head) + "|"]
    steps_panels, time_panels = ({metric: defaultdict(list) for metric in study.metrics} for _ in range(2))
    for (method, sampler, steps), group in cells.items():
        shown = []
        for metric in study.metrics:
            values = np.array([r[metric] for r in group if r.get(metric) is not None], float)
            if not len(values):
                shown.append("-")
                continue
            # Over seeds their standard deviation; of one seed the samples' own standard error.
            spread = values.std(ddof=1) if len(values) > 1 else group[0].get(f"{metric}_stderr")
            shown.append(f"{values.mean():.3f}" + ("" if spread is None else f" ± {spread:.3f}"))
            if steps:
                label = f"{method}, {sampler}"
                steps_panels[metric][label].append((steps, values.mean()))
                milliseconds = 10 * np.mean([r["seconds_per_100"] for r in group])
                time_panels[metric][label].append((milliseconds, values.mean()))
        name = f"{method}, {sampler}" if sampler else method
        lines.append(f"| {name} | {steps or ''} | {len(group)} | {' | '.join(shown)} |")
    (results / "study.md").write_text("\n".join(lines) + "\n")
    for panels, name, label in (
        (steps_panels, "study.png", "sampling steps (network calls)"),
        (time_panels, "study_time.png", "milliseconds a sample"),
    ):
        draw_panels(results / name, panels, label, lambda axes, panel: axes.set_xscale("log"))
