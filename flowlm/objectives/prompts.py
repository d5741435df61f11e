"""Prompts: some tokens of a row are given, and a model writes the rest. One mechanism for every family.

`given` holds ids [B, L], and UNKNOWN where a token is to be written. What wraps the network is all that knows of it:

    Shown   the network is fed the clean embedding of each given token, marked by a learnt vector that is added to its input.
            Trained so (objective.prompts > 0), with the loss on the other positions alone, its optimum is the posterior
            p(token | noised rest, given tokens), and every sampler of the family is one of the conditional law. Masked diffusion
            needs no such training, because clean tokens among masks are what it always sees.
    Told    replacement, for a network that was not trained so: it predicts given tokens with certainty, and a sampler's own steps
            then take these positions along their noised path, z_t = (1 - t) z0 + t E[token]. This is an approximation, because
            the other positions read that path through its noise: early steps, and a single step, know nothing of the prompt.
            In autoregression the same stands in place of draws, which for a prefix is exact.
    Guided  guidance (2207.12598): predictions with the prompt, p_c, taken further away from those without, p_u,

                p ~ p_c^w p_u^(1 - w) = p_u (p_c / p_u)^w

            token by token, in logits, so that p is a distribution at every w. Where one token is to be written, p_c and p_u are
            its laws times the same evidence of its noise. So p is the posterior of the law p(y | given)^w p(y)^(1-w), and that
            law is written. w = 1 is Shown itself, in one call; any other value costs a second call.

`sample` puts the given tokens into what any sampler returns, so that they come back as they were given.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from flowlm.maths.vocab import Head
from flowlm.models.network import Network, Params
from flowlm.objectives.base import Batch, Family
from flowlm.system.settings import setting

UNKNOWN = -1
# Logit of every other token where one is given: its probability is 0 in float32 at any temperature, and no difference is infinite.
NEVER = -1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompted(Family):
    """A family that can be trained with prompts.

    Attributes:
      prompts: share of the rows that show a random part of their text clean.
      prompt_guidance: w, how far the sampler goes from what it would write without the prompt: 0 is without it, 1 with it, and
        above 1 beyond.
    """

    prompts: float = setting(
        0.0, "share of the rows that show parts of their text clean, so that a prompt can be followed", "[0, 1]"
    )
    prompt_guidance: float = setting(
        1.0, "sampler: above 1, away from what is written without the prompt", "[0, inf)", note="1: none"
    )

    def __post_init__(self):
        super().__post_init__()
        knows_both = self.prompts < 1 if self.prompts > 0 else self.conditions == "shown"
        if self.prompt_guidance != 1 and not knows_both:
            raise ValueError(
                f"objective.prompt_guidance {self.prompt_guidance:g} needs a run that learnt to write with and without a prompt, "
                f"and this one's objective.prompts is {self.prompts:g}: leave it out, or take a run with a share between 0 and 1"
            )


# --- training ----------------------------------------------------------------------------------------------------


def drawn(key: jax.Array, ids: jax.Array, share: float) -> jax.Array:
    """`given` [B, L] of rows ids [B, L], of which about the share `share` gives a part; the others give nothing.

    A row gives its first token, which no text leaves open, and of the L - 1 others a number from 0 to L - 2 that is drawn
    uniformly: the first ones (a prefix), the last ones (a suffix), a span that goes on at the row's beginning where it comes to
    its end (a span, or all but one), or scattered ones.
    """
    num, length = ids.shape
    behind = jnp.arange(length - 1)

    def shown(key):
        whether, kind, size, place, order = jax.random.split(key, 5)
        start = jax.random.randint(place, (), 0, length - 1)
        ranks = behind, behind[::-1], (behind - start) % (length - 1), jax.random.permutation(order, length - 1)
        rank = jnp.stack(ranks)[jax.random.randint(kind, (), 0, len(ranks))]
        count = jax.random.randint(size, (), 0, length - 1)
        return jax.random.bernoulli(whether, share) & jnp.append(True, rank < count)

    return jnp.where(jax.vmap(shown)(jax.random.split(key, num)), ids, UNKNOWN)


def prompted(net: Network, batch: Batch) -> Network:
    """The network as a loss sees it for the rows of `batch`: the same where none has a prompt."""
    return Shown(net, batch["given"]) if "given" in batch else net


def asked(tokens: jax.Array, batch: Batch) -> jax.Array:
    """bool [B, L]: those of `tokens` that the rows of `batch` do not give."""
    return tokens & (batch["given"] == UNKNOWN) if "given" in batch else tokens


def mean(values: jax.Array, batch: Batch) -> jax.Array:
    """The mean [B] of values [B, L] over the tokens that a row of `batch` does not give."""
    if "given" not in batch:
        return values.mean(-1)
    rest = batch["given"] == UNKNOWN
    return jnp.where(rest, values, 0).sum(-1) / jnp.maximum(rest.sum(-1), 1)


# --- sampling ----------------------------------------------------------------------------------------------------


def check(family: Family, given: np.ndarray) -> None:
    """Raises ValueError if rows of given [B, L] are no prompts for the family: autoregression takes prefixes alone."""
    known = given != UNKNOWN
    if family.conditions == "prefix" and (known[:, 1:] > known[:, :-1]).any():
        raise ValueError(
            "an autoregressive model goes on from a prefix, and a prompt gives text behind a gap: write `TEXT ...`, or take a run "
            "of another family"
        )


def knowing(family: Family, net: Network, given: jax.Array) -> Network:
    """The network as the family's samplers see it for rows of given [B, L]."""
    if family.prompt_guidance != 1:
        return Guided(net, given, family.prompt_guidance)
    return (Shown if family.prompts > 0 or family.conditions == "shown" else Told)(net, given)


