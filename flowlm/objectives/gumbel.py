"""Gumbel coupling: the noise that an autoregressive model writes a text with, and a map that learns to do the same (2610.00497).

The model draws a token as argmax_k (l_k + xi_k), l its logits and xi Gumbel noise, so its text is a function of noise. Of a text
y that noise is known in law. As a race, in which token k arrives at exp(-xi_k) / exp(l_k) and the first one is written, it is a
sum of exponentials, because whoever is not there when the winner is waits anew. With p = softmax(l), and T, f_k ~ Exp(1):

    exp(-xi_k) = p_k T           for k = y
    exp(-xi_k) = p_k T + f_k     for the others

This is the posterior M ~ Gumbel(logsumexp l), xi_y = M - l_y, xi_k = -log(-log(u F(M - l_k))), F(a) = exp(-exp(-a)), without its
logarithms of logarithms: T = exp(logsumexp l - M), f_k = -log u. Where y is the model's, x0 = Phi^-1(exp(-exp(-xi))) is N(0, I_V),
independent of all other positions; where y is data, so far as the model has the data's law. Hence the student's objective:

    z0 = x0 @ E,    loss = cross-entropy of delta_{0,1}(z0) to y,    which a good enough network takes to 0

The first token is given, not drawn: its noise is free. `config.teacher` names the model, which keeps its own network.

    sample  one call: noise to text
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.scipy.special import ndtri

from flowlm.maths import vocab
from flowlm.maths.prior import HIGHEST
from flowlm.models.network import Network, Params
from flowlm.objectives.autoregressive import Autoregressive, forced
from flowlm.objectives.base import Auxiliary, Batch, Losses, Teacher
from flowlm.objectives.denoiser import NoisePath
from flowlm.objectives.flow_map import check_two_times
from flowlm.system.settings import setting

# exp(-xi) is kept between these, so that x0 is finite, at most 13 in size: a token that the model holds for impossible (p_k = 0)
# would lie at infinity, and exp(-100) is no float32.
LEAST, MOST = 1e-37, 80.0


def coupled(logits: jax.Array, ids: jax.Array, waits: jax.Array) -> jax.Array:
    """x0 [..., V] that softmax(logits) [..., V] draws ids [...] with, for waits ~ Exp(1) [..., V + 1]."""
    winner = jax.nn.one_hot(ids, logits.shape[-1], dtype=bool)
    waited = jax.nn.softmax(logits) * waits[..., -1:] + jnp.where(winner, 0, waits[..., :-1])
    waited = jnp.clip(waited, LEAST, MOST)
    # Either tail through the probability that is small there, because float32 has no numbers near 1 to tell it by.
    high = waited < jnp.log(2.0)
    tail = ndtri(jnp.where(high, -jnp.expm1(-waited), jnp.exp(-waited)))
    return jnp.where(high, -tail, tail)


def coupled_states(
    teacher: Teacher, ids: jax.Array, keys: jax.Array, embedding: jax.Array, span: int | None = None
) -> jax.Array:
    """z0 [B, L, D] = x0 @ E of noise that the teacher writes ids [B, L] with, a chunk of positions at a time.

    Args:
      keys: [B], one for each row.
    """
    net, params = teacher.net, teacher.flow
    hidden = jnp.pad(forced(net, params, ids), ((0, 0), (1, 0), (0, 0)))
    embedding = embedding.astype(jnp.float32)
    size = embedding.shape[0]

    def draw(key, at):
        # The gumbel noise has an exact tail, where that of jax.random.exponential is cut at 1e-7 and may be 0.
        return jnp.exp(-jax.random.gumbel(jax.random.fold_in(key, at), (size + 1,), mode="high"))

    def states(logits, ids, position):
        given = jnp.where(jax.nn.one_hot(ids, size, dtype=bool), 0.0, -jnp.inf)
        logits = jnp.where(position[..., None] == 0, given, logits)
        waits = jax.vmap(jax.vmap(draw, (None, 0)))(keys, position)
        return jnp.matmul(coupled(logits, ids, waits), embedding, precision=HIGHEST)

    position = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return vocab.over_logits(states, ((net.head(params), hidden),), (ids, position), span)


@dataclasses.dataclass(frozen=True)
class Gumbel(NoisePath):
    """A one-step map that learns an autoregressive model's texts from the noise that it writes them with.

    Attributes:
      teacher: whether there is one, without which there is nothing to follow.
      texts: whose rows are coupled with noise: of the `data`, or drawn from the `teacher`, one call a token.
      train_embedding: otherwise the embedding stays what it was, such as that of the run `config.init_from`.
    """

    needs: ClassVar[dict] = dict(mask_token=False, loss_weight=False)
    taught_by: ClassVar[type] = Autoregressive

    teacher: bool = False
    texts: str = setting("data", "rows that are coupled with noise: data, or drawn anew", choices=("data", "teacher"))
    train_embedding: bool = setting(True, "train the embedding; otherwise it stays that of --config.init_from")

    def __post_init__(self):
        super().__post_init__()
        if not self.teacher:
            raise ValueError(
                "the family gumbel follows an autoregressive model: give --config.teacher=RUNDIR, the run of one"
            )
        if self.prior.name != "gaussian":
            raise ValueError(
                f"the family gumbel makes normal noise, not {self.prior.name}: set --config.prior=gaussian"
            )

    def check(self, family: str, model: Mapping[str, Any]) -> None:
        """It is a map of two times, and sees all of the noise."""
        check_two_times(model)
        super().check(family, model)
        if model["vocab_size"] > model["width"]:
            raise ValueError(
                f"the family {family} reads the noise of each of model.vocab_size = {model['vocab_size']} tokens, and a state of "
                f"model.width = {model['width']} numbers shows no more than that many: set --config.model.width to at least "
                f"{model['vocab_size']}, or choose a tokenizer of at most {model['width']} tokens"
            )

    def start(self, net: Network, params: Params, teacher: Teacher | None, origin: Params | None) -> Params:
        """A fresh network, or another run: the teacher's is of another kind."""
        return super().start(net, params, None, origin)

    def draw(self, key: jax.Array, num: int) -> Batch:
        """A noise key for every row."""
        return {"noise": jax.random.split(key, num)}

    def loss(self, net: Network, params: Params, aux: Auxiliary, batch: Batch, keys: jax.Array | None) -> Losses:
        """({cross_entropy: [B]}, {}), nats per token, for batch = {ids [B, L], noise: keys [B]}."""
        embedding = net.embedding(params)
        if not self.train_embedding:
            embedding = stop_gradient(embedding)
            params = net.with_embedding(params, embedding)
        ids, (noise, text) = batch["ids"], jnp.moveaxis(jax.vmap(jax.random.split)(batch["noise"]), 1, 0)
        if self.texts == "teacher":
            later = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, net.length - 1))(text), 1, 0)
            ids = Autoregressive().continued(aux.teacher.net, aux.teacher.flow, ids[:, 0], later)
        z = coupled_states(aux.teacher, ids, noise, embedding)
        start = jnp.zeros(len(ids))
        hidden = net.apply(params, z, start, jnp.ones_like(start), keys)
        return {"cross_entropy": vocab.cross_entropy(net.head(params), hidden, ids).mean(-1)}, {}

    def samplers(self) -> dict[str, "Gumbel"]:
        """One, which takes all of the noise."""
        return {"map": self}

    def sample(self, net: Network, params: Params, key: jax.Array, num: int, steps: int) -> jax.Array:
        """ids [num, L] by one network call. Raises ValueError for another number of steps."""
        if steps != 1:
            raise ValueError(
                f"the family gumbel learns the jump from noise to text alone, in one step, got {steps}: set evaluation.steps or "
                "--steps to 1"
            )
        params = net.prepared(params)
        z = self.fresh(net, params, key, num, 1.0)
        start = jnp.zeros(num)
        return vocab.argmax(net.head(params), net.apply(params, z, start, jnp.ones_like(start)))

    def trajectory(self, net: Network, params: Params, key: jax.Array, num: int, steps: int) -> jax.Array:
        """What `sample` writes, ids [1, num, L]."""
        return self.sample(net, params, key, num, steps)[None]
