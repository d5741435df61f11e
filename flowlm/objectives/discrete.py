"""What the two discrete diffusions share: times, a student's divergence, and draws of each row from its own key.

Time r goes from data at 0 to noise at 1; training draws r ~ U[EPS, 1], stratified over the global batch.

A student's divergence is `reverse`, KL(student || teacher), or `forward`, KL(teacher || student). `reverse` is the default, and
the authors of SDTT and DCD train with it. Under `forward` the best student predicts the mean of the teacher's predictions over the
teacher's draws. That mean is what the teacher predicts before it draws, so the student gains nothing. Under `reverse` the student
drops tokens that are likely after only a few of the draws.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from flowlm.maths import vocab
from flowlm.maths.time_sampling import stratified
from flowlm.models.network import Network, Params
from flowlm.objectives.base import Batch, Walk
from flowlm.objectives.prompts import Prompted
from flowlm.system.settings import setting

EPS = 1e-3


@dataclasses.dataclass(frozen=True)
class Discrete(Prompted):
    """A discrete diffusion, or its student.

    Attributes:
      teacher: whether the family is a student, distilled from a teacher.
      jump: step in time that a student learns to take at once.
      divergence: a student's divergence from its target, `forward` or `reverse`.
      temperature: the sampler draws from softmax(logits / temperature); 0 takes the likeliest token.
      top_p: share of the probability that the sampler's draws keep.
      greedy: whether the sampler takes the likeliest tokens in its last step.
    """

    any_steps: ClassVar[bool] = True

    teacher: bool = False
    jump: float = setting(1 / 32, "step in time that a student learns to take at once", "(0, 1]")
    divergence: str = setting(
        "reverse", "of a student: KL(student || teacher), or forward", choices=("forward", "reverse")
    )
    temperature: float = setting(1.0, "sampler: of the draws", "[0, inf)", note="0: the likeliest token")
    top_p: float = setting(1.0, "sampler: share of the probability that is kept", "(0, 1]")
    greedy: bool = setting(False, "sampler: take the likeliest tokens in the last step")

    def samplers(self) -> dict[str, "Discrete"]:
        """One sampler, with the settings as they are."""
        return {"ancestral": self}

    def likelihoods(self) -> dict[str, Callable]:
        """`bound`."""
        return {"bound": self.bound}

    @abc.abstractmethod
    def walk(self, net: Network, params: Params, key: jax.Array, num: int, steps: int) -> Walk:
        """The sampler a network call at a time."""

    def sample(self, net: Network, params: Params, key: jax.Array, num: int, steps: int) -> jax.Array:
        """ids [num, L] by `steps` network calls. Raises ValueError for fewer than 1, unless they are traced."""
        return self.walk(net, params, key, num, steps).finished(steps)

    def apart(self, target: vocab.Readout, student: vocab.Readout) -> jax.Array:
        """The divergence between a student and its target, nats [B, L]. Each is given by (head, hidden [B, L, F])."""
        return vocab.over_logits(kl, (student, target) if self.divergence == "reverse" else (target, student))

    def draw(self, key: jax.Array, num: int) -> Batch:
        """{r: [num], noise: a key for each row [num]}."""
        times, noise = jax.random.split(key)
        return {"r": EPS + (1 - EPS) * stratified(times, num), "noise": jax.random.split(noise, num)}


def rows(keys: jax.Array, purpose: int, length: int) -> jax.Array:
    """U[0, 1] draws [B, L], each row from its own key; another `purpose` makes independent draws."""
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, purpose), (length,)))(keys)


def kl(first: jax.Array, second: jax.Array) -> jax.Array:
    """KL(softmax(first) || softmax(second)): nats [...] for logits [..., V]."""
    log_p, log_q = jax.nn.log_softmax(first), jax.nn.log_softmax(second)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
