"""Masked discrete diffusion, MDLM (2406.07524), and its distillation, SDTT (2410.21035).

Time r is the share of tokens that are masked: r = 0 is data, r = 1 is noise. The prediction for an unmasked token is the token
itself, and the mask is never predicted (SUBS). The network reads no time, because the true posterior of a masked token does not
depend on r.

    loss    (1 / r) sum over masked positions of -log p(token);   r ~ U[EPS, 1] stratified over the global batch
    sample  r -> r' unmasks every masked token with probability (r - r') / r; the new token is drawn from the prediction
    bound   the loss with r ~ U[0, 1], summed over positions: E >= -log p

SDTT: the teacher takes two such steps of size `jump` / 2. The target of a position is the teacher's prediction at the step that
unmasked it, or at the second step if neither did. The student learns to predict this target in one step of `jump`, by a divergence
(discrete.py). In the next round the student teaches and the jump doubles.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from flowlm.maths import vocab
from flowlm.maths.time_sampling import stratified
from flowlm.models.network import Network, Params
from flowlm.objectives import prompts
from flowlm.objectives.base import Auxiliary, Batch, Losses, Walk, check_steps
from flowlm.objectives.discrete import Discrete, rows


def unmask(
    uniform: jax.Array, ids: jax.Array, mask: int, drawn: jax.Array, r: jax.Array, r_next: jax.Array
) -> jax.Array:
    """ids [B, L] after the step from r to r_next: each masked token becomes the drawn one with probability (r - r_next) / r.

    Args:
      uniform: U[0, 1] draws [B, L].
      mask: id of the mask.
      drawn: ids [B, L] to put in place of masks.
      r: the time before the step, in a shape that broadcasts against [B, L].
      r_next: the time after the step, likewise.
    """
    return jnp.where((ids == mask) & (uniform < (r - r_next) / r), drawn, ids)


@dataclasses.dataclass(frozen=True)
class Masked(Discrete):
    """Masked diffusion, or its student; its settings are those of `Discrete`."""

    needs: ClassVar[dict] = dict(input="raw", causal=False, time_embeddings=0, mask_token=True)
    may: ClassVar[dict] = dict(time_embeddings=1)  # because the reference code's networks read a time, always 0
    conditions: ClassVar[str] = "shown"

    def _see(self, net, params, ids, keys=None):
        """(head, hidden) of the network at ids [B, L], tokens and masks."""
        return net.head(params), net.apply(params, net.embed(params, ids), jnp.zeros(ids.shape[0]), keys=keys)

    def noised(self, net: Network, batch: Batch) -> jax.Array:
        """ids [B, L]: batch["ids"], each token masked with probability r."""
        return jnp.where(rows(batch["noise"], 0, net.length) < batch["r"][:, None], net.vocab, batch["ids"])

    def _diffusion(self, net, params, batch, keys=None):
        noised = self.noised(net, batch)
        nats = vocab.cross_entropy(*self._see(net, params, noised, keys), batch["ids"])
        return jnp.where(noised == net.vocab, nats / batch["r"][:, None], 0.0)

    def loss(self, net: Network, params: Params, aux: Auxiliary, batch: Batch, keys: jax.Array | None) -> Losses:
        """({diffusion or sdtt: [B]}, {}), nats per token."""
        net = prompts.prompted(net, batch)
        if not self.teacher:
            return {"diffusion": prompts.mean(self._diffusion(net, params, batch, keys), batch)}, {}
        noised = self.noised(net, batch)
        target = self.two_steps(net, aux.teacher.flow, noised, batch["r"], batch["noise"])
        live = self._see(net, params, noised, keys)
        divergence = self.apart(target, live)
        masked = prompts.asked(noised == net.vocab, batch)
        count = jnp.maximum(masked.sum(-1), 1)
        return {"sdtt": jnp.where(masked, divergence, 0.0).sum(-1) / count}, {}

    def two_steps(
        self, net: Network, params: Params, ids: jax.Array, r: jax.Array, keys: jax.Array | None
    ) -> vocab.Readout:
        """(head, hidden): the teacher's prediction for each masked position at the step that unmasked it, or at the second step."""
        first = self._see(net, params, ids)
        half = jnp.maximum(r - self.jump / 2, 0)
        drawn = vocab.categorical(*first, jax.vmap(jax.random.fold_in, (0, None))(keys, 1))
        after = unmask(rows(keys, 2, net.length), ids, net.vocab, drawn, r[:, None], half[:, None])
        second = self._see(net, params, after)
        return first[0], jnp.where((after == net.vocab)[..., None], second[1], first[1])

    def bound(self, net: Network, params: Params, batch: Batch, key: jax.Array) -> jax.Array:
        """An unbiased estimate, one per row, of an upper bound on -log p(ids): nats [B]."""
        times, noise = jax.random.split(key)
        num = batch["ids"].shape[0]
        r = jnp.maximum(stratified(times, num), 1e-6)
        rows = {"ids": batch["ids"], "r": r, "noise": jax.random.split(noise, num)}
        return self._diffusion(net, params, rows).sum(-1)

    def walk(self, net: Network, params: Params, key: jax.Array, num: int, steps: int) -> Walk:
        """At most `steps` network calls, because a prediction is kept while no token of the batch changes.

        Its state is (ids [num, L], the hidden states of the last call, whether these are of other ids).
        """
        check_steps(steps)
        ids = jnp.full((num, net.length), net.vocab, jnp.int32)
        hidden = self._see(net, params, ids)[1]
        head = net.head(params)

        # Times and keys of a step follow from its number, so that a program need not know how many there will be.
        def step(state, i, greedy=False):
            ids, hidden, stale = state
            r, r_next = 1 - i / steps, 1 - (i + 1) / steps
            pick, draw = jax.random.split(jax.random.fold_in(key, i))
            hidden = jax.lax.cond(stale, lambda: self._see(net, params, ids)[1], lambda: hidden)
            told = draw, self.temperature, self.top_p
            drawn = vocab.argmax(head, hidden) if greedy else vocab.categorical(head, hidden, *told)
            after = unmask(jax.random.uniform(pick, ids.shape), ids, net.vocab, drawn, r, r_next)
            return after, hidden, jnp.any(after != ids)

        def move(state, i):
            ids, hidden, stale = step(state, i)
            return (ids, hidden, stale), jnp.where(ids == net.vocab, vocab.argmax(head, hidden), ids)

        def end(state):
            return step(state, jnp.asarray(steps - 1), self.greedy)[0]

        return Walk((ids, hidden, jnp.array(False)), move, end)
