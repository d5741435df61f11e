"""The autoregressive family: exact likelihood, and a cache that changes nothing."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from flowlm.objectives.autoregressive import Autoregressive


def case(**fields):
    net = toy.network(vocab=7, length=6, causal=True, time_embeddings=0, **fields)
    return net, toy.perturbed(jax.jit(net.init)(jax.random.key(0)))


@partial(jax.jit, static_argnums=0)
def slow(net, params, ids):
    """Logits after the last of ids [B, n], the whole prefix computed anew."""
    hidden = net.apply(params, net.embed(params, ids), jnp.zeros(len(ids)))
    return net.unembed(params, hidden)[:, -1]


@pytest.mark.parametrize("learned", [False, True])
def test_greedy_with_the_cache_is_greedy_without(learned):
    net, first = case(learned_positions=learned)
    family = Autoregressive(start_token=3, temperature=0)
    fast = jax.jit(lambda params: family.sample(net, params, jax.random.key(0), 2, 5))
    seen = set()
    for seed in range(8):
        params = toy.perturbed(first, scale=0.6, seed=seed)
        ids = np.full((2, 1), 3)
        for _ in range(5):
            ids = np.concatenate([ids, slow(net, params, jnp.asarray(ids)).argmax(-1)[:, None]], 1)
        np.testing.assert_array_equal(fast(params), ids)
        seen.add(tuple(ids[0]))
    assert len(seen) > 4


def test_bound_is_the_chain_rule_and_samples_follow_it():
    net, params = case()
    net = replace(net, length=3)
    family = Autoregressive(start_token=3)
    every = np.array([[3, a, b] for a in range(7) for b in range(7)])
    nats = np.asarray(family.bound(net, params, {"ids": jnp.asarray(every)}, None))
    first = jax.nn.log_softmax(slow(net, params, jnp.full((1, 1), 3)))[0]
    second = jax.nn.log_softmax(slow(net, params, jnp.array([[3, a] for a in range(7)])))
    np.testing.assert_allclose(nats, [-(first[a] + second[a, b]) for _, a, b in every], rtol=1e-5)
    np.testing.assert_allclose(np.exp(-nats).sum(), 1, rtol=1e-5)
    sample = jax.jit(lambda key: family.sample(net, params, key, 40_000, 2), compiler_options=toy.OPTIMIZED)
    ids = np.asarray(sample(jax.random.key(0)))
    counts = np.bincount(ids[:, 1] * 7 + ids[:, 2], minlength=49) / 40_000
    np.testing.assert_array_less(np.abs(counts - np.exp(-nats)), 5 * np.sqrt(np.exp(-nats) / 40_000))


def test_another_number_of_steps_is_an_error():
    net, params = case()
    with pytest.raises(ValueError, match="6 tokens takes 5 steps, got 8"):
        Autoregressive(start_token=3).sample(net, params, jax.random.key(0), 2, 8)
