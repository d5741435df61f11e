"""Draws of warped time over the global batch. Strata are those of the global batch: draw before it is split."""

import jax
import jax.numpy as jnp

PAIRS = ("uniform_diff", "uniform_pair")


def stratified(key: jax.Array, num: int) -> jax.Array:
    """tau [num] ~ U[0, 1], one in each of num equal strata, in random order."""
    place, order = jax.random.split(key)
    tau = (jnp.arange(num) + jax.random.uniform(place, (num,))) / num
    return jax.random.permutation(order, tau)


def pairs(key: jax.Array, num: int, boundary: int, kind: str, tau_max: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """(tau_s, tau_t) [num] with tau_s <= tau_t, of which exactly `boundary` are (0, 1), in random order.

    Args:
      kind: `uniform_diff`, the difference uniform, then the start uniform in what is left, both stratified;
        `uniform_pair`, two sorted uniforms.
      tau_max: upper end of tau_t away from the boundary.
    """
    if kind not in PAIRS:
        raise ValueError(f"unknown objective.pairs {kind!r}: choose one of {list(PAIRS)}")
    first, second, order = jax.random.split(key, 3)
    a, b = stratified(first, num), stratified(second, num)
    if kind == "uniform_diff":
        tau_s = b * (1 - a)
        tau_t = tau_s + a
    else:
        tau_s, tau_t = jnp.minimum(a, b), jnp.maximum(a, b)
    at_boundary = jax.random.permutation(order, jnp.arange(num)) < boundary
    return jnp.where(at_boundary, 0.0, tau_s * tau_max), jnp.where(at_boundary, 1.0, jnp.minimum(tau_t, 1) * tau_max)
