"""Cloud TPU: one queued resource for a job, its run started on every worker by the startup script tpu_vm.sh.

Queueing, placing and taking back are the service's. This command stays until the run has ended (tpu_supervisor.py). Cut short,
it is taken up by the same command: the queued resource has the job's name.

With --existing=NAME the script is started, over gcloud's ssh, on a TPU VM that is there, which then is neither made nor deleted.
"""

import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from flowlm.studies.study import finished
from flowlm.system import storage
from launch import cloud_tpu, tpu_workers
from launch.at_once import at_once
from launch.bucket_checks import check_buckets
from launch.cloud_tpu import CloudTpu, FlexStart, passing, refusals
from launch.credentials import refuse_secrets
from launch.job import Handle, Job, settings
from launch.tpu_requests import ROOT, Resources, flex_start, request, script
from launch.tpu_slices import check_mesh
from launch.tpu_supervisor import Supervisor, listening

__all__ = ["Resources", "check", "describe", "logs", "script", "status", "stop", "submit"]

PATTERNS = frozenset("*?[]#")
# Secret Manager takes more, but the environment of a process no other names.
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
ZONE = re.compile(r"[a-z]+-[a-z]+[0-9]+-[a-z]")
MOST_HOURS = 168


def _check_resources(jobs: Sequence[Job]) -> None:
    for job in jobs:
        wanted = job.resources
        for name in ("project", "zone", *(() if wanted.existing else ("accelerator",))):
            if not getattr(wanted, name):
                raise ValueError(f"the backend tpu_vm needs --{name}")
        if not ZONE.fullmatch(wanted.zone):
            raise ValueError(f"--zone={wanted.zone} is not a zone: they are called like us-central1-a")
        if min(wanted.max_restarts, wanted.parallel) < 0:
            raise ValueError(
                f"max_restarts and parallel are at least 0, got {wanted.max_restarts} and {wanted.parallel}"
            )
        _check_capacity(wanted)
        # What was given is not repeated, because whoever mistakes the flag gives a secret itself.
        if not all(map(VARIABLE.fullmatch, wanted.secret_names)):
            raise ValueError(
                "--secrets takes names in Secret Manager that are names of variables too, such as WANDB_API_KEY: "
                "`gcloud secrets create NAME --data-file=FILE` makes one"
            )
        refuse_secrets(job.environment, "put it into Secret Manager, and give its name in --secrets")
        if not storage.in_bucket(job.workdir):
            raise ValueError(f"workers share nothing but a bucket: --workdir must be gs://..., got {job.workdir}")
        if patterns := PATTERNS & set(job.workdir):
            raise ValueError(
                f"gcloud reads {' '.join(sorted(patterns))} as a pattern: name --workdir without, got {job.workdir}"
            )
        if wanted.accelerator:
            check_mesh(settings(job).mesh, wanted.accelerator)
    if twice := [name for name, times in Counter(job.name for job in jobs).items() if times > 1]:
        raise ValueError(f"two runs of the sweep would be called {twice[0]}: rename one of them")
    if len(jobs) > 1 and jobs[0].resources.existing:
        raise ValueError(
            "--existing is one machine, and a sweep has several runs: give --config, or leave out --existing"
        )


def _check_capacity(wanted: Resources) -> None:
    kinds = {name: getattr(wanted, name) for name in ("spot", "reservation", "flex_start")}
    asked = [f"--{name}" for name, value in kinds.items() if value]
    if asked and wanted.existing:
        raise ValueError(f"{asked[0]} is how a TPU is made, and --existing takes one that is made: give one of them")
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} are kinds of capacity: give one of them")
    if not 1 <= wanted.hours <= MOST_HOURS:
        raise ValueError(f"--hours is from 1 to {MOST_HOURS}, got {wanted.hours}")


def check(jobs: Sequence[Job]) -> None:
    """Looks at all that can be seen, and leaves nothing behind.

    Raises:
      ImportError, FileNotFoundError: what asks for machines is not installed here.
      ValueError: what could never run, or is not where machines find it.
      RuntimeError: there are no credentials, or a bucket refuses.
    """
    _check_resources(jobs)
    cloud_tpu.client()
    changed = _git("status", "--porcelain", "--untracked-files=no")
    if changed:
        raise ValueError(f"what is sent is the last commit, and these files have changed since: {changed}. Commit them")
    for job in jobs:
        if shutil.which("gcloud") is None and (job.resources.existing or job.resources.flex_start):
            raise FileNotFoundError("--existing and --flex_start need gcloud: install the Google Cloud CLI")
        if job.resources.existing:
            node = _cloud(job).node(job.resources.existing)
            if node is None:
                raise ValueError(f"there is no TPU VM {job.resources.existing} in {job.resources.zone}")
            accelerator, state = node
            if state != "READY":
                raise ValueError(f"the TPU VM {job.resources.existing} is {state}, not READY")
            check_mesh(settings(job).mesh, accelerator)
    check_buckets(jobs, jobs[0].resources.zone)


def _git(*arguments: str) -> str:
    answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"git {arguments[0]} failed in {ROOT}: {answer.stderr.strip()}")
    return answer.stdout.strip()


def _cloud(job: Job) -> CloudTpu:
    kind = FlexStart if job.resources.flex_start else CloudTpu
    return kind(job.resources.project, job.resources.zone, job.name)


# ---- What is sent.


def ssh(handle: Handle, command: str) -> list[str]:
    """The line that runs a command on every worker of an existing TPU VM."""
    place = [f"--project={handle['project']}", f"--zone={handle['zone']}"]
    return [
        "gcloud",
        "compute",
        "tpus",
        "tpu-vm",
        "ssh",
        handle["existing"],
        *place,
        "--worker=all",
        f"--command={command}",
    ]


