"""The backend tpu_vm before a Cloud TPU of our own: a gRPC server of the client's service, and a bucket on this machine."""

import contextlib
import importlib.util
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from concurrent import futures
from pathlib import Path

import pytest
from google.protobuf import empty_pb2

from flowlm import storage
from launch import cloud_tpu, run, tpu_supervisor, tpu_vm, tpu_workers

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
exceptions = pytest.importorskip("google.api_core.exceptions")
auth_exceptions = pytest.importorskip("google.auth.exceptions")

ROOT = Path(__file__).parents[1]
BUCKET = "gs://bucket"
PATIENCE = 300  # seconds until a test gives up; on an idle machine none waits a tenth of it
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
        patch.setattr(cloud_tpu, "client", credentials)
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

    saved = after(workdir, {"config.json": '{"steps": 40}'}, w0=0)

    def anew():
        assert not tpu_workers.exits(workdir)
        return State.ACTIVE

    cloud.lives = [[State.ACTIVE, saved, saved, State.SUSPENDING], [State.PROVISIONING, anew, finishing(workdir)]]
    launch(f"--workdir={workdir}", "--spot")
    first, second = cloud.created
    assert first == second and "spot" in first.queued_resource
    assert len(cloud.deleted) == 2 and not cloud.resources
    assert "flowlm-spot preempted: started again (1)" in capsys.readouterr().err


def test_preempted_for_ever(cloud):
    cloud.lives = [[State.ACTIVE, State.SUSPENDED]] * 3
    said = error_of(f"--workdir={BUCKET}/runs/unlucky", "--spot", "--max_restarts=2")
    assert "flowlm-unlucky: preempted, after 2 restarts: run the same command again to go on" in said
    assert len(cloud.created) == len(cloud.deleted) == 3


def test_a_command_that_was_cut_short_is_taken_up(cloud, monkeypatch, capsys):
    workdir = f"{BUCKET}/runs/cut"

    def cut(seconds):
        raise KeyboardInterrupt

    cloud.lives = [[State.ACTIVE, finishing(workdir)]]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(tpu_supervisor.time, "sleep", cut)
        launch(f"--workdir={workdir}")
    assert cloud.resources
    launch(f"--workdir={workdir}")
    assert len(cloud.created) == 1 and not cloud.resources
    assert "taken up" in capsys.readouterr().err


def test_a_run_that_fails_says_why_and_costs_no_more(cloud, capsys):
    workdir = f"{BUCKET}/runs/failing"
    failed = after(workdir, {"logs/3/a.log": "100%\nflowlm: loss nan at step 3\nTraceback\n"}, w3=1)
    cloud.lives = [[State.ACTIVE, failed]]
    why = "worker 3 ended with 1: flowlm: loss nan at step 3"
    assert f"{why}, after 0 restarts" in error_of(f"--workdir={workdir}", "--max_restarts=0")
    assert not cloud.resources and "BILLS" not in capsys.readouterr().err
    run.main(["logs", f"--workdir={workdir}"])
    assert capsys.readouterr().out.startswith(f"==> {workdir}/logs/3 <==\n100%\n")
    run.main(["status", f"--workdir={workdir}"])
    assert capsys.readouterr().out == "deleted; worker 3 ended with 1\n"


def failing_in_turns(workdir, *steps):
    """An answer: in each turn a worker fails, after a checkpoint at the turn's step, if it has one; then the run ends."""
    turns = iter(steps)
    seen = set()

    def answer():
        now = tpu_workers.turn(workdir)
        if now in seen:
            return State.ACTIVE
        seen.add(now)
        step = next(turns, "end")
        if step == "end":
            return finishing(workdir)()
        made = {f"checkpoints/{step}/commit_success.txt": ""} if step else {}
        return after(workdir, made | {f"logs/1/{now:03}.log": f"flowlm: turn {now}\n"}, w1=1)()

    return answer


