"""A network's predictions for a sampler, with or without autoguidance (2406.02507).

    p = p_weak + guidance (p_strong - p_weak),   p_weak from the same network with dropout of model.weak_dropout

This guides flow and flow map alike, because a velocity is linear in p. guidance = 1 is the network itself, in one call; any other
value costs a second call. p sums to 1 but may have negative entries, so a draw uses the positive part of p.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flowlm.maths import vocab
from flowlm.models.network import Network, Params


class Prediction(NamedTuple):
    """Distributions over tokens for every position.

    Attributes:
      head: hidden -> logits.
      hidden: (strong,), or (strong, weak) with guidance; each [B, L, F].
      guidance: factor on p_strong - p_weak.
    """

    head: vocab.Head
    hidden: tuple[jax.Array, ...]
    guidance: float

    def _probs(self, fn, arrays=()):
        def mix(*logits_and_arrays):
            strong, weak = (jax.nn.softmax(x) for x in logits_and_arrays[:2])
            return fn(weak + self.guidance * (strong - weak), *logits_and_arrays[2:])

        return vocab.over_logits(mix, tuple((self.head, h) for h in self.hidden), arrays)

    def mean(self, embedding: jax.Array) -> jax.Array:
        """The mean embedding p @ E, [B, L, D], for E [V, D]."""
        means = [vocab.softmax_embed(self.head, h, embedding) for h in self.hidden]
        return means[0] if len(means) == 1 else means[1] + self.guidance * (means[0] - means[1])

    def argmax(self) -> jax.Array:
        """The likeliest tokens, ids [B, L]."""
        if len(self.hidden) == 1:
            return vocab.argmax(self.head, self.hidden[0])
        return self._probs(lambda p: jnp.argmax(p, -1).astype(jnp.int32))

    def draw(self, key: jax.Array, temperature: float = 1.0, top_p: float = 1.0) -> jax.Array:
        """ids [B, L] drawn from p at a temperature (softmax(logits / temperature)), within its `top_p` likeliest share."""
        if len(self.hidden) == 1:
            return vocab.categorical(self.head, self.hidden[0], key, temperature, top_p)
        shape = self.hidden[0].shape[:2]
        keys = jax.random.split(key, shape)

        def draw(p, keys):
            logits = vocab.nucleus(vocab.tempered(jnp.log(jnp.maximum(p, 1e-30)), temperature), top_p)

            def pick(k, x):
                return jax.random.categorical(k, x, mode="high")

            return jax.vmap(jax.vmap(pick))(jax.random.wrap_key_data(keys), logits).astype(jnp.int32)

        return self._probs(draw, (jax.random.key_data(keys),))


class Predictor(NamedTuple):
    """predictor(z, tau_s, tau_t, key) -> Prediction, by one network call, or two where guidance is not 1.

    `key` is for the weak network's dropout. Nothing else may be drawn with it, because that would depend on the dropout.
    """

    net: Network
    params: Params
    guidance: float = 1.0

    def __call__(
        self, z: jax.Array, tau_s: jax.Array, tau_t: jax.Array | None = None, key: jax.Array | None = None
    ) -> Prediction:
        hidden = (self.net.apply(self.params, z, tau_s, tau_t),)
        if self.guidance != 1:
            hidden += (self.net.weak(self.params, z, tau_s, tau_t, jax.random.split(key, z.shape[0])),)
        return Prediction(self.net.head(self.params), hidden, self.guidance)
