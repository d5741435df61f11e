"""Distillation is training with a teacher: the same loop, the same guarantees, and a student that starts as its teacher."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from command_line import error_of
from orbax.checkpoint.experimental import v1 as ocp
from toy import network, perturbed, run_config, train_only

from flowlm.data.tokenizers import shipped
from flowlm.engine import build as assembly
from flowlm.engine import state as train_state
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.evaluation.results import Evaluation, compare
from flowlm.objectives.base import Family
from flowlm.runs import directory as run_directory
from flowlm.runs import trained
from flowlm.runs.metrics import read_metrics

STEPS = 4


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, data_dir):
    """The directory of a flow trained for a few steps."""
    workdir = tmp_path_factory.mktemp("teacher")
    train_only(run_config(data_dir, **{"model.input": "both", "steps": 4, "optimizer.learning_rate": 1e-2}), workdir)
    return workdir


@pytest.fixture
def student(data_dir, teacher, tmp_path):
    """student(name, **changes): the directory of a distillation of a few steps, every one of which is saved."""

    def run(name, **changes):
        changes = {"steps": STEPS, "checkpoint.every": 1, "teacher": str(teacher)} | changes
        train_only(run_config(data_dir, "flow_map", **changes), tmp_path / name)
        return tmp_path / name

    return run


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, data_dir, teacher):
    """The directory of a student with nothing changed, which several tests compare theirs with."""
    workdir = tmp_path_factory.mktemp("distilled")
    changes = {"steps": STEPS, "checkpoint.every": 1, "teacher": str(teacher)}
    train_only(run_config(data_dir, "flow_map", **changes), workdir)
    return workdir


def losses(workdir):
    return np.array([line["loss"] for line in read_metrics(workdir) if "loss" in line])


def saved(workdir, step=STEPS):
    return ocp.load(workdir / "checkpoints" / str(step))


# --- the student starts as its teacher ---------------------------------------------------------------------------


@pytest.mark.parametrize("preview", [False, True])
def test_step_zero_is_the_teacher(teacher, data_dir, preview):
    """The same logits to the last bit, whatever the second time; and training would move what was zero."""
    config = run_config(data_dir, "flow_map", **{"teacher": str(teacher), "model.preview": preview})
    layout = Layout(make_mesh(data=1))
    student = assembly.build(config, 99)
    params = trained.load_teacher(config, shipped("grammar98"), student, layout).flow
    run = trained.load_trained(teacher, layout)
    theirs = run.experiment.net
    z = jax.random.normal(jax.random.key(0), (4, 19, 32)) @ jnp.diag(jnp.linspace(0.1, 1, 32))
    tau = jnp.array([0.0, 0.3, 0.6, 0.9])
    expected = theirs.unembed(run.params, theirs.apply(run.params, z, tau))
    assert float(jnp.std(expected)) > 1e-3
    for end in (tau, jnp.ones(4)):
        ours = student.net.unembed(params, student.net.apply(params, z, tau, end))
        np.testing.assert_array_equal(ours, expected)

    def at(params, end):
        return student.net.apply(params, z, tau, end)

    moved = perturbed(params, 0.1)
    assert float(jnp.abs(at(moved, jnp.ones(4)) - at(moved, tau)).max()) > 1e-3


def test_the_teacher_stays_out_of_the_checkpoint(student, distilled, teacher):
    """It keeps no more than a student without one, and the embedding stays the teacher's to the last bit."""
    state = saved(distilled)
    workdir = student("alone", teacher=None)
    first, alone = saved(workdir, 1), saved(workdir)
    assert jax.tree.structure(state) == jax.tree.structure(alone)
    theirs = saved(teacher, 4)["ema"]["embedding"]
    np.testing.assert_array_equal(state["params"]["embedding"], theirs)
    # Without a teacher there is none to keep.
    assert (alone["params"]["embedding"] != first["params"]["embedding"]).any()
    trained = saved(student("trained", **{"objective.train_embedding": True}))
    assert (trained["params"]["embedding"] != theirs).any()


# --- the same guarantees as for any run --------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["psd", pytest.param("lsd", marks=pytest.mark.slow)])
def test_microbatches_on_four_devices_distil_as_one(student, distilled, target):
    """The exact counts of diagonal rows hold in each of the two microbatches."""
    changes = {"objective.target": target}
    one = losses(distilled if target == "psd" else student("one", **changes))
    parts = losses(student("parts", **changes, **{"mesh.data": 4, "accumulation": 2}))
    np.testing.assert_allclose(parts, one, rtol=1e-5)


