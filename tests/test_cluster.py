"""A process finds the others, knows when there are none, and says for whom it waits."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flowlm.system import cluster

ROOT = Path(__file__).parents[1]
PATIENCE = 300  # seconds until a test gives up
# What `import kubernetes` does in a pod whose service account has no token: the same class by the same name, with the same words.
KUBERNETES = """
import types
class ConfigException(Exception): pass
def load_incluster_config(): raise ConfigException('Service token file does not exist.')
config = types.SimpleNamespace(load_incluster_config=load_incluster_config)
"""
JOIN = "from flowlm.system import cluster; cluster.NOTICE_SECONDS, cluster.START_SECONDS = 1, 3; cluster.join(False); import jax; "
JOIN += "print(jax.process_index(), 'of', jax.process_count())"


@pytest.fixture
def pod(tmp_path):
    """The environment of a pod where the package of Kubernetes is installed."""
    (tmp_path / "kubernetes.py").write_text(KUBERNETES)
    return {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "PYTHONPATH": f"{tmp_path}:{ROOT}"}


def slurm(index, number):
    """What SLURM tells a task of a step on this machine."""
    told = {"JOB_ID": "77", "STEP_NODELIST": "localhost", "NTASKS": number, "PROCID": index, "LOCALID": index}
    return {f"SLURM_{key}": str(value) for key, value in told.items()} | {"JAX_COORDINATOR_PORT": str(free_port())}


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def join(environment):
    here = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(
        [sys.executable, "-c", JOIN], env={"PYTHONPATH": str(ROOT), **os.environ, **environment}, **here
    )


def train(environment, workdir):
    command = [sys.executable, "-m", "flowlm", "train", "--config=experiments/test.py", f"--workdir={workdir}"]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=PATIENCE
    )


def test_a_pod_whose_cluster_cannot_be_asked_is_told_how_to_go_on(pod, tmp_path):
    done = train(pod, tmp_path / "run")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("flowlm: ")]
    assert (
        "(ConfigException: Service token file does not exist.): set JAX_NUM_PROCESSES=1 if this is the only process"
        in line
    )
    assert not (tmp_path / "run").exists()


def test_the_only_process_of_a_pod_looks_for_no_other(pod):
    out, err = join(pod | {"JAX_NUM_PROCESSES": "1"}).communicate(timeout=PATIENCE)
    assert out == "0 of 1\n", err


def test_processes_that_are_told_who_is_who_ask_no_cluster(pod):
    told = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    both = [join(pod | told | {"JAX_PROCESS_ID": str(index)}) for index in range(2)]
    ends = [process.communicate(timeout=PATIENCE) for process in both]
    assert [out for out, _ in ends] == ["0 of 2\n", "1 of 2\n"], ends


@pytest.mark.parametrize(("index", "others"), [(0, "1, 2, 3"), (2, "0, 1, 3")])
def test_a_task_that_is_alone_says_for_whom_it_waits(index, others):
    """It says so while it waits, and ends with a line and not with JAX's abort."""
    environment = slurm(index, 4)
    process = join(environment)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and out == ""
    waits = f"flowlm: process {index} of 4 (SLURM_NTASKS=4) waits at localhost:{environment['JAX_COORDINATOR_PORT']} for {others}"
    told = [line for line in err.splitlines() if line.startswith("flowlm: ")]
    assert told == [
        f"{waits}, for up to 3 s",
        f"{waits}, and has waited for 3 s: start them, or set JAX_NUM_PROCESSES=1 if this is the only process",
    ]
    assert "stack trace" not in err


def test_one_process_in_a_step_of_many_tasks_can_be_alone():
    out, err = join(slurm(0, 4) | {"JAX_NUM_PROCESSES": "1"}).communicate(timeout=PATIENCE)
    assert out == "0 of 1\n" and "waits" not in err


def test_the_only_process_is_not_one_of_several(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    with pytest.raises(ValueError, match="--distributed says that there are other processes, and JAX_NUM_PROCESSES=1"):
        cluster.join(True)
