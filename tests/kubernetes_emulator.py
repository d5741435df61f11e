"""A Kubernetes of our own: an API server in this process, what its controllers do when they are told to, and no node."""

import contextlib
import functools
import http.server
import itertools
import json
import re
import threading
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: pip install -e .[dev]")

TOKEN = "a-token-that-nobody-may-see"
PATH = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+/[^/]+))/namespaces/(?P<namespace>[^/]+)/(?P<plural>[^/]+)"
    r"(?:/(?P<name>[^/]+)(?P<log>/log)?)?"
)
INDEX = "batch.kubernetes.io/job-completion-index"


@functools.cache
def _schemas():
    document = json.loads((Path(__file__).parent / "data/kubernetes.json").read_text())
    return {
        kind: jsonschema.Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": document["$defs"]})
        for kind in ("JobSet", "Job", "Service")
    }


def wrong_with(manifest):
    """What the published schema of its kind says against a manifest, a line each."""
    return [f"{error.json_path}: {error.message}" for error in _schemas()[manifest["kind"]].iter_errors(manifest)]


def expanded(word, variables):
    """A word of a command as Kubernetes gives it to a container: $(NAME) is a variable that is there, and $$ is $."""
    return re.sub(
        r"\$(\$|\((\w+)\))",
        lambda match: "$" if match[1] == "$" else variables.get(match[2], match[0]),
        word,
    )


def container_of(manifest):
    """The one container of a JobSet's or a Job's pods."""
    spec = manifest["spec"]
    (replicated,) = spec.get("replicatedJobs", [{"template": manifest}])
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    return container


def words_of(manifest):
    """What a container runs, word by word."""
    container = container_of(manifest)
    variables = {each["name"]: each["value"] for each in container.get("env", []) if "value" in each}
    return [expanded(word, variables) for word in (*container["command"], *container["args"])]


