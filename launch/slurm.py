"""SLURM: one sbatch script for a job, or for an array of them. Queues, gangs and requeueing are SLURM's own.

The script is slurm.sbatch, filled in. Checkout, Python and workdir must be on a file system that all nodes share; tasks find
each other by JAX's own detection. Where there are several tasks on a node each has one GPU, where there is one it has all.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from os.path import commonpath
from pathlib import Path

import jinja2

from launch.credentials import refuse_secrets
from launch.job import FINISHED, Handle, Job, error_in, help_of, tail

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Resources:
    nodes: int = help_of(1, "machines")
    tasks_per_node: int = help_of(1, "processes on each: one, or one for every GPU")
    gpus: int = help_of(0, "GPUs of each machine")
    cpus_per_task: int = help_of(0, "cores of each process; 0: the cluster's default")
    partition: str = help_of("", "where to queue; none: the cluster's default")
    account: str = help_of("", "whom it is charged to")
    time: str = help_of("", "limit, as SLURM writes it (2:00:00); at its end the job is saved and queued again")
    grace: int = help_of(120, "seconds before the limit at which it is told to save")


def script(jobs: Sequence[Job]) -> str:
    """The sbatch script of jobs that ask for the same resources."""
    resources = jobs[0].resources
    _check_resources(jobs)
    template = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    ).from_string((ROOT / "launch/slurm.sbatch").read_text())
    points = []
    for job in jobs:
        environment = dict(job.environment)
        if resources.gpus and resources.tasks_per_node == 1:
            # Without this a task takes the one GPU that has its number on the node.
            environment["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, range(resources.gpus)))
        points.append(
            {
                "workdir": shlex.quote(_absolute(job.workdir)),
                "environment": [f"{key}={shlex.quote(value)}" for key, value in environment.items()],
                "command": shlex.join([sys.executable, *job.command]),
            }
        )
    return template.render(
        name=jobs[0].name,
        root=_word(str(ROOT)),
        # In the names of files SLURM puts numbers for %j and its like; %% is a %.
        output=_word(_folder(jobs).replace("%", "%%") + ("/slurm-%a.log" if len(jobs) > 1 else "/slurm.log")),
        resources={key: _word(value) if isinstance(value, str) else value for key, value in asdict(resources).items()},
        points=points,
        finished=shlex.join([sys.executable, "-c", FINISHED]),
    )


def check(jobs: Sequence[Job]) -> None:
    """Asks SLURM itself. Raises ValueError with its answer where the jobs could never run; nothing is queued."""
    answer = _slurm("sbatch", "--test-only", input=script(jobs))
    if answer.returncode:
        known = sorted({line.rstrip("*") for line in _slurm("sinfo", "--noheader", "--format=%P").stdout.split()})
        said = " ".join(re.sub(r"(sbatch: )?error: |allocation failure: ", "", answer.stderr).split())
        raise ValueError(f"SLURM would refuse this: {said} (its partitions are {', '.join(known)})")


def describe(jobs: Sequence[Job]) -> str:
    return f"sbatch --parsable <<'EOF'\n{script(jobs)}EOF"


def submit(jobs: Sequence[Job], record: Callable[[Job, Handle], None]) -> None:
    """One `sbatch`. Raises RuntimeError with SLURM's words if it refuses."""
    for part in [jobs, *([job] for job in jobs)]:
        Path(_folder(part)).mkdir(parents=True, exist_ok=True)
    answer = _slurm("sbatch", "--parsable", input=script(jobs))
    if answer.returncode:
        raise RuntimeError(f"sbatch refused the job: {answer.stderr.strip()}")
    number = answer.stdout.strip().partition(";")[0]
    for index, job in enumerate(jobs):
        name, log = (f"{number}_{index}", f"slurm-{index}.log") if len(jobs) > 1 else (number, "slurm.log")
        record(job, {"id": name, "log": f"{_folder(jobs)}/{log}"})
        print(f"{job.name} is job {name}", file=sys.stderr)


def status(handle: Handle) -> str:
    """SLURM's word for the job's state, and why it waits or failed."""
    answer = _slurm("scontrol", "show", "job", "--oneliner", handle["id"])
    if answer.returncode:
        return f"no longer known to SLURM; it last said: {error_in(tail(Path(handle['log'])))}"
    fields = dict(re.findall(r"(\w+)=(\S*)", answer.stdout))
    state = fields["JobState"]
    if state == "PENDING":
        return f"{state} ({fields['Reason']})"
    if state in ("RUNNING", "COMPLETED"):
        return f"{state}, started {int(fields['Restarts']) + 1} time(s)"
    return f"{state} (exit code {fields['ExitCode']}): {error_in(tail(Path(handle['log'])))}"


def logs(handle: Handle) -> str:
    return f"==> {handle['log']} <==\n{tail(Path(handle['log']))}"


def stop(handle: Handle) -> None:
    """Raises RuntimeError with SLURM's words if it refuses."""
    answer = _slurm("scancel", handle["id"])
    if answer.returncode:
        raise RuntimeError(f"scancel: {answer.stderr.strip()}")


def _check_resources(jobs: Sequence[Job]) -> None:
    resources = jobs[0].resources
    for job in jobs:
        refuse_secrets(job.environment, "keep it in your home, as `wandb login` and `hf auth login` do")
    if any(job.resources != resources for job in jobs):
        raise ValueError("the jobs of one array ask for the same resources")
    if wrong := [job.workdir for job in jobs if "\\" in job.workdir or "\n" in job.workdir]:
        raise ValueError(
            f"SLURM cannot write to a path with a backslash or a line break: give another --workdir than {wrong[0]!r}"
        )
    if resources.nodes < 1 or resources.tasks_per_node < 1 or resources.grace < 1:
        raise ValueError(f"nodes, tasks_per_node and grace are at least 1, got {resources}")
    if resources.gpus and resources.tasks_per_node not in (1, resources.gpus):
        raise ValueError(
            f"{resources.tasks_per_node} tasks a node cannot share {resources.gpus} GPUs: set tasks_per_node to 1 or to gpus"
        )


def _absolute(workdir: str) -> str:
    return workdir if "://" in workdir else str(Path(workdir).resolve())


def _folder(jobs: Sequence[Job]) -> str:
    """Where SLURM writes what the jobs say: beside the run, or for an array beside all of its runs."""
    if "://" in jobs[0].workdir:
        return str(ROOT / "runs" / "logs" / jobs[0].name)
    return f"{commonpath([_absolute(job.workdir) for job in jobs])}/logs"


def _word(value: str) -> str:
    """One word for sbatch, which splits its lines at blanks and ends them at a #, but for what stands in quotes."""
    return value if re.fullmatch(r"[\w./%=@:,+-]*", value, re.ASCII) else '"' + value.replace('"', r"\"") + '"'


def _slurm(*command: str, input: str | None = None) -> subprocess.CompletedProcess:
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"SLURM's {command[0]} is not here: run this on a login node of the cluster")
    return subprocess.run(command, input=input, capture_output=True, text=True, timeout=60)
