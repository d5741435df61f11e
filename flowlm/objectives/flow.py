"""The flow language model, FLM (2602.16813): a denoiser trained by cross-entropy, sampled by integrating its velocity.

    loss    -log D_t(z_t)[token], averaged over positions; tau ~ U[0, 1] stratified over the global batch, no time weight
    sample  N steps of the path's own dynamics on a uniform grid of tau (interpolant.ancestral_step); argmax at the end
    bound   -log p(tokens) <= int_0^{t_max} 1/2 SNR'(t) E |(E_y - m) G^{-1/2}|^2 dt + E[ -log D_{t_max}(z_{t_max})[tokens] ]

with SNR = r^2, r = t / (1 - t): the path of z is a Gaussian diffusion in the metric of G = E^T E, so for any denoiser the
right side is an upper bound on the negative log-likelihood (the Gaussian to one-hot case is in 2605.07820). r is drawn
uniformly, hence the explicit weight r_max * r.
"""

import dataclasses

import jax
import jax.numpy as jnp

from flowlm import vocab
from flowlm.interpolant import ancestral_step, interpolate, own_position_features, own_position_matrix
from flowlm.prior import HIGHEST, Dirichlet, Gaussian, geometry
from flowlm.time_sampling import stratified
from flowlm.time_warp import TimeWarp

LOSSES = {"cross_entropy": vocab.cross_entropy, "squared_error": vocab.squared_error}


