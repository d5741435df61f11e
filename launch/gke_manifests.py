"""What is sent to Kubernetes for a job: one JobSet on slices of TPUs, or one indexed Job on nodes with GPUs.

Both start all pods of a run with one command, and start them again when one has failed. Slices are the Jobs of a JobSet, which
begins again as a whole. The pods of a GPU Job are replaced one by one, as their processes end with the one that failed, and find
the first of them by the name that a Service without an address gives it.
"""

import hashlib
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from flowlm.scale.ahead_of_time import Topology, parse_topology
from flowlm.system.cluster import ADDRESS, INDEX, NUMBER
from launch import credentials
from launch.job import FINISHED, Job, help_of

Manifest = dict[str, Any]
LABEL = "flowlm-job"
QUEUE = "kueue.x-k8s.io/queue-name"
INDEX_OF_POD = "batch.kubernetes.io/job-completion-index"
# Names of pods are labels of DNS, at most 63 characters, and end with numbers and letters of their own.
NAME_LENGTH = 40
PORT = 8476

# Who ends the container wants the run to be saved. A command that ends well before its last step has done that, and must not
# count as finished: exit status 75 is a failure for Kubernetes, which starts it again unless the job is deleted.
SCRIPT = """\
finished=$1 child= told= again=1
shift
trap 'again=1; if [ "$child" ]; then kill -TERM "$child"; else told=1; fi' TERM
"$@" &
child=$!
[ -z "$told" ] || kill -TERM "$child"
while [ "$again" = 1 ]; do
    again=0
    wait "$child"
    status=$?
done
[ "$status" = 0 ] || exit "$status"
eval "$finished" || { echo "saved before its last step"; exit 75; }
"""


@dataclass(frozen=True)
class Resources:
    image: str = help_of("", "container image with flowlm in it, such as one of the Dockerfile")
    command: str = help_of("python", "what Python is called in the image")
    topology: str = help_of("", "TPUs, as `flowlm plan` names them, such as v5e:4x4, or v5e:4x4:2 for two slices")
    gpu: str = help_of("", "in place of --topology: GPUs, as GKE names them, such as nvidia-h100-80gb")
    gpus: int = help_of(1, "GPUs of each node")
    nodes: int = help_of(1, "nodes with GPUs")
    spot: bool = help_of(False, "spare capacity: cheaper, taken back at any time")
    reservation: str = help_of("", "name of a reservation of Compute Engine to run in")
    flex_start: bool = help_of(False, "capacity that is waited for and stays for at most seven days")
    queue: str = help_of("", "Kueue's LocalQueue; none: started at once")
    namespace: str = help_of("default", "where all of it is made")
    context: str = help_of("", "the cluster, as kubeconfig names it; none: the current one")
    service_account: str = help_of("", "whom the pods act as; none: the namespace's default. It must reach the bucket")
    secrets: str = help_of("", "names of Secrets, split by commas, all of whose keys become variables of the processes")
    cpu: str = help_of("", "cores that each pod asks for, such as 30; none: the cluster's default")
    memory: str = help_of("", "memory that each pod asks for, such as 200Gi; none: the cluster's default")
    grace: int = help_of(300, "seconds to save in, from SIGTERM to SIGKILL")
    max_restarts: int = help_of(20, "how often the run is started again, after a preemption or a failure")
    parallel: int = help_of(0, "of a sweep's jobs, how many may be there at once; 0: all")

    @property
    def secret_names(self) -> list[str]:
        return credentials.names(self.secrets)


# ---- Slices of TPUs.


class Tpu(NamedTuple):
    """What GKE calls a generation of TPU, and how many devices JAX sees on one of its chips."""

    label: str
    devices: int = 1


TPUS = {
    "v4": Tpu("tpu-v4-podslice"),
    "v5e": Tpu("tpu-v5-lite-podslice"),
    "v5p": Tpu("tpu-v5p-slice"),
    "v6e": Tpu("tpu-v6e-slice"),
    "tpu7x": Tpu("tpu7x", devices=2),
}


class Slices(NamedTuple):
    """Slices of one shape.

    Attributes:
      label: the generation, as GKE labels its nodes.
      shape: of one slice, such as 4x4.
      count: how many slices.
      hosts: nodes of each.
      chips: of each node.
      devices: what JAX sees, of all slices together.
    """

    label: str
    shape: str
    count: int
    hosts: int
    chips: int
    devices: int


def slices(topology: str) -> Slices:
    """The slices that `--topology` names. Raises ValueError for what is not offered."""
    found: Topology = parse_topology(topology)
    tpu = TPUS[topology.partition(":")[0]]
    chips = math.prod(map(int, found.shape.split("x")))
    # 2x4 is sold as one machine with eight chips; all larger slices are of machines with four.
    each = 8 if found.shape == "2x4" else min(chips, 4)
    return Slices(tpu.label, found.shape, found.slices, chips // each, each, found.slices * chips * tpu.devices)


# ---- The manifests.


def name_of(job: Job) -> str:
    """What the job's objects are called: the same for the same workdir, and another for every other."""
    ending = hashlib.sha256(job.workdir.rstrip("/").encode()).hexdigest()[:6]
    return f"{job.name[: NAME_LENGTH - 7].rstrip('-')}-{ending}"


def manifests(job: Job) -> list[Manifest]:
    """All objects of a job, in the order in which they are made; the last of them is the one that runs it."""
    wanted = job.resources
    if wanted.topology:
        return [_jobset(job, slices(wanted.topology))]
    metadata = _metadata(job)
    # As many failures of pods as there are in so many restarts of all of them.
    restarts = wanted.max_restarts * wanted.nodes
    spec = _job_spec(wanted.nodes, restarts, _pod(job, _gpu_environment(job), wanted.nodes > 1, **_gpus(wanted)))
    made: Manifest = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}
    if wanted.nodes == 1:
        return [made]
    spec["template"]["spec"]["subdomain"] = metadata["name"]
    return [_service(metadata), made]


