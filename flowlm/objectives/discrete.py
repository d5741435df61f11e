"""What the two discrete diffusions share: times, a student's start, draws of a row from its own key.

Time r goes from data at 0 to noise at 1; training draws r ~ U[EPS, 1], stratified over the global batch.
"""

import jax
import jax.numpy as jnp

from flowlm.time_sampling import stratified

EPS = 1e-3


class Discrete:
    """A family with a `jump`, the step in r that a student learns to take at once."""

    jump: float

    def start(self, net, params, teacher):
        """The student begins as its teacher."""
        return net.adopt(params, teacher.flow)

    def draw(self, key: jax.Array, num: int) -> dict[str, jax.Array]:
        """r [num], and a noise key for every row."""
        times, noise = jax.random.split(key)
        return {"r": EPS + (1 - EPS) * stratified(times, num), "noise": jax.random.split(noise, num)}


def rows(keys: jax.Array, purpose: int, length: int) -> jax.Array:
    """U[0, 1] draws [B, L], each row from its own key."""
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, purpose), (length,)))(keys)


def kl(target: jax.Array, logits: jax.Array) -> jax.Array:
    """KL(softmax(target) || softmax(logits)): nats [...] for logits [..., V]."""
    log_p, log_q = jax.nn.log_softmax(target), jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
