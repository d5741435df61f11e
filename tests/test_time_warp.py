"""The warp against published test vectors, a Monte-Carlo count of argmax and its own derivative."""

from fractions import Fraction
from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowlm.maths.time_warp import TimeWarp

TAUS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
T_AT_TAU = {
    27: (0.01271, 0.10575, 0.31268, 0.42567, 0.56843, 0.66944, 0.73438, 0.77512, 0.79428, 0.82302, 0.84745),
    1024: (None, 0.45602, 0.60361, 0.65506, 0.71702, 0.76439, 0.79839, 0.82171, 0.83332, 0.85160, 0.86805),
    30522: (0.48308, 0.63114, 0.70693, 0.73594, 0.77349, 0.80448, 0.82809, 0.84502, 0.85368, 0.86762, 0.88050),
    50258: (0.51199, 0.64641, 0.71661, 0.74379, 0.77925, 0.80875, 0.83137, 0.84765, 0.85601, 0.86950, 0.88200),
}
TAU_AT_T = {
    30522: {0.5: 0.001244, 0.7: 0.042594, 0.75: 0.141095, 0.8: 0.456097, 0.85: 0.931310},
    50258: {0.5: 0.000847, 0.7: 0.033277, 0.75: 0.117489, 0.8: 0.412736, 0.85: 0.916157},
}


def monte_carlo_tau(prior, vocab, t, scale=1.0, num=200_000):
    """(tau, standard error): how often the clean token's coordinate is the largest, by drawing x0 itself."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(10):
        x0 = (
            rng.standard_normal((num // 10, vocab)) if prior == "gaussian" else rng.dirichlet(np.ones(vocab), num // 10)
        )
        x0[:, 0] += scale * t / (1 - t)
        hits += (x0.argmax(1) == 0).sum()
    q = hits / num
    factor = vocab / (vocab - 1)
    return factor * (q - 1 / vocab), factor * np.sqrt(q * (1 - q) / num)


@pytest.mark.parametrize("vocab", T_AT_TAU)
def test_gaussian_inverse_matches_the_published_table(vocab):
    warp = TimeWarp("gaussian", "ambient", vocab, vocab)
    expected = [(tau, t) for tau, t in zip(TAUS, T_AT_TAU[vocab], strict=True) if t is not None]
    tau, t = map(jnp.array, zip(*expected, strict=True))
    np.testing.assert_allclose(jax.jit(warp.t)(tau), t, atol=2e-5)


@pytest.mark.parametrize("vocab", TAU_AT_T)
def test_gaussian_matches_the_published_values(vocab):
    warp = TimeWarp("gaussian", "ambient", vocab, vocab)
    t, tau = map(jnp.array, zip(*TAU_AT_T[vocab].items(), strict=True))
    np.testing.assert_allclose(jax.jit(warp.tau)(t), tau, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize(("prior", "vocab"), [("gaussian", 8), ("dirichlet", 3), ("dirichlet", 16), ("dirichlet", 60)])
@pytest.mark.parametrize("ratio", [0.03, 0.1, 0.4])
def test_tau_is_how_often_argmax_is_right(prior, vocab, ratio):
    t = ratio / (1 + ratio)
    expected, stderr = monte_carlo_tau(prior, vocab, t)
    assert abs(float(TimeWarp(prior, "ambient", vocab, vocab).tau(t)) - expected) < 5 * stderr + 1e-4


@pytest.mark.parametrize("vocab", [24, 25, 60])
def test_dirichlet_matches_the_alternating_sum_in_exact_arithmetic(vocab):
    for ratio in (Fraction(1, 50), Fraction(1, 7), Fraction(2, 5)):
        terms = ((-1) ** k * comb(vocab, k + 1) * max(1 - k * ratio, 0) ** (vocab - 1) for k in range(vocab))
        tau = (sum(terms) - 1) / (vocab - 1)
        warp = TimeWarp("dirichlet", "ambient", vocab, vocab)
        np.testing.assert_allclose(warp.tau(float(ratio / (1 + ratio))), float(tau), atol=2e-6)


def test_embedded_is_ambient_time_of_the_projected_signal():
    vocab, width, t = 64, 16, 0.8
    expected, stderr = monte_carlo_tau("gaussian", vocab, t, scale=np.sqrt(width / vocab))
    assert abs(float(TimeWarp("gaussian", "embedded", vocab, width).tau(t)) - expected) < 5 * stderr + 1e-4
    grid = np.linspace(0, 1, 11)
    same = TimeWarp("gaussian", "embedded", 16, 64).tau(grid)
    np.testing.assert_array_equal(same, TimeWarp("gaussian", "ambient", 16, 64).tau(grid))


def test_between_is_as_far_from_ambient_as_from_embedded():
    """A sixteenth of the power is a fourth of the signal, and half of it is halfway: at as much more signal all three agree."""
    vocab, width = 1024, 64
    ambient, embedded, between = (
        TimeWarp("gaussian", kind, vocab, width) for kind in ("ambient", "embedded", "between")
    )
    ratio = jnp.array([0.5, 1.0, 2.0, 3.0])

    def t(r):
        return r / (1 + r)

    np.testing.assert_allclose(between.tau(t(2 * ratio)), ambient.tau(t(ratio)), atol=1e-4)
    np.testing.assert_allclose(embedded.tau(t(4 * ratio)), ambient.tau(t(ratio)), atol=1e-4)


@pytest.mark.parametrize("prior", ["gaussian", "dirichlet"])
@pytest.mark.parametrize("vocab", [2, 99, 1024, 50258])
def test_inverse_ends_and_derivative(prior, vocab):
    warp = TimeWarp(prior, "ambient", vocab, 128)
    ends = jnp.array([0.0, 1.0])
    np.testing.assert_array_equal(warp.tau(ends), ends)
    np.testing.assert_array_equal(warp.t(ends), ends)
    t = warp.t(jnp.linspace(0.01, 0.99, 50))
    np.testing.assert_allclose(warp.t(warp.tau(t)), t, atol=2e-6)
    t = np.float64(warp.t(np.linspace(0.001, 0.999, 3000)))
    grown = np.concatenate([[0], np.cumsum(np.diff(t) * (warp.dtau_dt(t)[1:] + warp.dtau_dt(t)[:-1]) / 2)])
    np.testing.assert_allclose(grown, warp.tau(t) - warp.tau(t[0]), atol=5e-4)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="uniform"):
        TimeWarp("uniform", "ambient", 10, 10)
    with pytest.raises(ValueError, match="wrapped"):
        TimeWarp("gaussian", "wrapped", 10, 10)
