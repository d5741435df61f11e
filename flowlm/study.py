"""A study: many runs, each an ordinary `flowlm train`, then one table and one picture of all of them.

The methods of a comparison under one budget are a study, and so are the points of a sweep (sweeps.py). Runs are taken one after
another or several at a time, seed 0 of all before seed 1 of any, so a study that is cut short is whole as far as it went. A run
that is finished is left alone, one that was cut is taken up where it was, and one that fails is reported at the end while the
others go on; a student waits for its teacher and is skipped without it.
"""

import csv
import json
import os
import runpy
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from flowlm.curves import draw_panels
from flowlm.matching import Point, at_entropy


@dataclass(frozen=True)
class Run:
    """One method.

    Attributes:
      name: of the method, the same for all seeds.
      config: `experiments/NAME.py[:arg]`.
      settings: {key: value} over the experiment's own; "{workdir}" in one is the study's directory.
      teacher: name of another run of the study, which comes before this one.
      sweep: settings of its sampler, each of which is evaluated too, for the table at equal entropy.
      seeds: training seeds; a student's teacher has the same one, or its first where it has not that.
      needs: names of earlier runs whose directories its settings name, such as that of a judge.
      drawn: whether the pictures show it.
    """

    name: str
    config: str
    settings: Mapping[str, object] = field(default_factory=dict)
    teacher: str | None = None
    seeds: tuple[int, ...] = (0,)
    sweep: tuple[Mapping[str, object], ...] = ()
    needs: tuple[str, ...] = ()
    drawn: bool = True


@dataclass(frozen=True)
class Study:
    """runs, teachers first; metrics: what the table and the pictures show; matched: those shown at equal entropy, in nats.

    Without `matched` every swept setting of a sampler is a row of the table.
    """

    runs: Sequence[Run]
    metrics: Sequence[str]
    matched: Sequence[str] = ()


def directory(workdir: Path, run: Run, seed: int) -> Path:
    return workdir / run.name / f"seed{seed}"


def swept(path: Path, setting: Mapping[str, object]) -> Path:
    """Where the evaluation of the run in `path` with another setting of its sampler goes."""
    return path / "sweep" / ",".join(f"{key}={value}" for key, value in setting.items())


def finished(path: Path) -> bool:
    """Whether the run in `path` was evaluated after its last step."""
    if not (path / "evaluation.json").exists():
        return False
    steps = json.loads((path / "config.json").read_text())["steps"]
    return json.loads((path / "evaluation.json").read_text())["step"] == steps


def before(run: Run, seed: int, runs: Mapping[str, Run]) -> list[tuple[Run, int]]:
    """What must be finished before a run: its teacher, if it has one, and what else it needs."""
    others = [runs[name] for name in (run.teacher, *run.needs) if name is not None]
    return [(other, seed if seed in other.seeds else other.seeds[0]) for other in others]


def command(run: Run, seed: int, workdir: Path, runs: Mapping[str, Run], extra: Sequence[str]) -> list[str]:
    """The command line of one run."""
    line = [sys.executable, "-m", "flowlm.main", "train", f"--config={run.config}", f"--config.seed={seed}"]
    settings = {key: value for key, value in run.settings.items() if value is not None}
    line += [f"--config.{key}={value}".replace("{workdir}", str(workdir)) for key, value in settings.items()]
    if run.teacher is not None:
        line.append(f"--config.teacher={directory(workdir, *before(run, seed, runs)[0])}")
    return [*line, *extra, f"--workdir={directory(workdir, run, seed)}"]


def in_order(study: Study) -> tuple[list[tuple[Run, int]], dict[str, Run]]:
    """(run, seed) of the study in the order they are made, and its runs by name.

    Raises:
      ValueError: two runs of one name, or a teacher that is no earlier run of the study.
    """
    runs: dict[str, Run] = {}
    for run in study.runs:
        if run.name in runs:
            raise ValueError(f"two runs are called {run.name!r}: a name is a directory")
        for what, name in (("teacher", run.teacher), *(("needed", name) for name in run.needs)):
            if name is not None and name not in runs:
                raise ValueError(f"the {what} {name!r} of {run.name!r} is no earlier run: there are {sorted(runs)}")
        runs[run.name] = run
    seeds = sorted({seed for run in study.runs for seed in run.seeds})
    return [(run, seed) for seed in seeds for run in study.runs if seed in run.seeds], runs


class Unfinished(NamedTuple):
    """A run that is left to do. ready: its teacher, if it has one, and what else it needs are finished."""

    name: str
    directory: Path
    command: list[str]
    ready: bool


