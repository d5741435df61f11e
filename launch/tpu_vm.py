"""Cloud TPU: one queued resource for a job, its run started on every worker by the startup script tpu_vm.sh.

Queueing, placing and taking back are the service's. This command stays until the run has ended (tpu_supervisor.py). Cut short,
it is taken up by the same command: the queued resource has the job's name.

With --existing=NAME the script is started, over gcloud's ssh, on a TPU VM that is there, which then is neither made nor deleted.
"""

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowlm.studies.study import finished
from flowlm.system import storage
from launch import tpu_workers
from launch.cloud_tpu import CloudTpu, passing, refusals
from launch.job import Handle, Job, help_of, settings
from launch.tpu_slices import check_mesh, runtime
from launch.tpu_supervisor import Supervisor

ROOT = Path(__file__).parents[1]
PATTERNS = frozenset("*?[]#")


@dataclass(frozen=True)
class Resources:
    accelerator: str = help_of("", "type and size, such as v5litepod-16")
    project: str = help_of("", "the project that pays")
    zone: str = help_of("", "where, such as us-central1-a; near the bucket")
    spot: bool = help_of(False, "spare capacity: cheaper, taken back at any time, created again by this command")
    existing: str = help_of("", "name of a TPU VM that is there already, to be used in place of a new one")
    runtime: str = help_of("", "image of the machines; none: the one of the accelerator")
    service_account: str = help_of(
        "", "whom the machines act as; none: the project's default. It must reach the bucket"
    )
    max_restarts: int = help_of(20, "how often the run is started again, after a preemption or a failure")


def _check_resources(jobs: Sequence[Job]) -> None:
    for job in jobs:
        wanted = job.resources
        for name in ("project", "zone", *(() if wanted.existing else ("accelerator",))):
            if not getattr(wanted, name):
                raise ValueError(f"the backend tpu_vm needs --{name}")
        if wanted.max_restarts < 0:
            raise ValueError(f"max_restarts is at least 0, got {wanted.max_restarts}")
        if wanted.existing and wanted.spot:
            raise ValueError("--spot is how a TPU is made, and --existing takes one that is made: give one of them")
        if not job.workdir.startswith(storage.SCHEME):
            raise ValueError(f"workers share nothing but a bucket: --workdir must be gs://..., got {job.workdir}")
        if patterns := PATTERNS & set(job.workdir):
            raise ValueError(
                f"gcloud reads {' '.join(sorted(patterns))} as a pattern: name --workdir without, got {job.workdir}"
            )
        if wanted.accelerator:
            check_mesh(settings(job).mesh, wanted.accelerator)


def check(jobs: Sequence[Job]) -> None:
    """Raises ValueError for what could never run, FileNotFoundError where gcloud is needed and missing. Sends nothing."""
    _check_resources(jobs)
    changed = _git("status", "--porcelain", "--untracked-files=no")
    if changed:
        raise ValueError(f"what is sent is the last commit, and these files have changed since: {changed}. Commit them")
    for job in jobs:
        if job.resources.existing:
            if shutil.which("gcloud") is None:
                raise FileNotFoundError("--existing needs gcloud, which has the ssh keys: install the Google Cloud CLI")
            node = _cloud(job).node(job.resources.existing)
            if node is None:
                raise ValueError(f"there is no TPU VM {job.resources.existing} in {job.resources.zone}")
            accelerator, state = node
            if state != "READY":
                raise ValueError(f"the TPU VM {job.resources.existing} is {state}, not READY")
            check_mesh(settings(job).mesh, accelerator)


def _git(*arguments: str) -> str:
    answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"git {arguments[0]} failed in {ROOT}: {answer.stderr.strip()}")
    return answer.stdout.strip()


def _cloud(job: Job) -> CloudTpu:
    return CloudTpu(job.resources.project, job.resources.zone, job.name)


# ---- What is sent.


def script(job: Job) -> str:
    """The startup script: tpu_vm.sh with the job's values above it."""

    def array(words):
        return f"({shlex.join(words)})"

    values = {
        "bundle": shlex.quote(f"{job.workdir}/launch/flowlm.bundle"),
        "logs": shlex.quote(f"{job.workdir}/logs"),
        "turns": shlex.quote(f"{job.workdir}/launch/turn"),
        "supervised": "" if job.resources.existing else "yes",
        "environment": array([f"{key}={value}" for key, value in job.environment.items()]),
        # On a slice JAX finds the workers itself; if it did not, each would train alone in the one workdir.
        "command": array([*job.command, "--distributed"]),
    }
    lines = [f"{key}={value}" for key, value in values.items()]
    return "\n".join(["#!/usr/bin/env bash", *lines, (ROOT / "launch/tpu_vm.sh").read_text()])


def request(job: Job) -> dict[str, Any]:
    """The creation of a job's queued resource, which is named as the job, in the service's JSON."""
    wanted = job.resources
    parent = f"projects/{wanted.project}/locations/{wanted.zone}"
    node: dict[str, Any] = {
        "acceleratorType": wanted.accelerator,
        "runtimeVersion": wanted.runtime or runtime(wanted.accelerator),
        "networkConfig": {"enableExternalIps": True},
        "metadata": {"startup-script": script(job)},
    }
    if wanted.service_account:
        node["serviceAccount"] = {"email": wanted.service_account}
    resource: dict[str, Any] = {"tpu": {"nodeSpec": [{"parent": parent, "nodeId": job.name, "node": node}]}}
    if wanted.spot:
        resource["spot"] = {}
    return {"parent": parent, "queuedResourceId": job.name, "queuedResource": resource}


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
        else:
            sent = request(job)
            sent["queuedResource"]["tpu"]["nodeSpec"][0]["node"]["metadata"]["startup-script"] = "the script"
            told.append(f"CreateQueuedResource {json.dumps(sent, indent=2)}")
        told.append(f"the script:\n{script(job)}")
    return "\n".join(told)


def _upload(job: Job) -> None:
    """The commit as a git bundle, so that the machines need no access to where it came from, and the script."""
    folder = storage.path(job.workdir) / "launch"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as here:
        _git("bundle", "create", f"{here}/flowlm.bundle", "HEAD")
        storage.copy(storage.path(f"{here}/flowlm.bundle"), folder / "flowlm.bundle")
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
    """Carries the jobs out, one after another. Raises RuntimeError naming those that failed, after all others were done."""
    failed = []
    for job in jobs:
        cloud = _cloud(job)
        try:
            _upload(job)
            if job.resources.existing:
                tpu_workers.next_turn(job.workdir)
                record(job, _handle(job))
                _call(_started_over_ssh(job))
                told = f"started on {job.resources.existing}"
            else:
                supervisor = Supervisor(job, cloud, request(job), shlex.join(_deletion(job)))
                told = supervisor.run(lambda job=job: record(job, _handle(job)))
            print(f"{job.name} {told}", file=sys.stderr, flush=True)
        except (*refusals(), *passing(), RuntimeError) as error:
            failed.append(f"{job.name}: {getattr(error, 'message', None) or error}")
    if failed:
        raise RuntimeError("; ".join(failed))


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
