"""The backend tpu_vm before a Cloud TPU of our own: a gRPC server of the client's service, and a bucket on this machine."""

import importlib.util
import itertools
import os
import subprocess
import sys
from concurrent import futures
from pathlib import Path

import pytest
from google.protobuf import empty_pb2

from flowlm import storage
from launch import run

HINT = "not installed: pip install -e .[dev]"
for _package in ("gcsfs", "gcp_storage_emulator"):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"{_package} is {HINT}", allow_module_level=True)
tpu_v2 = pytest.importorskip("google.cloud.tpu_v2", reason=f"google-cloud-tpu is {HINT}")
# What the client itself is made of.
grpc = pytest.importorskip("grpc")
transports = pytest.importorskip("google.cloud.tpu_v2.services.tpu.transports")
operations_pb2 = pytest.importorskip("google.longrunning.operations_pb2")
code_pb2 = pytest.importorskip("google.rpc.code_pb2")
status_pb2 = pytest.importorskip("google.rpc.status_pb2")
tpu_vm = importlib.import_module("launch.tpu_vm")

ROOT = Path(__file__).parents[1]
BUCKET = "gs://bucket"
CONFIG = "--config=experiments/test.py"
PLACE = ("--backend=tpu_vm", "--project=p", "--zone=z", "--accelerator=v5litepod-16")
State = tpu_v2.QueuedResourceState.State


@pytest.fixture(scope="module", autouse=True)
def bucket(tmp_path_factory):
    from bucket_emulator import running

    with running(tmp_path_factory.mktemp("mirror")):
        yield


class CloudTpu:
    """google.cloud.tpu.v2.Tpu. Each creation takes the next of `lives`: what GetQueuedResource answers, call after call.

    An answer is a state, or a function that returns one; the last stays. A life that is an error refuses the creation.
    """

    def __init__(self, *lives):
        self.lives, self.resources, self.nodes = list(lives), {}, {}
        self.created, self.deleted, self.operations = [], [], {}

    def CreateQueuedResource(self, request, context):
        name = f"{request.parent}/queuedResources/{request.queued_resource_id}"
        if name in self.resources:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, f"{name} already exists")
        self.created.append(request)
        life = self.lives.pop(0)
        if isinstance(life, grpc.StatusCode):
            context.abort(life, "Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded. Limit: 8 in zone z.")
        operation = operations_pb2.Operation(name=f"operations/{len(self.operations)}")
        self.operations[operation.name] = done = operations_pb2.Operation(name=operation.name, done=True)
        if isinstance(life, status_pb2.Status):
            done.error.CopyFrom(life)
        else:
            resource = tpu_v2.QueuedResource(name=name)
            self.resources[name] = (resource, iter(itertools.chain(life, itertools.repeat(life[-1]))))
            done.response.Pack(tpu_v2.QueuedResource.pb(resource))
        return operation

    def GetQueuedResource(self, request, context):
        if request.name not in self.resources:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such resource")
        resource, life = self.resources[request.name]
        answer = next(life)
        answer = answer() if callable(answer) else answer
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
    server = grpc.server(futures.ThreadPoolExecutor(2))
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
    monkeypatch.setattr(tpu_vm, "_git", lambda *words: "" if words[0] == "status" else git(*words))
    monkeypatch.setattr(tpu_vm, "_client", lambda: client)
    monkeypatch.setattr(tpu_vm, "POLL_SECONDS", 0.01)
    monkeypatch.chdir(ROOT)
    yield service
    channel.close()
    server.stop(None)


def write(workdir, **files):
    for name, text in files.items():
        path = storage.path(workdir) / name.replace("__", "/").replace("_", ".")
        path.write_text(text)


def finishing(workdir):
    """What the workers leave when the run has ended; the queued resource is still there, and costs."""

    def answer():
        write(workdir, config_json='{"steps": 40}', evaluation_json='{"step": 40}', logs__0_exit="0\n")
        return State.ACTIVE

    return answer


def launch(*arguments):
    run.main([CONFIG, *PLACE, *arguments])


def error_of(*arguments):
    with pytest.raises(SystemExit) as exit:
        launch(*arguments)
    assert exit.value.code.startswith("launch: ")
    return exit.value.code


# --- a run -------------------------------------------------------------------------------------------------------


