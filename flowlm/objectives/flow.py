"""The flow language model, FLM (2602.16813): a denoiser trained by cross-entropy, sampled by integrating its velocity.

loss    -log D_t(z_t)[token], averaged over positions; tau ~ U[0, 1] stratified over the global batch, no time weight
sample  N steps of the path's own dynamics on a uniform grid of tau (interpolant.ancestral_step); argmax at the end
"""

import dataclasses

import jax
import jax.numpy as jnp

from flowlm import vocab
from flowlm.interpolant import MIN_NOISE, ancestral_step
from flowlm.objectives.denoiser import Denoiser
from flowlm.objectives.guidance import Prediction, Predictor
from flowlm.time_sampling import stratified

LOSSES = {"cross_entropy": vocab.cross_entropy, "squared_error": vocab.squared_error, "velocity": vocab.squared_error}


@dataclasses.dataclass(frozen=True)
class Flow(Denoiser):
    """Attributes:
    loss_kind: `cross_entropy`, or the ablations `squared_error` on the posterior and `velocity`, that of the velocity it
      implies: |b - (x1 - x0)|^2 = |D - x1|^2 / (1 - t)^2.
    eta: sampler noise in [0, 1]; 0 is Euler's method, 1 the exact ancestral step (gaussian prior).
    temperature: None puts the mean embedding of the posterior into a step; a number puts that of one token drawn from
      softmax(logits / temperature) there (2605.13681), at 0 the likeliest.
    noise_scale: below 1 every draw of noise is that much smaller in sampling: less diverse and more coherent, as the
      truncated latents of 1809.11096.
    guidance: 1 samples the network itself; more moves away from the same network with dropout (autoguidance, 2406.02507).
    """

    loss_kind: str = "cross_entropy"
    eta: float = 1.0
    temperature: float | None = None
    noise_scale: float = 1.0
    guidance: float = 1.0

    def __post_init__(self):
        if self.loss_kind not in LOSSES:
            raise ValueError(f"unknown objective.loss {self.loss_kind!r}: choose one of {sorted(LOSSES)}")
        if self.eta > 0 and self.prior.name != "gaussian":
            raise ValueError(
                f"the ancestral sampler needs the gaussian prior, not {self.prior.name!r}: set objective.eta to 0"
            )
        if self.temperature is not None and self.guidance != 1:
            raise ValueError("objective.temperature draws tokens, objective.guidance mixes posteriors: set only one")

    def draw(self, key: jax.Array, num: int) -> dict[str, jax.Array]:
        """The random part of a global batch of num rows: tau [num], and a noise key for every row."""
        times, noise = jax.random.split(key)
        return {"tau": stratified(times, num), "noise": jax.random.split(noise, num)}

    def loss(self, net, params, aux, batch, keys):
        """({name: per-example loss [B]}, {name: per-example metric [B]}) for batch = {ids [B, L]} | draw(...).

        `aux` carries teachers for families that have one; unused here. `keys` [B] are for dropout alone, or None.
        """
        del aux
        t = self.warp.t(batch["tau"])
        hidden = net.apply(params, self.noised(net.embedding(params), batch, t), batch["tau"], keys=keys)
        per_row = LOSSES[self.loss_kind](net.head(params), hidden, batch["ids"]).mean(-1)
        if self.loss_kind == "velocity":
            per_row = per_row / jnp.maximum(1 - t, MIN_NOISE) ** 2
        loss = net.weighted(params, per_row, batch["tau"], batch["tau"])
        return {self.loss_kind: loss}, {}

    def sample(self, net, params, key, num: int, steps: int) -> jax.Array:
        """ids [num, L] by exactly `steps` network calls on a uniform grid of tau, the last of which is decoded by argmax."""
        return self._sample(net, params, key, num, steps, lambda prediction: None)[1]

    def trajectory(self, net, params, key, num: int, steps: int) -> jax.Array:
        """The likeliest tokens at every call of `sample` with the same key, ids [steps, num, L]; the last are its samples."""
        seen, ids = self._sample(net, params, key, num, steps, Prediction.argmax)
        return jnp.concatenate([seen, ids[None]])

    def _sample(self, net, params, key, num: int, steps: int, look):
        """(look(prediction) of all calls but the last, stacked; ids)."""
        if steps < 1:
            raise ValueError(f"sampling takes at least 1 step, got {steps}")
        params = net.prepared(params)
        embedding, predict = net.embedding(params), Predictor(net, params, self.guidance)
        start, rest = jax.random.split(key)
        z = self.fresh(net, params, start, num, self.noise_scale)
        tau = jnp.linspace(0.0, 1.0, steps + 1)

        def step(z, inputs):
            tau, tau_next, key = inputs
            token_key, fresh_key, weak_key = jax.random.split(key, 3)
            prediction = predict(z, jnp.full((num,), tau), key=weak_key)
            if self.temperature is None:
                mean = prediction.mean(embedding)
            else:
                mean = net.embed(params, prediction.draw(token_key, self.temperature))
            fresh = self.fresh(net, params, fresh_key, num, self.noise_scale) if self.eta > 0 else None
            return ancestral_step(z, mean, fresh, self.warp.t(tau), self.warp.t(tau_next), self.eta), look(prediction)

        # A key for every call, and none of them twice: that of the last is for its dropout alone.
        keys = jax.random.split(rest, steps)
        z, seen = jax.lax.scan(step, z, (tau[:-2], tau[1:-1], keys[:-1]))
        return seen, predict(z, jnp.full((num,), tau[-2]), key=keys[-1]).argmax()