def test_resume_is_exact(student, distilled, tmp_path):
    assert "teacher" in (distilled / "config.json").read_text()
    shutil.copytree(distilled, tmp_path / "cut")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "cut/checkpoints" / str(step))
    ours, theirs = saved(student("cut")), saved(distilled)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    with pytest.raises(ValueError, match="teacher = .* there, None here"):
        student("cut", teacher=None)


def test_the_two_stages_of_the_two_network_map(student, teacher, data_dir, tmp_path):
    """The first stage starts at g = 0 and moves; the second needs it and starts at the flow; nothing else takes it as a teacher."""
    first = tmp_path / "first"
    train_only(
        run_config(data_dir, "residual", **{"steps": STEPS, "checkpoint.every": 1, "teacher": str(teacher)}), first
    )
    kernels = [
        saved(first, step)["params"]["unembed_kernel"] for step in (2, STEPS)
    ]  # the first step has a rate of zero
    assert 0 < np.abs(kernels[0]).max() < np.abs(kernels[1]).max() < 1e-2 * STEPS
    second = student("second", **{"teacher": str(first), "objective.target": "residual"})
    theirs = saved(teacher, 4)["ema"]
    ours = saved(second, 1)["params"]
    np.testing.assert_allclose(ours["unembed_kernel"], theirs["unembed_kernel"], atol=2e-3)  # one step away
    with pytest.raises(ValueError, match="is of the family 'residual'; here a flow is wanted"):
        student("third", teacher=str(first))
    with pytest.raises(ValueError, match="is of the family 'flow'; here a residual is wanted"):
        student("fourth", **{"objective.target": "residual"})
    with pytest.raises(ValueError, match="family residual follows a teacher"):
        train_only(run_config(data_dir, "residual"), tmp_path / "fifth")


def test_surgery_takes_the_conflict_out():
    """Of two losses pulling in opposite directions along x the second loses its pull, and keeps it along y."""

    class Pulls(Family):
        parts = ("first", "second")

        def draw(self, key, num):
            return {}

        def loss(self, net, params, aux, batch, key):
            ones = jnp.ones(batch["ids"].shape[0])
            return {"first": ones * params["x"], "second": ones * (params["y"] - 3 * params["x"])}, {}

    state = train_state.TrainState(jnp.int32(0), {"x": jnp.float32(0), "y": jnp.float32(0)}, None, None)
    state = state._replace(ema=state.params, opt_state=optax.sgd(1.0).init(state.params))

    def step(family):
        return train_state.make_step(
            None, family, optax.sgd(1.0), seed=0, ema_decay=0.9, accumulation=1, dropout=False
        )(state, jnp.zeros((2, 1), jnp.int32))[0].params

    assert step(Pulls()) == {"x": -1.0, "y": -1.0}
    plain = Pulls()
    plain.parts = ("loss",)
    assert step(plain) == {"x": 2.0, "y": -1.0}


def test_a_learned_weight_finds_the_loss():
    """exp(-w) L + w is least at w = log L, for every pair of times."""
    net = network(time_embeddings=2, loss_weight=True)
    tau_s, tau_t = jnp.array([0.1, 0.5, 0.9]), jnp.array([0.2, 0.9, 1.0])
    loss = jnp.array([0.1, 1.0, 5.0])
    params = net.init(jax.random.key(0))
    np.testing.assert_array_equal(net.weighted(params, loss, tau_s, tau_t), loss)  # w starts at zero
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: net.weighted(p, loss, tau_s, tau_t).sum())(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, 1000)
    np.testing.assert_allclose(net.weighted(params, loss, tau_s, tau_t), 1 + np.log(loss), rtol=1e-3)


# --- what can be wrong -------------------------------------------------------------------------------------------


