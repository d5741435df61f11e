"""A real SLURM of two nodes on this machine (tests/slurm_cluster.sh): what is asked for happens, and what happens is told."""

import fcntl
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from programs import Program
from toy import experiment_file, run_config, sweep_file, train_only

from flowlm.runs.metrics import read_metrics
from flowlm.studies import report
from launch import job as jobs
from launch import slurm

pytestmark = pytest.mark.needs("slurm")
ROOT = Path(__file__).parents[1]
PATIENCE = 900  # seconds until a test gives up; on an idle machine none waits a tenth of it
# A run that has nothing left to do, as far as the script can see.
FINISHED = """
import json, os, sys
from pathlib import Path
here = Path({workdir!r})
here.mkdir(parents=True, exist_ok=True)
(here / "config.json").write_text(json.dumps(dict(steps=1)))
(here / "evaluation.json").write_text(json.dumps(dict(step=1)))
"""


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One at a time, whichever worker of pytest needs it."""
    script = ["bash", str(ROOT / "tests/slurm_cluster.sh")]
    with (
        (Path(tempfile.gettempdir()) / "flowlm-slurm.lock").open("w") as lock,
        tempfile.TemporaryDirectory() as directory,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.MonkeyPatch.context() as patch:
            try:
                started = subprocess.run([*script, "start", directory], stdout=subprocess.PIPE, text=True, check=True)
                patch.setenv("SLURM_CONF", started.stdout.strip())
                yield
            finally:
                subprocess.run(["scancel", "--user=root"], check=False)
                subprocess.run([*script, "stop", directory], check=True)


def python(workdir, program, **resources):
    return Program("toy", program, (), str(workdir), slurm.Resources(**resources))


def submit(*points):
    handles = []
    slurm.submit(points, lambda job, handle: handles.append(handle))
    return handles


def wait_until(holds, handle):
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, slurm.status(handle) + slurm.logs(handle)
        time.sleep(0.2)


def wait_for(state, handle):
    wait_until(lambda: slurm.status(handle).startswith(state), handle)


def test_two_nodes_through_a_time_limit_and_a_requeue(tmp_path, data_dir):
    """Warned as before its limit it saves and queues again; requeued in the middle it resumes; it ends as if nothing had been."""
    changes = {"mesh.data": -1, "checkpoint.every": 5, "steps": 60}
    experiment = experiment_file(tmp_path / "experiment.py", data_dir, **changes)
    (tmp_path / "slow").touch()
    workdir = tmp_path / "run"
    flags = "--xla_force_host_platform_device_count=1"
    start = [
        sys.executable, "-m", "launch.run", "--backend=slurm", f"--config={experiment}", f"--workdir={workdir}",
        "--nodes=2", "--time=30", f"--environment=PYTHONPATH={ROOT}/tests", f"--environment=XLA_FLAGS={flags}",
    ]  # fmt: skip
    # Whoever sends it reads the experiment too.
    subprocess.run(start, cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": f"{ROOT}/tests"})

    def told(action):
        return subprocess.run(
            [sys.executable, "-m", "launch.run", action, f"--workdir={workdir}"],
            cwd=ROOT,
            text=True,
            capture_output=True,
        )

    ((_, _, handle),) = jobs.recall(str(workdir))

    wait_until(lambda: len(read_metrics(workdir)) >= 7, handle)
    assert slurm.status(handle).startswith("RUNNING")
    subprocess.run(["scancel", "--batch", "--signal=USR1", handle["id"]], check=True)  # what --signal=B:USR1@... sends
    wait_until(lambda: "saved; back into the queue" in slurm.logs(handle), handle)
    (stopped,) = re.findall(r"told to stop: at step (\d+)", Path(handle["log"]).read_text(errors="replace"))

    def resumed():
        return [
            int(step)
            for step in re.findall(r"from step (\d+) to 60, in 2 proc", Path(handle["log"]).read_text(errors="replace"))
        ]

    wait_until(lambda: len(resumed()) == 2, handle)
    assert resumed() == [0, int(stopped)]
    assert (workdir / "checkpoints" / stopped).is_dir()

    wait_until(lambda: len(read_metrics(workdir)) >= int(stopped) + 8, handle)
    subprocess.run(["scontrol", "requeue", handle["id"]], check=True)
    wait_until(lambda: len(resumed()) == 3, handle)
    assert int(stopped) < resumed()[2] < 60
    (tmp_path / "slow").unlink()
    wait_for("COMPLETED", handle)
    assert told("status").stdout == "COMPLETED, started 3 time(s)\n"
    assert "0: " in told("logs").stdout

    train_only(run_config(data_dir, **changes | {"mesh.data": 2}), tmp_path / "uninterrupted")
    ours, theirs = ([(m["step"], m["loss"]) for m in read_metrics(w)] for w in (workdir, tmp_path / "uninterrupted"))
    assert [step for step, _ in ours] == list(range(1, 61))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_an_array_is_one_submission(tmp_path):
    points = [
        python(tmp_path / name, FINISHED.format(workdir=str(tmp_path / name)) + f"print('I am {name}')")
        for name in ("one", "two")
    ]
    slurm.check(points)
    handles = submit(*points)
    assert handles[0]["id"].partition("_")[0] == handles[1]["id"].partition("_")[0]
    for name, handle in zip(("one", "two"), handles):
        wait_for("COMPLETED", handle)
        assert f"I am {name}" in slurm.logs(handle)


@pytest.mark.parametrize("points", [1, 2])
def test_a_path_is_not_a_pattern(tmp_path, points):
    """Nor several words, nor a comment: what a job says is found where it was promised, beside a run of any name."""
    folder = tmp_path / "it's 50%j %a of 'a' #1 & $HOME"
    made = [
        python(folder / f"{i}", FINISHED.format(workdir=str(folder / f"{i}")) + f"print('I am {i}')")
        for i in range(points)
    ]
    slurm.check(made)
    for index, handle in enumerate(submit(*made)):
        wait_for("COMPLETED", handle)
        assert Path(handle["log"]).is_relative_to(folder) and f"I am {index}" in slurm.logs(handle)


def test_a_task_that_is_alone_says_for_whom_it_waits():
    """Four tasks of which one trains, as in an interactive step, where JAX counts the tasks; and two that both do."""
    program = (
        "from flowlm.system import cluster; cluster.NOTICE_SECONDS, cluster.START_SECONDS = {}; cluster.join(False); "
    )
    program += "import jax; print(jax.process_index(), 'of', jax.process_count())"
    only = 'if [ "$SLURM_PROCID" = 0 ]; then exec "$0" -c "$1"; fi'
    here = dict(cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)

    def step(tasks, line, seconds, **environment):
        command = ["srun", "--nodes=2", f"--ntasks={tasks}", "--overcommit", "bash", "-c", line, sys.executable]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
        return subprocess.run([*command, program.format(seconds)], env=environment, **here)

    told = step(4, only, (1, 3))
    waits = r"flowlm: process 0 of 4 \(SLURM_NTASKS=4\) waits at flowlm-node1:\d+ for 1, 2, 3"
    assert told.returncode != 0 and re.search(f"{waits}, for up to 3 s", told.stderr), told.stderr
    alone = step(4, only, (1, 3), JAX_NUM_PROCESSES="1")
    assert (alone.returncode, alone.stdout) == (0, "0 of 1\n"), alone.stderr
    both = step(2, 'exec "$0" -c "$1"', (PATIENCE, 2 * PATIENCE))
    assert sorted(both.stdout.splitlines()) == ["0 of 2", "1 of 2"], both.stderr


def test_a_sweep_is_an_array(tmp_path, data_dir):
    """Both of its points are run, and a report has both."""
    study = sweep_file(tmp_path, data_dir)
    start = [
        sys.executable, "-m", "launch.run", "--backend=slurm", f"--sweep={study}", f"--workdir={tmp_path}/sweep",
        "--time=30", f"--environment=PYTHONPATH={ROOT}/tests",
    ]  # fmt: skip
    subprocess.run(start, cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": f"{ROOT}/tests"})
    found = jobs.recall(str(tmp_path / "sweep"))
    assert len({handle["id"].partition("_")[0] for _, _, handle in found}) == 1 and len(found) == 2
    for _, _, handle in found:
        wait_for("COMPLETED", handle)
    told = {run.name: run.status for run in report.gather([str(tmp_path / "sweep")])}
    assert told == {"ema_decay=0.5/seed0": "finished", "ema_decay=0.9/seed0": "finished"}


def test_a_job_that_fails_tells_why(tmp_path):
    (handle,) = submit(python(tmp_path, "import sys; sys.exit('flowlm: no luck')"))
    wait_for("FAILED", handle)
    assert re.fullmatch(r"FAILED \(exit code 1:0\): .*flowlm: no luck", slurm.status(handle))
    assert "failed with exit status 1" in slurm.logs(handle)


def test_a_job_that_is_stopped_stays_stopped(tmp_path):
    """Though it ends well, as a run does that has saved."""
    program = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: sys.exit(0)); "
        "print('up', flush=True); time.sleep(1000)"
    )
    (handle,) = submit(python(tmp_path, program))
    wait_until(lambda: "up" in slurm.logs(handle), handle)
    slurm.stop(handle)
    wait_for("CANCELLED", handle)
    wait_until(lambda: "JobState=CANCELLED" in _shown(handle) and "EndTime=Unknown" not in _shown(handle), handle)
    time.sleep(2)  # for the script to do what it should not
    assert slurm.status(handle).startswith("CANCELLED")


def _shown(handle):
    return subprocess.run(
        ["scontrol", "show", "job", "--oneliner", handle["id"]], capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        (dict(partition="nowhere"), r"invalid partition specified: nowhere .*\(its partitions are main\)"),
        (dict(nodes=3), "Requested node configuration is not available"),
        (dict(gpus=1), r"Invalid generic resource \(gres\) specification"),
        (dict(time="soon"), "Invalid --time specification"),
    ],
    ids=str,
)
def test_bad_resources_are_refused_before_submission(resources, expected, tmp_path):
    def queued():
        return subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout

    before = queued()
    with pytest.raises(ValueError, match=f"SLURM would refuse this: {expected}"):
        slurm.check([python(tmp_path, "print()", **resources)])
    assert queued() == before and os.listdir(tmp_path) == []
