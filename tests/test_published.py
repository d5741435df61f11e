"""The checkpoints in the repository load anywhere, their samples are worth what the tables say, and the tables are the runs'."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from flowlm.assembly import load_trained
from flowlm.data.grammar import Grammar
from flowlm.evaluation import Sampler, samplers
from flowlm.judges.grammar import GrammarJudge
from flowlm.judges.statistics import entropies
from flowlm.sharding import Layout, make_mesh
from flowlm.study import load
from flowlm.study_tables import write

ROOT = Path(__file__).parents[1]
PUBLISHED = sorted(path for path in (ROOT / "checkpoints").iterdir() if path.is_dir())


def draw(name, sampler, steps, num):
    layout = Layout(make_mesh())
    run = load_trained(ROOT / "checkpoints" / name, layout)
    family = samplers(run.experiment.family)[sampler]
    return run, Sampler(run.experiment.net, family, steps, layout)(run.params, jax.random.key(0), num)


def test_they_are_small():
    size = sum(file.stat().st_size for path in PUBLISHED for file in path.rglob("*") if file.is_file())
    assert {path.name for path in PUBLISHED} == {"flm", "fmlm", "grammar_dcd", "grammar_fmlm"}
    assert size <= 12e6


@pytest.mark.parametrize(
    ("name", "sampler", "steps", "run"),
    [("grammar_fmlm", "map-noise0.5", 1, "flow_map"), ("grammar_dcd", "ancestral", 8, "dcd_8_to8")],
)
def test_on_the_grammar_as_grammatical_as_in_the_study(name, sampler, steps, run):
    record = json.loads((ROOT / f"results/study/grammar/runs/{run}/seed0.json").read_text())
    told = record["evaluations"][""]["metrics"]
    run, ids = draw(name, sampler, steps, 1024)
    scores = GrammarJudge(Grammar.load("grammar98"), run.tokenizer.start).score(ids, [])
    expected = told[f"samples/{sampler}@{steps}/grammatical"]
    spread = np.hypot(scores["grammatical_stderr"], told[f"samples/{sampler}@{steps}/grammatical_stderr"])
    assert abs(scores["grammatical"] - expected) < 4 * spread


@pytest.mark.parametrize(("name", "sampler", "steps"), [("fmlm", "map-noise0.4", 1), ("flm", "euler", 8)])
def test_on_real_text_as_diverse_as_in_the_table(name, sampler, steps):
    file = {"fmlm": "quickstart_flow_map", "flm": "quickstart"}[name]
    told = json.loads((ROOT / f"results/{file}.json").read_text())["metrics"]
    _, ids = draw(name, sampler, steps, 256)
    assert np.mean(entropies(ids[:, 1:])) == pytest.approx(told[f"samples/{sampler}@{steps}/entropy"], abs=0.05)


STUDIES = {f"study/{name}": f"study.py:{name}" for name in ("grammar", "text", "tuning")} | {
    f"ablations/{name}": f"ablations.py:{name}_cpu" for name in ("time_warp", "input", "target", "teacher")
}


@pytest.mark.parametrize("place", STUDIES)
def test_the_tables_are_those_of_the_runs(place, tmp_path, monkeypatch):
    """What a command wrote, not a hand: each file again, from the evaluations that are kept."""
    monkeypatch.chdir(ROOT)
    write(load(f"experiments/{STUDIES[place]}"), ROOT / "results" / place / "runs", tmp_path)
    written = [path for path in tmp_path.iterdir() if path.suffix in (".csv", ".md")]
    assert len(written) >= 3
    for path in written:
        assert path.read_text() == (ROOT / "results" / place / path.name).read_text(), path.name