@dataclasses.dataclass(frozen=True)
class Flow:
    """Attributes:
    prior, warp: the noise and its time warp.
    loss_kind: `cross_entropy`, or the ablation `squared_error` on the posterior.
    eta: sampler noise in [0, 1]; 0 is Euler's method, 1 the exact ancestral step (gaussian prior).
    temperature: None puts the mean embedding of the posterior into a step; a number puts that of one token drawn from
      softmax(logits / temperature) there (2605.13681).
    tau_max: where the bound hands over to the decoder, in embedded warped time.
    """

    prior: Gaussian | Dirichlet
    warp: TimeWarp
    loss_kind: str = "cross_entropy"
    eta: float = 1.0
    temperature: float | None = None
    tau_max: float = 0.9999

    def __post_init__(self):
        if self.loss_kind not in LOSSES:
            raise ValueError(f"unknown objective.loss {self.loss_kind!r}: choose one of {sorted(LOSSES)}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"objective.eta must be in [0, 1], got {self.eta}")
        if self.eta > 0 and self.prior.name != "gaussian":
            raise ValueError(
                f"the ancestral sampler needs the gaussian prior, not {self.prior.name!r}: set objective.eta to 0"
            )

    def draw(self, key: jax.Array, num: int) -> dict[str, jax.Array]:
        """The random part of a global batch of num rows: tau [num], and a noise key for every row."""
        times, noise = jax.random.split(key)
        return {"tau": stratified(times, num), "noise": jax.random.split(noise, num)}

    def _noised(self, net, params, batch, t):
        z0 = self.prior.sample(batch["noise"], net.embedding(params), net.length)
        return interpolate(z0, net.embed(params, batch["ids"]), t[:, None, None])

    def loss(self, net, params, aux, batch, key):
        """({name: per-example loss [B]}, {name: per-example metric [B]}) for batch = {ids [B, L]} | draw(...).

        `aux` carries teachers for families that have one; unused here. `key` is for dropout alone, or None.
        """
        del aux
        z = self._noised(net, params, batch, self.warp.t(batch["tau"]))
        hidden = net.apply(params, z, batch["tau"], key=key)
        per_token = LOSSES[self.loss_kind](net.head(params), hidden, batch["ids"])
        return {self.loss_kind: per_token.mean(-1)}, {}

    def sample(self, net, params, key, num: int, steps: int) -> jax.Array:
        """ids [num, L] by exactly `steps` network calls on a uniform grid of tau, the last of which is decoded by argmax."""
        if steps < 1:
            raise ValueError(f"sampling takes at least 1 step, got {steps}")
        embedding, head = net.embedding(params), net.head(params)
        start, rest = jax.random.split(key)
        z = self.prior.sample(jax.random.split(start, num), embedding, net.length)
        tau = jnp.linspace(0.0, 1.0, steps + 1)

        def step(z, inputs):
            tau, tau_next, key = inputs
            token_key, fresh_key = jax.random.split(key)
            hidden = net.apply(params, z, jnp.full((num,), tau))
            if self.temperature is None:
                mean = vocab.softmax_embed(head, hidden, embedding)
            else:
                mean = net.embed(params, vocab.categorical(head, hidden, token_key, self.temperature))
            # Euler's method needs no noise: the draw is dead code that XLA removes at eta = 0.
            fresh = self.prior.sample(jax.random.split(fresh_key, num), embedding, net.length)
            return ancestral_step(z, mean, fresh, self.warp.t(tau), self.warp.t(tau_next), self.eta), None

        keys = jax.random.split(rest, steps - 1)
        z, _ = jax.lax.scan(step, z, (tau[:-2], tau[1:-1], keys))
        return vocab.argmax(head, net.apply(params, z, jnp.full((num,), tau[-2])))

    def bound(self, net, params, batch, key) -> jax.Array:
        """An unbiased estimate, one per row, of an upper bound on -log p(ids): nats [B] for batch = {ids [B, L]}."""
        if self.prior.name != "gaussian":
            raise ValueError(f"the likelihood bound needs the gaussian prior, not {self.prior.name!r}")
        num = batch["ids"].shape[0]
        ratio_key, noise_key, last_key = jax.random.split(key, 3)
        embedding, head = net.embedding(params), net.head(params)
        # Where V > D ambient time runs out before the state can be decoded; embedded time does not.
        t_max = TimeWarp("gaussian", "embedded", net.vocab, net.width).t(self.tau_max)
        ratio_max = t_max / (1 - t_max)
        ratio = ratio_max * stratified(ratio_key, num)

        def posterior(keys, t):
            z = self._noised(net, params, {"ids": batch["ids"], "noise": keys}, t)
            return net.apply(params, z, self.warp.tau(t))

        hidden = posterior(jax.random.split(noise_key, num), ratio / (1 + ratio))
        miss = net.embed(params, batch["ids"]) - vocab.softmax_embed(head, hidden, embedding)
        miss = jnp.matmul(miss, geometry(embedding).whiten, precision=HIGHEST)
        path = ratio_max * ratio * jnp.sum(miss**2, (1, 2))
        last = posterior(jax.random.split(last_key, num), jnp.full((num,), t_max))
        return path + vocab.cross_entropy(head, last, batch["ids"]).sum(-1)

    def denoising(self, net, params, batch, key, tau: float) -> jax.Array:
        """Cross-entropy of the denoiser at one warped time, whatever it was trained with: nats per token [B]."""
        num = batch["ids"].shape[0]
        batch = {**batch, "noise": jax.random.split(key, num)}
        tau = jnp.full((num,), tau)
        hidden = net.apply(params, self._noised(net, params, batch, self.warp.t(tau)), tau)
        return vocab.cross_entropy(net.head(params), hidden, batch["ids"]).mean(-1)

    def context_free(self, net, params, batch, key, tau: float, log_marginals: jax.Array) -> jax.Array:
        """`denoising` of softmax( log p(v at position l) + own-position log-likelihood ): the best a per-token classifier can do.

        It sees the same noise as `denoising` with the same key.

        Args:
          log_marginals: [L, V] log p(v at position l) of the training data.
        """
        num = batch["ids"].shape[0]
        batch = {**batch, "noise": jax.random.split(key, num)}
        t = self.warp.t(jnp.full((num,), tau))
        geo = geometry(net.embedding(params))
        features = own_position_features(geo, self._noised(net, params, batch, t), t)
        # A position is one more (one-hot) feature and its marginals one more block of the matrix.
        positions = jnp.broadcast_to(jnp.eye(net.length), (num, net.length, net.length))
        matrix = jnp.concatenate([own_position_matrix(geo), log_marginals], 0)
        head = jax.tree_util.Partial(_linear, matrix)
        return vocab.cross_entropy(head, jnp.concatenate([features, positions], -1), batch["ids"]).mean(-1)


def _linear(matrix, features):
    return jnp.matmul(features, matrix, precision=HIGHEST)
