"""A study: many runs, each an ordinary `flowlm train`, then one table and one picture of all of them.

The methods of a comparison under one budget are a study, and so are the points of a sweep (sweeps.py). This file says what a
study is, where its files lie and what is left of it to do; carry_out.py runs it, and tables.py makes its tables.
"""

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from flowlm.engine import overrides
from flowlm.system import storage


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
      listed: whether the tables show it; a run that is only made to teach another one need not be.
    """

    name: str
    config: str
    settings: Mapping[str, object] = field(default_factory=dict)
    teacher: str | None = None
    seeds: tuple[int, ...] = (0,)
    sweep: tuple[Mapping[str, object], ...] = ()
    needs: tuple[str, ...] = ()
    drawn: bool = True
    listed: bool = True


@dataclass(frozen=True)
class Study:
    """What is run, and what is shown of it.

    Attributes:
      runs: all of them, teachers before their students.
      metrics: what the table and the pictures show.
      matched: metrics that are shown at equal diversity too; without any, every swept setting of a sampler is a row of the table.
      below: nats below the diversity of held-out rows at which they are shown, a table for each.
      diversity: the metric, in nats, that is made equal.
    """

    runs: Sequence[Run]
    metrics: Sequence[str]
    matched: Sequence[str] = ()
    below: Sequence[float] = (0.0,)
    diversity: str = "entropy"


def directory(workdir: Path, run: Run, seed: int) -> Path:
    return workdir / run.name / f"seed{seed}"


def swept(path: Path, setting: Mapping[str, object]) -> Path:
    """Where the evaluation of the run in `path` with another setting of its sampler goes."""
    return path / "sweep" / setting_name(setting)


def setting_name(setting: Mapping[str, object]) -> str:
    """A setting of a sampler as the command line writes it, such as temperature=0.8,noise_scale=1.0."""
    return ",".join(f"{key}={value}" for key, value in setting.items())


def finished(path: Path) -> bool:
    """Whether the run in `path` was evaluated after its last step. Raises ValueError where a file of it is damaged."""
    if not (path / "evaluation.json").exists():
        return False
    steps = storage.read_json(path / "config.json")["steps"]
    return storage.read_json(path / "evaluation.json")["step"] == steps


def before(run: Run, seed: int, runs: Mapping[str, Run]) -> list[tuple[Run, int]]:
    """What must be finished before a run: its teacher, if it has one, and what else it needs."""
    others = [runs[name] for name in (run.teacher, *run.needs) if name is not None]
    return [(other, seed if seed in other.seeds else other.seeds[0]) for other in others]


def flags_of(run: Run, seed: int, workdir: Path, runs: Mapping[str, Run], extra: Sequence[str]) -> tuple[str, ...]:
    """The flags of one run beside its experiment and its directory."""
    flags = [f"--config.seed={seed}"]
    flags += [f"--config.{key}={value}".replace("{workdir}", str(workdir)) for key, value in run.settings.items()]
    if run.teacher is not None:
        flags.append(f"--config.teacher={directory(workdir, *before(run, seed, runs)[0])}")
    return (*flags, *extra)


def train_arguments(config: str, flags: Sequence[str], workdir: str | os.PathLike) -> tuple[str, ...]:
    """What `flowlm train` is given to run the experiment `config` with further flags in `workdir`."""
    return (f"--config={config}", *flags, f"--workdir={os.fspath(workdir)}")


def command(config: str, flags: Sequence[str], workdir: str | os.PathLike) -> list[str]:
    """The command line of one `flowlm train`."""
    return [sys.executable, "-m", "flowlm", "train", *train_arguments(config, flags, workdir)]


def in_order(study: Study) -> tuple[list[tuple[Run, int]], dict[str, Run]]:
    """(run, seed) of the study in the order they are made, and its runs by name.

    Raises:
      ValueError: two runs of one name, or a teacher or another needed run that is no earlier run of the study.
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
    """A run that is left to do.

    Attributes:
      config: its experiment.
      flags: its further flags of `flowlm train`.
      ready: its teacher, if it has one, and what else it needs are finished.
    """

    name: str
    directory: Path
    config: str
    flags: tuple[str, ...]
    ready: bool

    @property
    def command(self) -> list[str]:
        """The command line that makes it."""
        return command(self.config, self.flags, self.directory)


def unfinished(
    study: Study,
    workdir: Path,
    extra: Sequence[str] = (),
    results: Path | None = None,
    done: Callable[[Path], bool] = finished,
) -> list[Unfinished]:
    """What is left of the study, in order; with `results`, of what is not kept there. Raises ValueError as `in_order`.

    Args:
      done: whether the run in a directory is finished.
    """
    order, runs = in_order(study)
    left = []
    for run, seed in order:
        path = directory(workdir, run, seed)
        kept = results is not None and is_kept(results / "runs", run, seed)
        if not kept and not done(path):
            ready = all(done(directory(workdir, *other)) for other in before(run, seed, runs))
            flags = flags_of(run, seed, workdir, runs, extra)
            left.append(Unfinished(f"{run.name}-seed{seed}", path, run.config, flags, ready))
    return left


def commands(study: Study, workdir: Path, extra: Sequence[str] = (), results: Path | None = None) -> list[str]:
    """The command lines of `unfinished`, as a shell takes them."""
    return [shlex.join(run.command) for run in unfinished(study, workdir, extra, results)]


def load_study(argument: str) -> Study:
    """The study of `FILE.py[:ARGUMENT]`. Raises ValueError if there is no such file, or no such study in it."""
    path, _, name = argument.partition(":")
    if not Path(path).is_file():
        raise ValueError(f"no study {path}: run from a checkout, there it is experiments/head_to_head.py")
    return overrides.call(path, "get_study", *[name] * bool(name))


def complete(path: Path, run: Run) -> bool:
    """Whether the run in `path` is finished, and every setting of its sampler evaluated."""
    return finished(path) and all((swept(path, setting) / "evaluation.json").exists() for setting in run.sweep)


def kept_file(kept: Path, run: Run, seed: int) -> Path:
    """Where what a study keeps of a run lies: one file with its settings, versions and evaluations."""
    return kept / run.name / f"seed{seed}.json"


def is_kept(kept: Path, run: Run, seed: int) -> bool:
    """Whether the evaluation after the last step and those of every setting of its sampler are kept."""
    path = kept_file(kept, run, seed)
    if not path.exists():
        return False
    record = storage.read_json(path)
    steps, evaluations = record["config"]["steps"], record["evaluations"]
    return evaluations[""]["step"] == steps and set(map(setting_name, run.sweep)) <= set(evaluations)


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
        if not is_kept(kept, run, seed):
            want(run, seed)
    return list(needed.values())
