"""Kubernetes, as Google's GKE has it: a job is one JobSet on slices of TPUs, or one indexed Job on nodes with GPUs.

Queueing, placing and starting again are the cluster's own (gke_manifests.py says what is asked of it), so this command returns
when all is sent; of a sweep with --parallel it stays until the last of its jobs is sent.
"""

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import yaml

from flowlm.studies.study import finished
from flowlm.system import storage
from launch.bucket_checks import check_buckets
from launch.cluster_api import Cluster, Refused
from launch.credentials import refuse_secrets
from launch.gke_manifests import INDEX_OF_POD, LABEL, Resources, manifests, name_of, slices
from launch.job import Handle, Job, error_in, last_lines, settings
from launch.tpu_slices import check_devices

__all__ = ["Resources", "check", "describe", "logs", "status", "stop", "submit"]

POLL_SECONDS = 10
NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


def _check_resources(jobs: Sequence[Job]) -> None:
    for job in jobs:
        wanted = job.resources
        if not wanted.image:
            raise ValueError("the backend gke needs --image")
        if bool(wanted.topology) == bool(wanted.gpu):
            raise ValueError("the backend gke needs --topology for TPUs or --gpu for GPUs, and not both")
        if wanted.topology and (wanted.gpus, wanted.nodes) != (1, 1):
            raise ValueError(f"--gpus and --nodes are of GPUs: what {wanted.topology} has follows from its name")
        if sum(map(bool, (wanted.spot, wanted.reservation, wanted.flex_start))) > 1:
            raise ValueError("--spot, --reservation and --flex_start are three kinds of capacity: give one of them")
        if min(wanted.gpus, wanted.nodes, wanted.grace) < 1 or min(wanted.max_restarts, wanted.parallel) < 0:
            raise ValueError(
                f"gpus, nodes and grace are at least 1, and max_restarts and parallel at least 0, got {wanted.gpus}, "
                f"{wanted.nodes}, {wanted.grace}, {wanted.max_restarts} and {wanted.parallel}"
            )
        # What was given is not repeated, because whoever mistakes the flag gives a secret itself.
        if not all(map(NAME.fullmatch, wanted.secret_names)):
            raise ValueError(
                "--secrets takes names of Secrets, split by commas: `kubectl create secret generic NAME "
                "--from-env-file=FILE` makes one"
            )
        refuse_secrets(job.environment, "put it into a Secret, and give --secrets=NAME")
        if not job.workdir.startswith(storage.SCHEME):
            raise ValueError(f"pods share nothing but a bucket: --workdir must be gs://..., got {job.workdir}")
        _check_mesh(job)


def _check_mesh(job: Job) -> None:
    wanted, mesh = job.resources, settings(job).mesh
    if wanted.gpu:
        have = wanted.nodes * wanted.gpus
        check_devices(mesh, have, f"--gpus={wanted.gpus} on --nodes={wanted.nodes}", "GPUs", "these")
        return
    place = slices(wanted.topology)
    if place.count > 1 and place.hosts == 1:
        raise ValueError(
            f"GKE joins slices of several hosts only, and {place.shape} is one host: give a larger --topology"
        )
    check_devices(mesh, place.devices, wanted.topology, "devices", "--topology")
    inside = mesh.data * mesh.model
    replicas = place.devices // inside if mesh.replica == -1 else mesh.replica
    if replicas % place.count:
        raise ValueError(
            f"{wanted.topology} has {place.count} slices, which are replicas: make mesh.replica a multiple of it, not {replicas}"
        )


def check(jobs: Sequence[Job]) -> None:
    """Asks the cluster itself, which makes nothing.

    Raises:
      ValueError: what could never run. ImportError: no client.
      RuntimeError: no cluster, or what the cluster or a bucket would refuse.
    """
    _check_resources(jobs)
    cluster = _cluster(jobs[0])
    for job in jobs:
        try:
            for manifest in manifests(job):
                cluster.create(manifest, dry_run=True)
        except Refused as error:
            if not _may_wait(job, error):
                raise
    check_buckets(jobs)


