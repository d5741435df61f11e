"""The training step: the same numbers on every mesh and in every number of microbatches."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint.experimental import v1 as ocp
from toy import run_config, train_only

from flowlm.data import open_dataset
from flowlm.engine.optimizers import update_ema
from flowlm.engine.sharding import Layout, global_rows, make_mesh
from flowlm.maths.time_sampling import stratified
from flowlm.runs.metrics import read_metrics

STEPS = 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    """trained(name, **changes): the directory of a run of five steps, every one of which is saved."""

    def run(name, **changes):
        workdir = tmp_path_factory.getbasetemp() / "training" / name
        train_only(run_config(data_dir, **{"steps": STEPS, "checkpoint.every": 1} | changes), workdir)
        return workdir

    return run


@pytest.fixture(scope="module")
def reference(trained):
    return trained("reference")


def losses(workdir):
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([line["loss"] for line in lines])


def saved(workdir, step):
    return ocp.load(workdir / "checkpoints" / str(step))


def assert_close(ours, theirs):
    """Every array to 1e-5 of its norm: Adam divides by gradients that may be all rounding."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= 1e-5 * np.linalg.norm(np.asarray(b))


# --- meshes and microbatches -------------------------------------------------------------------------------------


def test_eight_devices_train_as_one(trained, reference):
    workdir = trained("eight", **{"mesh.data": 8})
    np.testing.assert_allclose(losses(workdir), losses(reference), rtol=1e-5)
    assert_close(saved(workdir, STEPS)["params"], saved(reference, STEPS)["params"])
    # What eight devices began, all parameters cut over four and heads and vocabulary over two of them go on with, then one.
    trained("eight", **{"mesh.data": 4, "mesh.model": 2, "mesh.fsdp": True, "steps": STEPS + 1})
    trained("eight", **{"mesh.data": 1, "steps": STEPS + 2})
    longer = trained("longer", steps=STEPS + 2)
    np.testing.assert_allclose(losses(workdir), losses(longer), rtol=1e-5)


def test_accumulation_changes_only_rounding(trained, reference):
    workdir = trained("accumulated", steps=3, accumulation=4)
    np.testing.assert_allclose(losses(workdir), losses(reference)[:3], rtol=1e-5)
    assert_close(saved(workdir, 3)["params"], saved(reference, 3)["params"])


# --- the moving average ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [1, 5, 8, 20])
def test_share_of_the_initialisation_in_the_average(updates):
    """prod_{n<N} (1 + n) / (10 + n) = 9! N! / (N + 9)!, until the decay 0.5 is reached at n = 8."""
    ema = {"a": jnp.ones(3)}
    for n in range(updates):
        ema = update_ema(ema, {"a": jnp.zeros(3)}, jnp.int32(n), 0.5)
    warm = min(updates, 8)
    share = math.factorial(9) * math.factorial(warm) / math.factorial(warm + 9) * 0.5 ** (updates - warm)
    np.testing.assert_allclose(ema["a"], share, rtol=1e-5)


def test_a_run_averages_its_own_parameters(reference):
    """The recursion in float64 over the parameters that a run saved, from the first step to the last."""
    ema = jax.tree.map(np.float64, saved(reference, 1)["ema"])
    for step in range(2, STEPS + 1):
        state = saved(reference, step)
        d = min(0.999, step / (step + 9))  # the update to state k is number k - 1
        ema = jax.tree.map(lambda e, p, d=d: d * e + (1 - d) * np.float64(p), ema, state["params"])
        for ours, theirs in zip(jax.tree.leaves(state["ema"]), jax.tree.leaves(ema)):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-8)
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(ema), jax.tree.leaves(state["params"]))]
    assert max(moved) > 1e-4


# --- batches and times -------------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_seed_and_step(data_dir):
    """The same on every mesh, read in any order, over the end of an epoch too; every device holds its rows alone."""
    config = run_config(data_dir).data
    split = open_dataset(config.name, config.tokenizer, config.length, config.dir).train
    batch = 24
    last = len(split) // batch
    stream = split.shuffled(3)
    truth = {step: stream(step * batch, (step + 1) * batch) for step in (0, 1, last)}
    for step in (last, 0, 1):
        for devices in (1, 8):
            ids = global_rows(split.shuffled(3), step * batch, batch, split.length, Layout(make_mesh(data=devices)))
            np.testing.assert_array_equal(ids, truth[step])
            assert len(ids.addressable_shards) == devices
            for shard in ids.addressable_shards:
                assert shard.data.shape[0] == batch // devices
    assert (truth[0] != truth[1]).any()
    assert (split.shuffled(4)(0, batch) != truth[0]).any()


def test_stratified_times():
    """One in every stratum, anywhere in it; a row's stratum is uniform."""
    num = 64
    keys = jax.random.split(jax.random.key(0), 2000)
    tau = np.asarray(jax.vmap(lambda key: stratified(key, num))(keys))
    strata = np.floor(tau * num).astype(int)
    np.testing.assert_array_equal(np.sort(strata, 1), np.broadcast_to(np.arange(num), strata.shape))
    # Standard errors: 64 / sqrt(12) / sqrt(2000) = 0.41 of a stratum, 1 / sqrt(12) / sqrt(2000) = 0.0065 of a place in it.
    np.testing.assert_allclose(strata.mean(0), (num - 1) / 2, atol=2.1)
    np.testing.assert_allclose((tau * num - strata).mean(0), 0.5, atol=0.033)
    assert np.abs(np.corrcoef(strata[:, 0], strata[:, 1])[0, 1]) < 0.1
