"""The autoregressive model: it writes one token with each network call, and its likelihood is exact.

loss    -log p(token | tokens before it)
sample  begins at the start token; one call for each token, with a cache of keys and values; a prefix that is given is read as it is

The network is causal, reads no time, and predicts at every position the next token.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from flowlm.maths import vocab
from flowlm.models.network import Network, Params, Transformer
from flowlm.objectives.base import Auxiliary, Batch, Family, Losses
from flowlm.system.settings import setting


def forced(net: Network, params: Params, ids: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """hidden [B, L - 1, F] for every token of ids [B, L] but the first, from those before it."""
    return net.apply(params, net.embed(params, ids[:, :-1]), jnp.zeros(ids.shape[0]), keys=keys)


@dataclasses.dataclass(frozen=True)
class Autoregressive(Family):
    """The autoregressive model.

    Attributes:
      start_token: id of the token that begins every row, which is given and never predicted.
      temperature: the sampler draws from softmax(logits / temperature); 0 takes the likeliest token.
      top_p: share of the probability that the sampler's draws keep.
    """

    distils: ClassVar[bool] = False
    needs: ClassVar[dict] = dict(input="raw", causal=True, time_embeddings=0)
    conditions: ClassVar[str] = "prefix"

    start_token: int = setting(
        0, "the tokenizer's start token: a check, as model.vocab_size is", "[0, inf)", key="start"
    )
    temperature: float = setting(1.0, "sampler: of the draws", "[0, inf)", note="0: the likeliest token")
    top_p: float = setting(1.0, "sampler: share of the probability that is kept", "(0, 1]")

    def samplers(self) -> dict[str, "Autoregressive"]:
        """One sampler, with the settings as they are."""
        return {"draws": self}

    def likelihoods(self) -> dict[str, Callable]:
        """`bound`, which here is -log p(ids) itself."""
        return {"bound": self.bound}

    def draw(self, key: jax.Array, num: int) -> Batch:
        """{}, because nothing in the loss is random."""
        return {}

    def nats(self, net: Network, params: Params, ids: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """-log p of every token but the first, nats [B, L - 1], for ids [B, L]."""
        return vocab.cross_entropy(net.head(params), forced(net, params, ids, keys), ids[:, 1:])

    def loss(self, net: Network, params: Params, aux: Auxiliary, batch: Batch, keys: jax.Array | None) -> Losses:
        """({cross_entropy: [B]}, {}), nats per predicted token, for batch = {ids [B, L]}."""
        return {"cross_entropy": self.nats(net, params, batch["ids"], keys).mean(-1)}, {}

    def bound(self, net: Network, params: Params, batch: Batch, key: jax.Array) -> jax.Array:
        """-log p(ids) given the start token: nats [B], exact."""
        return self.nats(net, params, batch["ids"]).sum(-1)

    def sample(self, net: Transformer, params: Params, key: jax.Array, num: int, steps: int) -> jax.Array:
        """ids [num, L] by L - 1 network calls. Raises ValueError for another number of steps."""
        if steps != net.length - 1:
            raise ValueError(
                f"an autoregressive sample of {net.length} tokens takes {net.length - 1} steps, got {steps}: set "
                f"evaluation.steps or --steps to {net.length - 1}"
            )
        first = jnp.full((num,), self.start_token, jnp.int32)
        return self.continued(net, params, first, jax.random.split(key, steps))

    def continued(self, net: Transformer, params: Params, first: jax.Array, keys: jax.Array) -> jax.Array:
        """ids [num, L] that go on from first [num], by L - 1 network calls.

        Args:
          keys: [L - 1], one for each call, or [L - 1, num], one for each row too.
        """
        head = net.head(params)

        def step(carry, key):
            cache, ids = carry
            cache, hidden = net.decode(params, cache, ids)
            ids = vocab.categorical(head, hidden, key, self.temperature, self.top_p)[:, 0]
            return (cache, ids), ids

        _, ids = jax.lax.scan(step, (net.empty_cache(first.shape[0]), first), keys)
        return jnp.concatenate([first[:, None], ids.T], 1)
