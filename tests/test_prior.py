"""Noise drawn in embedding space against noise drawn densely over the vocabulary: laws, losses, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import OPTIMIZED

from flowlm.maths.prior import PRIORS, Dirichlet, Gaussian, geometry

SIGMAS = 5


def embedding(vocab, width, seed=0):
    return jax.random.normal(jax.random.key(seed), (vocab, width)) / np.sqrt(width)


def dense(name, key, num, vocab):
    """The reference: x0 itself, [num, V]."""
    if name == "gaussian":
        return jax.random.normal(key, (num, vocab))
    return jax.random.dirichlet(key, jnp.ones(vocab), (num,))


def draw(name, keys, e):
    return PRIORS[name]().sample(keys, e, 1)[:, 0]


@pytest.mark.parametrize("name", ["gaussian", "dirichlet"])
@pytest.mark.parametrize(("vocab", "width"), [(24, 5), (5, 24)])
def test_mean_and_covariance_are_the_dense_law_s(name, vocab, width):
    e = embedding(vocab, width)
    num = 200_000
    draws = jax.jit(lambda k: draw(name, k, e), compiler_options=OPTIMIZED)
    z = np.asarray(draws(jax.random.split(jax.random.key(1), num)), np.float64)
    if name == "gaussian":
        mean, cov = np.zeros(vocab), np.eye(vocab)
    else:  # Dirichlet(1, ..., 1)
        mean = np.full(vocab, 1 / vocab)
        cov = (np.eye(vocab) / vocab - 1 / vocab**2) / (vocab + 1)
    exact = np.asarray(e, np.float64)
    np.testing.assert_array_less(np.abs(z.mean(0) - mean @ exact), SIGMAS * z.std(0) / np.sqrt(num) + 1e-9)
    centred = z - mean @ exact
    products = centred[:, :, None] * centred[:, None, :]
    stderr = products.std(0) / np.sqrt(num)
    np.testing.assert_array_less(np.abs(products.mean(0) - exact.T @ cov @ exact), SIGMAS * stderr + 1e-9)


def toy_gradients(name, vocab, width, num):
    """Per-draw loss and gradient in E of a smooth nonlinear function of the interpolant, in both formulations."""
    e = embedding(vocab, width)
    weights = jax.random.normal(jax.random.key(7), (width,))
    t, token = 0.4, 1

    def loss_of_state(z):
        return jnp.sin(z @ weights) + 0.3 * jnp.sum(z**2)

    def ours(e, key):
        z0 = draw(name, key[None], e)[0]
        return loss_of_state((1 - t) * z0 + t * e[token])

    def theirs(e, key):
        x = (1 - t) * dense(name, key, 1, vocab)[0] + t * jax.nn.one_hot(token, vocab)
        return loss_of_state(x @ e)

    keys = jax.random.split(jax.random.key(3), num)

    def evaluate(fn):
        return jax.jit(jax.vmap(jax.value_and_grad(fn), (None, 0)), compiler_options=OPTIMIZED)(e, keys)

    return evaluate(ours), evaluate(theirs)


@pytest.mark.parametrize("name", ["gaussian", "dirichlet"])
@pytest.mark.parametrize(("vocab", "width"), [(40, 4), (12, 6), (4, 9)])
def test_loss_and_its_gradient_in_the_embedding_are_the_dense_ones(name, vocab, width):
    num = 60_000
    (value, grad), (value_dense, grad_dense) = toy_gradients(name, vocab, width, num)
    for ours, theirs in ((value, value_dense), (grad, grad_dense)):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        stderr = np.sqrt((ours.var(0) + theirs.var(0)) / num)
        np.testing.assert_array_less(np.abs(ours.mean(0) - theirs.mean(0)), SIGMAS * stderr + 1e-7)


@pytest.mark.parametrize(("vocab", "width"), [(40, 4), (64, 8)])
def test_the_gradient_is_less_noisy_than_the_dense_one_where_v_is_at_least_4d(vocab, width):
    (_, grad), (_, grad_dense) = toy_gradients("gaussian", vocab, width, 20_000)
    assert np.asarray(grad).var(0).sum() < 0.8 * np.asarray(grad_dense).var(0).sum()


def test_the_weakest_direction_is_right_at_condition_number_1e5():
    width, vocab = 16, 64
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.standard_normal((vocab, width)))
    right, _ = np.linalg.qr(rng.standard_normal((width, width)))
    scales = np.logspace(0, -2.5, width)  # singular values: cond(G) = 1e5
    e = jnp.asarray(left @ np.diag(scales) @ right, jnp.float32)
    geo = geometry(e)
    num = 100_000
    draws = jax.jit(lambda k: draw("gaussian", k, e), compiler_options=OPTIMIZED)
    z = np.asarray(draws(jax.random.split(jax.random.key(0), num)), np.float64)
    variance = (z @ right.T).var(0) / scales**2
    np.testing.assert_allclose(variance, 1, atol=SIGMAS * np.sqrt(2 / num) + 0.01)
    np.testing.assert_allclose(geo.color.T @ geo.color, e.T @ e, atol=2e-6)
    np.testing.assert_allclose((geo.color @ geo.whiten), np.eye(width), atol=2e-3)


@pytest.mark.parametrize(("vocab", "width"), [(20, 6), (6, 20)])
def test_whitened_codes_reproduce_the_metric(vocab, width):
    """codes @ codes^T = E G^+ E^T, the projector that own-position likelihoods and the bound are made of."""
    e = embedding(vocab, width)
    exact = np.asarray(e, np.float64)
    np.testing.assert_allclose(geometry(e).codes @ geometry(e).codes.T, exact @ np.linalg.pinv(exact), atol=1e-4)


def test_dirichlet_in_chunks_of_the_vocabulary_follows_the_same_law():
    vocab, width, num = 50, 3, 100_000
    e = embedding(vocab, width)
    keys = jax.random.split(jax.random.key(0), num)
    z = np.asarray(jax.jit(lambda k: Dirichlet(chunk=16).sample(k, e, 1), compiler_options=OPTIMIZED)(keys))[:, 0]
    dense_draws = jax.jit(lambda key: dense("dirichlet", key, num, vocab) @ e, compiler_options=OPTIMIZED)
    reference = np.asarray(dense_draws(jax.random.key(1)))
    for moment in (1, 2, 3):
        ours, theirs = z.astype(np.float64) ** moment, reference.astype(np.float64) ** moment
        stderr = np.sqrt((ours.var(0) + theirs.var(0)) / num)
        np.testing.assert_array_less(np.abs(ours.mean(0) - theirs.mean(0)), SIGMAS * stderr)


def test_a_row_s_noise_depends_on_its_own_key_alone():
    e = embedding(12, 4)
    keys = jax.random.split(jax.random.key(0), 6)
    for prior in (Gaussian(), Dirichlet()):
        whole = prior.sample(keys, e, 5)
        np.testing.assert_array_equal(prior.sample(keys[2:4], e, 5), whole[2:4])
        assert np.abs(whole[0] - whole[1]).max() > 0.01
