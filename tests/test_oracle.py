"""The flow family on a law whose exact denoiser is known: sampler, loss, bound."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from toy import OPTIMIZED, overriding

from flowlm.maths.prior import Gaussian
from flowlm.maths.time_warp import TimeWarp
from flowlm.objectives.denoiser import TAU_MAX
from flowlm.objectives.flow import Flow


def case(vocab, width, length=3, num=6, seed=0, warp="embedded", **kwargs):
    sequences, weights = oracle.correlated_law(vocab, length, num, seed)
    embedding = np.random.default_rng(seed).standard_normal((vocab, width)) / np.sqrt(width)
    warp = TimeWarp("gaussian", warp, vocab, width)
    net, params = oracle.oracle(sequences, weights, embedding, warp, **kwargs)
    return net, params, Flow(Gaussian(), warp), sequences, weights


@pytest.mark.parametrize(("vocab", "width"), [(5, 8), (12, 6)])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_reach_the_data_law_as_steps_grow(vocab, width, eta):
    net, params, family, sequences, weights = case(vocab, width)
    family = replace(family, eta=eta)
    num = 20_000
    distance = {}
    for steps in (1, 4, 64):
        ids = jax.jit(lambda key, n=steps: family.sample(net, params, key, num, n))(jax.random.key(steps))
        distance[steps] = oracle.total_variation(ids, sequences, weights)
    noise = np.sqrt(weights / (2 * np.pi * num)).sum() * 2  # the expected distance of an exact sampler is half of this
    assert distance[64] < noise + 0.01
    assert distance[64] < 0.5 * distance[4] < 0.5 * distance[1]


def test_a_drawn_token_in_place_of_the_mean_also_reaches_the_law():
    net, params, family, sequences, weights = case(5, 8)

    def sample(family):
        draw = jax.jit(lambda key: family.sample(net, params, key, 20_000, 128), compiler_options=OPTIMIZED)
        return draw(jax.random.key(0))

    assert oracle.total_variation(sample(replace(family, temperature=1.0)), sequences, weights) < 0.03
    cold = sample(replace(family, temperature=0.25))
    assert oracle.total_variation(cold, sequences, weights) > 0.1


def test_the_noise_scale_shrinks_every_draw_of_noise():
    """Where the data are one sequence, states of the ancestral sampler are (1 - t) scale z0 + t E[ids]."""
    net, params, family, *_ = case(5, 8)
    seen = []

    def one(params, z, tau_s, *args, **kwargs):
        jax.debug.callback(lambda *a: seen.append(a), z, tau_s[0], ordered=True)
        return jnp.full((*z.shape[:2], 5), -1e3).at[..., 2].set(0.0)

    net = overriding(net, apply=one, head=lambda params: jax.tree_util.Partial(lambda logits: logits))
    family = replace(family, eta=1.0, noise_scale=0.5)
    family.sample(net, params, jax.random.key(0), 5_000, 4)
    jax.effects_barrier()
    e = np.asarray(params["embedding"], np.float64)
    assert len(seen) == 4
    for z, tau in seen:
        t = float(family.warp.t(tau))
        noise = ((np.asarray(z, np.float64) - t * e[2]) / (1 - t)).reshape(-1, 8)
        products = noise[:, :, None] * noise[:, None, :]
        np.testing.assert_array_less(
            np.abs(products.mean(0) - e.T @ e / 4), 5 * products.std(0) / len(noise) ** 0.5 + 1e-5
        )


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_a_step_is_one_network_call(steps):
    net, params, family, *_ = case(5, 8)
    calls = []

    def counted(*args, **kwargs):
        jax.debug.callback(lambda: calls.append(1))
        return net.apply(*args, **kwargs)

    jax.block_until_ready(family.sample(overriding(net, apply=counted), params, jax.random.key(0), 4, steps))
    jax.effects_barrier()
    assert len(calls) == steps


@pytest.mark.parametrize(("vocab", "width"), [(5, 8), (12, 6)])
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_the_oracle_minimises_the_loss(vocab, width, loss):
    """The same noise for all, so that differences are exact; every tilt of the oracle's logits is worse."""
    net, params, family, sequences, weights = case(vocab, width)
    family = replace(family, loss_kind=loss)
    rng = np.random.default_rng(1)
    ids = jnp.asarray(sequences[rng.choice(len(weights), 8192, p=weights)])
    batch = {"ids": ids, **family.draw(jax.random.key(2), len(ids))}

    def mean_loss(net):
        return float(jax.jit(lambda b: family.loss(net, params, None, b, None)[0][loss].mean())(batch))

    best = mean_loss(net)
    for seed in range(4):
        tilt = 0.3 * np.random.default_rng(seed).standard_normal(vocab)
        assert mean_loss(case(vocab, width, tilt=tilt)[0]) > best


@pytest.mark.parametrize(("vocab", "width"), [(5, 8), (12, 6), (24, 8)])
def test_the_bound_at_the_oracle_is_just_above_the_entropy(vocab, width):
    net, params, family, sequences, weights = case(vocab, width, num=16)
    rng = np.random.default_rng(3)
    nats = []
    bound = jax.jit(lambda ids, key: family.bound(net, params, {"ids": ids}, key))
    for i in range(8):
        ids = jnp.asarray(sequences[rng.choice(len(weights), 8192, p=weights)])
        nats.append(np.asarray(bound(ids, jax.random.key(i))))
    nats = np.concatenate(nats)
    stderr = nats.std() / np.sqrt(len(nats))
    truth = oracle.entropy(weights)
    assert truth - 4 * stderr < nats.mean() < 1.05 * truth
    assert stderr < 0.012 * truth


def test_the_ambient_norm_would_be_loose_where_v_exceeds_d():
    """Why the bound whitens: with |x1 - D|^2 in place of the metric of G the figure is several times the entropy."""
    net, params, family, sequences, weights = case(24, 8, num=16)
    ids = jnp.asarray(sequences[np.random.default_rng(4).choice(16, 4096, p=weights)])
    t_max = family.warp.t(TAU_MAX)
    r = (jnp.arange(4096) + 0.5) / 4096 * t_max / (1 - t_max)
    t = r / (1 + r)
    z0 = family.prior.sample(jax.random.split(jax.random.key(0), 4096), params["embedding"], net.length)
    z = (1 - t)[:, None, None] * z0 + t[:, None, None] * params["embedding"][ids]
    p = jax.nn.softmax(net.apply(params, z, family.warp.tau(t)))
    ambient = (jnp.square(jax.nn.one_hot(ids, 24) - p).sum((1, 2)) * r).mean() * t_max / (1 - t_max)
    assert ambient > 1.5 * oracle.entropy(weights)
