"""`flowlm evaluate --follow`: checkpoints are judged beside their training, each once, and nothing of the training's is touched."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from command_line import error_of, flowlm
from orbax.checkpoint.experimental import v1 as ocp
from toy import experiment_file, run_config, train_only

from flowlm.evaluation import evaluator, following
from flowlm.evaluation.results import Evaluation
from flowlm.runs import directory as run_directory
from flowlm.runs.metrics import MetricWriter
from flowlm.runs.trained import load_trained
from flowlm.system import lock, processes

ROOT = Path(__file__).parents[1]
EVERY_STEP = {"checkpoint.every": 1, "evaluation.every": 0, "steps": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    """A run of four steps, each of which was saved, judged by nobody."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train_only(run_config(data_dir, **EVERY_STEP), workdir)
    return workdir


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def judged(monkeypatch):
    """[(step, parameters, samples)] of every evaluation; they cost nothing here, and each asks thrice whether to stop."""
    evaluations = []

    class Noting:
        def __init__(self, *given):
            pass

        def __call__(self, params, step, num_samples, final=False):
            evaluations.append((step, jax.tree.map(np.asarray, params), num_samples))
            for _ in range(3):
                processes.check_stopped()
            return Evaluation(step, {"samples/map@1/entropy": step / 3}, {"map@1": ["text"]})

    monkeypatch.setattr(evaluator, "Evaluator", Noting)
    return evaluations


def files(directory):
    """{name: (content, when it was changed)} of all files of a run but what following writes."""
    inside = (path for path in sorted(directory.rglob("*")) if path.is_file())
    inside = (path for path in inside if following.FOLDER not in path.relative_to(directory).parts)
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in inside}


def steps_in(run):
    return sorted(int(p.name) for p in (run / following.FOLDER).iterdir() if p.is_dir())


def test_each_checkpoint_is_judged_once_and_as_it_is(run, judged, data_dir):
    """The newest first, the last one not, because training judges that; the run's own files stay to the last bit."""
    before = files(run)
    ended = flowlm("evaluate", "--follow", run)
    assert ended.status == 0, ended.err
    assert [step for step, *_ in judged] == [3, 2, 1] and steps_in(run) == [1, 2, 3]
    assert f"{run} is finished and judged: 3 evaluations are new in {run / following.FOLDER}" in ended.out
    assert files(run) == before
    config, _ = run_directory.load_workdir(run)
    for step, params, num in judged:  # each is of that step's own average
        assert num == config.evaluation.samples
        saved = ocp.load(run / "checkpoints" / str(step))["ema"]
        jax.tree.map(np.testing.assert_array_equal, params, saved)
        found = json.loads((run / following.FOLDER / str(step) / "evaluation.json").read_text())
        assert found["step"] == step and found["metrics"] == {"samples/map@1/entropy": step / 3}
    assert "grammar98" in found["data"]


