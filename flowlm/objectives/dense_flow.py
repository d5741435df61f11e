"""The flow as it is written elsewhere, with noise, state and logits over the whole vocabulary: what flowlm is measured against."""

import jax
import jax.numpy as jnp

from flowlm.objectives.flow import Flow


class DenseFlow(Flow):
    """`Flow` with nothing saved: the noise, the state and the logits have shape [B, L, V]. Gaussian prior, cross-entropy."""

    def loss(self, net, params, aux, batch, keys):
        del aux
        ids, t = batch["ids"], self.warp.t(batch["tau"])[:, None, None]
        x0 = jax.vmap(lambda row: jax.random.normal(row, (net.length, net.vocab)))(batch["noise"])
        x = (1 - t) * x0 + t * jax.nn.one_hot(ids, net.vocab)
        hidden = net.apply(params, net.embed(params, x), batch["tau"], keys=keys)
        log_probs = jax.nn.log_softmax(net.unembed(params, hidden))
        return {"cross_entropy": -jnp.take_along_axis(log_probs, ids[..., None], -1).mean((1, 2))}, {}