def unfinished(study: Study, workdir: Path, extra: Sequence[str] = (), results: Path | None = None) -> list[Unfinished]:
    """What is left of the study, in order; with `results`, of what is not kept there. Raises ValueError as `in_order`."""
    order, runs = in_order(study)
    left = []
    for run, seed in order:
        path = directory(workdir, run, seed)
        done = results is not None and complete(directory(results / "runs", run, seed), run)
        if not done and not finished(path):
            ready = all(finished(directory(workdir, *other)) for other in before(run, seed, runs))
            left.append(Unfinished(f"{run.name}-seed{seed}", path, command(run, seed, workdir, runs, extra), ready))
    return left


def commands(study: Study, workdir: Path, extra: Sequence[str] = (), results: Path | None = None) -> list[str]:
    """The same as lines for a shell."""
    return [shlex.join(run.command) for run in unfinished(study, workdir, extra, results)]


def load(argument: str) -> Study:
    """The study of `FILE.py[:ARGUMENT]`. Raises ValueError if there is no such file, or no such study in it."""
    path, _, name = argument.partition(":")
    if not Path(path).is_file():
        raise ValueError(f"no study {path}: run from a checkout, there it is experiments/study.py")
    return runpy.run_path(path)["get_study"](*[name] * bool(name))


def complete(path: Path, run: Run) -> bool:
    """Whether the run in `path` is finished, and every setting of its sampler evaluated."""
    return finished(path) and all((swept(path, setting) / "evaluation.json").exists() for setting in run.sweep)


def keep(path: Path, kept: Path, run: Run) -> None:
    """Copies what the tables are made of."""
    names = ["config.json", "evaluation.json"]
    names += [f"{swept(path, setting).relative_to(path)}/evaluation.json" for setting in run.sweep]
    for name in names:
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        (kept / name).write_text((path / name).read_text())


def left(study: Study, workdir: Path, kept: Path) -> list[tuple[Run, int]]:
    """What has to be run, in order: all that is not kept, and what that needs of runs whose directories are gone."""
    order, runs = in_order(study)
    needed: dict[tuple[str, int], tuple[Run, int]] = {}

    def want(run: Run, seed: int) -> None:
        if not finished(directory(workdir, run, seed)):
            for other in before(run, seed, runs):
                if not finished(directory(workdir, *other)):
                    want(*other)
        needed[run.name, seed] = run, seed

    for run, seed in order:
        if not complete(directory(kept, run, seed), run):
            want(run, seed)
    return list(needed.values())


def _take_cores(shares: SimpleQueue) -> None:
    """Keeps this thread, and the processes that it starts, to its share of the cores."""
    os.sched_setaffinity(0, shares.get())


def shares_of_cores(parallel: int) -> list[set[int]]:
    """The cores of this machine in `parallel` parts. Raises ValueError: there are not as many, or no saying which."""
    if not hasattr(os, "sched_getaffinity"):
        raise ValueError("runs cannot be kept to cores of their own on this system: use --parallel=1")
    cores = sorted(os.sched_getaffinity(0))
    if parallel > len(cores):
        raise ValueError(f"--parallel={parallel} runs need as many cores, and here are {len(cores)}")
    return [set(cores[i::parallel]) for i in range(parallel)]


