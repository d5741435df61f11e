"""The discrete baselines in the one trainer: sharded, resumed, evaluated, and distilled in rounds."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from command_line import flowlm
from orbax.checkpoint.experimental import v1 as ocp
from toy import run_config, train_only

from flowlm.engine.sharding import Layout, make_mesh
from flowlm.runs.metrics import read_metrics
from flowlm.runs.trained import load_trained
from flowlm.training import train


def losses(workdir):
    return np.array([line["loss"] for line in read_metrics(workdir) if "loss" in line])


@pytest.mark.parametrize(
    "family",
    [pytest.param("autoregressive", marks=pytest.mark.slow), "masked", pytest.param("uniform", marks=pytest.mark.slow)],
)
def test_microbatches_on_four_devices_train_as_one(family, data_dir, tmp_path):
    """The uniform one through its curriculum and out of it."""
    changes = {"objective.curriculum_steps": 3, "objective.curriculum_temperature": 0.3} if family == "uniform" else {}
    for name, mesh, accumulation in (("one", 1, 1), ("parts", 4, 2)):
        config = run_config(data_dir, family, **changes, **{"mesh.data": mesh, "accumulation": accumulation})
        train_only(config, tmp_path / name)
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "one"), rtol=2e-5)


@pytest.mark.parametrize("family", ["masked", pytest.param("uniform", marks=pytest.mark.slow)])
def test_rounds_of_distillation_resume_exactly(family, data_dir, tmp_path):
    """The second round's teacher is the first one's student, its jump twice as long; cut in its middle it changes no bit."""
    train_only(run_config(data_dir, family, steps=4), tmp_path / "teacher")
    settings = {"steps": 4, "checkpoint.every": 1}

    def round_(name, teacher, jump):
        changes = settings | {"teacher": str(tmp_path / teacher), "objective.jump": jump}
        train_only(run_config(data_dir, family, **changes), tmp_path / name)
        return jax.tree.map(np.asarray, ocp.load(tmp_path / name / "checkpoints" / "4"))

    round_("first", "teacher", 1 / 8)
    whole = round_("second", "first", 1 / 4)
    shutil.copytree(tmp_path / "second", tmp_path / "cut")
    for step in ("3", "4"):
        shutil.rmtree(tmp_path / "cut/checkpoints" / step)
    again = round_("cut", "first", 1 / 4)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        assert a.tobytes() == b.tobytes()
    other = "uniform" if family == "masked" else "masked"
    with pytest.raises(ValueError, match=f"is of the family '{family}': it cannot teach '{other}'"):
        train_only(run_config(data_dir, other, teacher=str(tmp_path / "teacher")), tmp_path / "x")


def test_a_run_is_evaluated_with_another_sampler(data_dir, tmp_path):
    """What is set on the command line reaches the sampler; the run keeps its own results."""
    train_only(run_config(data_dir, steps=2, **{"optimizer.warmup_steps": 1}), tmp_path / "run")
    (tmp_path / "run/evaluation.json").write_text(kept := '{"metrics": {}}')
    changes = "--objective=temperature=0.5,noise_scale=0.25,eta=1"
    told = flowlm(
        "evaluate", f"--checkpoint={tmp_path}/run", "--steps=2", "--num=8", changes, f"--results={tmp_path}/out"
    )
    assert told.status == 0, told.err
    metrics = json.loads((tmp_path / "out/evaluation.json").read_text())["metrics"]
    assert "samples/ancestral-temp0.5-noise0.25@2/entropy" in metrics
    assert (tmp_path / "run/evaluation.json").read_text() == kept
    for change, message in (
        ({"heat": 1}, "has no 'heat': it has eta, family"),
        ({"eta": "hot"}, "objective.eta cannot be 'hot'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_trained(tmp_path / "run", Layout(make_mesh(data=1)), change)


@pytest.mark.parametrize("family", ["autoregressive", "masked", "uniform"])
def test_an_evaluation_has_samples_and_a_bound(family, data_dir, tmp_path):
    train(run_config(data_dir, family), str(tmp_path / "run"))
    metrics = json.loads((tmp_path / "run/evaluation.json").read_text())["metrics"]
    name = "draws@18" if family == "autoregressive" else "ancestral@1"
    assert np.isfinite(metrics[f"samples/{name}/entropy"])
    bound = metrics["held_out/bound_nats_per_token"]
    assert 0.5 < bound < 2 * np.log(99)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("masked", {"model.mask_token": False}, "the family masked needs model.mask_token=True, but it is False"),
        ("autoregressive", {"model.causal": False}, "the family autoregressive needs model.causal=True"),
        ("uniform", {"model.input": "both"}, "the family uniform needs model.input='raw', but it is 'both'"),
        ("flow", {"model.mask_token": True}, "the family flow needs model.mask_token=False"),
        ("autoregressive", {"objective.start": 3}, "objective.start is 3, but the start token of 'grammar98' is 98"),
        ("masked", {"objective.jump": 0.0}, "objective.jump must be in (0, 1], got 0.0"),
        ("uniform", {"objective.divergence": "both"}, "unknown objective.divergence 'both'"),
        ("masked", {"objective.divergence": "both"}, "unknown objective.divergence 'both'"),
        ("uniform", {"time_warp": "embedded"}, "set prior to gaussian, time_warp to ambient"),
    ],
)
def test_bad_settings(family, changes, message, data_dir, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        train_only(run_config(data_dir, family, **changes), tmp_path / "run")
