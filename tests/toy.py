"""Small settings that several tests share."""

import jax
import jax.numpy as jnp

from flowlm.models import make_network
from flowlm.time_warp import TimeWarp

FIELDS = dict(
    width=16,
    blocks=2,
    heads=2,
    cond=16,
    dropout=0.0,
    input="raw",
    output="plain",
    time_embeddings=1,
    time_scale=1.0,
    gate_init=1.0,
    learned_positions=False,
    causal=False,
    remat=False,
    dtype="float32",
)


def network(vocab=12, length=6, prior="gaussian", warp="ambient", **fields):
    """A network of the tests' size; fields override FIELDS."""
    fields = FIELDS | fields
    return make_network(vocab_size=vocab, length=length, warp=TimeWarp(prior, warp, vocab, fields["width"]), **fields)


def perturbed(params, scale=0.3, seed=0):
    """Parameters with nothing left at its zero initialisation."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([p + scale * jax.random.normal(k, jnp.shape(p)) for p, k in zip(leaves, keys, strict=True)])
