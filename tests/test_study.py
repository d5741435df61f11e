"""A study is ordinary runs in order: what is done is left alone, and its table is their evaluations."""

import csv
import json
import os
import re
import runpy
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flowlm.engine.build import build
from flowlm.studies import carry_out as running
from flowlm.studies import study
from flowlm.studies.carry_out import carry_out
from flowlm.studies.matching import matched
from flowlm.studies.study import Run, Study
from flowlm.system import signals

ROOT = Path(__file__).parents[1]
RUNS = [
    Run("teacher", "experiments/a.py", {"steps": 7}),
    Run("student", "experiments/a.py:flow_map", {"objective.jump": 0.5}, "teacher", (0, 1)),
]


@pytest.fixture
def commands(monkeypatch):
    """Commands that would have been run; a run but for seed 9 of the teacher writes an evaluation whose numbers are known."""
    lines = []

    def run(self, line, log=None):
        lines.append(line)
        if log is not None:
            print(*sorted(os.sched_getaffinity(0)), file=log)
        if line[3] == "evaluate":
            place, heat = Path(line[-1].removeprefix("--results=")), float(line[5].rpartition("=")[2])
            place.mkdir(parents=True)
            metrics = {
                "samples/map-heat@4/entropy": 2 + heat,
                "samples/map-heat@4/nats": 5 * heat,
                "samples/map-heat@4/nats_stderr": 0.3,
                "samples/map-heat@4/seconds_per_100": 3.0,
            }
            (place / "evaluation.json").write_text(json.dumps({"step": 7, "metrics": metrics}))
            return True
        if "teacher/seed9" in line[-1]:
            return False
        workdir = Path(line[-1].removeprefix("--workdir="))
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(json.dumps({"steps": 7, "batch_size": 1_000_000}))
        (workdir / "versions.json").write_text(json.dumps({"git_commit": "abc"}))
        seed = int(re.search(r"config.seed=(\d)", " ".join(line))[1])
        metrics = {"samples/map@4/entropy": 2.0 + seed, "samples/map@4/entropy_stderr": 0.25}
        metrics |= {
            "samples/map@4/seconds_per_100": 3.0,
            "samples/held_out/entropy": 3.0,
            "held_out/bound_nats_per_token": 1.5,
        }
        if "teacher" in line[-1]:
            (workdir / "evaluation.json").touch()  # whoever reads it now finds a file half written
            time.sleep(0.3)
        (workdir / "evaluation.json").write_text(json.dumps({"step": 7, "metrics": metrics}))
        return True

    monkeypatch.setattr(running.Commands, "__call__", run)
    monkeypatch.setattr(running, "passes", lambda config: 3.0)
    return lines


def test_runs_in_order_and_only_what_is_left(commands, tmp_path):
    carry_out(Study(RUNS, ["entropy"]), tmp_path / "w", tmp_path / "r", ["--config.x=1"])
    assert [line[-1].split("/w/")[1] for line in commands] == ["teacher/seed0", "student/seed0", "student/seed1"]
    assert "--config.steps=7" in commands[0] and "--config.x=1" in commands[2]
    # Of seed 1 there is no teacher: the student learns from seed 0's.
    assert f"--config.teacher={tmp_path}/w/teacher/seed0" in commands[2]
    assert commands[2][3:5] == ["train", "--config=experiments/a.py:flow_map"]
    carry_out(Study(RUNS, ["entropy"]), tmp_path / "w", tmp_path / "r")
    assert len(commands) == 3
    # Evaluated in its middle only, a run is not done.
    path = tmp_path / "w/student/seed1/evaluation.json"
    path.write_text(path.read_text().replace('"step": 7', '"step": 4'))
    carry_out(Study(RUNS, ["entropy"]), tmp_path / "w", tmp_path / "r2")
    assert len(commands) == 4


# A run that tells the study to stop, and saves when it is told itself.
_SAVES = """
import os, pathlib, signal, sys
def save(number, frame):
    pathlib.Path(sys.argv[1]).touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
os.kill(os.getppid(), signal.SIGTERM)
signal.pause()
"""


@pytest.mark.parametrize("parallel", [1, 2])
def test_told_to_stop_it_lets_what_is_under_way_save_and_begins_nothing_else(tmp_path, monkeypatch, capfd, parallel):
    def line(config, flags, workdir):
        return [sys.executable, "-c", _SAVES, str(tmp_path / f"{workdir.parent.name}0")]

    monkeypatch.setattr(running, "command", line)
    monkeypatch.setattr(running, "shares_of_cores", lambda parallel: [os.sched_getaffinity(0)] * parallel)
    signals.listen()
    runs = [Run(name, "experiments/a.py") for name in "abc"]
    carry_out(Study(runs, ["entropy"]), tmp_path / "w", tmp_path / "r", parallel=parallel)
    begun = re.findall("== .*/([abc])/seed0", capfd.readouterr().err)
    assert 0 < len(begun) <= parallel
    # Whichever tells the study is certainly ready to save; the other may be stopped before it is.
    assert set() < {path.name for path in tmp_path.glob("[abc]0")} <= {f"{name}0" for name in begun}


