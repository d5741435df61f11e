"""The algebra of sweeps by enumeration, the shipped ablations, and a sweep that was interrupted."""

import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import network, perturbed

from flowlm import training
from flowlm.engine.build import build
from flowlm.maths.interpolant import MIN_NOISE
from flowlm.maths.prior import Gaussian
from flowlm.maths.time_warp import TimeWarp
from flowlm.objectives.flow import Flow
from flowlm.runs.metrics import read_metrics
from flowlm.studies import study, sweeps
from flowlm.studies.carry_out import carry_out
from flowlm.studies.study import Study
from flowlm.studies.sweeps import chain, name, product, runs, sweep, zipped

ROOT = Path(__file__).parents[1]


# --- algebra -----------------------------------------------------------------------------------------------------


def test_algebra():
    a, b = sweep("a", (1, 2)), sweep("x.b", (3, 4, 5))
    assert a == [{"a": 1}, {"a": 2}]
    assert product(a, b) == [{"a": i, "x.b": j} for i in (1, 2) for j in (3, 4, 5)]
    assert product(a, b, [{"c": 0}]) == [{"a": i, "x.b": j, "c": 0} for i in (1, 2) for j in (3, 4, 5)]
    assert zipped(a, b[1:]) == [{"a": 1, "x.b": 4}, {"a": 2, "x.b": 5}]
    assert chain(a, b, a) == [*a, *b, *a]
    # Laws: chain is associative, product distributes over it from both sides, one empty point is product's unit.
    assert product(chain(a, b), [{"c": 0}]) == chain(product(a, [{"c": 0}]), product(b, [{"c": 0}]))
    assert product([{"c": 0}], chain(a, b)) == chain(product([{"c": 0}], a), product([{"c": 0}], b))
    assert product(a, [{}]) == product(a) == product([{}], a) == a
    assert product(a, []) == []


def test_what_cannot_be_joined():
    a = sweep("a", (1, 2))
    with pytest.raises(ValueError, match="a is set by two"):
        product(a, a)
    with pytest.raises(ValueError, match="a is set by two"):
        zipped(a, a)
    with pytest.raises(ValueError, match="sweeps of 2, 3 points cannot be zipped"):
        zipped(a, sweep("b", (1, 2, 3)))
    with pytest.raises(ValueError, match="two runs are called 'a=1'"):
        study.commands(Study(runs([*a, *a], "experiments/a.py"), ["entropy"]), Path("w"))


def test_points_become_runs():
    points = [{"objective.target": "psd", "teacher": None}, {"model.dims": (1, 2), "path": "a/b,c"}, {"lr": 1e-4}]
    assert [name(point) for point in points] == ["target=psd+teacher=none", "dims=_1_2_+path=a_b_c", "lr=0.0001"]
    made = runs(points, "experiments/a.py", {"steps": 7, "lr": 1.0}, "flow", (0, 3))
    assert [run.teacher for run in made] == [None, "flow", "flow"]
    assert [dict(run.settings) for run in made] == [
        {"steps": 7, "lr": 1.0, "objective.target": "psd", "teacher": None},
        {"steps": 7, "lr": 1.0, "model.dims": (1, 2), "path": "a/b,c"},
        {"steps": 7, "lr": 1e-4},
    ]
    lines = study.commands(Study([sweeps.Run("flow", "experiments/b.py", seeds=(0, 3)), *made], []), Path("w"))
    assert [line.rpartition("--workdir=")[2].strip("'") for line in lines] == [
        f"w/{run}/seed{seed}"
        for seed in (0, 3)
        for run in ("flow", "target=psd+teacher=none", "dims=_1_2_+path=a_b_c", "lr=0.0001")
    ]
    assert "--config.seed=3 --config.steps=7 --config.lr=0.0001 --config.teacher=w/flow/seed3 " in lines[-1]
    assert (
        lines[1].count("config.teacher") == 1 and " --config.teacher=None " in lines[1]
    )  # or its experiment wants one


# --- the shipped ablations ---------------------------------------------------------------------------------------

ABLATIONS, ONE_STEP = (runpy.run_path(str(ROOT / f"experiments/{name}.py")) for name in ("ablations", "one_step"))


