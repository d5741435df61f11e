"""A trained model as it is called from Python: what it writes, what it makes of texts, and what it says where it cannot."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import drawn, run_config

import flowlm
from flowlm.data.grammar import Grammar
from flowlm.data.tokenizers import numbers, shipped
from flowlm.engine import build as assembly
from flowlm.engine.sampling import Sampler
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.runs import directory as run_directory
from flowlm.runs import trained
from flowlm.runs.checkpoint import save_params
from flowlm.runs.model import Model

ROOT = Path(__file__).parents[1]
SMALL = {"model.blocks": 1, "model.width": 16, "model.heads": 2, "model.cond": 16, "model.learned_positions": True}
FAMILIES = {
    "flow": {"objective.temperature": 0.8},
    "flow_map": {"objective.noise_scale": 0.5, "objective.gamma": 0.5, "objective.temperature": 0.9},
    "masked": {},
    "uniform": {},
    "autoregressive": {},
}
STEPS = dict.fromkeys(FAMILIES, 2) | {"autoregressive": 18}


def make_run(directory, family, tokenizer="grammar98", **changes):
    """A run directory with parameters that no training made."""
    config = run_config("", family, **SMALL, **changes)
    tokenizer = numbers(config.model.vocab_size) if tokenizer is None else shipped(tokenizer)
    run_directory.prepare_workdir(directory, config, tokenizer, copied=True)
    net = assembly.build(config, config.model.vocab_size).net
    save_params(directory, drawn(net, scale=0.3), 5, jnp.float32)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{family: a model of untrained parameters}."""
    folder = tmp_path_factory.mktemp("models")
    return {family: flowlm.load(make_run(folder / family, family, **settings)) for family, settings in FAMILIES.items()}


# --- texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_it_writes_what_the_sampler_of_evaluations_draws(family, models):
    """The first of that sampler's 256 rows, from eleven rows of its own."""
    model, steps, run = models[family], STEPS[family], models[family].run
    name, last = list(run.experiment.family.samplers().items())[-1]
    wanted = Sampler(run.experiment.net, last, model.layout)(run.params, jax.random.key(7), 11, steps)
    assert len(np.unique(wanted, axis=0)) > 5
    drawn = model.draw(11, steps, seed=7)
    np.testing.assert_array_equal(drawn.ids, wanted)
    assert drawn.texts == [run.tokenizer.decode(row) for row in wanted]
    assert (drawn.sampler, drawn.steps, drawn.seed) == (name, steps, 7) and model.samplers[-1] == name
    np.testing.assert_array_equal(model.sample_ids(11, steps, 7, name), wanted)
    assert model.sample(11, steps, 7) == drawn.texts
    assert not np.array_equal(model.sample_ids(11, steps, seed=8), wanted)


@pytest.mark.parametrize(("devices", "num", "rows"), [(1, 8, 8), (1, 300, 256), (4, 6, 8), (4, 8, 8), (8, 1, 8)])
def test_as_many_rows_are_computed_as_are_asked_for(devices, num, rows, models, monkeypatch):
    """Rounded up to the devices; and the next call compiles nothing."""
    run = models["masked"].run
    computed, family = [], type(run.experiment.family)

    def sample(self, net, params, key, num, steps):
        computed.append(num)
        return jnp.zeros((num, net.length), jnp.int32)

    monkeypatch.setattr(family, "sample", sample)
    model = Model(run, Layout(make_mesh(data=devices)))
    for _ in range(2):
        assert model.sample_ids(num, 2).shape == (num, 19)
    assert computed == [rows]