def carry_out(study: Study, workdir: Path, results: Path, extra: Sequence[str] = (), parallel: int = 1) -> None:
    """Runs what is left of the study and writes `results`/study*.{csv,md,png}, anew after every run.

    The evaluations are kept in `results`/runs. A run that is there is done, though its run directory be gone: it is made again
    only where a run that is left needs it, as its teacher for one. So a study can be carried out in pieces, on several machines.

    Args:
      extra: further flags of every run, such as --config.steps=10.
      parallel: runs at a time, each on its own share of the cores and with a log of its own in `workdir`/logs. Small networks
        are faster so than one by one on all cores.

    Raises:
      ValueError: as `in_order` and `shares_of_cores`.
      RuntimeError: runs that failed, by name, after all others were done.
    """
    runs, kept, failed = in_order(study)[1], results / "runs", []
    waiting, running, tried = left(study, workdir, kept), {}, set()

    def call(line: Sequence[str], name: str) -> bool:
        """Runs one command; what runs at the same time prints to files of its own."""
        if parallel == 1:
            return subprocess.run(line, check=False).returncode == 0
        (workdir / "logs").mkdir(parents=True, exist_ok=True)
        with (workdir / "logs" / f"{name}.log").open("a") as log:
            return subprocess.run(line, check=False, stdout=log, stderr=subprocess.STDOUT).returncode == 0

    def make(run: Run, seed: int) -> list[str]:
        """Trains and evaluates one run: what failed of it."""
        path, name, wrong = directory(workdir, run, seed), f"{run.name}-seed{seed}", []
        if not finished(path):
            print(f"== {path}", file=sys.stderr, flush=True)
            if not call(command(run, seed, workdir, runs, extra), name) or not finished(path):
                return [str(path)]
        if not complete(directory(kept, run, seed), run):
            for place in (swept(path, setting) for setting in run.sweep):
                line = [sys.executable, "-m", "flowlm.main", "evaluate", f"--checkpoint={path}"]
                line += [f"--objective={place.name}", f"--results={place}"]
                if not (place / "evaluation.json").exists() and not call(line, name):
                    wrong.append(str(place))
        return wrong

    shares: SimpleQueue = SimpleQueue()
    for share in shares_of_cores(parallel) if parallel > 1 else ():
        shares.put(share)
    cores = {"initializer": _take_cores, "initargs": (shares,)} if parallel > 1 else {}
    with ThreadPoolExecutor(parallel, **cores) as pool:
        while waiting or running:
            for run, seed in list(waiting):
                others = [directory(workdir, *other) for other in before(run, seed, runs)]
                path = directory(workdir, run, seed)
                if not finished(path) and any(other in tried and not finished(other) for other in others):
                    waiting.remove((run, seed))
                    tried.add(path)
                    failed.append(f"{path} (without its teacher)")
                elif len(running) < parallel and (finished(path) or all(map(finished, others))):
                    waiting.remove((run, seed))
                    running[pool.submit(make, run, seed)] = run, seed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run, seed = running.pop(future)
                path, place = directory(workdir, run, seed), directory(kept, run, seed)
                tried.add(path)
                failed += future.result()
                if complete(path, run) and not complete(place, run):
                    keep(path, place, run)
                write(study, kept, results)
    write(study, kept, results)
    if failed:
        where = "above" if parallel == 1 else f"in {workdir}/logs"
        raise RuntimeError(f"these runs failed, their own errors are {where}: {', '.join(failed)}")


def evaluations(study: Study, kept: Path) -> Iterator[tuple[Run, int, str, Path]]:
    """(run, seed, setting of the sampler or "", evaluation.json) of all that is there."""
    for run in study.runs:
        for seed in run.seeds:
            path = directory(kept, run, seed)
            if finished(path):
                yield run, seed, "", path / "evaluation.json"
                for setting in run.sweep:
                    if (swept(path, setting) / "evaluation.json").exists():
                        yield run, seed, swept(path, setting).name, swept(path, setting) / "evaluation.json"


def gather(study: Study, kept: Path) -> list[dict]:
    """One record for each finished run, setting, sampler and number of steps, and one for each row of reference of seed 0."""
    records = []
    for run, seed, setting, path in evaluations(study, kept):
        metrics = json.loads(path.read_text())["metrics"]
        samples: dict[str, dict] = defaultdict(dict)
        for key, value in metrics.items():
            if key.startswith("samples/"):
                _, sampler, metric = key.split("/")
                samples[sampler][metric] = value
        bound = {key: metrics.get(f"held_out/{key}") for key in ("bound_nats_per_token", "bound_nats_per_token_stderr")}
        if not setting:
            plain = samples
        for sampler, values in samples.items():
            before = plain[sampler] if setting and sampler in plain else {"": None}
            if all(k in values and values[k] == v for k, v in before.items() if k != "seconds_per_100"):
                continue  # a sampler that the setting does not touch
            name, _, steps = sampler.partition("@")
            record = {"method": run.name, "seed": seed, "setting": setting, "sampler": name, "steps": int(steps or 0)}
            records.append(record | (bound if steps else {}) | values)
    references = {}
    for record in records:
        if record["steps"] == 0:
            references.setdefault(record["sampler"], record | {"method": record["sampler"], "sampler": ""})
    return [record for record in records if record["steps"]] + list(references.values())


