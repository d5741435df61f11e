"""The backend tpu_vm before a Cloud TPU of our own: what is sent, what is refused, and what is told."""

import dataclasses
import os
import signal
import subprocess
import sys

import cloud_tpu_emulator
import pytest
from cloud_tpu_emulator import BUCKET, CONFIG, PLACE, ROOT, State, error_of, finishing, grpc, launch, tpu_v2

from flowlm.system import storage
from launch import cloud_tpu, run, tpu_vm, tpu_workers
from launch import job as jobs
from launch.job import job_name, training_job

bucket, cloud = cloud_tpu_emulator.bucket, cloud_tpu_emulator.cloud  # fixtures


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
    assert (sent.parent, sent.queued_resource_id) == ("projects/p/locations/us-central1-a", "flowlm-one")
    assert (spec.node.accelerator_type, spec.node.runtime_version) == ("v5litepod-16", "v2-alpha-tpuv5-lite")
    assert "spot" not in sent.queued_resource
    assert cloud.deleted == ["projects/p/locations/us-central1-a/queuedResources/flowlm-one"] and not cloud.resources

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


def test_how_other_turns_ended_does_not_count():
    """Nor what was written before there were turns, which was the status alone."""
    workdir = f"{BUCKET}/runs/exits"
    tpu_workers.next_turn(workdir)
    for worker, note in {0: "1 0", 1: "1 137", 2: "0 1", 3: "2 1", 4: "1", 5: ""}.items():
        (storage.path(workdir) / f"logs/{worker}.exit").write_text(f"{note}\n")
    assert tpu_workers.exits(workdir) == {"0": "0", "1": "137"}
    tpu_workers.next_turn(workdir)
    assert tpu_workers.exits(workdir) == {"3": "1"}


def test_the_parts_of_a_log_are_joined_when_read():
    workdir = f"{BUCKET}/runs/parts"
    for name, text in {"3/2026-000000.log": "a\nb", "3/2026-000001.log": "c\nd\n", "12/x.log": "e\n"}.items():
        path = storage.path(workdir) / "logs" / name
        path.write_text(text)
    assert tpu_workers.workers(workdir) == ["3", "12"]
    assert tpu_workers.said(workdir, "3") == "a\nbc\nd"
    assert tpu_workers.said(workdir, "3", 1) == "d"
    assert tpu_workers.said(workdir, "3", 2) == "bc\nd"


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
    cloud.nodes["projects/p/locations/us-central1-a/nodes/mine"] = node
    workdir = f"{BUCKET}/runs/existing"
    launch(f"--workdir={workdir}", "--accelerator=", "--existing=mine")
    run.main(["stop", f"--workdir={workdir}"])
    started, stopped = gcloud.read_text().splitlines()
    ssh = "compute tpus tpu-vm ssh mine --project=p --zone=us-central1-a --worker=all --command="
    assert started.startswith(f"{ssh}gcloud storage cat {workdir}/launch/startup.sh > ")
    assert stopped.startswith(f"{ssh}sudo kill -TERM ")
    assert (storage.path(workdir) / "launch/startup.sh").read_text().startswith("#!/usr/bin/env bash\n")
    assert not cloud.created and not cloud.deleted

    assert "v6e-8 has 8 chips, and the mesh" in error_of(
        f"--workdir={workdir}", "--accelerator=", "--existing=mine", "--config.mesh.data=4"
    )
    assert "there is no TPU VM yours in us-central1-a" in error_of(f"--workdir={workdir}", "--existing=yours")
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
    ("--zone=us-central1",): "--zone=us-central1 is not a zone: they are called like us-central1-a",
    (
        "--spot",
        "--existing=mine",
    ): "--spot is how a TPU is made, and --existing takes one that is made: give one of them",
    ("--reservation=ours", "--existing=mine"): "--reservation is how a TPU is made",
    ("--spot", "--flex_start"): "--spot and --flex_start are kinds of capacity: give one of them",
    ("--flex_start", "--hours=169"): "--hours is from 1 to 168, got 169",
    ("--parallel=-1",): "max_restarts and parallel are at least 0",
    ("--secrets=WANDB_API_KEY,abc123",): "--secrets takes names in Secret Manager that are names of variables too",
    ("--environment=HF_TOKEN=abc123",): "--environment=HF_TOKEN would be shown .*: put it into Secret Manager",
    (
        "--workdir=gs://bucket/run[1]",
    ): r"gcloud reads \[ \] as a pattern: name --workdir without, got gs://bucket/run\[1\]",
    ("--max_restarts=-1",): "max_restarts and parallel are at least 0",
    ("--config.stepss=3",): "stepss",
}


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
@pytest.mark.parametrize("dry", [(), ("--dry_run",)], ids=["", "dry"])
def test_bad_resources_are_refused_before_anything_is_sent(cloud, arguments, dry):
    with pytest.raises(SystemExit, match=BAD[arguments]) as refused:
        launch(f"--workdir={BUCKET}/runs/bad", *arguments, *dry)
    assert not cloud.created and not storage.path(f"{BUCKET}/runs/bad").exists()
    assert "abc123" not in str(refused.value)


