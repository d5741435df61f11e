"""A fresh run from another's weights: its averaged ones, to the last bit, and nothing else of it."""

import jax
import numpy as np
import pytest
from orbax.checkpoint.experimental import v1 as ocp
from toy import run_config, train_only

from flowlm.data.tokenizers import shipped
from flowlm.engine import build as assembly
from flowlm.engine import state as train_state
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.runs import trained
from flowlm.runs.metrics import read_metrics


@pytest.fixture(scope="module")
def origin(tmp_path_factory, data_dir):
    workdir = tmp_path_factory.mktemp("origin")
    train_only(run_config(data_dir, **{"model.input": "both", "steps": 3, "optimizer.learning_rate": 1e-2}), workdir)
    return workdir


def load(config):
    mesh, tokenizer = Layout(make_mesh(data=1)), shipped(config.data.tokenizer)
    experiment = assembly.build(config, tokenizer.vocab_size, tokenizer.start)
    return experiment, trained.load_origin(config, tokenizer, experiment, mesh)


def test_starts_at_the_others_averaged_weights(origin, data_dir, tmp_path):
    """Read from the first checkpoint of the fresh run, whose learning rate moves nothing but zeros, and those by 1e-30."""
    changes = {"model.input": "both", "init_from": str(origin), "seed": 5, "steps": 1, "checkpoint.every": 1}
    config = run_config(data_dir, **changes, **{"optimizer.learning_rate": 1e-30})
    train_only(config, tmp_path / "run")
    theirs, ours = ocp.load(origin / "checkpoints/3"), ocp.load(tmp_path / "run/checkpoints/1")
    live = jax.tree.leaves(theirs["params"])
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(theirs["ema"]), live, strict=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-30), ours["params"], theirs["ema"])
    # The average of equal numbers, but for its rounding.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7, atol=2e-30), ours["ema"], theirs["ema"])
    assert int(ours["step"]) == 1
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1]
    # It is a setting of the run: taken up again without it, the directory is another experiment's.
    del changes["init_from"]
    with pytest.raises(ValueError, match="init_from = .* there, None here"):
        train_only(run_config(data_dir, **changes, **{"optimizer.learning_rate": 1e-30}), tmp_path / "run")


def test_a_flow_map_starts_as_the_flow(origin, data_dir):
    """Without a teacher: what it has more is silent, whatever the second time is."""
    config = run_config(data_dir, "flow_map", init_from=str(origin))
    experiment, params = load(config)
    state = train_state.init_state(experiment.net, experiment.family, experiment.optimizer, 0, None, params)
    run = trained.load_trained(origin, Layout(make_mesh(data=1)))
    z = jax.random.normal(jax.random.key(0), (4, 19, 32))
    tau_s, tau_t = np.full(4, 0.3, np.float32), np.linspace(0.3, 1, 4, dtype=np.float32)
    np.testing.assert_array_equal(
        experiment.net.unembed(state.params, experiment.net.apply(state.params, z, tau_s, tau_t)),
        run.experiment.net.unembed(run.params, run.experiment.net.apply(run.params, z, tau_s)),
    )


REFUSED = {
    ("model.blocks", 3): "init_from .* is another network: .*blocks/.* does not fit",
    ("model.width", 64): "is another network: model.width is 32 there, 64 here",
    ("teacher", "x"): "give config.teacher or config.init_from, not both",
    ("init_from", "/nowhere"): "/nowhere is not a run directory",
}


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_what_does_not_fit_is_refused(key, value, origin, data_dir):
    family = "flow_map" if key == "teacher" else "flow"
    config = run_config(data_dir, family, **{"model.input": "both", "init_from": str(origin), key: value})
    with pytest.raises((ValueError, FileNotFoundError), match=REFUSED[key, value]):
        load(config)


def test_another_tokenizer_is_refused(origin, data_dir):
    config = run_config(data_dir, **{"model.input": "both", "init_from": str(origin)})
    config.data.tokenizer, config.model.vocab_size = "sotu_bpe_512", 512
    with pytest.raises(ValueError, match="has the tokenizer 'grammar98', not 'sotu_bpe_512'"):
        load(config)


def test_a_network_with_less_is_refused(origin, data_dir, tmp_path):
    """A flow cannot hold a flow map's second time embedding: said, not dropped."""
    train_only(run_config(data_dir, "flow_map", **{"init_from": str(origin), "steps": 1}), tmp_path)
    config = run_config(data_dir, **{"model.input": "both", "init_from": str(tmp_path)})
    with pytest.raises(ValueError, match=r"is another network: .*time_t.* does not fit"):
        load(config)