def write(study: Study, kept: Path, results: Path) -> None:
    """study.csv: every record. study.md: mean over seeds, with spread; study_grid.md: the same, a table of methods by steps for
    each metric. study.png, study_time.png: against steps, against time, without swept settings."""
    records = gather(study, kept)
    if not records:
        return
    results.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for record in records for key in record))
    with (results / "study.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(records)

    cells: dict[tuple, list[dict]] = defaultdict(list)
    for record in (record for record in records if not (record["setting"] and study.matched)):
        method = f"{record['method']} {record['setting']}".strip()
        name = f"{method}, {record['sampler']}" if record["sampler"] else method
        cells[name, record["steps"] or ""].append(record)
    table = {cell: [shown(group, metric) for metric in study.metrics] for cell, group in cells.items()}
    rows = [[name, steps, len(cells[name, steps]), *values] for (name, steps), values in table.items()]
    (results / "study.md").write_text("\n".join(markdown(["method", "steps", "seeds", *study.metrics], rows)) + "\n")

    steps = sorted({steps for _, steps in table if steps})
    names = list(dict.fromkeys(name for name, _ in table))
    lines = []
    nothing = ["-"] * len(study.metrics)
    for i, metric in enumerate(study.metrics):
        # Real text and the naive samplers take no steps.
        rows = [[name, *(table.get((name, n), table.get((name, ""), nothing))[i] for n in steps)] for name in names]
        lines += [*markdown([metric, *steps], rows), ""]
    (results / "study_grid.md").write_text("\n".join(lines))
    if study.matched:
        (results / "study_matched.md").write_text("\n".join(matched_table(study, records)) + "\n")

    drawn = {run.name for run in study.runs if run.drawn}
    steps_panels, time_panels = ({metric: defaultdict(list) for metric in study.metrics} for _ in range(2))
    for (name, steps), group in cells.items():
        if steps and not group[0]["setting"] and group[0]["method"] in drawn:
            for metric in study.metrics:
                values = [record[metric] for record in group if record.get(metric) is not None]
                if values:
                    steps_panels[metric][name].append((steps, np.mean(values)))
                    milliseconds = 10 * np.mean([record["seconds_per_100"] for record in group])
                    time_panels[metric][name].append((milliseconds, np.mean(values)))
    for panels, name, label in (
        (steps_panels, "study.png", "sampling steps (network calls)"),
        (time_panels, "study_time.png", "milliseconds a sample"),
    ):
        draw_panels(results / name, panels, label, lambda axes, panel: axes.set_xscale("log", base=2))


def shown(group: Sequence[dict], metric: str) -> str:
    """Mean ± spread of the records of one cell: over seeds their standard deviation, of one seed the samples' standard error."""
    values = np.array([record[metric] for record in group if record.get(metric) is not None], float)
    if not len(values):
        return "-"
    spread = values.std(ddof=1) if len(values) > 1 else group[0].get(f"{metric}_stderr")
    return f"{values.mean():.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def markdown(head: Sequence, rows: Sequence[Sequence]) -> list[str]:
    """Lines of a table."""
    line = lambda cells: f"| {' | '.join(str(cell) for cell in cells)} |"
    return [line([str(name).replace("_", " ") for name in head]), "|---" * len(head) + "|", *map(line, rows)]


def matched_table(study: Study, records: Sequence[dict]) -> list[str]:
    """Lines of a table: each method's metrics at the entropy of held-out rows, or (at ENTROPY) at the nearest it reached.

    Of several seeds mean and standard deviation, of one the bootstrap's error. Held-out rows and the naive samplers, which
    have no knob, stand below as they are.
    """
    target = next(record["entropy"] for record in records if record["method"] == "held_out")
    curves: dict[tuple, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        sampler = record["sampler"].split(" ")[0]
        method = f"{record['method']}, {sampler}" if sampler else record["method"]
        curves[method, record["steps"] or ""][record["seed"]].append(record)
    rows = []
    for (method, steps), seeds in curves.items():
        cells = []
        for metric in study.matched:
            points = []
            for records in seeds.values():
                usable = [row for row in records if row.get(metric) is not None and row.get("entropy") is not None]
                keys = ("entropy", metric, f"{metric}_stderr", "entropy_stderr")
                if usable:
                    points.append(at_entropy([Point(*(row.get(key) or 0.0 for key in keys)) for row in usable], target))
            if not points:
                cells.append("-")
                continue
            values, entropy = [point.value for point in points], np.mean([point.entropy for point in points])
            spread = np.std(values, ddof=1) if len(points) > 1 else points[0].stderr
            reached = "" if entropy == target else f" (at {entropy:.2f})"
            cells.append(f"{np.mean(values):.3f}" + (f" ± {spread:.3f}" if spread else "") + reached)
        rows.append([method, steps, len(seeds), *cells])
    table = markdown(["method", "steps", "seeds", *study.matched], rows)
    return [f"Held-out entropy {target:.3f} nats.", "", *table]
