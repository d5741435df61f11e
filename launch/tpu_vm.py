"""Cloud TPU: one queued resource for a job, its run started on every worker by the startup script tpu_vm.sh.

Queueing, placing and taking back are the service's. This command stays until the run has ended: it waits for the TPU, creates it
again after a preemption, and deletes it in the end. Cut short, it is taken up by the same command: the queued resource has the
job's name. Credentials are the client library's own (`gcloud auth application-default login`) and are never read here.

With --existing=NAME the script is started, over gcloud's ssh, on a TPU VM that is there, which then is neither made nor deleted.
"""

import contextlib
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowlm import storage
from flowlm.study import finished
from launch.job import Handle, Job, error_in, help_of, settings, tail

try:
    from google.api_core import exceptions
    from google.api_core.retry import Retry
    from google.cloud import tpu_v2
except ImportError as error:
    raise ImportError("the backend tpu_vm needs google-cloud-tpu: `pip install -e .[gcp]` in the checkout") from error

ROOT = Path(__file__).parents[1]
POLL_SECONDS = 15
AXES = ("replica", "data", "model")

State = tpu_v2.QueuedResourceState.State


@dataclass(frozen=True)
class Kind:
    """A generation of TPU, as Cloud TPU sells it: `NAME-N`, one of sizes N, with N / `per_chip` chips.

    JAX sees one device a chip on all of these. runtime: the image of its machines.
    """

    name: str
    runtime: str
    sizes: tuple[int, ...]
    per_chip: int = 1


_SLICES = (1, 4, 8, 16, 32, 64, 128, 256)
_CUBES = tuple(2**n for n in range(3, 12))  # numbered by cores, two a chip
KINDS = (
    Kind("v4", "tpu-ubuntu2204-base", _CUBES, per_chip=2),
    Kind("v5litepod", "v2-alpha-tpuv5-lite", _SLICES),
    Kind("v5p", "v2-alpha-tpuv5", _CUBES, per_chip=2),
    Kind("v6e", "v2-alpha-tpuv6e", _SLICES),
)


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
    max_restarts: int = help_of(20, "how often it is created again after a preemption")


def chips(accelerator: str) -> int:
    """Chips of an accelerator type, which are JAX's devices. Raises ValueError listing the known ones."""
    return _kind(accelerator)[1]


def _kind(accelerator: str) -> tuple[Kind, int]:
    name, _, size = accelerator.rpartition("-")
    for kind in KINDS:
        if kind.name == name and size in map(str, kind.sizes):
            return kind, int(size) // kind.per_chip
    known = "; ".join(f"{kind.name}-N with N of {', '.join(map(str, kind.sizes))}" for kind in KINDS)
    raise ValueError(f"unknown --accelerator {accelerator!r}: known are {known}")


def check_mesh(mesh: Mapping[str, Any], accelerator: str) -> None:
    """Raises ValueError unless the product of the axes of `config.mesh` is the number of chips (-1 takes what is left)."""
    have = chips(accelerator)
    sizes = {axis: mesh[axis] for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    fits = have % fixed == 0 if -1 in sizes.values() else have == fixed
    if not fits:
        axes = ", ".join(f"mesh.{axis} = {size}" for axis, size in sizes.items())
        raise ValueError(
            f"{accelerator} has {have} chips, and the mesh ({axes}) {fixed}"
            f"{' or a multiple' if -1 in sizes.values() else ''}: change --config.mesh or --accelerator"
        )


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
            node = _node(_client(), job.resources)
            if node.state != tpu_v2.Node.State.READY:
                raise ValueError(f"the TPU VM {job.resources.existing} is {node.state.name}, not READY")
            check_mesh(settings(job).mesh, node.accelerator_type)


def _git(*arguments: str) -> str:
    answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"git {arguments[0]} failed in {ROOT}: {answer.stderr.strip()}")
    return answer.stdout.strip()


def _client() -> "tpu_v2.TpuClient":
    from google.auth.exceptions import DefaultCredentialsError

    try:
        return tpu_v2.TpuClient()
    except DefaultCredentialsError as error:
        raise RuntimeError("no Google Cloud credentials: run `gcloud auth application-default login`") from error


