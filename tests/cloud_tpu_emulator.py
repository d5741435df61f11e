"""A Cloud TPU of our own: a gRPC server of the client's service definitions, workers that are functions, and a bucket here."""

import importlib.util
import itertools
from concurrent import futures
from pathlib import Path

import pytest

from flowlm.system import storage
from launch import cloud_tpu, run, tpu_supervisor, tpu_vm, tpu_workers

HINT = "not installed: pip install -e .[dev]"
for _package in ("gcsfs", "gcp_storage_emulator"):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"{_package} is {HINT}", allow_module_level=True)
tpu_v2 = pytest.importorskip("google.cloud.tpu_v2", reason=f"google-cloud-tpu is {HINT}")
# What the client itself is made of.
grpc = pytest.importorskip("grpc")
empty_pb2 = pytest.importorskip("google.protobuf.empty_pb2")
transports = pytest.importorskip("google.cloud.tpu_v2.services.tpu.transports")
operations_pb2 = pytest.importorskip("google.longrunning.operations_pb2")
status_pb2 = pytest.importorskip("google.rpc.status_pb2")

ROOT = Path(__file__).parents[1]
BUCKET = "gs://bucket"
CONFIG = "--config=experiments/test.py"
PLACE = ("--backend=tpu_vm", "--project=p", "--zone=us-central1-a", "--accelerator=v5litepod-16")
State = tpu_v2.QueuedResourceState.State


@pytest.fixture(scope="module", autouse=True)
def bucket(tmp_path_factory):
    from bucket_emulator import running

    with running(tmp_path_factory.mktemp("mirror")):
        yield


class CloudTpu:
    """google.cloud.tpu.v2.Tpu. Each creation takes the next of `lives`, or of a dict the one of its name: what GetQueuedResource
    answers, call after call.

    An answer is a state, a code that the call is refused with, or a function that returns one; the last stays. A life that is an
    error refuses the creation.
    """

    def __init__(self, *lives):
        self.lives, self.resources, self.nodes = list(lives), {}, {}
        self.created, self.deleted, self.operations = [], [], {}

    def CreateQueuedResource(self, request, context):
        name = f"{request.parent}/queuedResources/{request.queued_resource_id}"
        if name in self.resources:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, f"{name} already exists")
        self.created.append(request)
        life = self._life(name)
        if isinstance(life, grpc.StatusCode):
            context.abort(
                life, "Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded. Limit: 8 in zone us-central1-a."
            )
        operation = operations_pb2.Operation(name=f"operations/{len(self.operations)}")
        self.operations[operation.name] = done = operations_pb2.Operation(name=operation.name, done=True)
        if isinstance(life, status_pb2.Status):
            done.error.CopyFrom(life)
        else:
            resource = self._appears(name, life)
            done.response.Pack(tpu_v2.QueuedResource.pb(resource))
        return operation

    def _life(self, name):
        return self.lives.pop(name.rpartition("/")[2] if isinstance(self.lives, dict) else 0)

    def _appears(self, name, life):
        resource = tpu_v2.QueuedResource(name=name)
        self.resources[name] = (resource, iter(itertools.chain(life, itertools.repeat(life[-1]))))
        return resource

    def appear(self, name):
        """Makes what was asked for by another way than this service's."""
        self._appears(name, self._life(name))

    def GetQueuedResource(self, request, context):
        if request.name not in self.resources:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such resource")
        resource, life = self.resources[request.name]
        answer = next(life)
        answer = answer() if callable(answer) else answer
        if isinstance(answer, grpc.StatusCode):
            context.abort(answer, "Getting metadata from plugin failed: Reauthentication is needed")
        if not isinstance(answer, tpu_v2.QueuedResourceState):
            answer = tpu_v2.QueuedResourceState(state=answer)
        resource.state = answer
        return resource

    def DeleteQueuedResource(self, request, context):
        if request.name not in self.resources:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such resource")
        assert request.force, "the service refuses to delete a resource that has machines"
        del self.resources[request.name]
        self.deleted.append(request.name)
        operation = operations_pb2.Operation(name="operations/delete", done=True)
        operation.response.Pack(empty_pb2.Empty())
        return operation

    def GetNode(self, request, context):
        if request.name not in self.nodes:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such node")
        return self.nodes[request.name]

    def GetOperation(self, request, context):
        return self.operations[request.name]


def handlers(service):
    raw, message = operations_pb2, tpu_v2
    return {
        "google.cloud.tpu.v2.Tpu": {
            "CreateQueuedResource": (message.CreateQueuedResourceRequest, raw.Operation.SerializeToString),
            "GetQueuedResource": (message.GetQueuedResourceRequest, message.QueuedResource.serialize),
            "DeleteQueuedResource": (message.DeleteQueuedResourceRequest, raw.Operation.SerializeToString),
            "GetNode": (message.GetNodeRequest, message.Node.serialize),
        },
        "google.longrunning.Operations": {"GetOperation": (raw.GetOperationRequest, raw.Operation.SerializeToString)},
    }


@pytest.fixture
def cloud(monkeypatch):
    """A service with no lives yet, to which the backend's client talks."""
    service = CloudTpu()
    server = grpc.server(futures.ThreadPoolExecutor(8))
    for name, methods in handlers(service).items():
        table = {}
        for method, (request, serialize) in methods.items():
            read = request.deserialize if hasattr(request, "deserialize") else request.FromString
            table[method] = grpc.unary_unary_rpc_method_handler(getattr(service, method), read, serialize)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, table),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    client = tpu_v2.TpuClient(transport=transports.TpuGrpcTransport(channel=channel))
    git = tpu_vm._git

    def quick(*words):
        """As if nothing were changed, and a bundle without what came before the commit, which is most of it."""
        return "" if words[0] == "status" else git(*words, *["-1"] * (words[0] == "bundle"))

    monkeypatch.setattr(tpu_vm, "_git", quick)
    monkeypatch.setattr(cloud_tpu, "client", lambda: client)
    monkeypatch.setattr(tpu_supervisor, "POLL_SECONDS", 0.01)
    monkeypatch.chdir(ROOT)
    yield service
    channel.close()
    server.stop(None)


def write(workdir, files):
    for name, text in files.items():
        (storage.path(workdir) / name).write_text(text)


def after(workdir, files=None, state=State.ACTIVE, **exits):
    """An answer: the state, when workers have left files, and the statuses (w3=1) that they ended this turn with."""

    def answer():
        now = tpu_workers.turn(workdir)
        notes = {f"logs/{worker[1:]}.exit": f"{now} {status}\n" for worker, status in exits.items()}
        write(workdir, (files or {}) | notes)
        return state

    return answer


def finishing(workdir):
    """What the workers leave when the run has ended; the queued resource is still there, and costs."""
    return after(workdir, {"config.json": '{"steps": 40}', "evaluation.json": '{"step": 40}'}, w0=0)


def launch(*arguments):
    run.main([CONFIG, *PLACE, *arguments])


def error_of(*arguments):
    with pytest.raises(SystemExit) as exit:
        launch(*arguments)
    assert exit.value.code.startswith("launch: ")
    return exit.value.code