def test_a_run_from_the_queue_to_its_end(cloud, capsys, tmp_path):
    workdir = f"{BUCKET}/runs/one"
    cloud.lives = [[State.ACCEPTED, State.WAITING_FOR_RESOURCES, State.PROVISIONING, State.ACTIVE, finishing(workdir)]]
    launch(f"--workdir={workdir}", "--config.steps=40", "--environment=NOTE=a b")
    told = capsys.readouterr().err.split("\n")
    assert [line.split()[-1] for line in told if line] == [
        "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ended",
    ]  # fmt: skip
    (sent,) = cloud.created
    (spec,) = sent.queued_resource.tpu.node_spec
    assert (sent.parent, sent.queued_resource_id) == ("projects/p/locations/z", "flowlm-one")
    assert (spec.node.accelerator_type, spec.node.runtime_version) == ("v5litepod-16", "v2-alpha-tpuv5-lite")
    assert "spot" not in sent.queued_resource
    assert cloud.deleted == ["projects/p/locations/z/queuedResources/flowlm-one"] and not cloud.resources

    # What was sent with it: the commit itself.
    bundle = storage.path(workdir) / "launch/flowlm.bundle"
    (tmp_path / "bundle").write_bytes(bundle.read_bytes())
    head = subprocess.run(
        ["git", "bundle", "list-heads", tmp_path / "bundle"], capture_output=True, text=True, check=True
    )
    assert head.stdout.split()[0] == tpu_vm._git("rev-parse", "HEAD")
    script = spec.node.metadata["startup-script"]
    assert "'NOTE=a b'" in script and f"bundle={workdir}/launch/flowlm.bundle" in script
    assert f"train --config=experiments/test.py --config.steps=40 --workdir={workdir} --distributed)" in script

    run.main(["status", f"--workdir={workdir}"])
    assert capsys.readouterr().out == "ended\n"


def test_a_dry_run_shows_what_is_sent_and_sends_nothing(cloud, monkeypatch, capsys):
    def credentials():
        raise AssertionError("a dry run asks for credentials")

    workdir = f"{BUCKET}/runs/dry"
    with monkeypatch.context() as patch:
        patch.setattr(tpu_vm, "_client", credentials)
        launch(f"--workdir={workdir}", "--spot", "--dry_run")
    assert not storage.path(workdir).exists()
    text = capsys.readouterr().out
    shown = tpu_v2.CreateQueuedResourceRequest.from_json(
        text[text.index("CreateQueuedResource {") + len("CreateQueuedResource ") : text.index("the script:\n")]
    )
    cloud.lives = [[finishing(workdir)]]
    launch(f"--workdir={workdir}", "--spot")
    (sent,) = cloud.created
    metadata = sent.queued_resource.tpu.node_spec[0].node.metadata
    assert metadata["startup-script"] in text
    metadata["startup-script"] = "the script"
    assert shown == sent


def test_a_preempted_run_is_created_again(cloud, capsys):
    """The workers of the first were told to stop and ended well; that is not the end of the run."""
    workdir = f"{BUCKET}/runs/spot"

    def saved():
        write(workdir, config_json='{"steps": 40}', logs__0_exit="0\n")
        return State.ACTIVE

    def anew():
        assert not (storage.path(workdir) / "logs/0.exit").exists()
        return State.ACTIVE

    cloud.lives = [[State.ACTIVE, saved, saved, State.SUSPENDING], [State.PROVISIONING, anew, finishing(workdir)]]
    launch(f"--workdir={workdir}", "--spot")
    first, second = cloud.created
    assert first == second and "spot" in first.queued_resource
    assert len(cloud.deleted) == 2 and not cloud.resources
    assert "flowlm-spot preempted" in capsys.readouterr().err


def test_preempted_for_ever(cloud):
    cloud.lives = [[State.ACTIVE, State.SUSPENDED]] * 3
    said = error_of(f"--workdir={BUCKET}/runs/unlucky", "--spot", "--max_restarts=2")
    assert "flowlm-unlucky: preempted 3 times" in said
    assert len(cloud.created) == len(cloud.deleted) == 3


def test_a_command_that_was_cut_short_is_taken_up(cloud, monkeypatch, capsys):
    workdir = f"{BUCKET}/runs/cut"

    def cut(seconds):
        raise KeyboardInterrupt

    cloud.lives = [[State.ACTIVE, finishing(workdir)]]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tpu_vm.time, "sleep", cut)
        launch(f"--workdir={workdir}")
    assert cloud.resources
    launch(f"--workdir={workdir}")
    assert len(cloud.created) == 1 and not cloud.resources
    assert "taken up" in capsys.readouterr().err


