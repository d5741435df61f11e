"""Distribution matching for discrete diffusion: IDLM (2602.19066), and with a `tie` D-MMD (2603.20155). matched.py has the idea.

The student predicts the clean tokens of noised data y. x1 is drawn from its prediction q and noised anew to y'. The loss compares
the logarithms of two predictions at y': p_T of the frozen diffusion, and p_phi of an auxiliary diffusion that follows the student:

    student      u <q, log p_phi(. | y') - log p_T(. | y')>        for every token that it drew
    auxiliary    its diffusion's own loss on (x1, y')  +  tie x cross-entropy of p_phi to p_T at y'

In masked diffusion u is 1 / r' on tokens that y' masks. In uniform diffusion u is 1 on every token, because the evidence of
a token's own noised value is the same in both networks and cancels. Student and auxiliary begin as the teacher.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from flowlm.maths import identities, vocab
from flowlm.maths.time_sampling import stratified
from flowlm.models.network import Network, Params
from flowlm.objectives import prompts
from flowlm.objectives.base import Auxiliary, Batch, Losses, Teacher, Update
from flowlm.objectives.discrete import EPS, Discrete
from flowlm.objectives.masked import Masked
from flowlm.objectives.matched import log
from flowlm.objectives.uniform import Uniform, alpha_of, diffusion, reverse
from flowlm.system.settings import setting


@dataclasses.dataclass(frozen=True)
class MatchedDiscrete(Discrete):
    """What both families share. They also have the attributes of `Discrete`, but do not use `jump` and `divergence`.

    Attributes:
      auxiliary_updates: updates of the auxiliary for one of the student.
      auxiliary_rate: learning rate of the auxiliary, as a multiple of the student's.
      at_noise: share of the rows that begin at pure noise; the others begin at noised data, with r uniform.
      tie: weight of the auxiliary's cross-entropy to the teacher, which keeps log p_phi near log p_T.
    """

    auxiliary_updates: int = setting(1, "updates of the auxiliary for one of the student", "[1, inf)")
    auxiliary_rate: float = setting(1.0, "the auxiliary's learning rate, as a multiple of the student's", "(0, inf)")
    at_noise: float = setting(0.25, "share of the rows that begin at pure noise", "[0, 1]")
    tie: float = setting(0.0, "weight of the auxiliary's cross-entropy to the teacher (D-MMD)", "[0, inf)")

    def __post_init__(self):
        super().__post_init__()
        if not self.teacher:
            raise ValueError("a matched student begins at its teacher: give --config.teacher=RUNDIR")

    @property
    def updates(self) -> Mapping[str, Update]:
        """The student moves in every `auxiliary_updates`-th step, the auxiliary in every step."""
        return {"student": Update(1.0, self.auxiliary_updates), "auxiliary": Update(self.auxiliary_rate)}

    def start(self, net: Network, params: Params, teacher: Teacher | None, origin: Params | None) -> Params:
        """Student and auxiliary begin as the teacher."""
        first = super().start(net, params, teacher, origin)
        return {"student": first, "auxiliary": first}

    def student(self, params: Params) -> Params:
        """The student's parameters, without the auxiliary's."""
        return params["student"]

    def draw(self, key: jax.Array, num: int) -> Batch:
        """{r: [num] times of the noised data, r_next: [num] times of the noised x1, noise: a key for each row [num]}."""
        keys = jax.random.split(key, 4)
        late = num - round(num * self.at_noise)
        r = jnp.ones((num,)).at[:late].set(EPS + (1 - EPS) * stratified(keys[0], late))
        return {
            "r": jax.random.permutation(keys[1], r),
            "r_next": EPS + (1 - EPS) * stratified(keys[2], num),
            "noise": jax.random.split(keys[3], num),
        }

    def loss(self, net: Network, params: Params, aux: Auxiliary, batch: Batch, keys: jax.Array | None) -> Losses:
        """({matching: [B], auxiliary: [B]}, {}). In steps in which the student does not move, `matching` is 0."""
        net = prompts.prompted(net, batch)
        student, auxiliary, r, r_next = params["student"], params["auxiliary"], batch["r"], batch["r_next"]
        first, second, third = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(batch["noise"]), 1, 0)
        y = self._hide(net, batch["ids"], r, first)
        ids = stop_gradient(self._write(net, self._shown(net, student, y, r, keys), y, r, second))
        y_next = self._hide(net, ids, r_next, third)
        follows = self._shown(net, auxiliary, y_next, r_next)
        wanted = stop_gradient(self._shown(net, aux.teacher.flow, y_next, r_next))
        following = prompts.mean(self._nats(net, follows, ids, y_next, r_next), batch)
        if self.tie > 0:
            unknown = self._unknown(net, y_next)
            tied = vocab.over_logits(identities.diagonal, (follows, wanted)).loss
            following += self.tie * prompts.mean(jnp.where(unknown, tied, 0.0), batch)

        def form(logits, phi, teacher, y, r, weight):
            return log(self._prediction(logits, y, r), phi, teacher, weight)

        def match():
            live = self._shown(net, student, y, r, keys)
            arrays = y, r, self._weight(net, y, y_next, r_next)
            matched = vocab.over_logits(form, (live, stop_gradient(follows), wanted), arrays)
            return prompts.mean(matched, batch)

        moves = aux.step % self.auxiliary_updates == self.auxiliary_updates - 1
        matching = jax.lax.cond(moves, match, lambda: jnp.zeros_like(r))
        return {"matching": matching, "auxiliary": following}, {}

    @abc.abstractmethod
    def _hide(self, net, ids, r, keys):
        """ids [B, L] noised to time r [B]."""

    @abc.abstractmethod
    def _shown(self, net, params, y, r, keys=None):
        """(head, hidden) of the network at noised tokens y."""

    @abc.abstractmethod
    def _prediction(self, logits, y, r):
        """Logits of the clean token, given the network's logits and the token's own noised value."""

    @abc.abstractmethod
    def _write(self, net, shown, y, r, keys):
        """Clean tokens [B, L], drawn from the prediction."""

    @abc.abstractmethod
    def _unknown(self, net, y):
        """bool [B, L]: the tokens of y that a network must predict."""

    @abc.abstractmethod
    def _weight(self, net, y, y_next, r_next):
        """u [B, L], the weight of each token in the student's loss."""

    @abc.abstractmethod
    def _nats(self, net, shown, ids, y, r):
        """The diffusion's own loss, nats [B, L]."""


