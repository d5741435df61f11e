"""Chunked operations over the vocabulary equal the dense ones, in value and gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from toy import OPTIMIZED

from flowlm.maths import vocab

B, L, D, V = 3, 12, 8, 11
# positions at once: all, some that divide the length, some that do not, one at a time, and the rule for large logits
SPANS = (100, 4, 5, 1, None)


def affine(kernel, bias, hidden):
    return hidden @ kernel + bias


@pytest.fixture
def arrays():
    keys = jax.random.split(jax.random.key(0), 6)
    return {
        "kernel": jax.random.normal(keys[0], (D, V)),
        "bias": jax.random.normal(keys[1], (V,)),
        "hidden": jax.random.normal(keys[2], (B, L, D)),
        "embedding": jax.random.normal(keys[3], (V, D)),
        "ids": jax.random.randint(keys[4], (B, L), 0, V),
        "weights": jax.random.normal(keys[5], (B, L, D)),
    }


def dense_cross_entropy(p, a):
    return -jnp.log(jnp.take_along_axis(p, a["ids"][..., None], -1))[..., 0]


def dense_squared_error(p, a):
    return jnp.square(p - jax.nn.one_hot(a["ids"], V)).sum(-1)


CASES = {
    "cross_entropy": (lambda h, a, c: vocab.cross_entropy(h, a["hidden"], a["ids"], c), dense_cross_entropy),
    "squared_error": (lambda h, a, c: vocab.squared_error(h, a["hidden"], a["ids"], c), dense_squared_error),
    "softmax_embed": (
        lambda h, a, c: vocab.softmax_embed(h, a["hidden"], a["embedding"], c),
        lambda p, a: p @ a["embedding"],
    ),
}


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("name", CASES)
def test_chunks_equal_the_dense_computation(name, span, arrays, monkeypatch):
    monkeypatch.setattr(vocab, "SMALL", 0)
    chunked, dense = CASES[name]

    def ours(params):
        a = {**arrays, **params}
        return chunked(Partial(affine, a["kernel"], a["bias"]), a, span)

    def theirs(params):
        a = {**arrays, **params}
        return dense(jax.nn.softmax(affine(a["kernel"], a["bias"], a["hidden"])), a)

    params = {k: arrays[k] for k in ("kernel", "bias", "hidden", "embedding")}
    out, pull = jax.vjp(ours, params)
    expected, pull_dense = jax.vjp(theirs, params)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    cotangent = arrays["weights"] if out.ndim == 3 else arrays["weights"][..., 0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        pull(cotangent)[0],
        pull_dense(cotangent)[0],
    )


@pytest.mark.parametrize("span", SPANS)
def test_argmax(span, arrays):
    head = Partial(affine, arrays["kernel"], arrays["bias"])
    np.testing.assert_array_equal(vocab.argmax(head, arrays["hidden"], span), head(arrays["hidden"]).argmax(-1))


def test_categorical_draws_the_far_tail():
    """64 tokens of probability e^-17 each. Plain float32 Gumbel noise ends near 16 and draws them six times too rarely."""
    tail = -17.0
    log_probs = jnp.concatenate([jnp.zeros(1), jnp.full(64, tail)])
    head = Partial(lambda hidden: jnp.broadcast_to(log_probs, (*hidden.shape[:-1], 65)))

    @partial(jax.jit, compiler_options=OPTIMIZED)
    def draw(key):
        return (vocab.categorical(head, jnp.zeros((64, 4096, 1)), key, span=781) > 0).sum()

    calls = 23
    count = sum(int(draw(jax.random.key(i))) for i in range(calls))
    expected = calls * 64 * 4096 * 64 * np.exp(tail)
    assert abs(count - expected) < 2.5 * np.sqrt(expected) < 0.7 * expected


def test_temperature_divides_the_logits():
    logits = jnp.array([0.0, 1.0, 2.0])
    head = Partial(lambda hidden: jnp.broadcast_to(logits, (*hidden.shape[:-1], 3)))
    ids = np.asarray(vocab.categorical(head, jnp.zeros((50, 1000, 1)), jax.random.key(0), temperature=0.5))
    p = np.asarray(jax.nn.softmax(logits / 0.5))
    np.testing.assert_allclose(np.bincount(ids.ravel()) / ids.size, p, atol=5 * 0.5 / np.sqrt(ids.size))


def test_no_array_over_tokens_and_vocabulary_outlives_its_chunk():
    """By XLA's own account a loss and its gradient need less than half of what all logits would."""
    batch, length, width, size = 8, 128, 16, 8192

    def loss(kernel, hidden, ids):
        return vocab.cross_entropy(Partial(affine, kernel, jnp.zeros(size)), hidden, ids, span=8).sum()

    args = (jnp.zeros((width, size)), jnp.zeros((batch, length, width)), jnp.zeros((batch, length), jnp.int32))
    memory = jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert memory < batch * length * size * 4 / 2