def test_a_commit_is_sent_and_changes_are_not(cloud, monkeypatch):
    monkeypatch.setattr(tpu_vm, "_git", lambda *words: "M flowlm/training.py")
    assert "M flowlm/training.py. Commit them" in error_of(f"--workdir={BUCKET}/runs/changed")
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


# --- kinds of capacity -------------------------------------------------------------------------------------------


def test_a_reservation_is_named_in_the_request_and_another_project_s_by_its_path(cloud):
    for name, given in {"ours": "ours", "theirs": "projects/host/locations/us-central1-a/reservations/theirs"}.items():
        workdir = f"{BUCKET}/runs/{name}"
        cloud.lives = [[finishing(workdir)]]
        launch(f"--workdir={workdir}", f"--reservation={given}")
    ours, theirs = (sent.queued_resource for sent in cloud.created)
    assert ours.reservation_name == "projects/p/locations/us-central1-a/reservations/ours"
    assert theirs.reservation_name == "projects/host/locations/us-central1-a/reservations/theirs"
    assert "guaranteed" in ours and "spot" not in ours


@pytest.fixture
def flex(cloud, tmp_path, monkeypatch):
    """A gcloud that writes down what it is told and the script that it is given, and makes what the service has a life for."""
    program = f"""#!{sys.executable}
import pathlib, sys
here = pathlib.Path({str(tmp_path)!r})
words = dict(word.removeprefix("--").split("=", 1) for word in sys.argv if "=" in word)
(here / "line").open("a").write(" ".join(sys.argv[1:]) + "\\n")
(here / "script").write_text(pathlib.Path(words["metadata-from-file"].partition("=")[2]).read_text())
if (here / "refuses").exists():
    sys.exit((here / "refuses").read_text())
"""
    (tmp_path / "gcloud").write_text(program)
    (tmp_path / "gcloud").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    create = cloud_tpu.FlexStart.create

    def made(self, line):
        if not (tmp_path / "refuses").exists():
            cloud.appear(self._resource)
        create(self, line)

    monkeypatch.setattr(cloud_tpu.FlexStart, "create", made)
    return tmp_path


def test_flex_start_is_asked_for_by_gcloud_and_again_when_its_hours_are_over(cloud, flex, capsys):
    """The client's requests have no word for it. What a dry run shows is the line, but for the script's file."""
    workdir = f"{BUCKET}/runs/flex"
    asked = ("--flex_start", "--hours=4", "--service_account=me@p", f"--workdir={workdir}")
    launch(*asked, "--dry_run")
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("gcloud alpha"))
    cloud.lives = [[State.ACTIVE, State.SUSPENDED], [State.ACTIVE, finishing(workdir)]]
    launch(*asked)
    lines = (flex / "line").read_text().splitlines()
    assert len(lines) == 2 and lines[0] == lines[1] and not cloud.created and len(cloud.deleted) == 2
    words, expected = (line.removeprefix("gcloud ").split() for line in (lines[0], shown))
    assert words[:6] == ["alpha", "compute", "tpus", "queued-resources", "create", "flowlm-flex"]
    assert {
        "--provisioning-model=flex-start", "--max-run-duration=4h", "--node-id=flowlm-flex", "--service-account=me@p",
        "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--zone=us-central1-a", "--project=p",
    } <= set(words)  # fmt: skip
    file = "--metadata-from-file=startup-script="
    assert [word for word in words if not word.startswith(file)] == [w for w in expected if not w.startswith(file)]
    assert (flex / "script").read_text() == (storage.path(workdir) / "launch/startup.sh").read_text()