def _jobset(job: Job, wanted: Slices) -> Manifest:
    several = wanted.hosts * wanted.count > 1
    selector = {
        "cloud.google.com/gke-tpu-accelerator": wanted.label,
        "cloud.google.com/gke-tpu-topology": wanted.shape,
    }
    # On a slice JAX finds the others by what GKE tells the pods.
    variables = [] if several else [{"name": NUMBER, "value": "1"}]
    pod = _pod(job, variables, several, selector=selector, device="google.com/tpu", count=wanted.chips)
    metadata = _metadata(job)
    if wanted.hosts > 1:
        # Each Job of the set has a slice, which is a pool of nodes, to itself.
        metadata["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
    replicated = {
        "name": "slice",
        "replicas": wanted.count,
        "template": {"spec": _job_spec(wanted.hosts, 0, pod)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            # Nothing begins before all that ran before it has ended, because both would write to one directory.
            "failurePolicy": {"maxRestarts": job.resources.max_restarts, "restartStrategy": "BlockingRecreate"},
            "replicatedJobs": [replicated],
        },
    }


def _metadata(job: Job) -> Manifest:
    queue = {QUEUE: job.resources.queue} if job.resources.queue else {}
    name = name_of(job)
    return {
        "name": name,
        "namespace": job.resources.namespace,
        "labels": {LABEL: name, **queue},
        "annotations": {"flowlm-workdir": job.workdir},
    }


def _job_spec(pods: int, failures: int, template: Manifest) -> Manifest:
    return {
        "completionMode": "Indexed",
        "completions": pods,
        "parallelism": pods,
        "backoffLimit": failures,
        "template": template,
    }


def _gpus(wanted: Resources) -> dict[str, Any]:
    selector = {"cloud.google.com/gke-accelerator": wanted.gpu}
    return {"selector": selector, "device": "nvidia.com/gpu", "count": wanted.gpus}


def _gpu_environment(job: Job) -> list[Manifest]:
    """Who is who, said outright, so that neither JAX nor the pods ask the API server."""
    if job.resources.nodes == 1:
        return [{"name": NUMBER, "value": "1"}]
    name = name_of(job)
    number = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX_OF_POD}']"}}
    return [
        {"name": ADDRESS, "value": f"{name}-0.{name}:{PORT}"},
        {"name": NUMBER, "value": str(job.resources.nodes)},
        {"name": INDEX, "valueFrom": number},
    ]


def _service(metadata: Manifest) -> Manifest:
    labels = {LABEL: metadata["name"]}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": metadata["name"], "namespace": metadata["namespace"], "labels": labels},
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": labels},
    }


def _pod(
    job: Job, variables: list[Manifest], several: bool, selector: Mapping[str, str], device: str, count: int
) -> Manifest:
    """The template of a job's pods. several: it has more than one."""
    wanted = job.resources
    python = shlex.split(wanted.command)
    line = [shlex.join([*python, "-c", FINISHED, job.workdir]), *python, *job.command]
    given = [{"name": name, "value": _literal(value)} for name, value in job.environment.items()]
    asked = {name: value for name, value in (("cpu", wanted.cpu), ("memory", wanted.memory)) if value}
    container: Manifest = {
        "name": "flowlm",
        "image": wanted.image,
        "command": ["sh", "-c", SCRIPT, "sh"],
        "args": [_literal(word) for word in (*line, *(["--distributed"] if several else []))],
        "env": [*given, *variables],
        "envFrom": [{"secretRef": {"name": name}} for name in wanted.secret_names],
        "resources": {"limits": {device: str(count)}, "requests": {device: str(count), **asked}},
    }
    choice, tolerations = _capacity(wanted)
    spec: Manifest = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": wanted.grace,
        "serviceAccountName": wanted.service_account,
        "nodeSelector": {**selector, **choice},
        "tolerations": tolerations,
        "containers": [_without_empty(container)],
    }
    return {"metadata": {"labels": {LABEL: name_of(job)}}, "spec": _without_empty(spec)}


def _capacity(wanted: Resources) -> tuple[dict[str, str], list[Manifest]]:
    """(labels of the nodes, what the pods tolerate of them) of spot, reserved or flex-start capacity."""
    labels, taints = {}, []
    if wanted.spot:
        labels = {"cloud.google.com/gke-spot": "true"}
        taints = ["gke-spot"]
    elif wanted.flex_start:
        labels = {"cloud.google.com/gke-flex-start": "true"}
        taints = ["gke-flex-start", "gke-queued"]
    elif wanted.reservation:
        labels = {
            "cloud.google.com/reservation-affinity": "specific",
            "cloud.google.com/reservation-name": wanted.reservation,
        }
    return labels, [
        {"key": f"cloud.google.com/{taint}", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        for taint in taints
    ]


def _without_empty(manifest: Manifest) -> Manifest:
    return {key: value for key, value in manifest.items() if value not in ("", [], {})}


def _literal(word: str) -> str:
    """A word that Kubernetes gives to the container as it is: it reads $(NAME) as a variable, and $$ as $."""
    return word.replace("$", "$$") if re.search(r"\$[$(]", word) else word
