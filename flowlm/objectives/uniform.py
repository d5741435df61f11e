"""Uniform-state discrete diffusion, UDLM with Duo's curriculum, and its distillation, DCD (2412.10193; 2506.10892).

Time r goes from data at 0 to noise at 1. A token survives with probability alpha(r) = 1 - (1 - EPS) r; otherwise a token drawn from
all V replaces it. The network reads alpha. With xbar = V alpha x + 1 - alpha, xbar^p the same with the prediction p in place of x:

    loss    alpha' / (V alpha) [ V / xbar_y - V / xbar^p_y - sum_j (xbar_j / xbar_y) log( xbar^p_y xbar_j / (xbar^p_j xbar_y) ) ]
            for the noised token y;   r ~ U[EPS, 1] stratified over the global batch
    sample  r -> r':  P(j | y) ~ [ a 1[j = y] + (1 - a) / V ] [ alpha(r') p_j + (1 - alpha(r')) / V ],   a = alpha(r) / alpha(r')
            The best p predicts a token from the other tokens alone, because its own noised value enters by the first factor.
    bound   the loss integrated over [EPS, 1] + E -log P(x | y at EPS) + KL( noised at r = 1 || uniform )

Curriculum: a uniform token at alpha is the argmax of a Gaussian latent w on a one-hot at t, tau(t) = alpha (time_warp.py). In the
first steps the network sees softmax(w / temperature) @ E in place of that token's embedding, a soft hint of the clean token.
DCD: one latent path gives y at r and y' at r - jump. The student at (y, r) learns what the teacher predicts at (y', r - jump). In
the next round the student teaches and the jump doubles.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from flowlm.maths import vocab
from flowlm.maths.time_sampling import stratified
from flowlm.maths.time_warp import TimeWarp
from flowlm.models.network import Network, Params
from flowlm.objectives import prompts
from flowlm.objectives.base import Auxiliary, Batch, Losses, Walk, check_steps
from flowlm.objectives.discrete import EPS, Discrete, rows
from flowlm.system.settings import setting

# The curriculum's range of alpha; outside this range a latent shows almost all of the clean token or almost nothing.
CURRICULUM = (0.03, 0.97)


def alpha_of(r: jax.Array) -> jax.Array:
    """The probability that a token survives until r."""
    return 1 - (1 - EPS) * r


def diffusion(logits: jax.Array, x: jax.Array, y: jax.Array, alpha: jax.Array, slope: jax.Array) -> jax.Array:
    """The loss in nats [...] for clean x, noised y, alpha and slope = d alpha / dr, all [...], and logits [..., V]."""
    size = logits.shape[-1]

    def at(a, i):
        return jnp.take_along_axis(a, i[..., None], -1)[..., 0]

    same, other = size * alpha + 1 - alpha, 1 - alpha  # xbar_x, and xbar_j of every other j
    mine = jnp.log(size * alpha[..., None] * jax.nn.softmax(logits) + 1 - alpha[..., None])
    here = jnp.where(x == y, same, other)
    entropy = same * jnp.log(same) + (size - 1) * other * jnp.log(other)
    cross = other * mine.sum(-1) + (same - other) * at(mine, x)
    ratios = size * (at(mine, y) - jnp.log(here)) + entropy - cross
    return slope / (size * alpha) * (size / here - size * jnp.exp(-at(mine, y)) - ratios / here)


def reverse(logits: jax.Array, y: jax.Array, alpha: jax.Array, alpha_next: jax.Array) -> jax.Array:
    """log P(j | y) [..., V], up to a constant, of the step from alpha to alpha_next >= alpha; y, alpha, alpha_next are [...]."""
    size, keep = logits.shape[-1], alpha / alpha_next
    stay = jnp.where(jax.nn.one_hot(y, size) > 0, keep[..., None], 0) + (1 - keep[..., None]) / size
    clean = alpha_next[..., None] * jax.nn.softmax(logits) + (1 - alpha_next[..., None]) / size
    return jnp.log(jnp.maximum(stay, 1e-30)) + jnp.log(jnp.maximum(clean, 1e-30))


@dataclasses.dataclass(frozen=True)
class Uniform(Discrete):
    """Uniform-state diffusion, or its student. It also has the attributes of `Discrete`.

    Attributes:
      warp: the function tau(t) = alpha of a latent's time t.
      curriculum_steps: number of training steps that show soft latents.
      curriculum_temperature: temperature of the softmax of these latents; lower is closer to a token.
    """

    needs: ClassVar[dict] = dict(input="raw", causal=False, time_embeddings=1, mask_token=False)

    warp: TimeWarp = dataclasses.field(kw_only=True)
    curriculum_steps: int = setting(0, "steps that show soft latents in place of tokens", "[0, inf)", note="0: none")
    curriculum_temperature: float = setting(0.05, "how soft those latents are", "(0, inf)")

    def __post_init__(self):
        super().__post_init__()
        if self.warp.prior != "gaussian" or self.warp.kind != "ambient":
            raise ValueError(
                "the family uniform has gaussian latents on one-hot tokens: set prior to gaussian, time_warp to ambient"
            )
        if self.curriculum_steps and self.teacher:
            raise ValueError("objective.curriculum_steps is for training from data, not for a student: set it to 0")

    def _see(self, net, params, z, alpha, keys=None):
        """(head, hidden) of the network at states z [B, L, D] or at tokens z [B, L]."""
        z = net.embed(params, z) if z.ndim == 2 else z
        return net.head(params), net.apply(params, z, alpha, keys=keys)

    def noised(self, net: Network, ids: jax.Array, keys: jax.Array | None, alpha: jax.Array) -> jax.Array:
        """ids [B, L], each replaced by a uniform token with probability 1 - alpha [B]."""
        fresh = jnp.floor(rows(keys, 1, net.length) * net.vocab).astype(jnp.int32)
        return jnp.where(rows(keys, 0, net.length) < alpha[:, None], ids, jnp.minimum(fresh, net.vocab - 1))

    def latent_times(self, r: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(t, alpha, d alpha / dr) [B] of the curriculum, in which log((1 - t) / t) is linear in r and alpha covers CURRICULUM."""
        low, high = (self.warp.t(jnp.float32(tau)) for tau in CURRICULUM)
        first, last = jnp.log(high / (1 - high)), jnp.log(low / (1 - low))
        t = jax.nn.sigmoid(first + (last - first) * r)
        return t, self.warp.tau(t), self.warp.dtau_dt(t) * t * (1 - t) * (last - first)

    def _diffusion(self, net, params, batch, y, z, alpha, slope, keys=None):
        """Nats [B, L] for noised tokens y; z, tokens or states, is what the network sees in place of y."""
        return vocab.over_logits(diffusion, (self._see(net, params, z, alpha, keys),), (batch["ids"], y, alpha, slope))

    def loss(self, net: Network, params: Params, aux: Auxiliary, batch: Batch, keys: jax.Array | None) -> Losses:
        """({diffusion or dcd: [B]}, {}), nats per token."""
        net = prompts.prompted(net, batch)
        ids, r, noise = batch["ids"], batch["r"], batch["noise"]
        if self.teacher:
            return {"dcd": prompts.mean(self._consistency(net, params, aux.teacher.flow, batch, keys), batch)}, {}
        embedding, slope = net.embedding(params), jnp.full(r.shape, EPS - 1)

        def hard():
            alpha = alpha_of(r)
            y = self.noised(net, ids, noise, alpha)
            return y, embedding[y], alpha, slope

        def soft():
            t, alpha, slope = self.latent_times(r)
            (y,), (z,) = (
                vocab.gaussian_latents(noise, ids, embedding, (t,), T) for T in (None, self.curriculum_temperature)
            )
            return y, z, alpha, slope

        shown = hard() if self.curriculum_steps == 0 else jax.lax.cond(aux.step < self.curriculum_steps, soft, hard)
        return {"diffusion": prompts.mean(self._diffusion(net, params, batch, *shown, keys), batch)}, {}

    def _consistency(self, net, params, teacher, batch, keys):
        alpha, alpha_next = alpha_of(batch["r"]), alpha_of(jnp.maximum(batch["r"] - self.jump, 0))
        times = self.warp.t(alpha), self.warp.t(alpha_next)
        y, y_next = vocab.gaussian_latents(batch["noise"], batch["ids"], net.embedding(params), times)
        live, target = self._see(net, params, y, alpha, keys), self._see(net, teacher, y_next, alpha_next)
        return self.apart(target, live)

    def bound(self, net: Network, params: Params, batch: Batch, key: jax.Array) -> jax.Array:
        """An unbiased estimate, one per row, of an upper bound on -log p(ids): nats [B]."""
        ids, num = batch["ids"], batch["ids"].shape[0]
        times, path, last = jax.random.split(key, 3)
        r, slope = EPS + (1 - EPS) * stratified(times, num), jnp.full((num,), EPS - 1)
        y = self.noised(net, ids, jax.random.split(path, num), alpha_of(r))
        nats = (1 - EPS) * self._diffusion(net, params, batch, y, y, alpha_of(r), slope)

        near, done = alpha_of(jnp.full((num,), EPS)), jnp.ones((num,))
        y = self.noised(net, ids, jax.random.split(last, num), near)

        def decode(logits, x, y, alpha, alpha_next):
            log_p = jax.nn.log_softmax(reverse(logits, y, alpha, alpha_next))
            return -jnp.take_along_axis(log_p, x[..., None], -1)[..., 0]

        nats += vocab.over_logits(decode, (self._see(net, params, y, near),), (ids, y, near, done))
        one = EPS + (1 - EPS) / net.vocab
        prior = one * math.log(one * net.vocab) + (1 - one) * math.log1p(-EPS)
        return nats.sum(-1) + prior * net.length

    def walk(self, net: Network, params: Params, key: jax.Array, num: int, steps: int) -> Walk:
        """Exactly `steps` network calls; its state is the noised tokens [num, L]."""
        check_steps(steps)
        start, rest = jax.random.split(key)
        y = jax.random.randint(start, (num, net.length), 0, net.vocab, jnp.int32)

        # Times and keys of a step follow from its number, so that a program need not know how many there will be.
        def seen(y, i):
            return self._see(net, params, y, jnp.full((num,), alpha_of(1 - i / steps)))

        def arrays(y, i, alpha_next):
            return y, jnp.full(y.shape, alpha_of(1 - i / steps)), jnp.full(y.shape, alpha_next)

        def likeliest(shown, *arrays):
            return vocab.over_logits(lambda *a: jnp.argmax(reverse(*a), -1).astype(jnp.int32), (shown,), arrays)

        def drawn(shown, y, i):
            key = jax.random.fold_in(rest, i)
            told = arrays(y, i, alpha_of(1 - (i + 1) / steps))
            return vocab.categorical(*shown, key, self.temperature, self.top_p, reverse, told)

        def move(y, i):
            shown = seen(y, i)
            return drawn(shown, y, i), likeliest(shown, *arrays(y, i, 1.0))

        def end(y):
            last = jnp.asarray(steps - 1)
            shown = seen(y, last)
            return (
                likeliest(shown, *arrays(y, last, alpha_of(1 - (last + 1) / steps)))
                if self.greedy
                else drawn(shown, y, last)
            )

        return Walk(y, move, end)