def test_a_run_that_fails_says_why_and_costs_no_more(cloud, capsys):
    workdir = f"{BUCKET}/runs/failing"

    def failed():
        write(workdir, logs__3_log="100%\nflowlm: loss nan at step 3\nTraceback\n", logs__3_exit="1\n")
        return State.ACTIVE

    cloud.lives = [[State.ACTIVE, failed]]
    assert "worker 3 ended with 1: flowlm: loss nan at step 3" in error_of(f"--workdir={workdir}")
    assert not cloud.resources
    capsys.readouterr()
    run.main(["logs", f"--workdir={workdir}"])
    assert f"==> {workdir}/logs/3.log <==" in capsys.readouterr().out
    run.main(["status", f"--workdir={workdir}"])
    assert capsys.readouterr().out == "deleted; worker 3 ended with 1\n"


@pytest.mark.parametrize("when", ["at once", "by the operation", "in the queue"])
def test_no_quota(cloud, when):
    said = "Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded."
    error = status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message=said)
    data = tpu_v2.QueuedResourceState.FailedData(error=error)
    queued = tpu_v2.QueuedResourceState(state=State.FAILED, failed_data=data)
    cloud.lives = [
        {
            "at once": grpc.StatusCode.RESOURCE_EXHAUSTED,
            "by the operation": error,
            "in the queue": [State.ACCEPTED, queued],
        }[when]
    ]
    assert said in error_of(f"--workdir={BUCKET}/runs/quota")
    assert len(cloud.created) == 1 and not cloud.resources


def test_stop_deletes_it(cloud, capsys):
    workdir = f"{BUCKET}/runs/stopped"

    def stopped():
        run.main(["stop", f"--workdir={workdir}"])
        return State.ACTIVE

    cloud.lives = [[State.ACTIVE, stopped]]
    launch(f"--workdir={workdir}")
    assert len(cloud.deleted) == 1
    assert "flowlm-stopped stopped" in capsys.readouterr().err


# --- a TPU VM that is there --------------------------------------------------------------------------------------


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """A command that only writes down what it is told."""
    (tmp_path / "gcloud").write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {tmp_path}/told\n')
    (tmp_path / "gcloud").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "told"


def test_an_existing_machine(cloud, gcloud, capsys):
    node = tpu_v2.Node(accelerator_type="v6e-8", state=tpu_v2.Node.State.READY)
    cloud.nodes["projects/p/locations/z/nodes/mine"] = node
    workdir = f"{BUCKET}/runs/existing"
    launch(f"--workdir={workdir}", "--accelerator=", "--existing=mine")
    run.main(["stop", f"--workdir={workdir}"])
    started, stopped = gcloud.read_text().splitlines()
    ssh = "compute tpus tpu-vm ssh mine --project=p --zone=z --worker=all --command="
    assert started.startswith(f"{ssh}gcloud storage cat {workdir}/launch/startup.sh > ")
    assert stopped.startswith(f"{ssh}sudo kill -TERM ")
    assert (storage.path(workdir) / "launch/startup.sh").read_text().startswith("#!/usr/bin/env bash\n")
    assert not cloud.created and not cloud.deleted

    assert "v6e-8 has 8 chips, and the mesh" in error_of(
        f"--workdir={workdir}", "--accelerator=", "--existing=mine", "--config.mesh.data=4"
    )
    assert "there is no TPU VM yours in z" in error_of(f"--workdir={workdir}", "--existing=yours")
    node.state = tpu_v2.Node.State.STOPPED
    assert "mine is STOPPED, not READY" in error_of(f"--workdir={workdir}", "--accelerator=", "--existing=mine")


# --- what could never run ----------------------------------------------------------------------------------------

