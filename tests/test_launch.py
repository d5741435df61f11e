"""Jobs: what is asked for is what is sent, and on this machine they survive whatever happens to their processes."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from programs import Program
from toy import experiment_file, run_config, sweep_file, train_only

from flowlm.runs.metrics import read_metrics
from flowlm.studies import report
from launch import job as jobs
from launch import local, run, slurm

ROOT = Path(__file__).parents[1]
PATIENCE = 900  # seconds until a test gives up; on an idle machine none waits a tenth of it
START = ("--config=experiments/test.py", "--workdir=/tmp/run")


def launch(*arguments):
    return [sys.executable, "-m", "launch.run", *map(str, arguments)]


def wait_until(holds, process=None):
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert process is None or process.poll() is None, "ended before its time"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def python(workdir, program, **resources):
    """A job that is a few words of Python."""
    return Program("toy", program, (), str(workdir), local.Resources(**resources))


def submit(job):
    local.submit([job], lambda job, handle: jobs.remember("local", job, handle))


def handle_of(job):
    return jobs.recall(job.workdir)[0][2]


# --- this machine ------------------------------------------------------------------------------------------------


def test_two_processes_through_a_kill_and_a_stop(tmp_path, data_dir):
    """Killed, started again, stopped, started by hand, and at the end the losses of a run that nothing happened to."""
    changes = {"mesh.data": -1, "checkpoint.every": 4, "steps": 10**6}
    experiment = experiment_file(tmp_path / "experiment.py", data_dir, **changes)
    (tmp_path / "slow").touch()
    workdir = tmp_path / "run"
    start = launch(
        "--backend=local", f"--config={experiment}", f"--workdir={workdir}", "--processes=2", "--cpu_devices=1",
        "--max_restarts=1", f"--compile_cache={tmp_path}/cache",
    )  # fmt: skip

    def told(action):
        return subprocess.run(launch(action, f"--workdir={workdir}"), cwd=ROOT, text=True, capture_output=True)

    here = dict(cwd=ROOT, text=True, env=os.environ | {"PYTHONPATH": f"{ROOT}/tests"})
    supervisor = subprocess.Popen(start, **here, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        wait_until(lambda: len(read_metrics(workdir)) >= 6, supervisor)
        _, _, second = json.loads((workdir / "logs/job.json").read_text())["pids"]
        os.kill(second, signal.SIGKILL)
        wait_until(lambda: len(read_metrics(workdir)) >= 12, supervisor)
        assert told("status").stdout == "running\n"
        again = subprocess.run(start, **here, capture_output=True)
        assert again.returncode == 1 and f"a job is running in {workdir} already" in again.stderr
        assert told("stop").returncode == 0
        _, said = supervisor.communicate(timeout=PATIENCE)
    finally:
        supervisor.kill()
        supervisor.wait()
    assert supervisor.returncode == 0, said
    assert "flowlm-run failed: process 1 ended with -9" in said and "started again (1)" in said
    assert told("status").stdout == "stopped\n"
    stopped = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert f"told to stop: at step {stopped}" in told("logs").stdout

    (tmp_path / "slow").unlink()
    steps = stopped + 3
    last = subprocess.run([*start, f"--config.steps={steps}"], **here, capture_output=True)
    assert last.returncode == 0, last.stderr
    assert told("status").stdout == "ended\n"
    assert (tmp_path / "cache").is_dir() and list((tmp_path / "cache").iterdir())
    train_only(run_config(data_dir, **changes | {"mesh.data": 2, "steps": steps}), tmp_path / "uninterrupted")
    ours, theirs = ([(m["step"], m["loss"]) for m in read_metrics(w)] for w in (workdir, tmp_path / "uninterrupted"))
    assert [step for step, _ in ours] == list(range(1, steps + 1))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_started_again_as_often_as_asked(tmp_path):
    """All processes, each with its own number, by the same command."""
    program = "import os, sys; open(sys.argv[1], 'a').write('x'); sys.exit('flowlm: no luck')"
    job = python(
        tmp_path,
        program.replace("sys.argv[1]", f"'{tmp_path}/' + os.environ['JAX_PROCESS_ID']"),
        processes=2,
        max_restarts=2,
    )
    with pytest.raises(RuntimeError, match=r"toy failed: process \d ended with 1: flowlm: no luck"):
        submit(job)
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == "xxx"
    assert local.status(handle_of(job)).endswith("ended with 1: flowlm: no luck")
    assert local.logs(handle_of(job)).count("flowlm: no luck") == 6


def test_the_others_are_ended_when_one_has_failed(tmp_path):
    program = "import os, sys, time; sys.exit(3) if os.environ['JAX_PROCESS_ID'] == '1' else time.sleep(1000)"
    with pytest.raises(RuntimeError, match="process 1 ended with 3"):
        submit(python(tmp_path, program, processes=2, max_restarts=0))


def test_the_other_jobs_are_done_when_one_has_failed(tmp_path):
    good = python(tmp_path / "good", "print('well')")
    with pytest.raises(RuntimeError, match="bad failed") as error:
        bad = Program("bad", "raise SystemExit(1)", (), str(tmp_path / "bad"), local.Resources(max_restarts=0))
        local.submit([bad, good], lambda job, handle: jobs.remember("local", job, handle))
    assert "toy" not in str(error.value)
    assert local.status(handle_of(good)) == "ended" and "well" in local.logs(handle_of(good))


def test_processes_without_their_supervisor(tmp_path):
    """Still seen, still stopped."""
    code = (
        "from launch import job, local; from programs import Program;"
        f"j = Program('toy', 'import time; time.sleep(1000)', (), {str(tmp_path)!r}, local.Resources());"
        "local.submit([j], lambda j, h: job.remember('local', j, h))"
    )
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    supervisor = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | paths)
    wait_until((tmp_path / "logs/job.json").exists, supervisor)
    supervisor.kill()
    supervisor.wait()
    ((_, _, handle),) = jobs.recall(str(tmp_path))
    assert local.status(handle) == "running"
    local.stop(handle)
    wait_until(lambda: local.status(handle).startswith("lost"))


def test_what_a_dry_run_prints_is_what_would_be_run(tmp_path, capfd):
    """The very lines, in a shell, do what the job does."""
    program = "import os; print(os.environ['JAX_PROCESS_ID'], os.environ['A'], os.environ['CUDA_VISIBLE_DEVICES'])"
    job = Program("toy", program, (), str(tmp_path), local.Resources(processes=2, gpus=2), {"A": "a 'word'"})
    (tmp_path / "logs").mkdir()
    subprocess.run(["bash", "-c", local.describe([job])], check=True)
    assert (tmp_path / "logs/0.log").read_text() == "0 a 'word' 0,1\n"
    assert (tmp_path / "logs/1.log").read_text() == "1 a 'word' 2,3\n"


@pytest.mark.slow
def test_a_sweep_of_two_points(tmp_path, data_dir):
    """Both are run, a report has both, what is finished is not run again; a student waits for its teacher."""
    study = sweep_file(tmp_path, data_dir)
    here = dict(cwd=ROOT, text=True, env=os.environ | {"PYTHONPATH": f"{ROOT}/tests"}, capture_output=True)
    start = launch("--backend=local", f"--sweep={study}", f"--workdir={tmp_path}/sweep", "--cpu_devices=1")
    done = subprocess.run(start, **here)
    assert done.returncode == 0, done.stderr
    assert "when their teachers are finished, give the same command again for student-seed0" in done.stderr
    told = subprocess.run(launch("status", f"--workdir={tmp_path}/sweep"), **here).stdout
    assert told.splitlines() == [f"{tmp_path}/sweep/ema_decay=0.{n}/seed0: ended" for n in (5, 9)]
    found = {run.name: run.status for run in report.gather([str(tmp_path / "sweep")])}
    assert found == {"ema_decay=0.5/seed0": "finished", "ema_decay=0.9/seed0": "finished"}
    left = subprocess.run([*start, "--dry_run"], **here).stdout
    assert f"--config.teacher={tmp_path}/sweep/ema_decay=0.5/seed0" in left and "ema_decay=0.9" not in left


def test_a_job_has_an_experiment_and_flags_and_its_command_says_no_more(tmp_path):
    """launch.json keeps the command that was given to Python, whichever fields it was made of."""
    job = jobs.training_job("experiments/test.py", ["--config.steps=3"], str(tmp_path / "A run"), None, {})
    assert (job.name, job.config, job.flags) == ("flowlm-a-run", "experiments/test.py", ("--config.steps=3",))
    arguments = ["--config=experiments/test.py", "--config.steps=3", f"--workdir={tmp_path}/A run"]
    jobs.remember("local", job, {"pid": 1})
    kept = json.loads((tmp_path / "A run/launch.json").read_text())
    command = ["-m", "flowlm", "train", *arguments]
    assert kept == {"backend": "local", "name": "flowlm-a-run", "command": command, "handle": {"pid": 1}}
    assert jobs.settings(job).steps == 3


# --- what is sent to SLURM ---------------------------------------------------------------------------------------


def test_an_array_of_jobs(tmp_path):
    """One script; each of its elements has its own command, workdir and variables, quoted."""
    resources = slurm.Resources(nodes=2, tasks_per_node=1, gpus=4, partition="gpu", time="2:00:00", grace=300)
    points = [
        Program("toy", "print('it is')", (), str(tmp_path / f"point {i}"), resources, {"A": f"{i} $HOME"})
        for i in range(2)
    ]
    text = slurm.script(points)
    options = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"nodes=2", "gpus-per-node=4", "partition=gpu", "time=2:00:00", "array=0-1", "requeue"} <= set(options)
    assert "signal=B:USR1@300" in options and f"output={tmp_path}/logs/slurm-%a.log" in options
    show = 'printf "%s|" "$workdir" "$A" "$JAX_LOCAL_DEVICE_IDS" "${command[@]}"\n'
    head = text[: text.index("esac") + 5] + show
    for index in range(2):
        shown = subprocess.run(
            ["bash"], input=head, env={"SLURM_ARRAY_TASK_ID": str(index)}, text=True, capture_output=True
        )
        expected = [
            f"{tmp_path}/point {index}",
            f"{index} $HOME",
            "0,1,2,3",
            sys.executable,
            "-c",
            "print('it is')",
            "",
        ]
        assert shown.stdout.split("|") == expected


ODD = 'it\'s 50%j of "#1" & $HOME'  # the name of a folder


@pytest.mark.parametrize("points", [1, 2])
def test_sbatch_reads_odd_names_as_they_are(tmp_path, points):
    """A line of options is split as a shell would, the name of the log has no number of a job in it, nor any other."""
    resources = slurm.Resources(partition="big one", account="a#b")
    made = [Program("toy", "", (), str(tmp_path / ODD / f"{i}"), resources) for i in range(points)]
    lines = [line.removeprefix("#SBATCH ") for line in slurm.script(made).splitlines() if line.startswith("#SBATCH")]
    options = [shlex.split(line, comments=True) for line in lines]
    assert all(len(words) == 1 for words in options)
    log = f"{ODD}/0/logs/slurm.log" if points == 1 else f"{ODD}/logs/slurm-%a.log"
    assert [f"--output={tmp_path}/" + log.replace("%j", "%%j")] in options
    assert ["--partition=big one"] in options and ["--account=a#b"] in options


def test_what_follows_a_flag_after_a_blank_is_its_value(tmp_path, monkeypatch, capsys):
    """Of this command, of its backend, of flowlm train and of the experiment; a flag without one has none."""
    monkeypatch.chdir(ROOT)
    words = ["--dry_run", "--backend", "local", "--config", "experiments/test.py", "--workdir", f"{tmp_path}/a run"]
    words += ["--compile_cache", "/a cache", "--config.seed", "3", "--nodistributed", "--max_restarts", "0"]
    run.main(words)
    line = next(line for line in capsys.readouterr().out.splitlines() if "-m flowlm train" in line)
    sent = shlex.split(line)[3 : shlex.split(line).index(">>")]
    assert sent == [
        "train", "--config=experiments/test.py", "--compile_cache=/a cache", "--config.seed=3", "--nodistributed",
        f"--workdir={tmp_path}/a run",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match=r"max_restarts at least 0, got .*max_restarts=-1"):
        run.main([*words[:-1], "-1"])
    with pytest.raises(SystemExit, match="nothing was started there"):
        run.main(["status", "--workdir", str(tmp_path)])


@pytest.mark.parametrize("name", ["a[1]", "lr=1e-3,b=*?"])
def test_a_workdir_whose_name_reads_as_a_pattern_is_found_again(tmp_path, name):
    """The run itself, and a sweep's."""
    for workdir in (tmp_path / name, tmp_path / "sweep[2]" / name / "seed0"):
        jobs.remember("local", python(workdir, ""), {"logs": "here"})
        assert jobs.recall(str(workdir)) == [(str(workdir), "local", {"logs": "here"})]
    assert jobs.recall(str(tmp_path / "sweep[2]")) == [(str(workdir), "local", {"logs": "here"})]


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give --backend=NAME, one of local, slurm, tpu_vm"),
        (["--backend=local"], "give --config=experiments/NAME.py or --sweep=.*, and --workdir=DIR"),
        (
            ["--backend=local", "--config=experiments/gramar.py", "--workdir=/tmp/run"],
            "no experiment experiments/gramar.py",
        ),
        (["--backend=local", *START, "--config.stepz=3"], "experiments/test.py has no setting stepz: --config.steps=3"),
        (["--backend=local", *START, "--config.steps=many"], "steps.*many"),
        (["--backend=local", *START, "--nodes=2"], "--nodes is no flag of train"),
        (["--backend=local", *START, "--environment=A"], "--environment takes NAME=VALUE, got 'A'"),
        (["--backend=local", *START, "--processes=0"], "processes is at least 1"),
        (["--backend=local", *START, "--gpus=1", "--cpu_devices=1"], "cpu_devices or gpus, not both"),
        (["--backend=local", START[0], "--workdir=gs://bucket/run"], "gs://bucket/run must be a directory here"),
        (["--backend=slurm", *START, "--gpus=8", "--tasks_per_node=3"], "3 tasks a node cannot share 8 GPUs"),
        (["--backend=slurm", START[0], "--workdir=/tmp/a\\b"], "give another --workdir than '/tmp/a"),
        (["--backend=local", *START, "--noconfig.steps"], "steps"),
        (["--backend=local", *START, "--nosteps"], "--nosteps is no flag of train"),
        (["--backend=local", *START, "--proceses=2"], "--proceses is no flag of this backend, .* train: --processes=2"),
        (
            ["--backend=local", START[0], f"--workdir={__file__}"],
            "test_launch.py is a file, where a directory is wanted",
        ),
        (["--backend=locl"], "argument --backend: invalid choice: 'locl'"),
        (["strat"], "argument action: invalid choice: 'strat'"),
        (["status"], "status needs --workdir=DIR"),
        (["stop", "--workdir=/nowhere"], "/nowhere has no launch.json"),
    ],
)
def test_commands(arguments, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    dry = ["--dry_run"] if arguments and arguments[0].startswith("--") else []
    with pytest.raises(SystemExit, match=f"^launch: .*{expected}.*$") as ended:
        run.main([*arguments, *dry])
    assert "\n" not in ended.value.code
    assert not Path("/tmp/run").exists()


def test_slurm_that_is_not_here(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit, match="SLURM's sbatch is not here: run this on a login node"):
        run.main(["--backend=slurm", *START])