def test_checkpoints_that_come_while_it_waits_are_judged_and_those_that_vanish_are_not(run, judged, monkeypatch):
    """Training saves 1, removes it before it is read, saves 2 and 3, and finishes; 3, which it judged itself, is left alone."""
    later, checkpoints = run / "later", run / "checkpoints"
    checkpoints.rename(later)
    checkpoints.mkdir()
    with_metrics = MetricWriter(run, start=4)
    with_metrics.write(3, {"samples/euler@1/entropy": 1.0})
    with_metrics.close()
    saves = iter([[], ["1"], ["2", "3"], ["4"]])

    def sleep(seconds):
        assert seconds == following.POLL_SECONDS
        for step in next(saves):
            (later / step).rename(checkpoints / step)

    def load(directory, layout, objective, step):
        if step == 1:
            shutil.rmtree(checkpoints / "1")
        return load_trained(directory, layout, objective, step)

    monkeypatch.setattr(following, "time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr("flowlm.runs.trained.load_trained", load)
    ended = flowlm("evaluate", run, "--follow")
    assert ended.status == 0, ended.err
    assert [step for step, *_ in judged] == [2]
    judged.clear()
    assert "0 evaluations are new" in flowlm("evaluate", run, "--follow").out and not judged


def test_what_training_judges_itself_is_left_to_it(run, judged):
    settings = json.loads((run / "config.json").read_text())
    settings["evaluation"]["every"] = 2
    (run / "config.json").write_text(json.dumps(settings))
    assert flowlm("evaluate", run, "--follow").status == 0
    assert [step for step, *_ in judged] == [3, 1]


def test_a_checkpoint_that_cannot_be_read_is_named_and_left_out(run, judged, caplog):
    for path in (p for p in (run / "checkpoints/3").rglob("*") if p.is_file()):
        os.truncate(path, path.stat().st_size // 2)
    ended = flowlm("evaluate", run, "--follow")
    assert ended.status == 0 and [step for step, *_ in judged] == [2, 1]
    assert "step 3 is not judged: " in caplog.text
    assert (run / "checkpoints/3").exists()  # nothing of the run is moved


def test_two_do_not_follow_one_run(run, judged):
    place = run / following.FOLDER
    release = lock.take(place / "follow.lock")
    said = error_of("evaluate", run, "--follow")
    assert said.startswith(f"flowlm: {place} is being written by process {os.getpid()}") and said.endswith(
        "give another --results"
    )
    assert not judged
    release()


def test_a_stop_ends_it_between_two_and_the_same_command_goes_on(run, judged, monkeypatch):
    """And nothing is left half."""
    asked = []

    def stop_at_the_sixth():
        asked.append(len(judged))
        if len(asked) == 6:
            raise processes.Stopped

    monkeypatch.setattr(processes, "check_stopped", stop_at_the_sixth)
    with pytest.raises(processes.Stopped):
        flowlm("evaluate", run, "--follow")
    assert steps_in(run) == [3] and [step for step, *_ in judged] == [3, 2]
    assert not (run / following.FOLDER / "follow.lock").exists()
    judged.clear()
    assert flowlm("evaluate", run, "--follow").status == 0
    assert [step for step, *_ in judged] == [2, 1]


def test_what_cannot_be_followed_is_named(run, tmp_path):
    assert "is only read, and nobody trains it" in error_of("evaluate", ROOT / "checkpoints/grammar_fmlm", "--follow")
    assert "is not a run directory" in error_of("evaluate", tmp_path / "none", "--follow")
    shutil.rmtree(run / "checkpoints")
    (run / "params").mkdir()
    assert "holds parameters alone, which no training follows" in error_of("evaluate", run, "--follow")


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_a_follower_that_waits(run, signum):
    """With exit status 0, one line, and no lock left."""
    shutil.rmtree(run / "checkpoints")
    follower = started(run, run.parent / "log")
    wait_for(run / following.FOLDER / "follow.lock", follower)
    follower.send_signal(signum)
    assert follower.wait(60) == 0
    said = (run.parent / "log").read_text()
    assert (
        "told to stop: what is judged stays, and the same command judges the rest" in said and "Traceback" not in said
    )


def started(run, log, *flags):
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    line = [sys.executable, "-m", "flowlm", "evaluate", str(run), "--follow", *flags]
    return subprocess.Popen(line, cwd=ROOT, env=env, stdout=log.open("w"), stderr=subprocess.STDOUT)


def wait_for(path, process):
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None, "ended before its time"
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_is_followed_while_it_trains(tmp_path, data_dir):
    """By a process of its own: both end by themselves, each step was judged once, by one of them, and as it is judged alone."""
    (tmp_path / "slow").touch()  # so that the training lasts longer than a look at it
    changes = EVERY_STEP | {"steps": 40, "checkpoint.every": 10, "evaluation.every": 20}
    changes |= {"checkpoint.keep_latest": 100}
    experiment = experiment_file(tmp_path / "experiment.py", data_dir, evaluate=True, **changes)
    run = tmp_path / "run"
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    line = [sys.executable, "-m", "flowlm", "train", f"--config={experiment}", f"--workdir={run}"]
    training = subprocess.Popen(
        line, cwd=ROOT, env=env, stdout=(tmp_path / "train").open("w"), stderr=subprocess.STDOUT
    )
    try:
        wait_for(run / "config.json", training)
        follower = started(run, tmp_path / "log")
        assert training.wait(600) == 0, (tmp_path / "train").read_text()
        assert follower.wait(600) == 0, (tmp_path / "log").read_text()
    finally:
        training.kill()
        follower.kill()
    assert steps_in(run) == [10, 30]
    assert json.loads((run / "evaluation.json").read_text())["step"] == 40
    (run / "checkpoints").rename(run / "all")
    (run / "checkpoints").mkdir()
    (run / "all/10").rename(run / "checkpoints/10")
    ended = flowlm("evaluate", run, "--num=16", f"--results={tmp_path / 'alone'}")
    assert ended.status == 0, ended.err
    ours, alone = (
        json.loads((at / "evaluation.json").read_text()) for at in (run / following.FOLDER / "10", tmp_path / "alone")
    )
    assert ours["step"] == alone["step"] == 10 and ours["metrics"].keys() == alone["metrics"].keys()
    for name, value in alone["metrics"].items():
        if not name.endswith("seconds_per_100"):
            assert ours["metrics"][name] == pytest.approx(value, rel=1e-5), name
