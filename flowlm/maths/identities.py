"""The flow map X_{s,t}, its two-time denoiser delta_{s,t}, and what is exactly true of them (2602.16813; 2604.09784; 2602.12233).

    X_{s,t}(z) = (1-t)/(1-s) z + (t-s)/(1-s) delta_{s,t}(z) @ E,      delta_{t,t} = D_t,      X_{0,1} = delta_{0,1} @ E

delta is a weighted mean of the denoiser along the trajectory, so it is a distribution over tokens, and obeys

    semigroup    delta_{s,t} = lam delta_{s,u} + (1 - lam) delta_{u,t}(X_{s,u}),      lam = (1-t)(u-s) / ((1-u)(t-s))
    Lagrangian   delta_{s,t} = D_t(X_{s,t}) - c d/dt delta_{s,t},                     c = (t-s)(1-t)/(1-s)
    Eulerian     (1-t) delta_{s,t} = (1-t) D_s + k (d/ds + b_s . grad) delta_{s,t},   k = (1-s)(t-s)

Each is a training target for delta. Below they are functions of one token's logits [.., V], of what the live network
says and what the (frozen) others say; `vocab.over_logits` runs them without ever holding (batch, length, V). Every one
returns Match(loss, distance, clamped), per token.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from flowlm.maths.time_warp import TimeWarp
from flowlm.maths.vocab import sparsemax

Moving = tuple[jax.Array, jax.Array]  # logits and their derivative

# Arguments of logarithms in the targets are kept above this; how often that happened is a metric.
FLOOR = 1e-3
# Lengths of intervals are kept above this in denominators.
EMPTY = 1e-12


def transport(z: jax.Array, mean: jax.Array, s: jax.Array, t: jax.Array) -> jax.Array:
    """X_{s,t}(z) for mean = delta_{s,t}(z) @ E; times broadcast against z."""
    return ((1 - t) * z + (t - s) * mean) / (1 - s)


def semigroup_weight(s: jax.Array, u: jax.Array, t: jax.Array) -> jax.Array:
    """lam, the weight of the first part of [s, t] cut at u; 0 where the interval is empty."""
    return (1 - t) * (u - s) / jnp.maximum((1 - u) * (t - s), EMPTY)


def step_weight(s: jax.Array, u: jax.Array, u_next: jax.Array, t: jax.Array) -> jax.Array:
    """The weight of D_u in delta_{s,t} when [u, u_next] is one Euler step of several from s to t; they sum to 1.

    (1-s)/(t-s) x (1-t)(u'-u)/((1-u)(1-u')), whose last factor is finite at u' = t = 1.
    """
    end = jnp.where(u_next >= t, 1.0, (1 - t) / jnp.maximum(1 - u_next, EMPTY))
    return (1 - s) * (u_next - u) * end / jnp.maximum((t - s) * (1 - u), EMPTY)


def lagrangian_weight(s: jax.Array, t: jax.Array) -> jax.Array:
    """c = (t - s)(1 - t) / (1 - s), the weight of the derivative in the Lagrangian identity."""
    return (t - s) * (1 - t) / (1 - s)


def eulerian_weight(s: jax.Array, t: jax.Array) -> jax.Array:
    """k = (1 - s)(t - s), the weight of the derivative in the Eulerian identity, which is multiplied by (1 - t): without that the
    weight would be k / (1 - t), singular at t = 1.
    """
    return (1 - s) * (t - s)


def d_dt(fn: Callable, warp: TimeWarp, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(fn(tau(t)), its derivative with respect to t): a partial time derivative through the warp."""
    return jax.jvp(lambda t: fn(warp.tau(t)), (t,), (jnp.ones_like(t),))