def test_what_gcloud_refuses_is_told_and_bills_nothing(cloud, flex, capsys):
    (flex / "refuses").write_text("ERROR: Quota limit 'X' has been exceeded.\n")
    assert "Cloud TPU could not make it: ERROR: Quota limit 'X' has been exceeded." in error_of(
        "--flex_start", f"--workdir={BUCKET}/runs/flex-refused"
    )
    assert "BILLS" not in capsys.readouterr().err


# --- several at once ---------------------------------------------------------------------------------------------


def sweep(names, **resources):
    """The jobs of a sweep's points."""
    wanted = tpu_vm.Resources("v5litepod-16", "p", "us-central1-a", **resources)
    jobs = [training_job("experiments/test.py", [], f"{BUCKET}/sweep/{name}/seed0", wanted, {}) for name in names]
    return [dataclasses.replace(job, name=job_name(name)) for job, name in zip(jobs, names, strict=True)]


@pytest.mark.parametrize(("parallel", "most"), [(1, 1), (2, 2), (0, 4)])
def test_at_most_so_many_of_a_sweep_have_a_slice_at_once(cloud, parallel, most):
    """And so many have: a slice ends only when as many are there as may be."""
    points = sweep("abcd", parallel=parallel)
    there, seen = set(), []

    def end(name):
        def answer():
            there.add(name)
            seen.append(len(there))
            if max(seen) < most:
                return State.ACTIVE
            there.discard(name)
            return finishing(f"{BUCKET}/sweep/{name}/seed0")()

        return answer

    cloud.lives = {f"flowlm-{name}": [State.ACTIVE, end(name)] for name in "abcd"}
    tpu_vm.submit(points, lambda job, handle: jobs.remember("tpu_vm", job, handle))
    assert max(seen) == most and len(cloud.created) == len(cloud.deleted) == 4
    assert [handle["name"] for _, _, handle in jobs.recall(f"{BUCKET}/sweep")] == [f"flowlm-{name}" for name in "abcd"]


def test_the_others_are_seen_to_their_end_when_one_has_failed(cloud):
    """By the service's refusal, or by a fault that nobody foresaw."""
    points = sweep(["bad", "worse", "good"], parallel=3)
    cloud.lives = {
        "flowlm-bad": grpc.StatusCode.RESOURCE_EXHAUSTED,
        "flowlm-worse": [State.ACTIVE],
        "flowlm-good": [State.ACTIVE, finishing(f"{BUCKET}/sweep/good/seed0")],
    }

    def record(job, handle):
        jobs.remember("tpu_vm", job, handle)
        if job.name == "flowlm-worse":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tpu_vm.submit(points, record)
    assert [name.rpartition("/")[2] for name in cloud.resources] == ["flowlm-worse"]
    with pytest.raises(RuntimeError, match=r"^flowlm-bad: .*Quota limit"):
        cloud.lives["flowlm-bad"] = grpc.StatusCode.RESOURCE_EXHAUSTED
        tpu_vm.submit(points[:1], record)


def test_what_ends_the_command_tells_of_every_slice_that_bills(cloud, capsys):
    points = sweep(["one", "two", "three"], parallel=2)
    cloud.lives = {f"flowlm-{name}": [State.ACTIVE] for name in ("one", "two", "three")}
    up = []

    def record(job, handle):
        up.append(job.name)
        if len(up) == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit, match="143"):
        tpu_vm.submit(points, record)
    last = [line.split()[0] for line in capsys.readouterr().err.splitlines() if "IS NOT DELETED AND BILLS" in line]
    assert sorted(last) == ["flowlm-one", "flowlm-two"] and len(cloud.resources) == 2


def test_a_sweep_on_one_machine_or_with_one_name_is_refused():
    for names, resources, expected in (
        (("a", "b"), {"existing": "mine"}, "--existing is one machine, and a sweep has several runs"),
        (("lr=0.1", "lr=0-1"), {}, "two runs of the sweep would be called flowlm-lr-0-1: rename one"),
    ):
        with pytest.raises(ValueError, match=expected):
            tpu_vm.describe(sweep(names, **resources))
