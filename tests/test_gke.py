"""The backend gke and the official client before a Kubernetes of our own: what is sent, told, stopped and refused."""

import importlib.util
import itertools
import types
from pathlib import Path

import kubernetes_emulator
import pytest
import yaml
from kubernetes_emulator import TOKEN

from flowlm.system import storage
from launch import gke, run
from launch import job as jobs

pytestmark = pytest.mark.needs("gke")
for _package in ("gcsfs", "gcp_storage_emulator"):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"{_package} is not installed: pip install -e .[dev]", allow_module_level=True)

ROOT = Path(__file__).parents[1]
BUCKET = "gs://bucket"
START = ("--backend=gke", "--config=experiments/test.py", "--image=place/flowlm:1")
TPU, GPU = ("--topology=v5e:4x4",), ("--gpu=nvidia-l4", "--nodes=2")


@pytest.fixture(scope="module", autouse=True)
def bucket(tmp_path_factory):
    from bucket_emulator import running

    with running(tmp_path_factory.mktemp("mirror")):
        yield


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A cluster with nothing in it, which kubeconfig names."""
    from kubernetes.config import kube_config

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(gke, "POLL_SECONDS", 0.01)
    with kubernetes_emulator.running(tmp_path / "kubeconfig") as api:
        yield api


@pytest.fixture
def told(capsys):
    """What an action says; whatever is said, it has no credential in it."""

    def say(action, workdir):
        run.main([action, f"--workdir={workdir}"])
        said = capsys.readouterr()
        assert TOKEN not in said.out + said.err
        return said.out.rstrip("\n")

    return say


def launch(workdir, *arguments):
    run.main([*START, f"--workdir={workdir}", *arguments])


def refused(workdir, *arguments):
    with pytest.raises(SystemExit) as error:
        launch(workdir, *arguments)
    assert error.value.code.startswith("launch: ") and "\n" not in error.value.code and TOKEN not in error.value.code
    return error.value.code


def made(workdir):
    """The job's handle."""
    ((_, backend, handle),) = jobs.recall(workdir)
    assert backend == "gke"
    return handle


def finish(workdir):
    for name, text in {"config.json": '{"steps": 1}', "evaluation.json": '{"step": 1}'}.items():
        (storage.path(workdir) / name).write_text(text)


def test_a_run_on_a_slice_from_its_first_request_to_its_end(cluster, told, capsys):
    """What is made is what a dry run shows; a node that is taken away restarts all, and the run goes on."""
    workdir = f"{BUCKET}/runs/one"
    launch(workdir, *TPU, "--dry_run")
    (shown,) = yaml.safe_load_all(capsys.readouterr().out)
    assert not cluster.requests and not storage.path(workdir).exists()
    launch(workdir, *TPU)
    ((_, name),) = cluster.objects
    assert {key: cluster.objects["jobsets", name][key] for key in shown} == shown
    assert f"is sent, as the JobSet {name} of namespace default" in capsys.readouterr().err
    assert made(workdir)["context"] == "ours"

    waits = "waits: 0 of 4 pods run, restarted {} time(s): 0/3 nodes are available: 3 Insufficient"
    assert told("status", workdir) == waits.format(0)
    assert told("logs", workdir).splitlines()[1] == "0/3 nodes are available: 3 Insufficient"
    cluster.run(name)
    assert told("status", workdir) == "running: 4 of 4 pods run, restarted 0 time(s)"
    heads = [line for line in told("logs", workdir).splitlines() if line.startswith("==>")]
    assert [head.split("-")[-2] for head in heads] == ["0", "1", "2", "3"]
    assert "step 1\nhere is" in told("logs", workdir)

    cluster.restart(name)
    assert told("status", workdir) == waits.format(1)
    cluster.run(name)
    assert told("status", workdir) == "running: 4 of 4 pods run, restarted 1 time(s)"
    cluster.condition(name, "Completed")
    finish(workdir)
    assert told("status", workdir) == "ended"
    cluster.objects.clear()
    assert told("status", workdir) == "ended"


def test_a_run_on_gpus_is_a_job_with_its_service_and_both_are_deleted(cluster, told):
    workdir = f"{BUCKET}/runs/gpus"
    launch(workdir, *GPU)
    assert cluster.created == ["services", "jobs"]
    name = made(workdir)["name"]
    cluster.run(name)
    cluster.objects["jobs", name]["status"]["failed"] = 2
    assert told("status", workdir) == "running: 2 of 2 pods run, 2 pod(s) failed"
    assert told("stop", workdir) == "stopping: its processes save, and end"
    assert ("services", name) not in cluster.objects
    assert told("status", workdir) == "not in the cluster: stopped, or deleted"
    assert not cluster.objects and not cluster.pods


def test_a_failure_is_told_with_the_last_words_of_who_failed(cluster, told):
    workdir = f"{BUCKET}/runs/failed"
    launch(workdir, *TPU)
    name = made(workdir)["name"]
    cluster.run(name)
    cluster.fail(name, "step 3\nflowlm: the loss is nan\nfailed\n", "FailedJobs")
    assert told("status", workdir) == "failed (FailedJobs): flowlm: the loss is nan"