def sample(family: Family, net: Network, params: Params, key: jax.Array, given: jax.Array, steps: int) -> jax.Array:
    """ids [B, L] by `family.sample`, with the tokens of given [B, L] among them."""
    ids = family.sample(knowing(family, net, given), params, key, given.shape[0], steps)
    return jnp.where(given == UNKNOWN, ids, given)


# --- networks ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Knowing(Network):
    """A network that knows given tokens.

    Attributes:
      net: the network that does not.
      given: ids [B, L], or UNKNOWN, of the rows that it is called for.
    """

    net: Network
    given: jax.Array

    @property
    def vocab(self) -> int:
        """V."""
        return self.net.vocab

    @property
    def length(self) -> int:
        """L."""
        return self.net.length

    @property
    def width(self) -> int:
        """D."""
        return self.net.width


class Shown(_Knowing):
    """A network that sees given tokens clean, whatever the state has in their place."""

    def _showing(self, params, z):
        known = self.given != UNKNOWN
        clean = self.embed(params, jnp.maximum(self.given, 0))
        return {**params, "known": known}, jnp.where(known[..., None], clean, z)

    def apply(
        self,
        params: Params,
        z: jax.Array,
        tau_s: jax.Array,
        tau_t: jax.Array | None = None,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """hidden [B, L, F]; what the network makes of given positions themselves has no meaning."""
        return self.net.apply(*self._showing(params, z), tau_s, tau_t, keys)

    def weak(
        self, params: Params, z: jax.Array, tau_s: jax.Array, tau_t: jax.Array | None, keys: jax.Array
    ) -> jax.Array:
        """`apply` with more dropout."""
        return self.net.weak(*self._showing(params, z), tau_s, tau_t, keys)

    def head(self, params: Params) -> Head:
        """The network's own."""
        return self.net.head(params)


@dataclasses.dataclass(frozen=True)
class Guided(_Knowing):
    """A network whose logits are those of `Shown`, taken further from the network's own. Its hidden states are both, side by side.

    Its own call knows nothing of the prompt. Where there is a mask, given positions are masked in it. Elsewhere the sampler writes
    there what it would without the prompt, because the network has learnt to read rows that are noised as a whole.

    Attributes:
      guidance: w, at least 0.
    """

    guidance: float

    def apply(
        self,
        params: Params,
        z: jax.Array,
        tau_s: jax.Array,
        tau_t: jax.Array | None = None,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """hidden [B, L, 2 F], by two calls of the network; at given positions both halves are of the call without the prompt."""
        known = (self.given != UNKNOWN)[..., None]
        shown = Shown(self.net, self.given).apply(params, z, tau_s, tau_t, keys)
        if self.embedding(params).shape[0] > self.vocab:
            z = jnp.where(known, self.embed(params, jnp.full_like(self.given, self.vocab)), z)
        without = self.net.apply(params, z, tau_s, tau_t, keys)
        return jnp.concatenate([jnp.where(known, without, shown), without], -1)

    def head(self, params: Params) -> Head:
        """log p_u + w (log p_c - log p_u), but for a constant."""
        return Partial(functools.partial(_guided, self.guidance), self.net.head(params))


class Told(_Knowing):
    """A network that predicts given tokens with certainty. Its hidden states have one number more, the given id."""

    def apply(
        self,
        params: Params,
        z: jax.Array,
        tau_s: jax.Array,
        tau_t: jax.Array | None = None,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """hidden [B, L, F + 1]."""
        return _telling(self.net.apply(params, z, tau_s, tau_t, keys), self.given)

    def weak(
        self, params: Params, z: jax.Array, tau_s: jax.Array, tau_t: jax.Array | None, keys: jax.Array
    ) -> jax.Array:
        """`apply` with more dropout."""
        return _telling(self.net.weak(params, z, tau_s, tau_t, keys), self.given)

    def head(self, params: Params) -> Head:
        """The network's own, but for positions that are given."""
        return Partial(_certain, self.net.head(params))

    def empty_cache(self, num: int) -> dict[str, jax.Array]:
        """The network's own."""
        return self.net.empty_cache(num)

    def decode(self, params: Params, cache: dict, ids: jax.Array) -> tuple[dict, jax.Array]:
        """(cache, hidden [B, 1, F + 1]) of the next token, which is given or not."""
        cache, hidden = self.net.decode(params, cache, ids)
        return cache, _telling(hidden, jax.lax.dynamic_slice_in_dim(self.given, cache["position"], 1, 1))


def _guided(guidance, head, hidden):
    shown, without = (head(half) for half in jnp.split(hidden, 2, -1))
    return without + guidance * (shown - without)


def _telling(hidden, given):
    return jnp.concatenate([hidden, given[..., None].astype(jnp.float32)], -1)


def _certain(head, hidden):
    logits, given = head(hidden[..., :-1]), hidden[..., -1:]
    told = jnp.where(given == jnp.arange(logits.shape[-1]), 0.0, NEVER)
    return jnp.where(given == UNKNOWN, logits, told)