@pytest.mark.parametrize(
    ("studies", "name"),
    [(ABLATIONS, name + size) for name in ABLATIONS["NAMES"] for size in ("", "_cpu")]
    + [(ONE_STEP, name) for name in ("lacks", "forms", "budget")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_shipped_studies_build(studies, name, monkeypatch):
    """Every point has real settings, and another experiment than every other point."""
    monkeypatch.chdir(ROOT)
    ours = studies["get_study"](name)
    seen, made = [], 0
    for run in ours.runs:
        path, _, argument = run.config.partition(":")
        config = runpy.run_path(path)["get_config"](argument)
        config.update_from_flattened_dict(run.settings)
        config.teacher = run.teacher or config.teacher or None
        experiment = build(config, config.model.vocab_size)
        for setting in run.sweep:
            config.objective.update(setting)
            seen.append(build(config, config.model.vocab_size).family)
        seen.append((experiment.family, config.to_json()))
        made += len(run.seeds)
    assert len(ours.runs) > 1 and len(set(map(str, seen))) == len(seen)
    # Every run's command line is of the same study as its teacher's.
    assert len(study.commands(ours, Path("/nowhere"))) == made


def test_an_unknown_ablation_is_named():
    with pytest.raises(
        ValueError,
        match=r"there are the ablations time_warp, .*, gamma, each also with _cpu, not 'warp'",
    ):
        ABLATIONS["get_study"]("warp")
    with pytest.raises(ValueError, match="there are the studies lacks, forms, budget, not 'all'"):
        ONE_STEP["get_study"]("all")


# --- what they need ----------------------------------------------------------------------------------------------


def test_without_a_warp_time_is_itself():
    warp, t = TimeWarp("gaussian", "identity", 99, 16), jnp.linspace(0, 1, 37)
    np.testing.assert_array_equal(warp.tau(t), t)
    np.testing.assert_array_equal(warp.t(t), t)
    np.testing.assert_array_equal(warp.dtau_dt(t), jnp.ones(37))


def test_the_velocity_loss_is_the_velocity_s(monkeypatch):
    """|b - (x1 - x0)|^2 written densely over the vocabulary, with any x0: it cancels."""
    net = network(warp="identity")
    params = perturbed(net.init(jax.random.key(0)))
    family = Flow(Gaussian(), TimeWarp("gaussian", "identity", 12, 16), loss_kind="velocity")
    ids = jax.random.randint(jax.random.key(1), (8, 6), 0, 12)
    batch = {"ids": ids, **family.draw(jax.random.key(2), 8)}
    t = batch["tau"]
    assert float(t.max()) < 1 - MIN_NOISE
    x0, x1, at = jax.random.normal(jax.random.key(3), (8, 6, 12)), jax.nn.one_hot(ids, 12), t[:, None, None]
    x = (1 - at) * x0 + at * x1
    z = family.noised(net.embedding(params), batch, t)
    denoised = jax.nn.softmax(net.unembed(params, net.apply(params, z, t)))
    velocity = (denoised - x) / (1 - at)
    expected = jnp.sum((velocity - (x1 - x0)) ** 2, -1).mean(-1)
    losses, _ = family.loss(net, params, None, batch, None)
    np.testing.assert_allclose(losses["velocity"], expected, rtol=2e-4)


# --- a sweep that was interrupted --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was(tmp_path, data_dir, monkeypatch):
    """One point is done, one was cut after a checkpoint, one was not begun; what is done is not done again."""
    monkeypatch.chdir(ROOT)
    common = {
        "model.width": 16,
        "model.blocks": 1,
        "model.heads": 2,
        "steps": 4,
        "batch_size": 8,
        "log_every": 1,
        "checkpoint.every": 2,
        "optimizer.schedule": "constant",
        "evaluation.steps": (1,),
        "evaluation.final_samples": 8,
        "evaluation.held_out": 8,
        "mesh.data": 1,
        "data.dir": str(data_dir),
    }
    points = sweep("optimizer.b2", (0.9, 0.99, 0.999))
    made = Study(runs(points, "experiments/grammar.py", common), ["grammatical"])
    carry_out(Study(made.runs[:1], made.metrics), tmp_path / "w", tmp_path / "r")
    first = tmp_path / "w/b2=0.9/seed0"
    stamp = (first / "metrics.jsonl").stat().st_mtime_ns
    assert len(study.commands(made, tmp_path / "w")) == 2

    cut = tmp_path / "w/b2=0.99/seed0"
    config = runpy.run_path("experiments/grammar.py")["get_config"]()
    config.update_from_flattened_dict({**common, "optimizer.b2": 0.99, "evaluation.every": 3})

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.evaluation.Evaluator, "__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            training.train(config, cut)
    assert not study.finished(cut)
    before = [line for line in read_metrics(cut) if "loss" in line]
    assert [line["step"] for line in before] == [1, 2]

    carry_out(made, tmp_path / "w", tmp_path / "r")
    assert (first / "metrics.jsonl").stat().st_mtime_ns == stamp
    after = [line for line in read_metrics(cut) if "loss" in line]
    assert after[:2] == before and [line["step"] for line in after] == [1, 2, 3, 4]
    lines = (tmp_path / "r/study.md").read_text().splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines[:6:2]] == [f"b2={b2}, euler" for b2 in (0.9, 0.99, 0.999)]
    assert json.loads((cut / "config.json").read_text())["optimizer"]["b2"] == 0.99
    assert study.commands(made, tmp_path / "w") == []