BAD = {
    ("--accelerator=v5e-16",): r"unknown --accelerator 'v5e-16': known are .*v5litepod-N with N of 1, 4, 8, 16",
    ("--accelerator=v5litepod-12",): "unknown --accelerator 'v5litepod-12'",
    ("--config.mesh.data=8",): "v5litepod-16 has 16 chips, and the mesh .*mesh.data = 8.*: change --config.mesh",
    ("--accelerator=v5p-16", "--config.mesh.data=16"): "v5p-16 has 8 chips",
    ("--config.mesh.model=3",): r"mesh.model = 3\) 3 or a multiple",
    ("--zone=",): "needs --zone",
    ("--project=",): "needs --project",
    ("--workdir=/tmp/run",): "--workdir must be gs://..., got /tmp/run",
    ("--spot", "--existing=mine"): "give one of them",
    ("--max_restarts=-1",): "max_restarts is at least 0",
    ("--config.stepss=3",): "stepss",
}


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
@pytest.mark.parametrize("dry", [(), ("--dry_run",)], ids=["", "dry"])
def test_bad_resources_are_refused_before_anything_is_sent(cloud, arguments, dry):
    with pytest.raises(SystemExit, match=BAD[arguments]):
        launch(f"--workdir={BUCKET}/runs/bad", *arguments, *dry)
    assert not cloud.created and not storage.path(f"{BUCKET}/runs/bad").exists()


def test_a_commit_is_sent_and_changes_are_not(cloud, monkeypatch):
    monkeypatch.setattr(tpu_vm, "_git", lambda *words: "M flowlm/train.py")
    assert "M flowlm/train.py. Commit them" in error_of(f"--workdir={BUCKET}/runs/changed")
    assert not cloud.created


def test_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.cloud.tpu_v2", None)
    monkeypatch.delattr("google.cloud.tpu_v2")
    monkeypatch.delitem(sys.modules, "launch.tpu_vm")
    with pytest.raises(SystemExit, match=r"needs google-cloud-tpu: `pip install -e \.\[gcp\]`"):
        launch(f"--workdir={BUCKET}/runs/none", "--dry_run")


# --- the script --------------------------------------------------------------------------------------------------

FAKES = {
    "gcloud": 'shift 2; [ "$1" = --quiet ] && shift; from=$1; to=$2\n'
    'case $from in gs://*) from="$BUCKETS/${from#gs://}";; esac\n'
    'case $to in gs://*) to="$BUCKETS/${to#gs://}"; mkdir -p "$(dirname "$to")";; esac\n'
    'if [ "$from" = - ]; then cat > "$to"; else cp "$from" "$to"; fi',
    "curl": "echo 2",  # the worker's number, of the metadata server
    "apt-get": "exit 0",
}
SETUP = """mkdir -p .venv/bin
echo "extras $1 for $PYTHON"
printf '#!/bin/sh\\necho "$NOTE: $@"\\nexit $STATUS\\n' > .venv/bin/python
chmod +x .venv/bin/python
"""


@pytest.mark.parametrize("status", [0, 7])
def test_the_script_on_a_worker(tmp_path, status):
    """Run twice, as after a restart, over a checkout that has only a setup.sh: what it fetches, runs and reports."""
    checkout, home, buckets = tmp_path / "checkout", tmp_path / "home", tmp_path / "buckets"
    for folder in (checkout / "launch", home, buckets / "b/launch", tmp_path / "bin"):
        folder.mkdir(parents=True)
    for name, body in FAKES.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (checkout / "launch/setup.sh").write_text(SETUP)
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(checkout)]
    for words in (
        ["init", "-q"],
        ["add", "."],
        ["commit", "-qm", "m"],
        ["bundle", "create", "-q", str(buckets / "b/launch/flowlm.bundle"), "HEAD"],
    ):
        subprocess.run([*git, *words], check=True)
    resources = tpu_vm.Resources(accelerator="v5litepod-16", project="p", zone="z")
    note = {"NOTE": "it's a 'note'", "STATUS": str(status)}
    job = tpu_vm.Job("flowlm-x", ("-m", "flowlm.main", "a b"), "gs://b", resources, note)
    environment = os.environ | {
        "HOME": str(home),
        "BUCKETS": str(buckets),
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
    }
    for _ in range(2):
        subprocess.run(["bash", "-c", tpu_vm.script(job)], env=environment, check=True, timeout=60)
    told = (buckets / "b/logs/2.log").read_text()
    assert (
        told.count("it's a 'note': -m flowlm.main a b --distributed\n") == 2 and "extras tpu,gcp for python3.11" in told
    )
    assert (buckets / "b/logs/2.exit").read_text() == f"{status}\n"
    assert (home / "flowlm.pid").read_text().strip().isdigit()
