"""The checkpoints in the repository load anywhere, their samples are worth what the tables say, and the tables are the runs'."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from flowlm.data.grammar import Grammar
from flowlm.engine.sampling import Sampler
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.evaluation.results import compare
from flowlm.judges.exact import GrammarJudge
from flowlm.judges.statistics import Statistics
from flowlm.runs.trained import load_trained
from flowlm.studies.study import load_study
from flowlm.studies.tables import write_tables

ROOT = Path(__file__).parents[1]
PUBLISHED = sorted(path for path in (ROOT / "checkpoints").iterdir() if path.is_dir())


def draw(name, sampler, steps, num):
    layout = Layout(make_mesh())
    run = load_trained(ROOT / "checkpoints" / name, layout)
    family = run.experiment.family.samplers()[sampler]
    return run, Sampler(run.experiment.net, family, layout)(run.params, jax.random.key(0), num, steps)


def test_they_are_small():
    size = sum(file.stat().st_size for path in PUBLISHED for file in path.rglob("*") if file.is_file())
    assert {path.name for path in PUBLISHED} == {
        "everyday",
        "everyday_map",
        "everyday_matched",
        "grammar_dcd",
        "grammar_fmlm",
        "grammar_matched",
    }
    assert size <= 12e6


@pytest.mark.parametrize(
    ("name", "sampler", "steps", "run"),
    [
        ("grammar_fmlm", "map-noise0.5", 1, "study/grammar/runs/flow_map/seed0"),
        ("grammar_dcd", "ancestral", 8, "study/grammar/runs/dcd_8_to8/seed0"),
        ("grammar_matched", "map", 1, "grammar_matched"),
    ],
)
def test_on_the_grammar_as_grammatical_as_told(name, sampler, steps, run):
    record = json.loads((ROOT / f"results/{run}.json").read_text())
    told = record["evaluations"][""]["metrics"] if "evaluations" in record else record["metrics"]
    run, ids = draw(name, sampler, steps, 1024)
    scores = GrammarJudge(Grammar.load("grammar98"), run.tokenizer.start).score(ids, [])
    expected = told[f"samples/{sampler}@{steps}/grammatical"]
    spread = np.hypot(scores["grammatical_stderr"], told[f"samples/{sampler}@{steps}/grammatical_stderr"])
    assert abs(scores["grammatical"] - expected) < 4 * spread


@pytest.mark.parametrize(("name", "steps"), [("everyday", 8), ("everyday_map", 1), ("everyday_matched", 1)])
def test_sentences_are_as_diverse_as_in_the_table(name, steps):
    told = json.loads((ROOT / f"results/{name}.json").read_text())["metrics"]
    run = load_trained(ROOT / "checkpoints" / name, Layout(make_mesh()))
    sampler = list(run.experiment.family.samplers())[-1]
    run, ids = draw(name, sampler, steps, 512)
    scores = Statistics(None, run.tokenizer.start, run.tokenizer.pad).score(ids, [])
    expected = {key: told[f"samples/{sampler}@{steps}/{key}"] for key in ("entropy", "distinct_rows")}
    assert scores["entropy"] == pytest.approx(expected["entropy"], abs=0.05)
    assert scores["distinct_rows"] >= expected["distinct_rows"] - 0.02  # of fewer rows fewer are alike


STUDIES = (
    {f"study/{name}": f"head_to_head.py:{name}" for name in ("grammar", "text", "tuning")}
    | {f"ablations/{name}": f"ablations.py:{name}_cpu" for name in ("time_warp", "input", "target", "teacher")}
    | {"one_step": "one_step.py:lacks"}
)


@pytest.mark.parametrize("place", STUDIES)
def test_the_tables_are_those_of_the_runs(place, tmp_path, monkeypatch):
    """What a command wrote, not a hand: each file again, from the evaluations that are kept."""
    monkeypatch.chdir(ROOT)
    write_tables(load_study(f"experiments/{STUDIES[place]}"), ROOT / "results" / place / "runs", tmp_path)
    written = [path for path in tmp_path.iterdir() if path.suffix in (".csv", ".md")]
    assert len(written) >= 3
    for path in written:
        assert path.read_text() == (ROOT / "results" / place / path.name).read_text(), path.name


def test_what_the_quickstart_shows_is_what_its_figures_print(tmp_path, monkeypatch, capsys):
    """The end of the screen, as results/everyday_screen.txt keeps it, within 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    for run, name in (("flow", "everyday"), ("flow_map", "everyday_map")):
        (tmp_path / run).mkdir()
        for kept, file in ((f"{name}.json", "evaluation.json"), (f"{name}.txt", "samples.txt")):
            shutil.copy(ROOT / "results" / kept, tmp_path / run / file)
    compare([str(tmp_path / "flow"), str(tmp_path / "flow_map")], samples=8)
    shown = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines()) + "\n"
    kept = ROOT / "results/everyday_screen.txt"
    assert max(map(len, shown.splitlines())) <= 80
    assert shown == kept.read_text()