def test_a_sampler_is_named_and_settings_are_replaced(models, tmp_path):
    run = make_run(tmp_path, "flow_map", **FAMILIES["flow_map"])
    model = flowlm.load(run, noise_scale=0.25, temperature=None)
    assert model.samplers == ("map", "map-noise0.25") and model.config.objective.temperature is None
    family = trained.load_trained(run, model.layout, {"noise_scale": 1.0, "temperature": None}).experiment.family
    plain = Sampler(model.run.experiment.net, family, model.layout)(model.run.params, jax.random.key(0), 4, 2)
    np.testing.assert_array_equal(model.sample_ids(4, 2, sampler="map"), plain)
    assert not np.array_equal(model.sample_ids(4, 2), plain)
    with pytest.raises(ValueError, match="no sampler 'mop': there are map, map-noise0.25; did you mean map"):
        model.sample(sampler="mop")
    with pytest.raises(ValueError, match="the objective of .* has no 'temprature': it has .*temperature"):
        flowlm.load(run, temprature=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num": 0}, "num must be a whole number, at least 1, got 0"),
        ({"num": 2.5}, "num must be a whole number, at least 1, got 2.5"),
        ({"steps": 0}, "steps must be a whole number, at least 1, got 0"),
        ({"seed": -1}, "seed must be a whole number, from 0 to 4294967295, got -1"),
        ({"seed": 2**32}, "seed must be a whole number, from 0 to 4294967295, got 4294967296"),
        ({"steps": 3}, "an autoregressive sample of 19 tokens takes 18 steps, got 3"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_named(arguments, message, models):
    with pytest.raises(ValueError, match=message):
        models["autoregressive"].sample(**{"steps": 18} | arguments)


# --- likelihood --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bound_is_the_familys(family, models):
    """Of texts, padded as the grammar's rows are, and of their rows of ids."""
    model = models[family]
    rows = Grammar.load("grammar98").sample(np.random.default_rng(0), 5)
    ids = np.concatenate([np.full((5, 1), 98, np.int32), rows], 1)
    texts = model.tokenizer.decode_batch(ids)
    assert len({len(text.split()) for text in texts}) > 1
    net, bound = model.run.experiment.net, model.run.experiment.family.bound
    key = jax.random.fold_in(jax.random.key(3), 0)
    wanted = jax.jit(lambda params: bound(net, params, {"ids": ids}, key))(model.run.params)
    for given in (texts, ids):
        np.testing.assert_allclose(model.log_prob_bound(given, seed=3), wanted, rtol=1e-5)


def test_an_autoregressive_bound_is_the_likelihood(tmp_path):
    """Over all rows the probabilities sum to 1."""
    small = {"model.vocab_size": 9, "data.length": 4, "objective.start": 0, "data.name": "none"}
    model = flowlm.load(make_run(tmp_path, "autoregressive", tokenizer=None, **small))
    every = np.array([(0, *rest) for rest in itertools.product(range(9), repeat=3)])
    nats = model.log_prob_bound(every)
    assert np.ptp(nats) > 1 and np.exp(-nats).sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["grammar_fmlm", "grammar_dcd"])
def test_on_the_grammar_the_bound_is_above_the_law(name):
    """E[bound] >= E[-log q] >= E[-log p] of rows from p; and a trained network is nearer to it than 30 nats."""
    grammar = Grammar.load("grammar98")
    rows = grammar.sample(np.random.default_rng(1), 64)
    model = flowlm.load(ROOT / "checkpoints" / name)
    excess = model.log_prob_bound(model.tokenizer.decode_batch(rows)) + grammar.log_prob(rows)
    stderr = excess.std() / len(excess) ** 0.5
    assert -2 * stderr < excess.mean() < 30


def test_texts_that_do_not_fit_a_row_are_named(models, tmp_path):
    bound = models["masked"].log_prob_bound
    fits, long = "a cat eats .", " ".join(["cat"] * 19)
    assert bound([fits]).shape == (1,)
    with pytest.raises(ValueError, match=r"texts\[1\], texts\[2\] of 19, 20 tokens: a row of this run has at most 18"):
        bound([fits, long, long + " ."])
    with pytest.raises(ValueError, match=r"\['a zebra eats .'\] has words outside the vocabulary"):
        bound([fits, "a zebra eats ."])
    with pytest.raises(ValueError, match=r"rows of ids have the shape \[num, 19\] and lie below 99, got \(2, 18\)"):
        bound(np.zeros((2, 18), int))
    for wrong in (fits, []):
        with pytest.raises(ValueError, match="texts is (one text: give a list of them|empty: give at least one)"):
            bound(wrong)
    # A sentence of this corpus is a row; the tokens behind it are those that its rows have there.
    everyday = {"data.name": "everyday", "data.tokenizer": "everyday_1000", "model.vocab_size": 1009, "data.length": 9}
    model = flowlm.load(make_run(tmp_path / "everyday", "masked", tokenizer="everyday_1000", **everyday))
    ids = [[model.tokenizer.start, *model.tokenizer.encode("I like it."), *[model.tokenizer.pad] * 4]]
    np.testing.assert_array_equal(model.log_prob_bound(["I like it."]), model.log_prob_bound(np.array(ids)))
    # Where texts are laid end to end a row is full of text.
    packed = {"data.name": "sotu", "data.tokenizer": "chars", "model.vocab_size": 28, "data.length": 9}
    bound = flowlm.load(make_run(tmp_path / "chars", "masked", tokenizer="chars", **packed)).log_prob_bound
    assert np.isfinite(bound(["eight ch"])).all()
    numbered = (
        r"texts\[0\], texts\[1\], texts\[2\], texts\[3\], texts\[4\] and 2 more of 7, 7, 7, 7, 7 tokens: .* exactly 8"
    )
    with pytest.raises(ValueError, match=numbered):
        bound(["seven c"] * 7)


def test_a_family_without_a_bound_is_named(tmp_path):
    """One by its kind, and one by its prior."""
    dirichlet = {"prior": "dirichlet", "objective.eta": 0.0}
    model = flowlm.load(make_run(tmp_path, "flow", **dirichlet))
    with pytest.raises(ValueError, match="no bound .* of the family 'flow' with the prior 'dirichlet'"):
        model.log_prob_bound(["a cat eats ."])