class KubernetesApi:
    """What the cluster has.

    Attributes:
      objects: {(plural, name): manifest with its status}.
      pods, said, events: pods and events as the API has them, and {pod: its log}.
      refusals: {plural: (status, message)} of what nobody may make.
      quotas: {plural: how many of them may be there}, complete ones and those that are being deleted too.
      requests: (method, path, query) of all that was asked.
      created: the plural of every object that was made, in order.
      lingers: how often an object is still seen after it was deleted.
    """

    def __init__(self):
        self.objects, self.pods, self.said, self.events = {}, [], {}, []
        self.refusals, self.quotas, self.requests, self.created, self.lingers = {}, {}, [], [], 1
        self._letters = itertools.count()

    # --- requests ---

    def create(self, plural, manifest, query):
        name = manifest["metadata"]["name"]
        if plural in self.refusals:
            return self.refusals[plural]
        if query.get("fieldValidation") != "Strict" or (wrong := wrong_with(manifest)):
            return 400, f"strict decoding error: {wrong}"
        if (plural, name) in self.objects:
            return 409, f'{plural} "{name}" already exists'
        used = sum(kind == plural for kind, _ in self.objects)
        if used >= (limit := self.quotas.get(plural, used + 1)):
            told = f"requested: count/{plural}=1, used: count/{plural}={used}, limited: count/{plural}={limit}"
            return 403, f'{plural} "{name}" is forbidden: exceeded quota: team, {told}'
        if query.get("dryRun") != "All":
            self.objects[plural, name] = manifest | {"status": {}}
            self.created.append(plural)
            if "kueue.x-k8s.io/queue-name" in manifest["metadata"]["labels"]:
                self.condition(name, "Suspended", message="the queue is full")
            elif plural != "services":
                self.start(name)
        return 201, manifest

    def read(self, plural, name):
        found = self.objects.get((plural, name))
        if found is None:
            return 404, f'{plural} "{name}" not found'
        if "deletionTimestamp" in found["metadata"]:
            if not found["metadata"]["left"]:
                self._forget(plural, name)
                return 404, f'{plural} "{name}" not found'
            found["metadata"]["left"] -= 1
        return 200, found

    def delete(self, plural, name, options):
        if (plural, name) not in self.objects:
            return 404, f'{plural} "{name}" not found'
        assert options["propagationPolicy"] == "Foreground", "pods would outlive what they belong to"
        found = self.objects[plural, name]
        if plural == "services" or not self.lingers:
            self._forget(plural, name)
        else:
            found["metadata"] |= {"deletionTimestamp": "2026-01-01T00:00:00Z", "left": self.lingers}
        return 200, found

    def _forget(self, plural, name):
        del self.objects[plural, name]
        if plural != "services":
            self.pods = [pod for pod in self.pods if pod["metadata"]["labels"]["flowlm-job"] != name]

    # --- what controllers do ---

    def _found(self, name):
        (found,) = (made for (plural, each), made in self.objects.items() if each == name and plural != "services")
        return found

    def condition(self, name, kind, message="", reason=""):
        condition = {"type": kind, "status": "True", "message": message, "reason": reason}
        self._found(name)["status"].setdefault("conditions", []).append(condition)

    def start(self, name):
        """Makes the pods, which wait for nodes."""
        made = self._found(name)
        spec = made["spec"]
        sets = spec.get("replicatedJobs", [{"template": made, "replicas": 1}])
        for replicated in sets:
            job = replicated["template"]["spec"]
            for index, pod in itertools.product(range(replicated["replicas"]), range(job["parallelism"])):
                of_set = {"jobset.sigs.k8s.io/job-index": str(index)} if made["kind"] == "JobSet" else {}
                self._pod(job["template"], f"{name}-{index}-{pod}-{next(self._letters)}", of_set, pod)

    def _pod(self, template, name, labels, index):
        metadata = {
            "name": name,
            "labels": template["metadata"]["labels"] | labels,
            "annotations": {INDEX: str(index)},
            "creationTimestamp": "2026-01-01T00:00:00Z",
        }
        nodes = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available: 3 Insufficient"}
        self.pods.insert(
            0, {"metadata": metadata, "spec": template["spec"], "status": {"phase": "Pending", "conditions": [nodes]}}
        )

    def run(self, name):
        """Gives all pods a node that wait for one."""
        for pod in (pod for pod in self._pods_of(name) if pod["status"]["phase"] == "Pending"):
            pod["status"] = {"phase": "Running"}
            self.said[pod["metadata"]["name"]] = f"step 1\nhere is {pod['metadata']['name']}\n"

    def restart(self, name):
        """What JobSet does when a node was taken away, or a process failed: all pods are made anew."""
        self.pods = [pod for pod in self.pods if pod not in self._pods_of(name)]
        status = self._found(name)["status"]
        status["restarts"] = status.get("restarts", 0) + 1
        self.start(name)

    def evict(self, name, why):
        """What Kueue does when others come first: the set is suspended, which ends its pods."""
        self.pods = [pod for pod in self.pods if pod not in self._pods_of(name)]
        self.condition(name, "Suspended", why)

    def admit(self, name):
        """What Kueue does when there is room."""
        for condition in self._found(name)["status"].get("conditions", []):
            if condition["type"] == "Suspended":
                condition["status"] = "False"
        self.start(name)

    def take_node(self, name):
        """What becomes of a GPU Job when a node is taken away: one of its pods has failed, and another waits in its place."""
        made, (pod, *_) = self._found(name), self._pods_of(name)
        pod["status"] = {"phase": "Failed", "reason": "Terminated", "message": "Pod was terminated: node shutdown"}
        made["status"]["failed"] = made["status"].get("failed", 0) + 1
        index = int(pod["metadata"]["annotations"][INDEX])
        self._pod(made["spec"]["template"], f"{name}-{index}-{next(self._letters)}", {}, index)

    def fail(self, name, said, reason):
        for pod in self._pods_of(name)[-1:]:
            pod["status"] = {"phase": "Failed"}
            self.said[pod["metadata"]["name"]] = said
        self.condition(name, "Failed", "jobset failed", reason)

    def _pods_of(self, name):
        return [pod for pod in self.pods if pod["metadata"]["labels"]["flowlm-job"] == name]

    def list(self, plural, query):
        if plural == "events":
            assert query["fieldSelector"] == "type=Warning"
            return {"kind": "EventList", "apiVersion": "v1", "metadata": {}, "items": self.events}
        label, _, value = query["labelSelector"].partition("=")
        assert label == "flowlm-job"
        return {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": self._pods_of(value)}

    def log(self, name, query):
        if name not in self.said:
            return 400, f'container "flowlm" in pod "{name}" is waiting to start: ContainerCreating'
        return 200, "\n".join(self.said[name].splitlines()[-int(query["tailLines"]) :]) + "\n"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        return None

    def _answer(self):
        url = urlparse(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        api = self.server.api
        api.requests.append((self.command, url.path, query))
        asked = PATH.fullmatch(url.path)
        known = {
            "core": ("pods", "services", "events"),
            "batch/v1": ("jobs",),
            "jobset.x-k8s.io/v1alpha2": ("jobsets",),
        }
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, "Unauthorized")
        if asked is None or asked["plural"] not in known.get(asked["group"] or "core", ()):
            return self._send(404, "404 page not found", plain=True)
        plural, name = asked["plural"], asked["name"]
        if self.command == "POST":
            return self._send(*api.create(plural, body, query))
        if self.command == "DELETE":
            return self._send(*api.delete(plural, name, query | body))
        if asked["log"]:
            status, said = api.log(name, query)
            return self._send(status, said, plain=status == 200)
        return self._send(*((200, api.list(plural, query)) if name is None else api.read(plural, name)))

    do_GET = do_POST = do_DELETE = _answer

    def _send(self, status, answer, plain=False):
        if isinstance(answer, str) and not plain:
            answer = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": answer, "code": status}
        data = answer.encode() if plain else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if plain else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def running(kubeconfig):
    """The cluster, while its API server answers; kubeconfig: the file that says where, of two contexts."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.api = KubernetesApi()
    there = f"http://127.0.0.1:{server.server_address[1]}"
    contexts = [{"name": name, "context": {"cluster": name, "user": "me"}} for name in ("ours", "away")]
    clusters = [
        {"name": name, "cluster": {"server": url}} for name, url in (("ours", there), ("away", "http://127.0.0.1:9"))
    ]
    users = [{"name": "me", "user": {"token": TOKEN}}]
    told = {"apiVersion": "v1", "kind": "Config", "current-context": "ours"}
    kubeconfig.write_text(json.dumps(told | {"contexts": contexts, "clusters": clusters, "users": users}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server.api
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