@dataclasses.dataclass(frozen=True)
class MatchedMasked(MatchedDiscrete, Masked):
    """The student of a masked diffusion."""

    needs: ClassVar[Mapping] = Masked.needs

    def _hide(self, net, ids, r, keys):
        return self.noised(net, {"ids": ids, "r": r, "noise": keys})

    def _shown(self, net, params, y, r, keys=None):
        return self._see(net, params, y, keys)

    def _prediction(self, logits, y, r):
        return logits

    def _write(self, net, shown, y, r, keys):
        return jnp.where(y == net.vocab, vocab.categorical(*shown, keys), y)

    def _unknown(self, net, y):
        return y == net.vocab

    def _weight(self, net, y, y_next, r_next):
        return jnp.where((y == net.vocab) & (y_next == net.vocab), 1 / r_next[:, None], 0.0)

    def _nats(self, net, shown, ids, y, r):
        return jnp.where(y == net.vocab, vocab.cross_entropy(*shown, ids) / r[:, None], 0.0)


@dataclasses.dataclass(frozen=True)
class MatchedUniform(MatchedDiscrete, Uniform):
    """The student of a uniform diffusion."""

    needs: ClassVar[Mapping] = Uniform.needs

    def _hide(self, net, ids, r, keys):
        return self.noised(net, ids, keys, alpha_of(r))

    def _shown(self, net, params, y, r, keys=None):
        return self._see(net, params, y, alpha_of(r), keys)

    def _prediction(self, logits, y, r):
        alpha = alpha_of(r)
        return reverse(logits, y, alpha, jnp.ones_like(alpha))

    def _write(self, net, shown, y, r, keys):
        times = jnp.broadcast_to(r[:, None], y.shape)
        return vocab.categorical(*shown, keys, kernel=self._prediction, arrays=(y, times))

    def _unknown(self, net, y):
        return jnp.ones_like(y, bool)

    def _weight(self, net, y, y_next, r_next):
        return jnp.ones(y.shape)

    def _nats(self, net, shown, ids, y, r):
        alpha, slope = alpha_of(r), jnp.full(r.shape, EPS - 1)
        return vocab.over_logits(diffusion, (shown,), (ids, y, alpha, slope))
