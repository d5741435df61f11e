"""What the two discrete diffusions share: times, a student's start and its divergence, draws of a row from its own key.

Time r goes from data at 0 to noise at 1; training draws r ~ U[EPS, 1], stratified over the global batch.

A student's divergence is `reverse`, KL(student || teacher), or `forward`, KL(teacher || student). The reverse one is the default,
and what the authors of SDTT and DCD train with: under the forward one the best student predicts the mean of what its teacher
says over the teacher's own draws, which is what the teacher says without them, so that nothing is gained. The reverse one leaves
out what the teacher only says in a few of its draws.
"""

import jax
import jax.numpy as jnp

from flowlm import vocab
from flowlm.time_sampling import stratified

EPS = 1e-3


class Discrete:
    """A family with a `jump`, the step in r that a student learns to take at once, and the `divergence` that it learns by."""

    jump: float
    divergence: str

    def __post_init__(self):
        if self.divergence not in ("forward", "reverse"):
            raise ValueError(f"unknown objective.divergence {self.divergence!r}: choose forward or reverse")

    def apart(self, target, student) -> jax.Array:
        """The divergence of a student from its target, each a (head, hidden [B, L, F]): nats [B, L]."""
        return vocab.over_logits(kl, (student, target) if self.divergence == "reverse" else (target, student))

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


def kl(first: jax.Array, second: jax.Array) -> jax.Array:
    """KL(softmax(first) || softmax(second)): nats [...] for logits [..., V]."""
    log_p, log_q = jax.nn.log_softmax(first), jax.nn.log_softmax(second)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
