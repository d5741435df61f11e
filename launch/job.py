"""What is to be run, whatever runs it; and what a backend is.

A backend is one file of this folder, named in run.BACKENDS. It turns jobs into the requests of its own engine, which does all
the rest: queues, placing, retries, preemption. It has these names, the methods of `Backend`:

    Resources                    frozen dataclass of what a job asks for; every field is a flag of the command line, with its help
    check(jobs)                  ValueError, FileNotFoundError or ImportError where they cannot run; nothing is sent yet
    describe(jobs) -> str        exactly what submit would send, as text: what --dry_run prints. Needs no credential
    submit(jobs, record)         sends them; record(job, handle) at once for every job that the engine has accepted
    status(handle) -> str        one line
    logs(handle) -> str          what the job's processes have said so far
    stop(handle)                 returns once the engine has been told
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ml_collections import ConfigDict

from flowlm.cli.command import parse
from flowlm.cli.commands import COMMANDS
from flowlm.cli.train import TRAIN
from flowlm.studies.study import train_arguments
from flowlm.system import storage

# What a backend needs to find a job again; a tree of JSON in the workdir, so no secrets.
Handle = Mapping[str, Any]
# What Python is given to end with exit status 0 if the run in the directory that follows was evaluated after its last step.
FINISHED = (
    "from flowlm.studies.study import finished; from flowlm.system import storage; import sys; "
    "sys.exit(not finished(storage.path(sys.argv[1])))"
)


@dataclass(frozen=True)
class Job:
    """One run of flowlm on one set of machines.

    Attributes:
      name: of letters, digits and dashes, as every engine takes them.
      config: its experiment, such as experiments/grammar.py:flow_map.
      flags: further ones of `flowlm train`, such as --config.steps=10.
      workdir: the run directory: a path that all hosts see, or a bucket.
      resources: the `Resources` of the backend that it is meant for.
      environment: variables of its processes beside those that the backend sets. No secrets: they are printed.
    """

    name: str
    config: str
    flags: tuple[str, ...]
    workdir: str
    resources: Any
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[str, ...]:
        """What `flowlm train` is given."""
        return train_arguments(self.config, self.flags, self.workdir)

    @property
    def command(self) -> tuple[str, ...]:
        """What Python is given, on every host the same; each backend has a Python of its own."""
        return ("-m", "flowlm", "train", *self.arguments)


class Backend(Protocol):
    """See above."""

    Resources: type

    def check(self, jobs: Sequence[Job]) -> None: ...
    def describe(self, jobs: Sequence[Job]) -> str: ...
    def submit(self, jobs: Sequence[Job], record: Callable[[Job, Handle], None]) -> None: ...
    def status(self, handle: Handle) -> str: ...
    def logs(self, handle: Handle) -> str: ...
    def stop(self, handle: Handle) -> None: ...


def help_of(default: Any, text: str) -> Any:
    """A field of a `Resources`: its default, which also gives the flag's type (bool, int or str), and its help."""
    return field(default=default, metadata={"help": text})


def training_job(
    config: str, extra: Sequence[str], workdir: str, resources: Any, environment: Mapping[str, str]
) -> Job:
    """The job of one `flowlm train`. extra: further flags of it, such as --config.steps=10."""
    # A bucket's client may not be here, and a dry run needs none.
    name = workdir.rstrip("/").rpartition("/")[2] if storage.in_bucket(workdir) else storage.path(workdir).name
    return Job(job_name(name), config, tuple(extra), workdir, resources, environment)


def job_name(name: str) -> str:
    """A name as every engine takes it."""
    return "flowlm-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def settings(job: Job) -> ConfigDict:
    """The settings that the job's run will have. Raises ValueError for what is wrong with its line, before it is queued."""
    return parse(TRAIN, job.arguments, COMMANDS).config


# ---- What was started, in the run directory itself: launch.json.


def remember(backend: str, job: Job, handle: Handle) -> None:
    """Writes down in the job's workdir which backend has it, and as what."""
    directory = storage.path(job.workdir)
    directory.mkdir(parents=True, exist_ok=True)
    entry = {"backend": backend, "name": job.name, "command": list(job.command), "handle": dict(handle)}
    (directory / "launch.json").write_text(json.dumps(entry, indent=2) + "\n")


def recall(workdir: str) -> list[tuple[str, str, Handle]]:
    """(workdir, backend, handle) of the job last started in `workdir`, or of all those of the sweep started there.

    Raises:
      FileNotFoundError: none was.
    """
    here = storage.path(workdir)
    # Folders are listed and not matched, because the name of one may read as a pattern.
    own = (here / "launch.json").exists()
    runs = [here] if own else [run for name in _folders(here) for run in _folders(name)]
    found = [path for path in (run / "launch.json" for run in runs) if path.exists()]
    if not found:
        raise FileNotFoundError(f"{workdir} has no launch.json: nothing was started there by `python -m launch.run`")
    entries = [(str(path.parent), json.loads(path.read_text())) for path in found]
    return [(directory, entry["backend"], entry["handle"]) for directory, entry in entries]


def _folders(place) -> list:
    return sorted(path for path in place.iterdir() if path.is_dir()) if place.is_dir() else []


# ---- What the processes on machines with a common file system say.


def last_lines(text: bytes, lines: int = 40) -> str:
    """The last lines of a log; of a progress bar, which draws itself again and again, what is seen at the end."""
    split = text.decode(errors="replace").rstrip("\n").split("\n")[-lines:]
    return "\n".join(line.rstrip("\r").split("\r")[-1] for line in split)


def tail(path: Path) -> str:
    """The last lines of a log, none where there is no log."""
    return last_lines(path.read_bytes()) if path.exists() else ""


def error_in(log: str) -> str:
    """The last line of a log in which flowlm said what was wrong, or the last line at all."""
    lines = log.split("\n")
    return next((line for line in reversed(lines) if "flowlm: " in line), lines[-1])
