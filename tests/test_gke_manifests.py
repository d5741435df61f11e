"""What the backend gke sends: held against the published schemas, and its container's command carried out as a node does."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kubernetes_emulator import container_of, words_of, wrong_with
from programs import Program

from launch import gke, run
from launch.gke_manifests import SCRIPT, TPUS, Resources, manifests, name_of, slices
from launch.job import training_job

ROOT = Path(__file__).parents[1]
WORKDIR = "gs://bucket/runs/one"
START = ("--backend=gke", "--config=experiments/test.py", f"--workdir={WORKDIR}", "--image=place/flowlm:1")
TPU, GPU = ("--topology=v5e:4x4",), ("--gpu=nvidia-h100-80gb", "--gpus=8", "--nodes=2")
ODD = "$(HOME) $$(HOME) $$ $x 'a' \"b\" #"


def printed(capsys, *arguments):
    """The manifests that a dry run shows."""
    run.main([*START, *arguments, "--dry_run"])
    return list(yaml.safe_load_all(capsys.readouterr().out))


def pod_of(manifest):
    (replicated,) = manifest["spec"].get("replicatedJobs", [{"template": manifest}])
    return replicated["template"]["spec"]["template"]["spec"]


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("capacity", [(), ("--spot",), ("--flex_start",), ("--reservation=ours",)], ids=str)
@pytest.mark.parametrize(
    "machines",
    [TPU, ("--topology=v5p:4x4x4:3", "--config.mesh.replica=3"), ("--topology=v6e:2x2",), GPU, (GPU[0],)],
    ids=" ".join,
)
def test_manifests_have_the_form_that_is_published(machines, capacity, capsys):
    asked = ("--queue=team", "--service_account=me", "--secrets=wandb,hf", "--cpu=30", "--memory=200Gi")
    made = printed(capsys, *machines, *capacity, *asked, f"--environment=NOTE={ODD}")
    assert [wrong_with(manifest) for manifest in made] == [[]] * len(made)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda made: made["spec"]["failurePolicy"].update(maxRestart=3), "'maxRestart' was unexpected"),
        (lambda made: made["spec"]["failurePolicy"].update(restartStrategy="Again"), "'Again' is not one of"),
        (lambda made: made["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "a queue"}), "does not match"),
        (lambda made: made["metadata"].update(name="A_b"), "does not match"),
        (lambda made: pod_of(made).update(terminationGracePeriodSeconds="5"), "is not of type 'integer'"),
        (lambda made: container_of(made)["env"].append({"name": "A", "value": 1}), "is not of type 'string'"),
        (lambda made: container_of(made)["resources"]["requests"].update(memory="much"), "is not valid under any"),
    ],
)
def test_the_schemas_find_what_is_wrong(change, expected, capsys):
    (made,) = printed(capsys, "--topology=v5e:2x2", "--memory=1Gi")
    change(made)
    assert expected in str(wrong_with(made))


def test_a_slice_is_a_job_of_a_jobset(capsys):
    (made,) = printed(capsys, "--topology=v4:2x2x4:2", "--config.mesh.replica=2", "--max_restarts=7", "--grace=90")
    assert made["kind"] == "JobSet" and made["metadata"]["name"] == made["metadata"]["labels"]["flowlm-job"]
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 7
    (replicated,) = made["spec"]["replicatedJobs"]
    job, pod = replicated["template"]["spec"], pod_of(made)
    assert (replicated["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 4, 4, 0)
    assert job["completionMode"] == "Indexed"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v4-podslice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
    }
    assert container_of(made)["resources"]["limits"] == {"google.com/tpu": "4"}
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 90)
    assert "tolerations" not in pod and words_of(made)[-1] == "--distributed"
    assert "kueue.x-k8s.io/queue-name" not in made["metadata"]["labels"]


def test_nodes_with_gpus_are_an_indexed_job_whose_processes_are_told_who_they_are(capsys):
    service, made = printed(capsys, *GPU, "--max_restarts=5")
    name = made["metadata"]["name"]
    spec, pod = made["spec"], pod_of(made)
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (2, 2, "Indexed")
    assert spec["backoffLimit"] == 10
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert container_of(made)["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    environment = {each["name"]: each for each in container_of(made)["env"]}
    # A pod of an indexed Job is called JOB-INDEX, in the domain that is its Service.
    assert environment["JAX_COORDINATOR_ADDRESS"]["value"].partition(":")[0] == f"{name}-0.{name}"
    assert environment["JAX_NUM_PROCESSES"]["value"] == "2"
    field = environment["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert service["metadata"]["name"] == pod["subdomain"] == name and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == spec["template"]["metadata"]["labels"]


@pytest.mark.parametrize("machines", [(GPU[0],), ("--topology=v5e:2x2",)], ids=str)
def test_a_pod_that_is_alone_waits_for_nobody(machines, capsys):
    (made,) = printed(capsys, *machines)
    assert {"name": "JAX_NUM_PROCESSES", "value": "1"} in container_of(made)["env"]
    assert "--distributed" not in words_of(made) and "subdomain" not in pod_of(made)


CAPACITY = {
    "--spot": ({"cloud.google.com/gke-spot": "true"}, ["cloud.google.com/gke-spot"]),
    "--flex_start": (
        {"cloud.google.com/gke-flex-start": "true"},
        ["cloud.google.com/gke-flex-start", "cloud.google.com/gke-queued"],
    ),
    "--reservation=ours": (
        {"cloud.google.com/reservation-name": "ours", "cloud.google.com/reservation-affinity": "specific"},
        [],
    ),
}


@pytest.mark.parametrize("flag", CAPACITY)
def test_capacity_is_chosen_by_the_labels_of_nodes(flag, capsys):
    (made,) = printed(capsys, *TPU, flag)
    labels, taints = CAPACITY[flag]
    assert labels.items() <= pod_of(made)["nodeSelector"].items()
    assert [each["key"] for each in pod_of(made).get("tolerations", [])] == taints


@pytest.mark.parametrize(
    ("topology", "hosts", "chips", "devices"),
    [
        ("v5e:2x2", 1, 4, 4),
        ("v5e:2x4", 1, 8, 8),
        ("v5e:4x8", 8, 4, 32),
        ("v6e:16x16:2", 64, 4, 512),
        ("v4:2x2x1", 1, 4, 4),
        ("v5p:4x4x8", 32, 4, 128),
        ("tpu7x:2x2x2", 2, 4, 16),
    ],
)
def test_a_slice_has_these_hosts_and_chips(topology, hosts, chips, devices):
    found = slices(topology)
    assert (found.hosts, found.chips, found.devices) == (hosts, chips, devices)
    assert found.hosts * found.chips * found.count * TPUS[topology.partition(":")[0]].devices == devices


def test_secrets_are_named_and_never_shown(capsys):
    (made,) = printed(capsys, *TPU, "--secrets=wandb, hf")
    assert container_of(made)["envFrom"] == [{"secretRef": {"name": "wandb"}}, {"secretRef": {"name": "hf"}}]
    for flag in ("--environment=WANDB_API_KEY=abc123", "--environment=HF_TOKEN=abc123", "--secrets=KEY=abc123"):
        with pytest.raises(SystemExit) as refused:
            run.main([*START, *TPU, flag, "--dry_run"])
        assert "Secret" in refused.value.code and "abc123" not in refused.value.code
    assert printed(capsys, *TPU, "--environment=TOKENIZERS_PARALLELISM=false")


def test_objects_of_one_workdir_have_one_name_and_of_two_have_two():
    """Also where it is long, or the last part of both is the same: pods' names have at most 63 characters."""
    names = []
    for workdir in ("gs://b/x/run", "gs://b/y/run", f"gs://b/{'long-' * 30}1", f"gs://b/{'long-' * 30}2", "gs://b/Ä"):
        job = training_job("experiments/test.py", [], workdir, Resources(image="i", topology="v5e:4x4"), {})
        again = training_job("experiments/test.py", ["--config.steps=3"], f"{workdir}/", job.resources, {})
        assert name_of(job) == name_of(again)
        assert not wrong_with(manifests(job)[-1])
        assert len(f"{name_of(job)}-slice-99-9999-abcde") <= 63
        names.append(name_of(job))
    assert len(set(names)) == len(names)