# ---- What is sent.


def script(job: Job) -> str:
    """The startup script: tpu_vm.sh with the job's values above it."""
    array = lambda words: f"({shlex.join(words)})"
    values = {
        "bundle": shlex.quote(f"{job.workdir}/launch/flowlm.bundle"),
        "logs": shlex.quote(f"{job.workdir}/logs"),
        "environment": array([f"{key}={value}" for key, value in job.environment.items()]),
        # On a slice JAX finds the workers itself; if it did not, each would train alone in the one workdir.
        "command": array([*job.command, "--distributed"]),
    }
    lines = [f"{key}={value}" for key, value in values.items()]
    return "\n".join(["#!/usr/bin/env bash", *lines, (ROOT / "launch/tpu_vm.sh").read_text()])


def _parent(resources: Resources) -> str:
    return f"projects/{resources.project}/locations/{resources.zone}"


def request(job: Job) -> "tpu_v2.CreateQueuedResourceRequest":
    """The queued resource of a job, named as it."""
    wanted = job.resources
    node = tpu_v2.Node(
        accelerator_type=wanted.accelerator,
        runtime_version=wanted.runtime or _kind(wanted.accelerator)[0].runtime,
        network_config=tpu_v2.NetworkConfig(enable_external_ips=True),
        metadata={"startup-script": script(job)},
    )
    if wanted.service_account:
        node.service_account = tpu_v2.ServiceAccount(email=wanted.service_account)
    spec = tpu_v2.QueuedResource.Tpu.NodeSpec(parent=_parent(wanted), node_id=job.name, node=node)
    resource = tpu_v2.QueuedResource(tpu=tpu_v2.QueuedResource.Tpu(node_spec=[spec]))
    if wanted.spot:
        resource.spot = tpu_v2.QueuedResource.Spot()
    return tpu_v2.CreateQueuedResourceRequest(
        parent=_parent(wanted), queued_resource_id=job.name, queued_resource=resource
    )


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
            sent.queued_resource.tpu.node_spec[0].node.metadata["startup-script"] = "the script"
            told.append(
                "CreateQueuedResource "
                + tpu_v2.CreateQueuedResourceRequest.to_json(sent, always_print_fields_with_no_presence=False)
            )
        told.append(f"the script:\n{script(job)}")
    return "\n".join(told)


def _upload(job: Job) -> None:
    """The commit as a git bundle, so that the machines need no access to where it came from, and the script."""
    folder = storage.path(job.workdir) / "launch"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as here:
        _git("bundle", "create", f"{here}/flowlm.bundle", "HEAD")
        storage.copy(storage.path(f"{here}/flowlm.bundle"), folder / "flowlm.bundle")
    storage.write(folder / "startup.sh", script(job))


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
    client = _client()
    for job in jobs:
        try:
            _upload(job)
            if job.resources.existing:
                _clear(job.workdir)
                record(job, _handle(job))
                _call(_started_over_ssh(job))
                _say(job, f"started on {job.resources.existing}")
            else:
                _carry_out(client, job, record)
        except (exceptions.GoogleAPICallError, RuntimeError) as error:
            failed.append(f"{job.name}: {getattr(error, 'message', None) or error}")
    if failed:
        raise RuntimeError("; ".join(failed))


def _carry_out(client, job: Job, record: Callable[[Job, Handle], None]) -> None:
    """Creates the queued resource, creates it again after preemptions, and deletes it, whatever came of the run."""
    handle = _handle(job)
    for _ in range(job.resources.max_restarts + 1):
        try:
            operation = client.create_queued_resource(request(job))
            _clear(job.workdir)
        except exceptions.AlreadyExists:
            operation = None
            _say(job, "is there already: taken up")
        record(job, handle)
        try:
            ended = _wait(client, job, handle, operation)
        except RuntimeError:
            _delete(client, handle)
            raise
        _delete(client, handle)
        if ended != "preempted":
            _say(job, ended)
            return
        _say(job, "preempted")
    raise RuntimeError(f"preempted {job.resources.max_restarts + 1} times: run the same command again to go on")