def test_what_is_kept_is_done_wherever_it_was_run(commands, tmp_path):
    """On another machine only what is left is made, and a teacher again if a student that is left needs it."""
    carry_out(Study(RUNS, ["entropy"]), tmp_path / "w", tmp_path / "r")
    table = (tmp_path / "r/study.md").read_text()
    assert len(commands) == 3
    carry_out(Study(RUNS, ["entropy"]), tmp_path / "elsewhere", tmp_path / "r")
    assert len(commands) == 3 and (tmp_path / "r/study.md").read_text() == table
    more = [*RUNS, Run("late", "experiments/a.py", teacher="teacher")]
    left = [
        line.rpartition("/elsewhere/")[2]
        for line in study.commands(Study(more, []), tmp_path / "elsewhere", (), tmp_path / "r")
    ]
    assert left == ["late/seed0"]
    carry_out(Study(more, ["entropy"]), tmp_path / "elsewhere", tmp_path / "r")
    assert [line[-1].split("/elsewhere/")[1] for line in commands[3:]] == ["teacher/seed0", "late/seed0"]


def test_several_at_a_time_are_the_same_runs_on_cores_of_their_own(commands, tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core only")
    other = Run("other", "experiments/a.py", {"teacher_of": "{workdir}/teacher/seed0"}, needs=("teacher",))
    more = [*RUNS, other, Run("alone", "experiments/b.py")]
    carry_out(Study(more, ["entropy"]), tmp_path / "w", tmp_path / "r", parallel=2)
    # Whatever needs the teacher comes after it, and every run kept to one half of the cores.
    names = [line[-1].split("/w/")[1] for line in commands]
    assert set(names[:2]) == {"teacher/seed0", "alone/seed0"}
    assert set(names[2:]) == {"student/seed0", "student/seed1", "other/seed0"}
    logs = {path.stem: path.read_text().split() for path in (tmp_path / "w/logs").iterdir()}
    assert set(logs) == {name.replace("/", "-") for name in names}
    assert all(list(map(int, log)) in (cores[::2], cores[1::2]) for log in logs.values())
    assert sorted(os.sched_getaffinity(0)) == cores
    one = tmp_path / "one"
    carry_out(Study(more, ["entropy"]), tmp_path / "w", one)
    assert (one / "study.md").read_text() == (tmp_path / "r/study.md").read_text()
    with pytest.raises(ValueError, match=f"--parallel=99 runs need as many cores, and here are {len(cores)}"):
        carry_out(Study(more, ["entropy"]), tmp_path / "w2", tmp_path / "r2", parallel=99)


def test_the_table_is_the_evaluations(commands, tmp_path):
    carry_out(Study(RUNS, ["entropy", "grammatical"]), tmp_path / "w", tmp_path / "r")
    lines = (tmp_path / "r/study.md").read_text().splitlines()
    assert lines[0] == "| method | sampling steps | seeds | entropy | grammatical |"
    assert lines[2:] == [
        "| teacher, map | 4 | 1 | 2.000 ± 0.250 | - |",
        f"| student, map | 4 | 2 | 2.500 ± {np.sqrt(0.5):.3f} | - |",
        "| held_out |  | 1 | 3.000 | - |",
    ]
    with (tmp_path / "r/study.csv").open() as file:
        records = list(csv.DictReader(file))
    assert [(r["method"], r["seed"], r["sampling_steps"], r["entropy"]) for r in records][2] == (
        "student",
        "1",
        "4",
        "3.0",
    )
    assert [r["bound_nats_per_token"] for r in records] == ["1.5"] * 3 + [""]
    for name in ("study.png", "study_time.png"):
        assert (tmp_path / "r" / name).read_bytes()[:4] == b"\x89PNG"


def test_sweeps_are_matched_at_the_entropy_of_real_text(commands, tmp_path):
    """Half way between two settings that lie around it; beyond all of them the nearest, with its own entropy."""
    sweeps = {"near": (0.9, 0.5, 1.1), "far": (0.25, 0.5)}
    runs = [Run(name, "experiments/a.py", sweep=tuple({"heat": h} for h in heats)) for name, heats in sweeps.items()]
    carry_out(Study(runs, ["entropy"], ["nats"], (0.0, 0.5)), tmp_path / "w", tmp_path / "r")
    assert commands[1][3:6] == ["evaluate", f"--checkpoint={tmp_path}/w/near/seed0", "--objective=heat=0.9"]
    lines = (tmp_path / "r/study_matched.md").read_text().splitlines()
    assert lines[:4] == [
        "At entropy 3.000 nats, 0 below that of held-out rows.",
        "",
        "| nats | 4 |",
        "|---|---|",
    ]
    near, far = (re.fullmatch(r"(.*) ± ([0-9.]+)(.*)", line).groups() for line in lines[4:6])
    assert near[0] == "| near, map | 5.000" and near[2] == " |"
    assert float(near[1]) == pytest.approx(0.3 * np.sqrt(0.5), rel=0.1)
    assert far[0] == "| far, map | 2.500" and far[2] == " (at 2.50) |"
    assert float(far[1]) == pytest.approx(0.3, rel=0.1)
    assert lines[6] == "| held_out | - |"
    # Half a nat lower, one setting of the far method is just there: 2 + 0.5.
    assert lines[8] == "At entropy 2.500 nats, 0.5 below that of held-out rows."
    assert lines[12].startswith("| near, map | 2.500 ± ") and lines[13].startswith("| far, map | 2.500 ± ")
    assert lines[13].endswith(" |") and "(at" not in lines[12] + lines[13]
    # The other table is of the runs themselves.
    assert "heat" not in (tmp_path / "r/study.md").read_text()
    count = len(commands)
    carry_out(Study(runs, ["entropy"], ["nats"]), tmp_path / "w", tmp_path / "r")
    assert len(commands) == count == 7
    # With nothing to be matched each setting is a row of its own.
    carry_out(Study(runs[1:], ["entropy"]), tmp_path / "w", tmp_path / "r2")
    rows = [line.split("|")[1:5] for line in (tmp_path / "r2/study.md").read_text().splitlines()[2:-1]]
    assert [(row[0].strip(), row[3].split()[0]) for row in rows] == [
        ("far, map", "2.000"),
        ("far heat=0.25, map-heat", "2.250"),
        ("far heat=0.5, map-heat", "2.500"),
    ]


def test_a_setting_that_another_beats_is_left_out():
    """Two knobs: at the same entropy, or less of it, worse."""
    settings = {2.0: 1.0, 2.4: 3.9, 2.5: 2.0, 3.0: 4.0}
    rows = [{"entropy": entropy, "nats": nats, "other": entropy} for entropy, nats in settings.items()]
    records = [row | {"method": "m", "seed": 0, "sampler": "map", "sampling_steps": 4} for row in rows]

    def at(entropy):
        return [point.value for point in matched(records, ["nats", "other"], entropy)["m, map", 4]]

    assert at(2.5) == pytest.approx([2.0, 2.5])
    assert at(2.4) == pytest.approx([1.8, 2.4])
    assert at(2.75) == pytest.approx([3.0, 2.75])


def test_the_budget_of_a_student_has_its_teacher_s(commands, tmp_path):
    """7 steps of a million rows, three passes each: 21 million, and as many before them."""
    carry_out(Study(RUNS, ["entropy"]), tmp_path / "w", tmp_path / "r", [])
    lines = (tmp_path / "r/study_budget.md").read_text().splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells == [
        ["teacher", "7", "1000000", "3.0", "21.00", "21.00"],
        ["student", "7", "1000000", "3.0", "21.00", "42.00"],
    ]


def test_a_failing_run_is_named_and_the_others_are_done(commands, tmp_path):
    runs = [
        Run(name, "experiments/a.py", {}, teacher, (9,))
        for name, teacher in (("teacher", None), ("student", "teacher"))
    ]
    runs.append(Run("other", "experiments/a.py", seeds=(9,)))
    with pytest.raises(
        RuntimeError, match=r"these runs failed.*teacher/seed9, .*student/seed9 \(without its teacher\)$"
    ):
        carry_out(Study(runs, ["entropy"]), tmp_path / "w", tmp_path / "r")
    assert len(commands) == 2
    with pytest.raises(ValueError, match=r"the teacher 'x' of 'y' is no earlier run: there are \[\]"):
        carry_out(Study([Run("y", "experiments/a.py", teacher="x")], ["entropy"]), tmp_path / "w", tmp_path / "r")


def shipped(name, vocab, start):
    """{family: its steps over all runs} of a study of the repository, every run of which is built with its own settings.

    Rounds to one jump, `sdtt_16_to8`, are a family of their own, `sdtt_to8`.
    """
    steps = {}
    for run in runpy.run_path("experiments/head_to_head.py")["get_study"](name).runs:
        path, _, argument = run.config.partition(":")
        config = runpy.run_path(path)["get_config"](argument)
        config.update_from_flattened_dict(run.settings)
        config.teacher = run.teacher
        build(config, vocab, start)
        for setting in run.sweep:
            config.objective.update(setting)
            build(config, vocab, start)
        family = re.sub(r"_\d+", "", run.name, count=1) if run.teacher and run.name != "flow_map" else run.name
        steps[family] = steps.get(family, 0) + config.steps
    return steps


MATCHED = {"matched": 3000, "matched_masked": 2400, "matched_uniform": 2400}


@pytest.mark.parametrize(
    ("name", "training", "distillation", "vocab", "start"),
    [("grammar", 3600, 4500, 99, 98), ("text", 6000, 3000, 512, 0), ("text_gpu", 40_000, 15_000, 30_522, 101)],
)
def test_the_shipped_studies_build(name, training, distillation, vocab, start, monkeypatch):
    """The budgets are equal: so many steps from data, so many of distillation."""
    monkeypatch.chdir(ROOT)
    steps = shipped(name, vocab, start)
    assert {run: steps.pop(run) for run in [*steps] if run.startswith("matched")} == (
        MATCHED if name == "grammar" else {}
    )
    assert steps == dict.fromkeys(("autoregressive", "masked", "uniform", "flow"), training) | dict.fromkeys(
        ("flow_map", *(f"{a}{to}" for a in ("sdtt", "dcd") for to in ("", "_to32", "_to8"))), distillation
    )


@pytest.mark.parametrize(("name", "vocab"), [("tuning", 99), ("text_tuning", 512)])
def test_what_was_tried_beside_builds(name, vocab, monkeypatch):
    """Every setting is a real one, and all families are among them."""
    monkeypatch.chdir(ROOT)
    assert {"masked", "uniform", "flow", "sdtt", "dcd"} <= set(shipped(name, vocab, 0))


def test_two_real_runs(tmp_path, data_dir, monkeypatch):
    """A teacher and its student by the command itself."""
    monkeypatch.chdir(ROOT)
    tiny = [
        "model.width=16",
        "model.blocks=1",
        "model.heads=2",
        "steps=2",
        "batch_size=8",
        "log_every=1",
        "optimizer.schedule=constant",
        f"data.dir={data_dir}",
    ]
    tiny += ["evaluation.final_samples=8", "evaluation.held_out=8", "mesh.data=1"]
    steps = {"evaluation.steps": (1, 2)}
    judged = steps | {"objective.jump": 0.5, "evaluation.language_models": ("run:{workdir}/autoregressive/seed0",)}
    runs = [
        Run("autoregressive", "experiments/grammar.py:autoregressive"),
        Run("masked", "experiments/grammar.py:masked", steps),
        Run(
            "sdtt", "experiments/grammar.py:sdtt", judged, "masked", sweep=({"temperature": 0.5}, {"temperature": 1.0})
        ),
    ]
    study = Study(runs, ["grammatical"], ["seed0_nats_per_token"])
    carry_out(study, tmp_path / "w", tmp_path / "r", [f"--config.{flag}" for flag in tiny])
    lines = (tmp_path / "r/study.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "autoregressive, draws",
        *("masked, ancestral", "masked, ancestral", "sdtt, ancestral", "sdtt, ancestral"),
        *("unigram", "trigram", "held_out"),
    ]
    head, _, *rows = (tmp_path / "r/study_matched.md").read_text().splitlines()[2:]
    assert head == "| seed0 nats / token | 1 | 2 | 18 |"
    cells = {name: line for name, *line in (line[2:-2].split(" | ") for line in rows)}
    assert cells["masked, ancestral"] == ["-", "-", "-"]
    # The first run has no judge, but real text has its figure all the same.
    assert re.match(r"\d\.\d{3}", cells["held_out"][0])
    # A swept setting is sampled and judged alone; the run's own one gives the run's own figures.
    path = tmp_path / "w/sdtt/seed0"
    own, same = (
        json.loads((path / name / "evaluation.json").read_text())["metrics"] for name in ("", "sweep/temperature=1.0")
    )
    assert same.keys() == {key for key in own if key.startswith("samples/ancestral")}
    judged = [key for key in same if not key.endswith("seconds_per_100")]
    assert [same[key] for key in judged] == [own[key] for key in judged]
    assert re.match(r"\d\.\d{3}", cells["sdtt, ancestral"][1])