# --- what the container runs -------------------------------------------------------------------------------------


def container(tmp_path, program, *flags):
    """The words of the container of a job that is a few words of Python, as a node would start it."""
    python = shlex.quote(sys.executable)
    resources = Resources(image="i", topology="v5e:2x2", command=python)
    job = Program("toy", program, flags, str(tmp_path), resources, {"HOME": "not here"})
    return words_of(manifests(job)[0])


def finish(tmp_path, steps=1):
    (tmp_path / "config.json").write_text(json.dumps({"steps": 1}))
    (tmp_path / "evaluation.json").write_text(json.dumps({"step": steps}))


HERE = dict(cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True)


def test_words_reach_the_command_as_they_are(tmp_path):
    """Though Kubernetes reads some of them as variables, and a shell stands between."""
    finish(tmp_path)
    words = container(tmp_path, "import sys; print(sys.argv[1:])", ODD, "--a=$(HOME)", "")
    done = subprocess.run(words, **HERE, capture_output=True, check=True)
    assert done.stdout == f"{[ODD, '--a=$(HOME)', '']}\n"
    assert "$(" not in SCRIPT and "$$" not in SCRIPT


def test_what_ends_well_before_its_last_step_is_started_again(tmp_path):
    """75 is a failure to Kubernetes; a failure stays what it was, and what is finished is a success."""
    assert subprocess.run(container(tmp_path, "raise SystemExit(3)"), **HERE).returncode == 3
    finish(tmp_path, steps=0)
    assert subprocess.run(container(tmp_path, ""), **HERE).returncode == 75
    finish(tmp_path)
    assert subprocess.run(container(tmp_path, ""), **HERE).returncode == 0