def _started_over_ssh(job: Job) -> list[str]:
    line = f"gcloud storage cat {shlex.quote(f'{job.workdir}/launch/startup.sh')} > /tmp/flowlm.sh"
    return ssh(_handle(job), f"{line} && (sudo setsid bash /tmp/flowlm.sh < /dev/null > /dev/null 2>&1 &)")


def describe(jobs: Sequence[Job]) -> str:
    _check_resources(jobs)
    told = []
    for job in jobs:
        told.append(f"commit {_git('rev-parse', 'HEAD')} -> {job.workdir}/launch/flowlm.bundle")
        told.append(f"script -> {job.workdir}/launch/startup.sh")
        if job.resources.existing:
            told.append(shlex.join(_started_over_ssh(job)))
        elif job.resources.flex_start:
            told.append(shlex.join(flex_start(job, "SCRIPT")))
        else:
            sent = request(job)
            sent["queuedResource"]["tpu"]["nodeSpec"][0]["node"]["metadata"]["startup-script"] = "the script"
            told.append(f"CreateQueuedResource {json.dumps(sent, indent=2)}")
        told.append(f"the script:\n{script(job)}")
    return "\n".join(told)


def _bundle(folder: Path) -> Path:
    """The commit as a git bundle, so that the machines need no access to where it came from."""
    _git("bundle", "create", f"{folder}/flowlm.bundle", "HEAD")
    return folder / "flowlm.bundle"


def _upload(job: Job, bundle: Path) -> None:
    folder = storage.path(job.workdir) / "launch"
    folder.mkdir(parents=True, exist_ok=True)
    storage.copy(storage.path(bundle), folder / "flowlm.bundle")
    storage.write_text(folder / "startup.sh", script(job))


# ---- Sending, and seeing to the end.


def _handle(job: Job) -> Handle:
    wanted = job.resources
    return {
        "project": wanted.project,
        "zone": wanted.zone,
        "name": job.name,
        "existing": wanted.existing,
        "workdir": job.workdir,
    }


def submit(jobs: Sequence[Job], record: Callable[[Job, Handle], None]) -> None:
    """Carries the jobs out, so many at a time as they ask for. Raises RuntimeError naming those that failed, after all others."""
    with tempfile.TemporaryDirectory() as folder, listening():
        bundle = _bundle(Path(folder))
        if jobs[0].resources.existing:
            _start_existing(jobs[0], bundle, record)
            return
        supervisors = [_supervisor(job, Path(folder)) for job in jobs]
        calls = [functools.partial(_carry_out, *each, bundle, record) for each in zip(jobs, supervisors, strict=True)]
        try:
            answers = at_once(calls, jobs[0].resources.parallel)
        finally:
            for supervisor in supervisors:
                supervisor.cut()
    failed = [(job, answer) for job, answer in zip(jobs, answers, strict=True) if answer is not None]
    for _, error in failed:
        if not isinstance(error, (*refusals(), *passing(), RuntimeError)):
            raise error
    if failed:
        raise RuntimeError(
            "; ".join(f"{job.name}: {getattr(error, 'message', None) or error}" for job, error in failed)
        )


def _start_existing(job: Job, bundle: Path, record: Callable[[Job, Handle], None]) -> None:
    _upload(job, bundle)
    tpu_workers.next_turn(job.workdir)
    record(job, _handle(job))
    _call(_started_over_ssh(job))
    print(f"{job.name} started on {job.resources.existing}", file=sys.stderr, flush=True)


def _supervisor(job: Job, folder: Path) -> Supervisor:
    """What carries a job out. folder: for what gcloud reads of files."""
    startup = folder / job.name
    startup.write_text(script(job))
    asked = flex_start(job, str(startup)) if job.resources.flex_start else request(job)
    return Supervisor(job, _cloud(job), asked, shlex.join(_deletion(job)))


def _carry_out(job: Job, supervisor: Supervisor, bundle: Path, record: Callable[[Job, Handle], None]) -> None:
    _upload(job, bundle)
    told = supervisor.run(lambda: record(job, _handle(job)))
    print(f"{job.name} {told}", file=sys.stderr, flush=True)


def _deletion(job: Job) -> list[str]:
    """The line that deletes the queued resource without flowlm."""
    place = [f"--project={job.resources.project}", f"--zone={job.resources.zone}"]
    return ["gcloud", "compute", "tpus", "queued-resources", "delete", job.name, *place, "--force", "--quiet"]


def _call(line: list[str]) -> None:
    answer = subprocess.run(line, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"`{shlex.join(line[:6])}` failed: {answer.stderr.strip()}")


# ---- What was started.


def status(handle: Handle) -> str:
    workdir = handle["workdir"]
    if finished(storage.path(workdir)):
        return "ended"
    told = "".join(f"; worker {worker} ended with {status}" for worker, status in tpu_workers.exits(workdir).items())
    if handle["existing"]:
        return f"on {handle['existing']}{told}"
    found = _made(handle).look()
    return f"{'deleted' if found is None else found[0]}{told}"


def logs(handle: Handle) -> str:
    workdir = handle["workdir"]
    return "\n".join(
        f"==> {workdir}/logs/{worker} <==\n{tpu_workers.said(workdir, worker)}"
        for worker in tpu_workers.workers(workdir)
    )


def stop(handle: Handle) -> None:
    """Deletes the queued resource: what was not saved is lost. An existing TPU VM stays; its processes save, and end."""
    if handle["existing"]:
        _call(ssh(handle, "sudo kill -TERM $(sudo cat /root/flowlm.pid)"))
    else:
        _made(handle).delete()


def _made(handle: Handle) -> CloudTpu:
    return CloudTpu(handle["project"], handle["zone"], handle["name"])
