"""The time warp tau(t): progress measured by what argmax can already read (2602.16813, section on time reparametrisation).

    tau(t) = V / (V - 1) (q(t) - 1 / V),    q(t) = P[ argmax_v I_t[v] is the clean token ]

with I_t = (1 - t) x0 + t x1, so tau(0) = 0, tau(1) = 1 and uniform tau spends equal effort on equal progress. With r = t / (1 - t):

    gaussian     q = E_{g ~ N(0,1)} [ Phi(g + r)^{V-1} ]
    dirichlet    q = 1/V sum_{k>=0} (-1)^k C(V, k+1) (1 - k r)_+^{V-1}
                   = (V-1)! / (2 pi i) * contour integral of  e^p p^{-V} (1 - (1 - e^{-p r})^V) / (V e^{-p r}) dp
                 (the event is max_{v != y} x0_v - x0_y <= r; the sum is exact but cancels for large V, the integral does not)

`ambient` is the paper's. Where V > D the network sees only the projection z = x @ E, which keeps about D / V of a token's
signal power: `embedded` scales r by sqrt(min(1, D / V)). That is right for tokens whose embeddings are of one length; a network
makes those of frequent ones longer, which are then read early, and rare ones late: `between` takes the root of that scale, halfway
in its logarithm. All are pure functions of (prior, V, D), tabulated once on the host with knots in t and interpolated inside jit.
`identity` is tau = t: no warp, for the ablation.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import gammaln, log_ndtr

KNOTS = 4097
# The factor of r in each kind, as a function of the share min(1, D / V) of the signal's power.
_SCALES = {"ambient": lambda share: 1.0, "embedded": math.sqrt, "between": lambda share: math.sqrt(math.sqrt(share))}
KINDS = (*_SCALES, "identity")


def _gaussian_q(ratio: np.ndarray, vocab: int) -> np.ndarray:
    # The trapezoid rule converges faster than any power for a Gaussian weight: error below 1e-12 at this spacing.
    nodes = np.linspace(-9.0, 9.0, 721)
    weights = np.exp(-(nodes**2) / 2) / math.sqrt(2 * math.pi) * (nodes[1] - nodes[0])
    return np.exp((vocab - 1) * log_ndtr(nodes[None, :] + ratio[:, None])) @ weights


def _dirichlet_q(ratio: np.ndarray, vocab: int) -> np.ndarray:
    if vocab <= 24:
        terms = [
            (-1.0) ** k * math.comb(vocab, k + 1) * np.maximum(1 - k * ratio, 0.0) ** (vocab - 1) for k in range(vocab)
        ]
        return sum(terms) / vocab
    # Along Re p = V, the saddle of e^p p^{-V}, the integrand decays like a Gaussian of width sqrt(V).
    offset = np.linspace(0.0, 12.0, 601) * math.sqrt(vocab)
    p = vocab + 1j * offset
    weight = np.exp(p - vocab * np.log(p) + gammaln(vocab)) * (offset[1] - offset[0]) / math.pi
    weight[0] /= 2  # its mirror image below the real axis is the complex conjugate
    tail = np.exp(-p[None, :] * np.minimum(ratio, 1.0)[:, None])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inner = -np.expm1(vocab * np.log1p(-tail)) / (vocab * tail)
    inner = np.where(np.abs(tail) < 1e-12, 1.0, inner)
    return np.where(ratio >= 1.0, 1.0, (inner * weight).sum(-1).real)


_CORRECT = {"gaussian": _gaussian_q, "dirichlet": _dirichlet_q}


@functools.lru_cache(maxsize=16)
def _table(prior: str, vocab: int, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Knots t, tau(t) and dtau/dt, in float32, strictly increasing in both."""
    t = np.linspace(0.0, 1.0, KNOTS)
    if prior == "dirichlet":  # all happens around t = log(V) / V: knots grow geometrically
        t = np.expm1(math.log(vocab) * t) / (vocab - 1)
    with np.errstate(divide="ignore"):
        ratio = np.minimum(scale * t / (1 - t), 1e3)
    tau = (vocab * _CORRECT[prior](ratio, vocab) - 1) / (vocab - 1)
    tau[0], tau[-1] = 0.0, 1.0
    slope = np.gradient(tau, t, edge_order=2)
    # Beyond this tau is 1 to float32: one straight piece keeps the table invertible.
    keep = np.maximum.accumulate(tau) < 1 - 1e-6
    keep &= np.concatenate([[True], np.diff(np.maximum.accumulate(tau)) > 1e-12])
    keep[-1] = True
    return tuple(a[keep].astype(np.float32) for a in (t, tau, np.maximum(slope, 0.0)))


@dataclasses.dataclass(frozen=True)
class TimeWarp:
    """The pair (t, tau). Networks are conditioned on tau; scales and likelihoods use t.

    Attributes:
      prior: `gaussian` or `dirichlet`.
      kind: `ambient` (the paper's), `embedded` (what is left of the signal after projection to D dimensions), `between` them, or
        `identity`.
      vocab: V.
      width: D.
    """

    prior: str
    kind: str
    vocab: int
    width: int

    def __post_init__(self):
        if self.prior not in _CORRECT:
            raise ValueError(f"unknown prior {self.prior!r}: choose one of {sorted(_CORRECT)}")
        if self.kind not in KINDS:
            raise ValueError(f"unknown time warp {self.kind!r}: choose one of {list(KINDS)}")
        if self.vocab < 2:
            raise ValueError(f"a time warp needs at least 2 tokens, got a vocabulary of {self.vocab}")

    @property
    def table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(t, tau, dtau/dt) at the knots."""
        if self.kind == "identity":
            ends = np.array([0.0, 1.0], np.float32)
            return ends, ends, np.ones(2, np.float32)
        return _table(self.prior, self.vocab, _SCALES[self.kind](min(1.0, self.width / self.vocab)))

    def tau(self, t: jax.Array) -> jax.Array:
        """Warped time of interpolation time t, both in [0, 1]."""
        knots, values, _ = self.table
        return jnp.interp(t, knots, values)

    def t(self, tau: jax.Array) -> jax.Array:
        """Interpolation time of warped time tau, both in [0, 1]: the exact inverse of `tau`."""
        knots, values, _ = self.table
        return jnp.interp(tau, values, knots)

    def dtau_dt(self, t: jax.Array) -> jax.Array:
        """Derivative of `tau` at t."""
        knots, _, slopes = self.table
        return jnp.interp(t, knots, slopes)