def describe(jobs: Sequence[Job]) -> str:
    """The manifests, as `kubectl apply -f -` takes them."""
    _check_resources(jobs)
    made = (manifest for job in jobs for manifest in manifests(job))
    return "---\n".join(yaml.dump(manifest, Dumper=_Readable, sort_keys=False, width=120) for manifest in made)


class _Readable(yaml.SafeDumper):
    """Writes a text of several lines as such."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Readable.add_representer(str, _Readable.represent_str)


# ---- Sending.


def _cluster(job: Job) -> Cluster:
    return Cluster(job.resources.context, job.resources.namespace)


def submit(jobs: Sequence[Job], record: Callable[[Job, Handle], None]) -> None:
    """Sends the jobs; with `parallel` of them at most so many are there at a time, and a full quota is waited for.

    Raises:
      Refused: the cluster refuses a job. Those after it are not sent.
    """
    cluster = _cluster(jobs[0])
    there = [job for job in jobs if _runs(cluster, *_place(job))]
    # These come first, because what ends while others wait is done, and must not be sent again.
    for job in [*there, *(job for job in jobs if job not in there)]:
        kind, name = _place(job)
        if job in there:
            told = "is there already, and is left as it is"
        else:
            _wait_for_room(cluster, [_place(other) for other in jobs if other is not job], job.resources.parallel)
            _cleared(cluster, kind, name, job.resources.grace)
            _send(cluster, job, jobs)
            told = f"is sent, as the {kind} {name} of namespace {job.resources.namespace}"
        place = {"context": cluster.context, "namespace": job.resources.namespace}
        record(job, {**place, "kind": kind, "name": name, "workdir": job.workdir})
        print(f"{job.name} {told}", file=sys.stderr, flush=True)


def _place(job: Job) -> tuple[str, str]:
    """(kind, name) of the object that runs a job."""
    return manifests(job)[-1]["kind"], name_of(job)


def _wait_for_room(cluster: Cluster, others: Sequence[tuple[str, str]], most: int) -> None:
    """Waits until fewer than `most` (0: any number) of the others are there, sent by whichever command."""
    while most and sum(_runs(cluster, *other) for other in others) >= most:
        time.sleep(POLL_SECONDS)


def _may_wait(job: Job, error: Refused) -> bool:
    return error.quota and job.resources.parallel > 0


def _send(cluster: Cluster, job: Job, jobs: Sequence[Job]) -> None:
    """Makes a job's objects. With `parallel` it waits while a quota is full, of which it deletes the jobs that are complete."""
    told, left = False, manifests(job)
    while left:
        try:
            cluster.create(left[0])
            del left[0]
        except Refused as error:
            if not _may_wait(job, error):
                raise
            if not told:
                print(f"{job.name} waits for room: {error}", file=sys.stderr, flush=True)
            told = True
            for kind, name in map(_place, jobs):
                found = cluster.read(kind, name)
                if found and _complete(found) and "deletionTimestamp" not in found["metadata"]:
                    _delete(cluster, kind, name)
            time.sleep(POLL_SECONDS)


def _runs(cluster: Cluster, kind: str, name: str) -> bool:
    found = cluster.read(kind, name)
    return found is not None and "deletionTimestamp" not in found["metadata"] and not _ended(found)


def _cleared(cluster: Cluster, kind: str, name: str, grace: int) -> None:
    """Makes room for an object of this name, and waits until all pods of the one before have ended."""
    deadline = time.monotonic() + grace + 120
    cluster.delete(kind, name)
    while cluster.read(kind, name) is not None:
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{name} of before is not gone, {grace} s and more after it was deleted: `kubectl describe` it"
            )
        time.sleep(POLL_SECONDS)


# ---- What was sent.


def _made(handle: Handle) -> Cluster:
    return Cluster(handle["context"], handle["namespace"])