def _wait(client, job: Job, handle: Handle, operation) -> str:
    """ended, stopped or preempted.

    Args:
      operation: of the creation, if that was now.

    Raises:
      RuntimeError: the service or a worker has failed.
    """
    seen = None
    while True:
        if operation is not None and operation.done():
            operation.result()  # raises why it was refused
            operation = None
        try:
            resource = _queued(client, handle)
        except exceptions.NotFound:
            if operation is None:
                return "stopped"
            time.sleep(POLL_SECONDS)
            continue
        state = resource.state.state
        if state != seen:
            _say(job, state.name)
        seen = state
        if state == State.FAILED:
            raise RuntimeError(
                f"Cloud TPU could not make it: {resource.state.failed_data.error.message or 'no reason given'}"
            )
        if state in (State.SUSPENDING, State.SUSPENDED):
            return "preempted"
        if state == State.ACTIVE:
            exits = _exits(job.workdir)
            if wrong := sorted(worker for worker, status in exits.items() if status != "0"):
                said = error_in(storage.path(job.workdir) / "logs" / f"{wrong[0]}.log")
                raise RuntimeError(f"worker {wrong[0]} ended with {exits[wrong[0]]}: {said}")
            if exits and finished(storage.path(job.workdir)):
                return "ended"
        time.sleep(POLL_SECONDS)


def _say(job: Job, text: str) -> None:
    print(f"{job.name} {text}", file=sys.stderr, flush=True)


def _call(line: list[str]) -> None:
    answer = subprocess.run(line, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"`{shlex.join(line[:6])}` failed: {answer.stderr.strip()}")


def _clear(workdir: str) -> None:
    """Forgets how the workers of an earlier TPU ended."""
    folder = storage.path(workdir) / "logs"
    if folder.exists():
        for path in folder.glob("*.exit"):
            path.unlink()


def _exits(workdir: str) -> dict[str, str]:
    """{worker: exit status} of the workers that have ended."""
    folder = storage.path(workdir) / "logs"
    return {path.stem: path.read_text().strip() for path in folder.glob("*.exit")} if folder.exists() else {}


def _name(handle: Handle, collection: str, name: str) -> str:
    return f"projects/{handle['project']}/locations/{handle['zone']}/{collection}/{name}"


def _queued(client, handle: Handle) -> "tpu_v2.QueuedResource":
    return client.get_queued_resource(name=_name(handle, "queuedResources", handle["name"]), retry=Retry(timeout=600))


def _delete(client, handle: Handle) -> None:
    """Deletes the queued resource with its machines, and waits until they are gone, so that its name is free."""
    name = _name(handle, "queuedResources", handle["name"])
    with contextlib.suppress(exceptions.NotFound):
        client.delete_queued_resource(tpu_v2.DeleteQueuedResourceRequest(name=name, force=True)).result(timeout=1800)


def _node(client, resources: Resources) -> "tpu_v2.Node":
    try:
        return client.get_node(name=f"{_parent(resources)}/nodes/{resources.existing}")
    except exceptions.NotFound as error:
        raise ValueError(f"there is no TPU VM {resources.existing} in {resources.zone}") from error


# ---- What was started.


def status(handle: Handle) -> str:
    workdir = storage.path(handle["workdir"])
    if finished(workdir):
        return "ended"
    exits = _exits(handle["workdir"])
    told = "".join(f"; worker {worker} ended with {status}" for worker, status in sorted(exits.items()))
    if handle["existing"]:
        return f"on {handle['existing']}{told}"
    try:
        return _queued(_client(), handle).state.state.name + told
    except exceptions.NotFound:
        return f"deleted{told}"


def logs(handle: Handle) -> str:
    folder = storage.path(handle["workdir"]) / "logs"
    paths = sorted(folder.glob("*.log")) if folder.exists() else []
    return "\n".join(f"==> {os.fspath(path)} <==\n{tail(path)}" for path in paths)


def stop(handle: Handle) -> None:
    """Deletes the queued resource: what was not saved is lost. An existing TPU VM stays; its processes save, and end."""
    if handle["existing"]:
        _call(ssh(handle, "sudo kill -TERM $(sudo cat /root/flowlm.pid)"))
    else:
        _delete(_client(), handle)