def test_the_same_command_takes_a_run_up_when_its_pods_are_gone(cluster, told, capsys):
    """One that is running is left as it is; one that has ended, failed or is being stopped makes room first."""
    workdir = f"{BUCKET}/runs/again"
    launch(workdir, *TPU)
    name = made(workdir)["name"]
    launch(workdir, *TPU)
    assert "is there already, and is left as it is" in capsys.readouterr().err
    assert cluster.created == ["jobsets"]
    cluster.lingers = 5
    told("stop", workdir)
    launch(workdir, *TPU, "--max_restarts=3")
    assert cluster.created == ["jobsets"] * 2
    assert cluster.objects["jobsets", name]["spec"]["failurePolicy"]["maxRestarts"] == 3
    cluster.condition(name, "Failed")
    launch(workdir, *TPU)
    assert cluster.created == ["jobsets"] * 3 and told("status", workdir).startswith("waits: 0 of 4")


def test_pods_that_do_not_end_are_not_waited_for_without_end(cluster, told, monkeypatch):
    workdir = f"{BUCKET}/runs/stuck"
    launch(workdir, *TPU)
    cluster.lingers = 10**9
    told("stop", workdir)
    clock = types.SimpleNamespace(sleep=lambda seconds: None, monotonic=itertools.count(0, 100).__next__)
    monkeypatch.setattr(gke, "time", clock)
    assert f"{made(workdir)['name']} of before is not gone, 90 s and more after" in refused(workdir, *TPU, "--grace=90")


def test_a_queue_holds_a_run_back(cluster, told):
    workdir = f"{BUCKET}/runs/queued"
    launch(workdir, *TPU, "--queue=team")
    assert told("status", workdir) == "waits: the queue is full"
    assert not cluster.pods and told("logs", workdir) == "waits: the queue is full"


def test_who_comes_first_suspends_a_run_and_it_goes_on(cluster, told):
    """By Kueue's preemption: the pods are ended, and made again when there is room."""
    workdir = f"{BUCKET}/runs/evicted"
    launch(workdir, *TPU, "--queue=team")
    name = made(workdir)["name"]
    cluster.admit(name)
    cluster.run(name)
    assert told("status", workdir) == "running: 4 of 4 pods run, restarted 0 time(s)"
    cluster.evict(name, "Preempted to accommodate a workload of another team")
    assert told("status", workdir) == "waits: Preempted to accommodate a workload of another team"
    launch(workdir, *TPU, "--queue=team")
    assert cluster.created == ["jobsets"]
    cluster.admit(name)
    cluster.run(name)
    assert told("status", workdir) == "running: 4 of 4 pods run, restarted 0 time(s)"


def test_a_node_with_gpus_that_is_taken_away_is_waited_for(cluster, told):
    workdir = f"{BUCKET}/runs/node"
    launch(workdir, *GPU)
    name = made(workdir)["name"]
    cluster.run(name)
    cluster.take_node(name)
    waits = "waits: 1 of 2 pods run, 1 pod(s) failed: 0/3 nodes are available: 3 Insufficient"
    assert told("status", workdir) == waits
    cluster.run(name)
    assert told("status", workdir) == "running: 2 of 2 pods run, 1 pod(s) failed"


# --- sweeps ------------------------------------------------------------------------------------------------------


def sweep(number, machines=None, **resources):
    """The jobs of a sweep's points."""
    wanted = gke.Resources(image="i", **(machines or {"topology": "v5e:4x4"}), **resources)
    return [
        jobs.training_job("experiments/test.py", [], f"{BUCKET}/sweep/{n}/seed0", wanted, {}) for n in range(number)
    ]


def submit(points):
    gke.submit(points, lambda job, handle: jobs.remember("gke", job, handle))


@pytest.fixture
def one_ends(cluster, monkeypatch):
    """Whenever it is waited, the first job that is up has ended; how many were up each time."""
    there = []

    def sleep(seconds):
        up = [
            each
            for each in cluster.objects
            if each[0] != "services" and "conditions" not in cluster.objects[each]["status"]
        ]
        there.append(len(up))
        if up:
            cluster.condition(up[0][1], "Completed" if up[0][0] == "jobsets" else "Complete")

    monkeypatch.setattr(gke, "time", types.SimpleNamespace(sleep=sleep, monotonic=lambda: 0))
    return there


def test_at_most_so_many_of_a_sweep_are_there_at_once(cluster, one_ends):
    """The next is sent when one has ended, in the order of the sweep."""
    points = sweep(4, parallel=2)
    submit(points)
    assert one_ends == [2, 2] and cluster.created == ["jobsets"] * 4
    found = jobs.recall(f"{BUCKET}/sweep")
    assert [handle["name"] for _, _, handle in found] == [gke.name_of(point) for point in points]


def test_what_an_earlier_command_has_sent_counts_too(cluster, one_ends):
    """Also where it stands behind what is to be sent, as when a run before it has failed."""
    points = sweep(4, parallel=2)
    submit(points[2:])
    submit(points)
    assert max(one_ends) == 2 and cluster.created == ["jobsets"] * 4