def test_a_failed_worker_does_not_cost_the_slice(cloud, capsys):
    """The run is started again on the machines that are there, which are asked for one more turn."""
    workdir = f"{BUCKET}/runs/again"
    cloud.lives = [[State.ACTIVE, failing_in_turns(workdir, None, 10, 20, None, 30)]]
    launch(f"--workdir={workdir}")
    assert len(cloud.created) == len(cloud.deleted) == 1
    assert tpu_workers.turn(workdir) == 6
    told = capsys.readouterr().err
    assert [f"flowlm-again worker 1 ended with 1: flowlm: turn {n}: started again ({n})" in told for n in range(1, 7)] == [
        True, True, True, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "steps", "expected", "turns"),
    [
        (["--max_restarts=2"], [10, 20, 30, 40], "turn 3, after 2 restarts: run the same command again", 3),
        ([], [None] * 9, "turn 3, 3 times without a new checkpoint", 3),
        ([], [None, 10, None, None, None], "turn 5, 3 times without a new checkpoint", 5),
    ],
    ids=["max_restarts", "in vain", "in vain at last"],
)
def test_failures_come_to_an_end(cloud, flags, steps, expected, turns):
    workdir = f"{BUCKET}/runs/end-{turns}-{len(steps)}"
    cloud.lives = [[State.ACTIVE, failing_in_turns(workdir, *steps)]]
    assert expected in error_of(f"--workdir={workdir}", *flags)
    assert tpu_workers.turn(workdir) == turns
    assert len(cloud.created) == len(cloud.deleted) == 1


def test_workers_that_end_well_before_the_last_step_are_asked_again(cloud):
    """As when a machine is restarted: all save and end, no preemption follows, and nobody may wait for ever."""
    workdir = f"{BUCKET}/runs/told"

    def answer():
        if tpu_workers.turn(workdir) == 1:
            return after(workdir, {"config.json": '{"steps": 40}', "checkpoints/7/x": ""}, w0=0, w1=0)()
        return finishing(workdir)()

    cloud.lives = [[State.ACTIVE, answer]]
    launch(f"--workdir={workdir}")
    assert tpu_workers.turn(workdir) == 2 and len(cloud.created) == 1


def test_what_passes_does_not_end_the_supervisor(cloud, monkeypatch, capsys):
    """The service, the login and the bucket are out of reach for a while; then the credentials are read anew."""
    workdir = f"{BUCKET}/runs/blind"
    client, asked = cloud_tpu.client(), []
    monkeypatch.setattr(cloud_tpu, "client", lambda: asked.append(1) or client)
    exits, wrong = tpu_workers.exits, [OSError("Forbidden"), auth_exceptions.RefreshError("Reauthentication is needed")]

    def broken(where):
        if wrong:
            raise wrong.pop()
        return exits(where)

    monkeypatch.setattr(tpu_workers, "exits", broken)
    away = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INTERNAL]
    cloud.lives = [[State.ACTIVE, *away, finishing(workdir)]]
    launch(f"--workdir={workdir}")
    assert len(cloud.created) == len(cloud.deleted) == 1 and len(asked) == 1 + 5
    told = capsys.readouterr().err
    assert told.count("is out of sight and may bill") == told.count("is in sight again") == 2
    assert "Reauthentication is needed" in told


def test_renewed_buckets_are_reached_anew(tmp_path):
    from etils.epath import backend

    place = storage.path(f"{BUCKET}/renewed")
    place.write_text("one")
    before = backend.fsspec_backend.fs(place)
    assert backend.fsspec_backend.fs(place) is before
    storage.renew()
    assert backend.fsspec_backend.fs(place) is not before
    assert place.read_text() == "one"


@pytest.mark.parametrize("how", ["refused", "interrupted", "SIGTERM", "SIGHUP", "a fault"])
def test_the_last_words_are_what_still_bills(cloud, capsys, how):
    name = how.split()[-1].lower()
    workdir = f"{BUCKET}/runs/{name}"

    def interrupted():
        signal.raise_signal(getattr(signal, "SIGINT" if how == "interrupted" else how))
        return State.ACTIVE

    end = grpc.StatusCode.PERMISSION_DENIED if how == "refused" else State.ACTIVE
    cloud.lives = [[State.ACTIVE, end]]
    with pytest.MonkeyPatch.context() as patch, pytest.raises((SystemExit, ZeroDivisionError)):
        if how == "a fault":
            patch.setattr(tpu_workers, "exits", lambda workdir: 1 / 0)
        elif how != "refused":
            patch.setattr(tpu_supervisor.time, "sleep", lambda seconds: interrupted())
        launch(f"--workdir={workdir}")
    assert cloud.resources and not cloud.deleted
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == (
        f"flowlm-{name} IS NOT DELETED AND BILLS. Delete it by `gcloud compute tpus queued-resources delete flowlm-{name} "
        f"--project=p --zone=z --force --quiet` or `python -m launch.run stop --workdir={workdir}`; "
        "the same command as before takes it up"
    )
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run.main(["stop", f"--workdir={workdir}"])
    assert not cloud.resources


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
    (
        "--workdir=gs://bucket/run[1]",
    ): r"gcloud reads \[ \] as a pattern: name --workdir without, got gs://bucket/run\[1\]",
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


