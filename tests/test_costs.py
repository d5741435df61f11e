"""FLOPs in closed form, counted from a jaxpr, and counted by XLA where nothing is in a loop, agree; the roofline by hand."""

import runpy
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from flowlm.engine.flops import count_flops, network_evaluations
from flowlm.maths import vocab
from flowlm.maths.time_warp import TimeWarp
from flowlm.models import dit
from flowlm.objectives import make_family
from flowlm.objectives.base import Auxiliary
from flowlm.scale.costs import CHIPS, EFFICIENCY, Chip, forward_flops, roofline

SIZES = dict(width=128, blocks=3, cond=32)
VOCAB, LENGTH, BATCH = 384, 64, 2


@pytest.fixture
def net(monkeypatch):
    """Its blocks are not a loop, for XLA counts the body of a loop once."""
    scan = nn.scan
    monkeypatch.setattr(dit.nn, "scan", lambda *args, **kwargs: scan(*args, **{**kwargs, "unroll": SIZES["blocks"]}))
    return toy.network(vocab=VOCAB, length=LENGTH, **SIZES)


def closed_form(times):
    return forward_flops(**SIZES, time_embeddings=times, vocab=VOCAB, length=LENGTH) * BATCH * LENGTH


def forward(net, params, z, tau):
    return vocab.cross_entropy(net.head(params), net.apply(params, z, tau), jnp.zeros(z.shape[:2], jnp.int32)).sum()


def arguments(net):
    params = jax.eval_shape(net.init, jax.random.key(0))
    return params, jax.ShapeDtypeStruct((BATCH, LENGTH, SIZES["width"]), jnp.float32), jnp.zeros(BATCH)


def xla_flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def test_the_closed_form_is_xlas_count_of_an_unrolled_network(net):
    args = arguments(net)
    counted = xla_flops(lambda *a: forward(net, *a), *args)
    # XLA also counts what is no product: a softmax, norms and activations, here three in a hundred.
    assert closed_form(1) < counted < 1.06 * closed_form(1)
    # An error of one term of the form would be seen: each is more than that.
    assert min(
        4 * LENGTH * SIZES["width"] * SIZES["blocks"], 2 * SIZES["width"] * VOCAB
    ) * BATCH * LENGTH > 0.06 * closed_form(1)


def test_the_count_from_a_jaxpr_is_the_closed_form():
    for times in (0, 1, 2):
        net = toy.network(vocab=VOCAB, length=LENGTH, time_embeddings=times, **SIZES)
        args = arguments(net)
        assert count_flops(jax.make_jaxpr(lambda *a, net=net: forward(net, *a))(*args)) == closed_form(times)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_training_is_three_forward_passes_and_what_is_recomputed(remat):
    net = toy.network(vocab=VOCAB, length=LENGTH, remat=remat, time_embeddings=0, **SIZES)
    args = arguments(net)
    counted = count_flops(jax.make_jaxpr(jax.grad(lambda *a: forward(net, *a), argnums=(0, 1)))(*args))
    # All of a block but its last product, 8 D^2, whose result no gradient needs.
    blocks = (16 * SIZES["width"] ** 2 + 4 * LENGTH * SIZES["width"]) * SIZES["blocks"] * BATCH * LENGTH
    assert counted == 3 * closed_form(0) + (blocks if remat == "full" else 0)


def test_a_step_of_the_flow_counts_its_noise_too():
    """3 forward + 4 D^2 a token for the draw and its gradient, 4 V D^2 for the Gram matrix and its."""
    width = SIZES["width"]
    net, warp = toy.network(vocab=VOCAB, length=LENGTH, **SIZES), TimeWarp("gaussian", "ambient", VOCAB, width)
    fields = dict(loss="cross_entropy", eta=1.0, temperature=None, noise_scale=1.0, guidance=1.0)
    family = make_family("flow", warp, False, **fields)

    def loss(params, ids):
        batch = {"ids": ids, **family.draw(jax.random.key(0), BATCH)}
        return family.loss(net, params, Auxiliary(), batch, None)[0]["cross_entropy"].mean()

    ids = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    counted = count_flops(jax.make_jaxpr(jax.grad(loss))(arguments(net)[0], ids))
    noise = 4 * width**2 * BATCH * LENGTH + 4 * VOCAB * width**2
    # The time embedding's input is no parameter: one of its three passes is not made.
    spared = 2 * dit.SINUSOIDS * SIZES["cond"] * BATCH
    assert counted == 3 * closed_form(1) - spared + noise


def test_shards_kernels_and_branches():
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    a = jnp.ones((16, 8))
    sharded = jax.shard_map(lambda a: a @ a.T, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert count_flops(jax.make_jaxpr(sharded)(a)) == 8 * (2 * 2 * 2 * 8)

    def kernel(a_ref, b_ref, out_ref):
        out_ref[...] = jnp.dot(a_ref[...], b_ref[...])

    def product(a):
        spec = pl.BlockSpec((4, 8), lambda i: (i, 0))
        whole = pl.BlockSpec((8, 8), lambda i: (0, 0))
        out = jax.ShapeDtypeStruct((16, 8), jnp.float32)
        call = pl.pallas_call(kernel, out, grid=(4,), in_specs=[spec, whole], out_specs=spec, interpret=True)
        return call(a, jnp.ones((8, 8))) @ jnp.ones((8, 8))

    traced = jax.make_jaxpr(product)(a)
    assert count_flops(traced, kernels_only=True) == 2 * 16 * 8 * 8 and count_flops(traced) == 2 * 2 * 16 * 8 * 8

    def either(a):
        return jax.lax.cond(a.sum() > 0, lambda a: a @ jnp.ones((8, 8)), lambda a: a, a)

    assert count_flops(jax.make_jaxpr(either)(a)) == 2 * 16 * 8 * 8


def test_roofline_by_hand():
    chip = Chip(flops=100e12, bandwidth=1e12, links=100e9, hbm=1, shapes=())
    result = roofline(chip, 2e12, 50e9, 1e9)
    assert result[:3] == pytest.approx((0.02, 0.05, 0.01))
    assert (result.floor, result.bound) == (pytest.approx(0.05), "memory")
    assert result.estimate == pytest.approx(0.05 / EFFICIENCY)
    assert roofline(chip, 2e13, 0, 0).bound == "compute"
    assert all(chip.reserved < chip.hbm and chip.shapes for chip in CHIPS.values())


@pytest.mark.parametrize(
    ("argument", "changes", "passes"),
    [
        ("masked", {}, 3),
        ("sdtt", {}, 3 + 2),  # the teacher's two steps
        ("dcd", {}, 3 + 1),
        ("matched_masked", {}, 1 + 3 + 1 + 3),  # what is written, the auxiliary, the teacher, the student
        ("matched_masked", {"objective.auxiliary_updates": 4}, 1 + 3 + 1 + 3 / 4),
    ],
)
def test_passes_of_a_step_are_those_of_its_networks(argument, changes, passes):
    """A backward pass is two; a network that moves in every fourth step counts a quarter."""
    config = runpy.run_path(str(Path(__file__).parents[1] / "experiments/grammar.py"))["get_config"](argument)
    config.teacher = None if argument == "masked" else "its run directory"
    config.update_from_flattened_dict(changes)
    assert network_evaluations(config) == pytest.approx(passes, rel=0.03)
