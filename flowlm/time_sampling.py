"""Draws of warped time over the global batch."""

import jax
import jax.numpy as jnp


def stratified(key: jax.Array, num: int) -> jax.Array:
    """tau [num] ~ U[0, 1], one in each of num equal strata, in random order.

    The strata are those of the global batch: draw once for the whole batch, before it is split over devices or
    microbatches.
    """
    place, order = jax.random.split(key)
    tau = (jnp.arange(num) + jax.random.uniform(place, (num,))) / num
    return jax.random.permutation(order, tau)
