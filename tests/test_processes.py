"""Several processes are one: the same losses and checkpoints, one step at which all stop, and none that waits for the dead."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint.experimental import v1 as ocp
from toy import experiment_file, run_config, train_only

from flowlm.engine import sharding
from flowlm.engine.build import abstract_state, build
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.runs import directory as run_directory
from flowlm.runs.metrics import read_metrics
from flowlm.system import processes
from flowlm.system.profiling import parse_steps
from flowlm.training import train

ROOT = Path(__file__).parents[1]
PATIENCE = 900  # seconds until a test gives up; on an idle machine none waits a tenth of it
ALL = {"mesh.data": -1, "checkpoint.every": 1}


@pytest.fixture
def start(tmp_path, data_dir):
    """start(workdir, processes, devices of each, *flags, **changes): a list of running processes, ended after the test."""
    running = []

    def run(workdir, number, devices, *flags, **changes):
        experiment = experiment_file(tmp_path / "experiment.py", data_dir, **changes)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        command = [
            sys.executable,
            "-m",
            "flowlm",
            "train",
            f"--config={experiment}",
            f"--workdir={workdir}",
            *flags,
        ]
        started = []
        for index in range(number):
            env = {
                "PYTHONPATH": f"{ROOT}:{ROOT}/tests",
                "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
            }
            if number > 1:
                env |= {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(number),
                    "JAX_PROCESS_ID": str(index),
                }
            log = (tmp_path / f"{workdir.name}.{index}.log").open("w")
            started.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | env, stdout=log, stderr=log))
        running.extend(started)
        return started

    yield run
    for process in running:
        process.kill()
        process.wait()


def ended(started):
    """Exit statuses, in order, of processes that end by themselves."""
    deadline = time.monotonic() + PATIENCE
    return [process.wait(max(1, deadline - time.monotonic())) for process in started]


def wait_for_steps(workdir, number, started):
    deadline = time.monotonic() + PATIENCE
    while len(read_metrics(workdir)) < number:
        assert all(process.poll() is None for process in started), "ended before its time"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def told(workdir, index=0):
    return (workdir.parent / f"{workdir.name}.{index}.log").read_text()


def losses(workdir):
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([line["loss"] for line in lines])


def noted(path):
    return [*map(int, path.read_text().split())]


def saved_steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


def assert_same_checkpoint(ours, theirs, step):
    """Parameters, average and optimizer state, as one device reads them: every array to 1e-5 of its norm."""
    config, _ = run_directory.load_workdir(ours)
    abstract = abstract_state(build(config, 99), Layout(make_mesh(data=1)))
    ours, theirs = (ocp.load(workdir / "checkpoints" / str(step), abstract) for workdir in (ours, theirs))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= 1e-5 * np.linalg.norm(np.asarray(b))


def test_two_processes_are_one(start, tmp_path, data_dir):
    """Losses, checkpoints, evaluation, of whose work each does half; and one writer of what all know."""
    two, one = tmp_path / "two", tmp_path / "one"
    (tmp_path / "count").touch()
    started = start(two, 2, 4, "--profile_steps=2:4", evaluate=True, steps=5, **ALL)
    train(run_config(data_dir, steps=5, **ALL), one)
    assert ended(started) == [0, 0], told(two) + told(two, 1)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    assert saved_steps(two) == saved_steps(one) == [1, 2, 3, 4, 5]
    assert_same_checkpoint(two, one, 2)
    assert_same_checkpoint(two, one, 5)
    ours, theirs = (json.loads((w / "evaluation.json").read_text())["metrics"] for w in (two, one))
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.startswith("held_out/"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, err_msg=name)
        elif not name.endswith("seconds_per_100"):
            assert ours[name] == theirs[name], name
    # Both try all judges on two rows. Then 16 rows of two samplers and three references go before three judges, once each.
    assert [noted(tmp_path / f"judged.{index}") for index in (0, 1)] == [[2, *[16] * 8], [2, *[16] * 7]]
    assert [noted(tmp_path / f"drawn.{index}") for index in (0, 1)] == [[128] * 2] * 2  # of 256 rows in a call
    assert (two / "samples.txt").read_text() == (one / "samples.txt").read_text()
    assert "in 2 processes" in told(two) and "Held-out nats / token" in told(two)
    assert "step" not in told(two, 1) and "nats" not in told(two, 1)
    assert "compiled anew" not in told(two) + told(two, 1)
    assert list((two / "profile").rglob("*.xplane.pb"))


def test_sigterm_in_one_process_stops_both_at_one_step(start, tmp_path, data_dir):
    """And one process goes on from there, as if nothing had been."""
    workdir = tmp_path / "run"
    endless = {"mesh.data": -1, "checkpoint.every": 10**6, "steps": 10**6}
    started = start(workdir, 2, 1, **endless)
    wait_for_steps(workdir, 3, started)
    started[1].send_signal(signal.SIGTERM)
    assert ended(started) == [0, 0], told(workdir) + told(workdir, 1)
    (step,) = saved_steps(workdir)
    assert f"told to stop: at step {step}" in told(workdir)
    assert not (workdir / "evaluation.json").exists()
    steps = {"mesh.data": 2, "checkpoint.every": 10**6, "steps": step + 3}
    train_only(run_config(data_dir, **steps), workdir)
    train_only(run_config(data_dir, **steps), tmp_path / "uninterrupted")
    np.testing.assert_allclose(losses(workdir), losses(tmp_path / "uninterrupted"), rtol=1e-5)
    assert_same_checkpoint(workdir, tmp_path / "uninterrupted", step + 3)


def test_sigterm_in_a_single_process(start, tmp_path):
    workdir = tmp_path / "run"
    started = start(workdir, 1, 1, **{"mesh.data": 1, "checkpoint.every": 10**6, "steps": 10**6})
    wait_for_steps(workdir, 3, started)
    started[0].send_signal(signal.SIGTERM)
    assert ended(started) == [0], told(workdir)
    (step,) = saved_steps(workdir)
    assert f"told to stop: at step {step}" in told(workdir)
    assert len(losses(workdir)) >= step - 1


def wait_for(path, started):
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert all(process.poll() is None for process in started), "ended before its time"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_evaluation_is_interrupted(start, tmp_path):
    """Killed in it, a run has the checkpoint that was due. Where that is not new it ends at once; else it saves, and ends."""
    seconds, judging = tmp_path / "judge_for", tmp_path / "judging"
    changes = {"mesh.data": 1, "checkpoint.every": 2, "evaluation.every": 2, "steps": 10**6}

    def run(workdir):
        judging.unlink(missing_ok=True)
        started = start(workdir, 1, 1, evaluate=True, **changes)
        wait_for(judging, started)
        return started

    seconds.write_text("600")
    killed, stopped = tmp_path / "killed", tmp_path / "stopped"
    started = run(killed)
    wait_for(killed / "checkpoints/2", started)
    started[0].kill()
    started[0].wait()

    started = run(killed)
    assert "from step 2 to" in told(killed)
    started[0].send_signal(signal.SIGHUP)
    assert ended(started) == [0], told(killed)
    assert re.findall("told to stop.*", told(killed)) == ["told to stop: the same command goes on from where it was"]
    assert saved_steps(killed) == [2] and "Traceback" not in told(killed)

    seconds.write_text("0.5")
    started = run(stopped)
    started[0].send_signal(signal.SIGINT)
    assert ended(started) == [0], told(stopped)
    assert "told to stop: at step 2" in told(stopped) and "Traceback" not in told(stopped)
    assert len(re.findall("^flowlm: interrupted", told(stopped), re.M)) == 1
    assert saved_steps(stopped) == [2]


# Asks whether to stop, as an evaluation does between its parts, and says at which asking it was.
_ASKS = """
import sys, time
from flowlm.system import processes
processes.start(True)
try:
    for number in range(10**6):
        processes.check_stopped()
        print(number, file=sys.stderr, flush=True)
        time.sleep(0.1)