def test_who_ends_the_container_lets_the_command_save(tmp_path):
    program = (
        "import pathlib, signal, sys, time; saved = pathlib.Path(sys.argv[1]) / 'saved'; "
        "signal.signal(signal.SIGTERM, lambda *a: (time.sleep(.2), saved.touch(), sys.exit(0))); "
        "print('up', flush=True); time.sleep(1000)"
    )
    process = subprocess.Popen(container(tmp_path, program, str(tmp_path)), **HERE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (75, "saved before its last step\n") and (tmp_path / "saved").exists()


# --- what is refused, and what a dry run needs -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--image=", *TPU), "needs --image"),
        ((), "needs --topology for TPUs or --gpu for GPUs"),
        ((*TPU, GPU[0]), "not both"),
        ((*TPU, "--nodes=4"), "what v5e:4x4 has follows from its name"),
        ((*TPU, "--spot", "--flex_start"), "three kinds of capacity: give one"),
        (("--topology=v5e:4x5",), "unknown --topology 'v5e:4x5'"),
        (("--topology=v5e:2x2:2",), "slices of several hosts only, and 2x2 is one host"),
        (("--topology=v5e:4x4:2",), "has 2 slices, which are replicas: make mesh.replica a multiple of it, not 1"),
        ((*TPU, "--config.mesh.data=8"), "v5e:4x4 has 16 devices, and the mesh .*mesh.data = 8"),
        ((*GPU, "--config.mesh.data=4"), "--gpus=8 on --nodes=2 has 16 GPUs"),
        ((*TPU, "--workdir=/data/run"), "--workdir must be gs://..., got /data/run"),
        ((*TPU, "--grace=0"), "grace are at least 1"),
        ((*TPU, "--max_restarts=-1"), "max_restarts and parallel at least 0"),
        ((*TPU, "--config.stepz=3"), "no setting stepz"),
    ],
    ids=str,
)
def test_what_could_never_run_is_refused(arguments, expected):
    with pytest.raises(SystemExit, match=f"^launch: .*{expected}") as refused:
        run.main([*START, *arguments, "--dry_run"])
    assert "\n" not in refused.value.code


def test_a_dry_run_needs_neither_client_nor_credentials_and_a_run_says_what_to_install(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor name in ('kubernetes', 'gcsfs', 'google.auth'): sys.modules[name] = None\n"
    )
    command = [sys.executable, "-m", "launch.run", *START, *TPU]
    here = HERE | {"env": os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "KUBECONFIG": "/nowhere"}}
    dry = subprocess.run([*command, "--dry_run"], **here, capture_output=True)
    (made,) = yaml.safe_load_all(dry.stdout)
    assert dry.returncode == 0 and not wrong_with(made), dry.stderr
    sent = subprocess.run(command, **here, capture_output=True)
    assert sent.returncode == 1 and sent.stderr.startswith("launch: the backend gke needs kubernetes: ")
    assert "`pip install -e .[gke]`" in sent.stderr


def test_every_job_of_a_sweep_has_objects_of_its_own():
    jobs = [
        training_job("experiments/test.py", [], f"gs://b/sweep/{name}/seed0", Resources(image="i", gpu="nvidia-l4"), {})
        for name in ("one", "two")
    ]
    made = list(yaml.safe_load_all(gke.describe(jobs)))
    assert len({manifest["metadata"]["name"] for manifest in made}) == 2
    assert made == [manifest for job in jobs for manifest in manifests(job)]
