"""The flow as it is usually written, with noise, state and logits over the whole vocabulary. flowlm is measured against it."""

import jax
import jax.numpy as jnp

from flowlm.models.network import Network, Params
from flowlm.objectives.base import Auxiliary, Batch, Losses
from flowlm.objectives.flow import Flow


def _noise(net, keys) -> jax.Array:
    """x0 ~ N(0, I_V): [B, L, V] for keys [B]."""
    return jax.vmap(lambda row: jax.random.normal(row, (net.length, net.vocab)))(keys)


class DenseFlow(Flow):
    """`Flow` whose noise, state and logits have shape [B, L, V]. It takes the gaussian prior and learns by cross-entropy."""

    def loss(self, net: Network, params: Params, aux: Auxiliary, batch: Batch, keys: jax.Array | None) -> Losses:
        del aux
        ids, t = batch["ids"], self.warp.t(batch["tau"])[:, None, None]
        x = (1 - t) * _noise(net, batch["noise"]) + t * jax.nn.one_hot(ids, net.vocab)
        hidden = net.apply(params, net.embed(params, x), batch["tau"], keys=keys)
        log_probs = jax.nn.log_softmax(net.unembed(params, hidden))
        return {"cross_entropy": -jnp.take_along_axis(log_probs, ids[..., None], -1).mean((1, 2))}, {}


def dense_sample(net: Network, params: Params, key: jax.Array, num: int) -> jax.Array:
    """ids [num, L] with the law of `FlowMap.sample` in one step, by x0 and logits of shape [num, L, V].

    The prior is gaussian. There is no softmax, because the argmax of the logits is the same, and so this is faster.
    """
    z, time = net.embed(params, _noise(net, jax.random.split(key, num))), jnp.zeros((num,))
    return jnp.argmax(net.unembed(params, net.apply(params, z, time, time + 1)), -1).astype(jnp.int32)