except processes.Stopped:
    print("stopped at", number)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_processes_that_ask_inside_a_step_stop_at_one_place(signum, tmp_path):
    """Whichever of them was told."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    logs = [tmp_path / f"{index}.log" for index in range(2)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _ASKS],
            env=env | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )
        for index, log in enumerate(logs)
    ]
    try:
        deadline = time.monotonic() + PATIENCE
        while not all(re.search("^3$", log.read_text(), re.M) for log in logs):
            assert all(process.poll() is None for process in started), [log.read_text() for log in logs]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        started[1].send_signal(signum)
        said = [process.communicate(timeout=PATIENCE)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], [log.read_text() for log in logs]
    places = [re.search(r"^stopped at (\d+)$", text, re.M)[1] for text in said]
    assert places[0] == places[1]


@pytest.mark.slow
def test_kill_9_of_one_process_ends_the_other(start, tmp_path):
    """With an error. Then both start again; what is damaged, neither reads."""
    workdir = tmp_path / "run"
    started = start(workdir, 2, 1, **ALL | {"steps": 10**6, "checkpoint.keep_latest": 3})
    wait_for_steps(workdir, 4, started)
    started[1].kill()
    assert ended(started)[0] not in (0, None)
    assert "flowlm: " in told(workdir) or "another task died" in told(workdir)
    for partial in (p for p in (workdir / "checkpoints").iterdir() if not p.name.isdigit()):
        shutil.rmtree(partial)
    *_, before, newest = saved_steps(workdir)
    for path in (p for p in (workdir / "checkpoints" / str(newest)).rglob("*") if p.is_file()):
        os.truncate(path, path.stat().st_size // 2)
    started = start(workdir, 2, 1, **ALL | {"steps": newest + 1, "checkpoint.keep_latest": 3})
    assert ended(started) == [0, 0], told(workdir) + told(workdir, 1)
    assert f"from step {before} to {newest + 1}" in told(workdir)
    assert [p.name for p in (workdir / "unreadable_checkpoints").iterdir()] == [str(newest)]
    losses(workdir)  # each step stands once


# --- bad input, and what is said of steps ------------------------------------------------------------------------


def test_what_the_environment_says(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES is 'two': it must be a whole number"):
        processes.start(False)


@pytest.mark.parametrize("environment", [{}, {"JAX_NUM_PROCESSES": "2"}], ids=str)
def test_no_other_process_is_found(environment, tmp_path):
    command = [
        sys.executable,
        "-m",
        "flowlm",
        "train",
        "--config=experiments/test.py",
        f"--workdir={tmp_path}/run",
    ]
    command += [] if environment else ["--distributed"]
    process = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 1
    assert re.search(
        r"^flowlm: no cluster was found here .*set JAX_COORDINATOR_ADDRESS=HOST:PORT", process.stderr, re.M
    )
    assert not (tmp_path / "run").exists()


def test_a_mesh_that_leaves_a_process_idle(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"leaves processes \[1\] without one: let it take all 8 devices"):
        processes.check_mesh(jax.make_mesh((8,), ("data",)))


@pytest.mark.parametrize("text", ["5", "5:", "5:5", "7:5", "a:b", "-1:2"])
def test_bad_profile_steps(text):
    with pytest.raises(ValueError, match="--profile_steps takes the first step and the one after the last"):
        parse_steps(text)


def test_a_step_that_is_compiled_again_is_told(tmp_path, data_dir, monkeypatch, caplog):
    global_rows = sharding.global_rows

    def shorter(rows, start, batch_size, length, mesh):
        return global_rows(rows, start, batch_size // (2 if start >= 3 * batch_size else 1), length, mesh)

    with monkeypatch.context() as patch:
        patch.setattr(sharding, "global_rows", shorter)
        train_only(run_config(data_dir, steps=6), tmp_path / "run")
    assert [record.getMessage()[:6] for record in caplog.records if "compiled anew" in record.getMessage()] == [
        "step 3"
    ]