def test_a_dry_run_needs_no_client_and_a_run_does(tmp_path):
    """Not Google's of TPUs, nor that of buckets, nor Google's libraries at all."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor name in ('google.cloud', 'google.auth', 'google.api_core', 'gcsfs'): sys.modules[name] = None\n"
    )
    command = [sys.executable, "-m", "launch.run", CONFIG, *PLACE, f"--workdir={BUCKET}/runs/none"]
    here = dict(cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True)
    dry = subprocess.run([*command, "--dry_run"], **here)
    assert dry.returncode == 0 and '"acceleratorType": "v5litepod-16"' in dry.stdout, dry.stderr
    call = "from launch import run, tpu_vm; tpu_vm._git = lambda *words: ''; run.main(" + repr(command[3:]) + ")"
    sent = subprocess.run([sys.executable, "-c", call], **here)
    assert "launch: the backend tpu_vm needs google-cloud-tpu: `pip install -e .[gcp]`" in sent.stderr


# --- the script --------------------------------------------------------------------------------------------------

FAKES = {
    # cp and cat of `gcloud storage`; every copy is written down with its size, and fails while there is a file "away".
    "gcloud": 'verb=$2; shift 2; [ "$1" = --quiet ] && shift; from=$1; to=${2:-/dev/stdout}\n'
    'case $from in gs://*) from="$BUCKETS/${from#gs://}";; esac\n'
    '[ "$verb" = cat ] && exec cat "$from"\n'
    '[ -e "$BUCKETS/away" ] && exit 1\n'
    'case $to in gs://*) to="$BUCKETS/${to#gs://}"; mkdir -p "$(dirname "$to")";; esac\n'
    'if [ "$from" = - ]; then cat > "$to.new"; else cp "$from" "$to.new"; fi\n'
    'mv "$to.new" "$to"; echo "$(stat -c %s "$to") $to" >> "$BUCKETS/copied"',
    "curl": "echo 2",  # the worker's number, of the metadata server
    "sleep": "echo $1 >> $BUCKETS/slept; exec /bin/sleep 0.05",
    # Fails as often as there are lines in a file.
    "apt-get": '[ ! -s "$BUCKETS/broken" ] || { sed -i 1d "$BUCKETS/broken"; echo "flowlm: mirror is down"; exit 100; }',
}
SETUP = """mkdir -p .venv/bin
echo "extras $1 for $PYTHON"
printf '#!/bin/bash\necho "$NOTE: $@ as $$ is $(cat ../flowlm.pid)"\neval "$DO"\n' > .venv/bin/python
chmod +x .venv/bin/python
"""


class Worker:
    """A machine with stand-ins for what it calls, and a bucket that is a folder."""

    def __init__(self, tmp_path):
        self.buckets, self.home = tmp_path / "buckets", tmp_path / "home"
        checkout = tmp_path / "checkout"
        for folder in (checkout / "launch", self.home, self.buckets / "b/launch", tmp_path / "bin"):
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
            ["bundle", "create", "-q", str(self.buckets / "b/launch/flowlm.bundle"), "HEAD"],
        ):
            subprocess.run([*git, *words], check=True)
        self.environment = os.environ | {
            "HOME": str(self.home),
            "BUCKETS": str(self.buckets),
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        }
        self.turn(1)

    def turn(self, number):
        path = self.buckets / "b/launch/turn"
        path.with_suffix(".new").write_text(f"{number}\n")
        path.with_suffix(".new").rename(path)

    def start(self, do, **resources):
        """The startup script, running; do: what the command does, in bash."""
        resources = tpu_vm.Resources(project="p", zone="z", **resources)
        job = tpu_vm.Job(
            "flowlm-x", ("-m", "flowlm.main", "a b"), "gs://b", resources, {"NOTE": "it's a 'note'", "DO": do}
        )
        return subprocess.Popen(["bash", "-c", tpu_vm.script(job)], env=self.environment, start_new_session=True)

    def end(self, script):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
        script.wait()

    @property
    def exit(self):
        path = self.buckets / "b/logs/2.exit"
        return path.read_text() if path.exists() else ""

    @property
    def log(self):
        parts = sorted((self.buckets / "b/logs/2").glob("*.log"))
        return "".join(part.read_text() for part in parts)


@pytest.fixture
def worker(tmp_path):
    return Worker(tmp_path)


def wait_until(holds, *scripts):
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert all(script.poll() is None for script in scripts), "ended before its time"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("status", [0, 7])
def test_the_script_on_a_worker_that_is_there(worker, status):
    """It fetches, installs, runs, reports, and is gone, since nobody would ask it for another turn."""
    assert worker.start(f"exit {status}", existing="mine").wait(PATIENCE) == 0
    assert re.search(r"it's a 'note': -m flowlm.main a b --distributed as (\d+) is \1\n", worker.log)
    assert "extras tpu,gcp for python3.11" in worker.log
    assert worker.exit == f"1 {status}\n"


def test_what_fails_for_a_moment_is_installed_again(worker):
    (worker.buckets / "broken").write_text("once\ntwice\n")
    worker.start("echo fine", existing="mine").wait(PATIENCE)
    assert worker.exit == "1 0\n" and worker.log.count("flowlm: mirror is down") == 2
    pauses = (worker.buckets / "slept").read_text().split()
    assert [pause for pause in pauses if pause != "20"] == ["10", "30"]


def test_what_cannot_be_installed_is_told(worker):
    (worker.buckets / "broken").write_text("again\n" * 100)
    worker.start("echo fine", existing="mine").wait(PATIENCE)
    assert worker.exit == "1 100\n" and worker.log.count("flowlm: mirror is down") == 6
    assert "fine" not in worker.log


def test_a_bucket_that_is_away_is_told_later(worker):
    away = worker.buckets / "away"
    script = worker.start(f"touch {away}; exit 3", existing="mine")
    wait_until(
        lambda: worker.home.joinpath("flowlm.log").read_text().count("report failed") >= 2 if away.exists() else False
    )
    away.unlink()
    script.wait(PATIENCE)
    assert worker.exit == "1 3\n"


def test_a_worker_runs_once_a_turn(worker):
    """It fails and waits; asked for another turn it runs again, without its peers it is ended, and ends well with the machine."""
    turns = worker.buckets / "b/launch/turn"
    stay = "trap 'echo saved; exit 0' TERM; echo up; while :; do /bin/sleep 0.1; done"
    do = f"case $(cat {turns}) in 1) exit 7;; 2) exec /bin/sleep 1000;; *) {stay};; esac"
    script = worker.start(do, accelerator="v5litepod-16")
    try:
        wait_until(lambda: worker.exit == "1 7\n", script)
        worker.turn(2)
        wait_until(lambda: worker.log.count("--distributed as") == 2, script)
        assert worker.exit == "1 7\n"
        worker.turn(3)
        wait_until(lambda: "up" in worker.log, script)
        assert worker.log.count("--distributed as") == 3 and worker.exit == "1 7\n"
        os.killpg(script.pid, signal.SIGTERM)
        assert script.wait(PATIENCE) == 0
        assert worker.log.endswith("saved\n") and worker.exit == "1 7\n"  # it is no end of the turn
    finally:
        worker.end(script)
    script = worker.start(do, accelerator="v5litepod-16")  # with the machine
    try:
        wait_until(lambda: worker.log.count("up\n") == 2, script)
        assert worker.log.count("saved") == 1
    finally:
        worker.end(script)


def test_a_long_log_is_sent_in_parts(worker):
    """Every byte arrives once, and of what is there no more than the last part is sent again."""
    lines = 3000
    script = worker.start(
        f"for i in $(seq {lines}); do echo $i {'x' * 100}; [ $((i % 100)) != 0 ] || /bin/sleep 0.02; done",
        existing="mine",
    )
    script.wait(PATIENCE)
    local = worker.home.joinpath("flowlm.log").read_text()
    assert worker.log == local and f"\n{lines} x" in local
    copies = [line.split() for line in (worker.buckets / "copied").read_text().splitlines()]
    copies = [(int(size), Path(path).name) for size, path in copies if "/logs/2/" in path]
    names = [name for _, name in copies]
    assert names == sorted(names) and len(set(names)) == len(local) // 65536 + 1
    assert max(size for size, _ in copies) == 65536


def test_the_parts_of_a_log_are_joined_when_read(bucket, monkeypatch):
    workdir = f"{BUCKET}/runs/parts"
    for name, text in {"3/2026-000000.log": "a\nb", "3/2026-000001.log": "c\nd\n", "12/x.log": "e\n"}.items():
        path = storage.path(workdir) / "logs" / name
        path.write_text(text)
    assert tpu_workers.workers(workdir) == ["3", "12"]
    assert tpu_workers.said(workdir, "3") == "a\nbc\nd"
    assert tpu_workers.said(workdir, "3", 1) == "d"
    assert tpu_workers.said(workdir, "3", 2) == "bc\nd"
