"""Both formulations of the benchmark train one model: their losses and gradients agree in expectation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from flowlm import bench
from flowlm.bench import compare
from flowlm.config import objective
from flowlm.costs import count_flops, forward_flops
from flowlm.objectives import make_family
from flowlm.objectives.dense_flow import DenseFlow, dense_sample
from flowlm.objectives.flow import Flow
from flowlm.prior import Gaussian
from flowlm.time_warp import TimeWarp
from flowlm.train_state import Auxiliary

SIGMAS = 5
QUICKLY = {"compiler_options": {"xla_backend_optimization_level": 0}}  # compiling takes nearly all of the time here


@pytest.mark.parametrize(("vocab", "width"), [(24, 16), (8, 16)])
def test_mean_loss_and_gradients_agree(vocab, width):
    length, rows, draws = 3, 64, 128
    net = toy.network(vocab=vocab, length=length, width=width, blocks=1)
    params = jax.jit(lambda key: toy.perturbed(net.init(key), scale=0.15), **QUICKLY)(jax.random.key(0))
    warp = TimeWarp("gaussian", "ambient", vocab, width)
    ids = jnp.broadcast_to(jnp.arange(length), (rows, length))  # all rows alike: gradients have a mean to speak of

    def estimates(family, seed):
        """Loss, dE and one block matrix's gradient, each with one independent estimate for every draw of the noise."""

        def loss(params, key):
            losses, _ = family.loss(net, params, Auxiliary(), {"ids": ids, **family.draw(key, rows)}, None)
            return losses["cross_entropy"].mean()

        def one(params, key):
            value, grads = jax.value_and_grad(loss)(params, key)
            return value[None], grads["embedding"].ravel(), grads["blocks"]["qkv"]["kernel"].ravel()

        keys = jax.random.split(jax.random.key(seed), draws)
        every = lambda params, keys: jax.lax.map(lambda key: one(params, key), keys)
        out = jax.jit(every, **QUICKLY)(params, keys)
        return [np.asarray(a, np.float64) for a in out]

    for ours, theirs in zip(
        estimates(Flow(Gaussian(), warp), 2), estimates(DenseFlow(Gaussian(), warp), 3), strict=True
    ):
        error = np.sqrt((ours.var(0) + theirs.var(0)) / draws)
        assert np.all(np.abs(ours.mean(0) - theirs.mean(0)) < SIGMAS * error + 1e-7)
        # Small against the signal, or the line above would find nothing. Without the noise's share dE is 12 errors off.
        assert np.linalg.norm(error) < 0.1 * np.linalg.norm(theirs.mean(0))


def test_the_bare_step_is_the_network_alone():
    """Its products are three passes of the network in closed form: nothing of the vocabulary."""
    sizes = dict(width=16, blocks=2, cond=8)
    net = toy.network(vocab=24, length=4, time_embeddings=0, **sizes)
    family = bench.Bare(Gaussian(), TimeWarp("gaussian", "ambient", 24, 16))

    def loss(params, ids):
        batch = {"ids": ids, **family.draw(jax.random.key(0), 2)}
        return family.loss(net, params, Auxiliary(), batch, None)[0]["square"].mean()

    params, ids = jax.eval_shape(net.init, jax.random.key(0)), jax.ShapeDtypeStruct((2, 4), jnp.int32)
    counted = count_flops(jax.make_jaxpr(jax.grad(loss))(params, ids))
    token = forward_flops(**sizes, time_embeddings=0, vocab=24, length=4, with_output=False)
    assert counted == 2 * 4 * 3 * token


def test_ratios_are_of_the_same_round():
    flow = [{"seconds": [1.0, 2.0, 9.0], "step": 10}, {"seconds": [3.0, 3.0, 3.0], "step": 10}]
    dense = [{"seconds": [4.0, 4.0, 4.0], "step": 40}, {"seconds": [5.0, 4.0, 9.0], "step": 50}]
    result = compare(flow, dense)
    assert result["seconds"] == {"ours": 2.5, "theirs": 4.5, "ratio": 2.5 / 4.5, "low": 0.5, "high": 0.6}
    assert (result["step"]["low"], result["step"]["high"]) == (0.2, 0.25)


@pytest.fixture
def draws():
    """Of V 24, D 16: {formulation: ids of its argument}, the network, one set of parameters that tells tokens apart, the family."""
    fields = {**objective("flow_map").to_dict(), "teacher": True}
    family = make_family(warp=TimeWarp("gaussian", "ambient", 24, 16), **fields)
    net, out = toy.network(vocab=24, time_embeddings=2), {}
    for name in bench.SAMPLING:
        out[name], params, _ = bench._sampling(name, net, family, 4)
    plain = {name: value for name, value in params.items() if name != "geometry"}
    # Little but the state decides, and its law is far from white.
    plain = toy.perturbed(plain, scale=0.05)
    plain["embedding"] *= jnp.geomspace(0.1, 1, 16)
    kernel = jax.random.normal(jax.random.key(2), (16, 24))
    params = net.prepared(plain | {"unembed_bias": jnp.zeros(24), "unembed_kernel": kernel})
    return {name: lambda of, draw=draw: np.asarray(draw(params, of)) for name, draw in out.items()}, net, params, family


def test_one_step_sampling_is_the_bare_forward_of_its_noise(draws):
    """What the sides of sample/forward and dense_sample/forward share: all but the draw of the noise."""
    of, net, params, family = draws
    key = jax.random.key(1)
    ids = of["sample"](key)
    np.testing.assert_array_equal(ids, of["forward"](family.fresh(net, params, jax.random.split(key)[0], 4, 1.0)))
    assert len(np.unique(ids)) >= 3
    x0 = np.stack([jax.random.normal(row, (net.length, net.vocab)) for row in jax.random.split(key, 4)])
    dense = of["dense_sample"](key)
    np.testing.assert_array_equal(dense, of["forward"](jnp.float32(x0 @ np.asarray(params["embedding"]))))
    assert len(np.unique(dense)) >= 3


def test_dense_samples_have_the_law_of_samples(draws):
    """How often each token, and each pair of neighbours, is written."""
    _, net, params, family = draws
    num = 8192

    def frequencies(draw):
        ids = np.asarray(jax.jit(draw)(jax.random.key(7)))
        one = np.eye(net.vocab)[ids].mean(0).ravel()
        return np.concatenate([one, np.bincount(ids[:, 0] * net.vocab + ids[:, 1], minlength=net.vocab**2) / num])

    ours = frequencies(lambda key: family.sample(net, params, key, num, 1))
    theirs = frequencies(lambda key: dense_sample(net, params, key, num))
    error = np.sqrt((ours * (1 - ours) + theirs * (1 - theirs)) / num)
    assert np.all(np.abs(ours - theirs) <= SIGMAS * error + 2 / num)
    # Noise of another covariance is seen (of another size it is not: the network normalises its state).
    white = params | {"geometry": params["geometry"]._replace(color=jnp.eye(16))}
    other = frequencies(lambda key: family.sample(net, white, key, num, 1))
    assert np.any(np.abs(other - theirs) > 2 * SIGMAS * error + 2 / num)