WRONG = {
    ("objective.target=psdd",): r"unknown objective.target 'psdd': choose one of \['csd', .*'teacher_steps'\]",
    ("objective.targets_from=teacher",): "unknown objective.targets_from 'teacher'",
    ("objective.cut=middle",): "unknown objective.cut 'middle'",
    ("objective.pairs=diff",): "unknown objective.pairs 'diff'",
    ("objective.teacher_temperature=0.0",): "teacher_temperature must be above 0, got 0.0",
    (
        "objective.teacher_temperature=0.5",
        "teacher=",
    ): "teacher_temperature sharpens a frozen flow: it needs --config.teacher",
    ("objective.noise_scale=0.0",): r"objective.noise_scale must be in \(0, 1\], got 0.0",
    ("objective.diagonal=1.5",): r"objective.diagonal must be in \[0, 1\), got 1.5",
    ("objective.diagonal=0.99",): "must be a fraction below 1",
    ("objective.diagonal=0.37",): "must be a fraction below 1 .* such as 3/8",
    ("objective.boundary=-0.1",): r"objective.boundary must be in \[0, 1\], got -0.1",
    ("objective.target=esd_logit",): "esd_logit is singular at t = 1: set objective.tau_max below 1.*stable form, esd",
    ("objective.target=teacher_steps", "teacher="): "teacher_steps follows a teacher: give --config.teacher=RUNDIR",
    ("model.time_embeddings=1",): "a flow map reads two times: set model.time_embeddings to 2",
    ("model.input=posterior",): "model.input posterior does not show it at s = 0: use both",
    ("batch_size=17",): r"17 is not a multiple of accumulation 1 x 1 devices x groups of 2 rows \(objective.diagonal\)",
    ("teacher=/nowhere",): "/nowhere is not a run directory",
    ("model.width=64",): "is another network: model.width is 32 there, 64 here",
    ("time_warp=embedded",): "is another network: time_warp is 'ambient' there, 'embedded' here",
    ("prior=dirichlet", "model.input=raw"): "prior is 'gaussian' there, 'dirichlet' here.*model.input is 'both'",
    ("objective.gamma=2.0",): r"objective.gamma must be in \[0, 1\], got 2.0",
}


@pytest.mark.parametrize("changes", WRONG, ids=", ".join)
def test_settings(changes, teacher, data_dir, tmp_path, monkeypatch):
    """One clear error before anything is written."""
    monkeypatch.setattr("flowlm.training.Checkpoints", None)
    config = run_config(data_dir, "flow_map", teacher=str(teacher))
    for change in changes:
        key, _, text = change.partition("=")
        value = {"teacher": text or None}.get(key, text)
        for kind in (int, float):
            try:
                value = kind(text)
                break
            except ValueError:
                pass
        config.update_from_flattened_dict({key: value})
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        train_only(config, tmp_path / "run")
    assert re.search(WRONG[changes], str(error.value)), error.value
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_another_tokenizer(data_dir, teacher, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    (other / "tokenizer.json").unlink()
    shipped("sotu_letters_112").save(other / "tokenizer.json")
    config, _ = run_directory.load_workdir(other)
    config.model.vocab_size = shipped("sotu_letters_112").vocab_size
    (other / "config.json").write_text(config.to_json())
    with pytest.raises(ValueError):  # its checkpoint is not of that size either; whichever is found first
        train_only(run_config(data_dir, "flow_map", teacher=str(other)), tmp_path / "run")


def test_a_flow_has_no_teacher(data_dir, teacher, tmp_path):
    with pytest.raises(ValueError, match="family flow has none, flow_map, .*, uniform, .* do"):
        train_only(run_config(data_dir, teacher=str(teacher)), tmp_path / "run")


# --- side by side ------------------------------------------------------------------------------------------------


def test_compare_shows_every_sampler_of_every_run_once(tmp_path, capsys):
    """And the held-out rows, which are the same for both, in one last line."""
    held = {"samples/held_out/entropy": 3.25, "held_out/cross_entropy": 1.0}
    for name, value in (("flow", 1.125), ("flow_map", 2.375)):
        (tmp_path / name).mkdir()
        metrics = {f"samples/map@{n}/entropy": value * n for n in (1, 2)} | held
        texts = {"map@1": [f"{name} wrote this"], "map@2": ["and this"], "held_out": ["a king"]}
        Evaluation(3, metrics, texts).save(tmp_path / name)
    error = error_of("compare", f"--runs={tmp_path}/flow,{tmp_path}/nothing")
    assert f"{tmp_path}/nothing has no evaluation.json: run `flowlm evaluate" in error
    compare([str(tmp_path / "flow"), str(tmp_path / "flow_map")])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [line.split() for line in lines[3:10]] == [
        ["flow"],
        ["map@1", "1.125"],
        ["map@2", "2.250"],
        ["flow_map"],
        ["map@1", "2.375"],
        ["map@2", "4.750"],
        ["held", "out", "3.250"],
    ]
    assert [line for line in lines[10:] if line] == [
        *("flow map@1", "flow wrote this", "flow map@2", "and this"),
        *("held out", "a king"),
        *("flow_map map@1", "flow_map wrote this", "flow_map map@2", "and this"),
    ]
