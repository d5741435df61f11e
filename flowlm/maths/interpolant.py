"""The straight path from noise to data and its discrete steps, in embedding space (2602.16813).

    z_t = (1 - t) z0 + t z1,     z1 = E[ids],     velocity b_t(z) = (m - z) / (1 - t),     m = D_t(z) @ E

where D_t = E[x1 | z_t] is the denoiser's posterior. Everything is linear in z, so a step needs only m [.., D]: what the
network's posterior over tokens looks like from inside embedding space. Times broadcast against z.
"""

import jax
import jax.numpy as jnp

from flowlm.maths.prior import HIGHEST, Geometry

# 1 - t is kept above this in denominators, because a likelihood is infinitely sharp at t = 1.
MIN_NOISE = 1e-2


def interpolate(z0: jax.Array, z1: jax.Array, t: jax.Array) -> jax.Array:
    """The state z_t of the path at time t."""
    return (1 - t) * z0 + t * z1


def ancestral_step(
    z: jax.Array, mean: jax.Array, fresh: jax.Array, t: jax.Array, t_next: jax.Array, eta: float
) -> jax.Array:
    """One step from t to t_next > t that keeps the law of the path; eta = 0 is one Euler step, eta = 1 the exact posterior.

        eps = (z - t m) / (1 - t);   z' = t' m + (1 - t') ( sqrt(1 - h) eps + sqrt(h) z0' )
        h = eta^2 ( 1 - ( t (1 - t') / (t' (1 - t)) )^2 )

    Args:
      z: the state [..., D].
      mean: m [..., D].
      fresh: a fresh draw z0' [..., D] of the prior, unused at eta = 0.
    """
    noise = (z - t * mean) / (1 - t)
    if eta > 0:
        share = eta**2 * (1 - (t * (1 - t_next) / (t_next * (1 - t))) ** 2)
        noise = jnp.sqrt(1 - share) * noise + jnp.sqrt(share) * fresh
    return t_next * mean + (1 - t_next) * noise


def over_states(t: jax.Array) -> jax.Array:
    """t [B], or [B, L] of every position, in a shape that broadcasts against states [B, L, D]."""
    return t[:, None, None] if t.ndim == 1 else t[..., None]


# What a token's own position says of it. In white coordinates w = z @ whiten and codes e_v the noise is N(0, I), so
#     log p(z_l | y_l = v) = t w.e_v / (1 - t)^2 - t^2 |e_v|^2 / (2 (1 - t)^2) + const
# is one product of features [.., R + 1] with a matrix [R + 1, V] (gaussian prior).


def own_position_features(geo: Geometry, z: jax.Array, t: jax.Array) -> jax.Array:
    """[B, L, R + 1] features of the state z [B, L, D] at times t [B] or [B, L]; gradients flow through z alone."""
    t = over_states(t)
    noise = jnp.maximum(1 - t, MIN_NOISE)
    white = jnp.matmul(z.astype(jnp.float32), geo.whiten, precision=HIGHEST)
    return jnp.concatenate([white * (t / noise**2), jnp.broadcast_to(t**2 / (2 * noise**2), (*z.shape[:-1], 1))], -1)


def own_position_matrix(geo: Geometry) -> jax.Array:
    """[R + 1, V]: features @ matrix is the own-position log-likelihood of every token, up to a constant."""
    return jnp.concatenate([geo.codes.T, -jnp.sum(geo.codes**2, -1)[None]], 0)