def d_flow(fn: Callable, warp: TimeWarp, s: jax.Array, z: jax.Array, mean: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(fn(tau(s), z), its total derivative (d/ds + b_s . grad) along the flow), for mean = D_s(z) @ E."""
    velocity = (mean - z) / (1 - s)[:, None, None]
    return jax.jvp(lambda s, z: fn(warp.tau(s), z), (s, z), (jnp.ones_like(s), velocity))


class Match(NamedTuple):
    """What a target says of one token.

    Attributes:
      loss: what is minimised.
      distance: |target - delta|^2.
      clamped: 1 where a logarithm's argument was.
    """

    loss: jax.Array
    distance: jax.Array
    clamped: jax.Array


def _entropy_to(target, logits, clamped=None) -> Match:
    """Cross-entropy of softmax(logits) to a distribution that does not move."""
    target = stop_gradient(target)
    log_p = jax.nn.log_softmax(logits)
    distance = stop_gradient(jnp.sum((target - jnp.exp(log_p)) ** 2, -1))
    return Match(-jnp.sum(target * log_p, -1), distance, jnp.zeros_like(distance) if clamped is None else clamped)


def _square(residual) -> Match:
    loss = jnp.sum(residual**2, -1)
    return Match(loss, stop_gradient(loss), jnp.zeros_like(loss))


def _slope(logits, tangent):
    """(p, dp) of p = softmax(logits) as logits move along `tangent`."""
    p = jax.nn.softmax(logits)
    return p, p * (tangent - jnp.sum(p * tangent, -1, keepdims=True))


# Diagonal: delta_{s,s} is the denoiser.


def diagonal(logits: jax.Array, flow: jax.Array) -> Match:
    """Cross-entropy to the denoiser of another network, logits `flow`."""
    return _entropy_to(jax.nn.softmax(flow), logits)


# Semigroup: PSD, and its form with a frozen flow's steps.


def _mixture(weights, parts):
    return sum(w[..., None] * jax.nn.softmax(part) for w, part in zip(weights, parts, strict=True))


def psd(logits: jax.Array, first: jax.Array, second: jax.Array, lam: jax.Array) -> Match:
    """Cross-entropy to lam delta_{s,u} + (1 - lam) delta_{u,t}(X_{s,u}) (2602.16813)."""
    return _entropy_to(_mixture((lam, 1 - lam), (first, second)), logits)


def psd_squared(logits: jax.Array, first: jax.Array, second: jax.Array, lam: jax.Array) -> Match:
    """`psd` with squared error in place of cross-entropy."""
    return _square(jax.nn.softmax(logits) - stop_gradient(_mixture((lam, 1 - lam), (first, second))))


def teacher_steps(logits: jax.Array, *flow_and_weights: jax.Array) -> Match:
    """Cross-entropy to sum_i w_i D_{u_i}: m logits of a frozen flow on its way, then their m weights."""
    m = len(flow_and_weights) // 2
    return _entropy_to(_mixture(flow_and_weights[m:], flow_and_weights[:m]), logits)


# Two networks (2602.16813 v1): X_{s,t} = x + (t-s) b_s + (t-s)^2 g_{s,t} / 2 with a free vector g, whose semigroup
# residual X_{s,t} - X_{u,t}(X_{s,u}) and whose delta = D_s + (1-s)(t-s) g / 2 need no x: it cancels.


def residual_map(
    live: jax.Array,
    first: jax.Array,
    second: jax.Array,
    flow_s: jax.Array,
    flow_u: jax.Array,
    s: jax.Array,
    u: jax.Array,
    t: jax.Array,
) -> Match:
    """Squared semigroup residual for g_{s,t}, g_{s,u}, g_{u,t}(X_{s,u}) and the flow's logits at s and at X_{s,u}."""
    s, u, t = s[..., None], u[..., None], t[..., None]
    # b_s - b_u(X_{s,u}), free of x.
    turn = (jax.nn.softmax(flow_s) - jax.nn.softmax(flow_u) + (u - s) ** 2 / 2 * first) / (1 - u)
    fixed = (t - u) * turn - (u - s) ** 2 / 2 * first - (t - u) ** 2 / 2 * second
    return _square((t - s) ** 2 / 2 * live + stop_gradient(fixed))


def residual(logits: jax.Array, flow: jax.Array, g: jax.Array, k: jax.Array) -> Match:
    """Squared error of delta to that of the two-network map, D_s + k g / 2."""
    target = jax.nn.softmax(flow) + k[..., None] / 2 * g
    return _square(jax.nn.softmax(logits) - stop_gradient(target))


# Lagrangian: `moving` is (logits, d/dt logits) of delta_{s,t}; `flow` the logits of D_t(X_{s,t}).


def lsd(moving: Moving, flow: jax.Array, c: jax.Array) -> Match:
    """Cross-entropy to the Lagrangian target, projected to the simplex (2602.16813)."""
    _, slope = _slope(*moving)
    target = sparsemax(stop_gradient(jax.nn.softmax(flow) - c[..., None] * slope))
    return _entropy_to(target, moving[0])


def lsd_logit(moving: Moving, flow: jax.Array, c: jax.Array) -> Match:
    """`lsd` with a target that logits keep on the simplex (2604.09784): softmax( flow - log(1 + c zeta) )."""
    logits, tangent = stop_gradient(moving)
    p = jax.nn.softmax(logits)
    zeta = tangent - jnp.sum(p * tangent, -1, keepdims=True)
    return _logit_target(moving[0], flow, 1 + c[..., None] * zeta)


def _logit_target(logits, flow, bracket) -> Match:
    clamped = jnp.mean((bracket < FLOOR).astype(jnp.float32), -1)
    target = jax.nn.softmax(flow - jnp.log(jnp.maximum(bracket, FLOOR)))
    return _entropy_to(target, logits, clamped)


def csd(moving: Moving, flow: jax.Array, s: jax.Array, t: jax.Array) -> Match:
    """|(1-t) d_t X_{s,t} - sg(D_t(X) - X)|^2 with x cancelled (2602.12233); the gradient goes through d_t delta."""
    s, t = s[..., None], t[..., None]
    p, slope = _slope(*moving)
    fixed = stop_gradient((t - s) / (1 - s) * p - jax.nn.softmax(flow))
    return _square((1 - t) / (1 - s) * p + lagrangian_weight(s, t) * slope + fixed)


def ecld(moving: Moving, flow: jax.Array, s: jax.Array, t: jax.Array) -> Match:
    """Cross-entropy to D_t(X_{s,t}) plus |(t-s)/(1-s) d_t delta|^2 (2602.12233).

    Twice this, less the target's entropy, bounds `csd` from above (Cauchy and Pinsker); it is not stationary at the exact map.
    """
    match = diagonal(moving[0], flow)
    _, slope = _slope(*moving)
    return match._replace(loss=match.loss + jnp.sum(((t - s) / (1 - s))[..., None] ** 2 * slope**2, -1))


# Eulerian: `moving` is (logits, total derivative along the flow) of delta_{s,t}; `flow` the logits of D_s(z).


def esd(moving: Moving, flow: jax.Array, t: jax.Array, k: jax.Array) -> Match:
    """Squared error of the Eulerian identity times (1 - t) (2602.16813)."""
    t, k = t[..., None], k[..., None]
    p, slope = _slope(*moving)
    return _square((1 - t) * p - stop_gradient((1 - t) * jax.nn.softmax(flow) + k * slope))


def esd_logit(moving: Moving, flow: jax.Array, t: jax.Array, k: jax.Array) -> Match:
    """Cross-entropy to softmax( flow - log( (1-t) - k xi ) ) (2604.09784); singular at t = 1."""
    logits, tangent = stop_gradient(moving)
    p = jax.nn.softmax(logits)
    xi = tangent - jnp.sum(p * tangent, -1, keepdims=True)
    return _logit_target(moving[0], flow, (1 - t)[..., None] - k[..., None] * xi)
