"""The backend tpu_vm before a Cloud TPU of our own: what is sent, what is refused, and what is told."""

import os
import subprocess
import sys

import cloud_tpu_emulator
import pytest
from cloud_tpu_emulator import BUCKET, CONFIG, PLACE, ROOT, State, error_of, finishing, launch, tpu_v2

from flowlm.system import storage
from launch import cloud_tpu, run, tpu_vm, tpu_workers

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
