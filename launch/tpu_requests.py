"""What is sent to Cloud TPU for a job: the request of its queued resource, and the script with which its machines start."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import credentials
from launch.job import Job, help_of
from launch.tpu_slices import runtime

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Resources:
    accelerator: str = help_of("", "type and size, such as v5litepod-16")
    project: str = help_of("", "the project that pays")
    zone: str = help_of("", "where, such as us-central1-a; in the region of the bucket")
    spot: bool = help_of(False, "spare capacity: cheaper, taken back at any time, created again by this command")
    reservation: str = help_of(
        "", "a reservation to run in: its name, or projects/HOST/locations/ZONE/reservations/NAME"
    )
    flex_start: bool = help_of(False, "capacity that is waited for and stays for --hours; asked for by gcloud")
    hours: int = help_of(168, "how long capacity of --flex_start stays, at most 168, before it is asked for again")
    existing: str = help_of("", "name of a TPU VM that is there already, to be used in place of a new one")
    runtime: str = help_of("", "image of the machines; none: the one of the accelerator")
    service_account: str = help_of(
        "", "whom the machines act as; none: the project's default. It must reach the bucket"
    )
    secrets: str = help_of(
        "", "names in Secret Manager, split by commas, such as WANDB_API_KEY: variables of these names in the processes"
    )
    max_restarts: int = help_of(20, "how often the run is started again, after a preemption or a failure")
    parallel: int = help_of(1, "of a sweep's jobs, how many have a slice at the same time; 0: all")

    @property
    def secret_names(self) -> list[str]:
        return credentials.names(self.secrets)

    @property
    def image(self) -> str:
        """That of the machines. Raises ValueError for an accelerator that is not known."""
        return self.runtime or runtime(self.accelerator)


def script(job: Job) -> str:
    """The startup script: tpu_vm.sh with the job's values above it."""

    def array(words: Iterable[str]) -> str:
        return f"({shlex.join(words)})"

    wanted = job.resources
    values = {
        "bundle": shlex.quote(f"{job.workdir}/launch/flowlm.bundle"),
        "logs": shlex.quote(f"{job.workdir}/logs"),
        "turns": shlex.quote(f"{job.workdir}/launch/turn"),
        "supervised": "" if wanted.existing else "yes",
        "project": shlex.quote(wanted.project),
        "secrets": array(wanted.secret_names),
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
        "runtimeVersion": wanted.image,
        "networkConfig": {"enableExternalIps": True},
        "metadata": {"startup-script": script(job)},
    }
    if wanted.service_account:
        node["serviceAccount"] = {"email": wanted.service_account}
    resource: dict[str, Any] = {"tpu": {"nodeSpec": [{"parent": parent, "nodeId": job.name, "node": node}]}}
    if wanted.spot:
        resource["spot"] = {}
    if wanted.reservation:
        name = wanted.reservation
        resource |= {"guaranteed": {}, "reservationName": name if "/" in name else f"{parent}/reservations/{name}"}
    return {"parent": parent, "queuedResourceId": job.name, "queuedResource": resource}


def flex_start(job: Job, startup: str) -> list[str]:
    """The line that asks for a job's queued resource on flex-start capacity, of which the client's requests know nothing.

    Args:
      startup: a file here with the startup script.
    """
    wanted = job.resources
    account = [f"--service-account={wanted.service_account}"] if wanted.service_account else []
    return [
        *("gcloud", "alpha", "compute", "tpus", "queued-resources", "create", job.name),
        f"--project={wanted.project}",
        f"--zone={wanted.zone}",
        f"--node-id={job.name}",
        f"--accelerator-type={wanted.accelerator}",
        f"--runtime-version={wanted.image}",
        "--provisioning-model=flex-start",
        f"--max-run-duration={wanted.hours}h",
        *account,
        f"--metadata-from-file=startup-script={startup}",
        "--quiet",
    ]
