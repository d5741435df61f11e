"""What kill -9 leaves of a run: it is killed at random moments, again and again, and ends with the parameters of one that was not.

    python tests/kills.py --kills=100 --processes=2 --workdir=DIR [--seed=0] [--steps=4000] [--results=FILE]

Both runs are `python -m launch.run --backend=local` at the tests' size. A kill comes a moment after a step drawn beforehand was
logged; every other one comes some seconds after a start if that is earlier, and so in imports, compilation and restoring too. It is
of one process or of all, as when the power fails. The seed draws steps, moments and processes; where the run then is depends on the
machine too, so the report says where each kill met it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp
from toy import experiment_file

from flowlm.engine.build import abstract_state, build
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.runs import directory as run_directory
from flowlm.runs.metrics import read_metrics

ROOT = Path(__file__).parents[1]
EVERY = 10  # steps between checkpoints
STARTING = 12.0  # seconds within which a kill after a start comes
MOMENT = 0.3  # seconds within which a kill comes after its step
TOLERANCE = {1: 0.0, 2: 1e-5}  # of the norm of an array, by the number of processes


class Kill(NamedTuple):
    """step: after it is logged. seconds: of the moment later; `starting` ones after a start. process: None for all of them."""

    step: int
    starting: bool
    seconds: float
    process: int | None


def drawn(kills, processes, seed, steps):
    """The kills, in order of their steps."""
    rng = np.random.default_rng(seed)
    out = []
    for step in sorted(rng.integers(1, steps * 9 // 10, kills).tolist()):
        process = int(rng.integers(processes)) if rng.random() < 0.75 else None
        starting = rng.random() < 0.5
        out.append(Kill(step, starting, rng.random() * (STARTING if starting else MOMENT), process))
    return out


def last_step(workdir, since=0.0):
    """The last step that was logged; -1 where none was, or none since that time."""
    path = workdir / "metrics.jsonl"
    if not path.exists() or path.stat().st_mtime < since:
        return -1
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        whole = file.read().split(b"\n")[:-1]
    return json.loads(whole[-1])["step"] if whole else -1


def processes_of(workdir):
    """The ids of a job's processes, those of its present start."""
    path = workdir / "logs/job.json"
    return json.loads(path.read_text())["pids"][1:] if path.exists() else []


def command(experiment, workdir, processes, restarts):
    flags = [f"--processes={processes}", "--cpu_devices=1", f"--max_restarts={restarts}"]
    cache = f"--compile_cache={experiment.parent}/cache"
    line = [sys.executable, "-m", "launch.run", "--backend=local", f"--config={experiment}", f"--workdir={workdir}"]
    return [*line, *flags, cache]


def carry_out(experiment, workdir, processes, kills):
    """Runs to the end through the kills; where each of them met the run, and how often it was started again."""
    met, before, begun = [], [], time.time()
    log = workdir.with_suffix(".log")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    line = command(experiment, workdir, processes, len(kills) + 3)
    left = list(kills)
    with log.open("w") as said:
        job = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=said)
        try:
            while job.poll() is None:
                time.sleep(0.01)
                if (now := processes_of(workdir)) != before:
                    before, begun = now, time.time()
                if not left or not now:
                    continue
                kill = left[0]
                early = kill.starting and time.time() - begun >= kill.seconds
                if not early and last_step(workdir, begun) < kill.step:
                    continue
                if not kill.starting:
                    time.sleep(kill.seconds)
                reached = last_step(workdir, begun)
                for pid in now if kill.process is None else [now[kill.process]]:
                    os.kill(pid, signal.SIGKILL)  # its supervisor has not waited for it, so the id is its own
                met.append(kill._asdict() | {"reached": reached})
                del left[0]
                while processes_of(workdir) == now and job.poll() is None:
                    time.sleep(0.01)
        finally:
            job.terminate()
            job.wait()
    told = log.read_text()
    assert job.returncode == 0, told
    return met, told.count("started again")


def state_of(workdir, step):
    """{name: array} of parameters, average and optimizer of a checkpoint, as one device reads them."""
    config, _ = run_directory.load_workdir(workdir)
    abstract = abstract_state(build(config, 99), Layout(make_mesh(data=1)))
    leaves, _ = jax.tree_util.tree_flatten_with_path(ocp.load(workdir / "checkpoints" / str(step), abstract))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def difference(ours, theirs):
    """The largest of all arrays, as a share of its norm; 0 where every bit is the same."""
    assert ours.keys() == theirs.keys()
    pairs = [
        (np.float64(ours[name]), np.float64(theirs[name]))
        for name in ours
        if ours[name].tobytes() != theirs[name].tobytes()
    ]
    return max((np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30) for a, b in pairs), default=0.0)


def study(workdir, kills, processes, seed, steps):
    """The report: what was drawn and met, and how far the end is from that of a run that nothing happened to."""
    workdir.mkdir(parents=True)
    settings = {"steps": steps, "mesh.data": -1, "checkpoint.every": EVERY, "checkpoint.keep_latest": 2}
    experiment = experiment_file(workdir / "experiment.py", workdir / "data", **settings)
    carry_out(experiment, workdir / "whole", processes, [])
    met, restarts = carry_out(experiment, workdir / "killed", processes, drawn(kills, processes, seed, steps))
    # A step that is evaluated has two lines, one of them without a loss.
    ours, theirs = ([line for line in read_metrics(workdir / name) if "loss" in line] for name in ("killed", "whole"))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, steps + 1))
    losses = [np.array([line["loss"] for line in lines]) for lines in (ours, theirs)]
    return {
        "seed": seed,
        "processes": processes,
        "steps": steps,
        "kills": len(met),
        "started_again": restarts,
        "difference": float(difference(*(state_of(workdir / name, steps) for name in ("killed", "whole")))),
        "difference_of_losses": float(np.max(np.abs(losses[0] - losses[1]) / np.abs(losses[1]))),
        "versions": json.loads((workdir / "killed/versions.json").read_text()),
        "met": met,
    }


def main():
    parser = argparse.ArgumentParser("tests/kills.py", usage=__doc__)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--processes", type=int, choices=sorted(TOLERANCE), default=1)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--results", type=Path)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *told: sys.exit("told to stop"))  # and to stop the job, as Ctrl-C does
    jax.config.update("jax_platforms", "cpu")
    report = study(asked.workdir.resolve(), asked.kills, asked.processes, asked.seed, asked.steps)
    if asked.results:
        asked.results.parent.mkdir(parents=True, exist_ok=True)
        asked.results.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({name: value for name, value in report.items() if name not in ("versions", "met")}))
    if report["kills"] < asked.kills:
        sys.exit(f"the run ended after {report['kills']} kills: give more --steps")
    if max(report["difference"], report["difference_of_losses"]) > TOLERANCE[asked.processes]:
        sys.exit("the run that was killed is another than the one that was not")


if __name__ == "__main__":
    main()