@pytest.mark.parametrize("machines", [{"topology": "v5e:4x4"}, {"gpu": "nvidia-l4", "nodes": 2}], ids=str)
def test_a_sweep_waits_for_room_in_a_quota(cluster, one_ends, capsys, machines):
    """Of which a complete job has its part until it is deleted; with the client's own requests counted by the server."""
    (plural,) = {"jobsets"} if "topology" in machines else {"jobs"}
    cluster.quotas[plural] = 2
    points = sweep(4, machines, parallel=3)
    submit(points)
    assert cluster.created.count(plural) == 4 and max(one_ends) == 2
    assert sum(kind == plural for kind, _ in cluster.objects) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "waits for room" in line]
    assert told and all("exceeded quota: team" in line for line in told)


def test_without_parallel_a_quota_that_is_full_ends_the_command_and_what_is_sent_is_known(cluster):
    cluster.quotas["jobsets"] = 2
    with pytest.raises(RuntimeError, match="exceeded quota: team.*Stop what runs, or ask for a larger quota"):
        submit(sweep(3))
    assert len(cluster.objects) == 2
    assert all("/sweep/" in workdir for workdir, _, _ in jobs.recall(f"{BUCKET}/sweep"))


def test_a_quota_that_is_full_at_the_start_is_waited_for_too(cluster, one_ends, monkeypatch):
    """The same command again goes on with a sweep that was cut while all its room was taken."""
    cluster.quotas["jobsets"] = 1
    points = sweep(2, parallel=1)
    submit(points[:1])
    gke.check(points)
    submit(points)
    assert cluster.created == ["jobsets"] * 2
    with pytest.raises(RuntimeError, match="exceeded quota"):
        gke.check(sweep(3)[2:])


# --- what is refused ---------------------------------------------------------------------------------------------


def test_a_quota_refuses_in_one_line_before_anything_is_made(cluster):
    quota = "exceeded quota: team, requested: count/jobsets.jobset.x-k8s.io=1, used: 4, limited: 4"
    cluster.refusals["jobsets"] = (403, f'jobsets.jobset.x-k8s.io "x" is forbidden: {quota}')
    workdir = f"{BUCKET}/runs/quota"
    said = refused(workdir, *TPU)
    assert f"{quota} (403). Stop what runs, or ask for a larger quota" in said
    assert not cluster.objects and not storage.path(workdir).exists()


def test_a_quota_of_pods_is_told_by_the_status(cluster, told):
    """Such a quota lets the set be made, and no pod of it."""
    workdir = f"{BUCKET}/runs/pods"
    launch(workdir, *TPU)
    name = made(workdir)["name"]
    cluster.pods.clear()
    for what, when in ((f"{name}-slice-0", "2026-01-01T00:00:02Z"), (name, "2026-01-01T00:00:01Z"), ("x", None)):
        metadata = {"name": f"{what}.1", "namespace": "default"}
        event = {"metadata": metadata, "involvedObject": {"name": what}, "message": f"exceeded quota: {what}"}
        cluster.events.append(event | {"lastTimestamp": when})
    assert told("status", workdir).endswith(f"restarted 0 time(s): exceeded quota: {name}-slice-0")


def test_refusals_say_what_to_mend(cluster, tmp_path, monkeypatch):
    from kubernetes.config import kube_config

    workdir = f"{BUCKET}/runs/refused"
    cluster.refusals["jobsets"] = (404, "the server could not find the requested resource")
    assert "(404). Has the cluster this namespace, and what runs a JobSet?" in refused(workdir, *TPU)
    cluster.refusals["jobsets"] = (403, 'User "me" cannot create resource "jobsets"')
    assert "(403). Ask for that right" in refused(workdir, *TPU)
    monkeypatch.setattr(kubernetes_emulator, "TOKEN", "another")
    assert "Unauthorized (401). Log in again: `gcloud auth login`" in refused(workdir, *TPU)
    assert "kubeconfig has no context theirs: --context is one of ours, away" in refused(
        workdir, *TPU, "--context=theirs"
    )
    assert "the API server of the cluster cannot be reached" in refused(workdir, *TPU, "--context=away")
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "nothing"))
    assert "run `gcloud container clusters get-credentials CLUSTER`" in refused(workdir, *TPU)


def test_what_was_started_is_asked_of_the_cluster_where_it_was(cluster, told):
    """Whichever is the current one now."""
    workdir = f"{BUCKET}/runs/there"
    launch(workdir, *TPU)
    from kubernetes.config import kube_config

    config = Path(kube_config.KUBE_CONFIG_DEFAULT_LOCATION)
    config.write_text(config.read_text().replace('"current-context": "ours"', '"current-context": "away"'))
    assert told("status", workdir).startswith("waits: 0 of 4")


def test_data_that_is_nowhere_is_refused_before_anything_is_made(cluster):
    workdir = f"{BUCKET}/runs/no-data"
    said = refused(workdir, *TPU, "--config.data.name=text8", "--config.data.tokenizer=sotu_bpe_512")
    assert said.startswith("launch: a new machine has no text8 in ")
    assert not cluster.objects and not storage.path(workdir).exists()
