"""The flow language model, FLM (2602.16813): a denoiser trained by cross-entropy, sampled by integrating its velocity.

loss    -log D_t(z_t)[token], averaged over positions; tau ~ U[0, 1] stratified over the global batch, no time weight
sample  N steps of the path's dynamics on a uniform grid of tau (interpolant.ancestral_step); the last step takes the argmax
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from flowlm.maths import vocab
from flowlm.maths.interpolant import MIN_NOISE, ancestral_step
from flowlm.maths.time_sampling import stratified
from flowlm.models.network import Network, Params
from flowlm.objectives import prompts
from flowlm.objectives.base import Auxiliary, Batch, Losses
from flowlm.objectives.denoiser import PathSampler
from flowlm.objectives.guidance import Predictor
from flowlm.system.settings import setting

LOSSES = {"cross_entropy": vocab.cross_entropy, "squared_error": vocab.squared_error, "velocity": vocab.squared_error}


@dataclasses.dataclass(frozen=True)
class Flow(PathSampler):
    """The flow: a denoiser and the integration of its velocity.

    Attributes:
      loss_kind: `cross_entropy`, or one of two ablations: `squared_error` of the posterior, and `velocity`, the squared error of
        the velocity that the posterior implies, |b - (x1 - x0)|^2 = |D - x1|^2 / (1 - t)^2.
      eta: sampler noise in [0, 1]; 0 is Euler's method, 1 the exact ancestral step (gaussian prior).
      temperature: None makes a step with the posterior's mean embedding; a number makes it with the embedding of a token drawn from
        softmax(logits / temperature) (2605.13681), and 0 with that of the likeliest token.
    """

    distils: ClassVar[bool] = False

    loss_kind: str = setting("cross_entropy", "what is learnt", key="loss", choices=LOSSES)
    eta: float = setting(1.0, "sampler: 0 is Euler's method, 1 the ancestral step", "[0, 1]")
    temperature: float | None = setting(
        None,
        "sampler: of tokens drawn in place of the posterior mean",
        "[0, inf)",
        note="0: the likeliest token, None: no draw",
        optional=float,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.eta > 0 and self.prior.name != "gaussian":
            raise ValueError(
                f"the ancestral sampler needs the gaussian prior, not {self.prior.name!r}: set objective.eta to 0"
            )
        if self.temperature is not None and self.guidance != 1:
            raise ValueError("objective.temperature draws tokens, objective.guidance mixes posteriors: set only one")

    def samplers(self) -> dict[str, "Flow"]:
        """`euler`, and a sampler that follows the settings and is named after them."""
        name = "ancestral" if self.eta == 1 else f"eta{self.eta:g}" if self.eta else "euler"
        if self.temperature is not None:
            name += f"-temp{self.temperature:g}"
        if self.noise_scale != 1:
            name += f"-noise{self.noise_scale:g}"
        return {"euler": dataclasses.replace(self, eta=0.0, temperature=None, noise_scale=1.0), name: self}

    def draw(self, key: jax.Array, num: int) -> Batch:
        """{tau: [num], noise: a key for each row [num]}: the random part of a global batch of num rows."""
        times, noise = jax.random.split(key)
        return {"tau": stratified(times, num), "noise": jax.random.split(noise, num)}

    def loss(self, net: Network, params: Params, aux: Auxiliary, batch: Batch, keys: jax.Array | None) -> Losses:
        """({loss_kind: [B]}, {}); the cross-entropy is in nats per token."""
        del aux
        net = prompts.prompted(net, batch)
        t = self.warp.t(batch["tau"])
        hidden = net.apply(params, self.noised(net.embedding(params), batch, t), batch["tau"], keys=keys)
        per_row = prompts.mean(LOSSES[self.loss_kind](net.head(params), hidden, batch["ids"]), batch)
        if self.loss_kind == "velocity":
            per_row = per_row / jnp.maximum(1 - t, MIN_NOISE) ** 2
        loss = net.weighted(params, per_row, batch["tau"], batch["tau"])
        return {self.loss_kind: loss}, {}

    def step(self, net: Network, params: Params, predict: Predictor, num: int) -> Callable:
        """A step of the ancestral dynamics, with the mean embedding of the posterior or the embedding of tokens drawn from it."""
        embedding = net.embedding(params)

        def step(z, inputs):
            tau, tau_next, key = inputs
            token_key, fresh_key, weak_key = jax.random.split(key, 3)
            prediction = predict(z, jnp.full((num,), tau), key=weak_key)
            if self.temperature is None:
                mean = prediction.mean(embedding)
            else:
                mean = net.embed(params, prediction.draw(token_key, self.temperature))
            fresh = self.fresh(net, params, fresh_key, num, self.noise_scale) if self.eta > 0 else None
            return ancestral_step(z, mean, fresh, self.warp.t(tau), self.warp.t(tau_next), self.eta), prediction

        return step

    def end(self, predict: Predictor, z: jax.Array, tau: jax.Array, key: jax.Array) -> jax.Array:
        """The likeliest tokens. Only the weak network's dropout uses the key."""
        return predict(z, tau, key=key).argmax()