def _conditions(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{type: condition} of those that hold."""
    conditions = found.get("status", {}).get("conditions") or []
    return {each["type"]: each for each in conditions if each["status"] == "True"}


def _complete(found: dict[str, Any]) -> bool:
    return bool({"Complete", "Completed"} & set(_conditions(found)))


def _ended(found: dict[str, Any]) -> bool:
    return _complete(found) or "Failed" in _conditions(found)


def status(handle: Handle) -> str:
    """How the job stands, and why it waits or failed."""
    cluster = _made(handle)
    found = cluster.read(handle["kind"], handle["name"])
    if found is None:
        return "ended" if finished(storage.path(handle["workdir"])) else "not in the cluster: stopped, or deleted"
    if "deletionTimestamp" in found["metadata"]:
        return "stopping: its processes save, and end"
    conditions = _conditions(found)
    if failure := conditions.get("Failed"):
        return f"failed ({failure.get('reason', 'no reason given')}): {_last_words(cluster, handle) or failure.get('message', '')}"
    if _ended(found):
        return "ended"
    if "Suspended" in conditions:
        return f"waits: {conditions['Suspended'].get('message') or 'suspended, as by a queue'}"
    return _progress(cluster, handle, found)


def _progress(cluster: Cluster, handle: Handle, found: dict[str, Any]) -> str:
    """How many of its pods run, and why the others do not."""
    pods = [pod for pod in _pods(cluster, handle) if pod["status"]["phase"] != "Failed"]
    up = sum(pod["status"]["phase"] != "Pending" for pod in pods)
    state = found.get("status", {})
    again = {
        "JobSet": f"restarted {state.get('restarts', 0)} time(s)",
        "Job": f"{state.get('failed', 0)} pod(s) failed",
    }
    told = f"{up} of {_wanted(found)} pods run, {again[handle['kind']]}"
    if up == _wanted(found):
        return f"running: {told}"
    why = next(filter(None, map(_waits_for, pods)), "") or cluster.warning(handle["name"])
    return f"waits: {told}{': ' if why else ''}{why}"


def _wanted(found: dict[str, Any]) -> int:
    """Pods of a JobSet or a Job."""
    spec = found["spec"]
    if found["kind"] == "Job":
        return spec["parallelism"]
    return sum(each["replicas"] * each["template"]["spec"]["parallelism"] for each in spec["replicatedJobs"])


def _waits_for(pod: dict[str, Any]) -> str:
    """Why a pod does not run; empty if it does, or does not say."""
    state = pod["status"]
    for container in state.get("containerStatuses") or ():
        if waiting := container.get("state", {}).get("waiting"):
            return ": ".join(filter(None, (waiting.get("reason"), waiting.get("message"))))
    failed = (each for each in state.get("conditions") or () if each["status"] == "False")
    return next((each["message"] for each in failed if each["type"] == "PodScheduled" and each.get("message")), "")


def _pods(cluster: Cluster, handle: Handle) -> Iterator[dict[str, Any]]:
    """A job's pods in the order of its processes, and of several that had one number in that of time."""

    def order(pod):
        metadata = pod["metadata"]
        slice_index = (metadata.get("labels") or {}).get("jobset.sigs.k8s.io/job-index", 0)
        index = (metadata.get("annotations") or {}).get(INDEX_OF_POD, 0)
        return int(slice_index), int(index), metadata.get("creationTimestamp") or "", metadata["name"]

    yield from sorted(cluster.pods(f"{LABEL}={handle['name']}"), key=order)


def _said(cluster: Cluster, pod: dict[str, Any]) -> str:
    try:
        return last_lines(cluster.said(pod["metadata"]["name"]))
    except Refused as error:  # a pod that has not begun has no log
        return _waits_for(pod) or f"{pod['status']['phase']}: {error}"


def _last_words(cluster: Cluster, handle: Handle) -> str:
    """What the first pod that failed said last."""
    failed = [pod for pod in _pods(cluster, handle) if pod["status"]["phase"] == "Failed"]
    return error_in(_said(cluster, failed[0])) if failed else ""


def logs(handle: Handle) -> str:
    """What the pods that are there have said; those of before a JobSet's last restart are deleted, and so is what they said."""
    cluster = _made(handle)
    return "\n".join(f"==> {pod['metadata']['name']} <==\n{_said(cluster, pod)}" for pod in _pods(cluster, handle))


def stop(handle: Handle) -> None:
    """Deletes the job: its processes get SIGTERM, save, and end."""
    _delete(_made(handle), handle["kind"], handle["name"])


def _delete(cluster: Cluster, kind: str, name: str) -> None:
    cluster.delete(kind, name)
    if kind == "Job":
        cluster.delete("Service", name)
