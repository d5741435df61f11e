"""A denoiser over warped time, however it is trained: its noise, its held-out cross-entropy, its likelihood bound, its sampler.

    bound   -log p(tokens) <= int_0^{t_max} 1/2 SNR'(t) E |(E_y - m) G^{-1/2}|^2 dt + E[ -log D_{t_max}(z_{t_max})[tokens] ]

with SNR = r^2, r = t / (1 - t). The right side is an upper bound for any denoiser, because the path of z is a Gaussian
diffusion in the metric of G = E^T E (2605.07820 has the case of one-hot data). The estimate has the explicit weight
r_max * r, because r is drawn uniformly.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from flowlm.maths import vocab
from flowlm.maths.interpolant import interpolate, own_position_features, own_position_matrix
from flowlm.maths.prior import HIGHEST, Dirichlet, Gaussian, geometry
from flowlm.maths.time_sampling import stratified
from flowlm.maths.time_warp import TimeWarp
from flowlm.models.network import Network, Params
from flowlm.objectives.base import Batch, Family, Walk, check_steps
from flowlm.objectives.guidance import Predictor
from flowlm.objectives.prompts import Prompted
from flowlm.system.settings import setting

# Embedded warped time of t_max, at which the bound's integral ends and its decoder term is taken.
TAU_MAX = 0.9999


@dataclasses.dataclass(frozen=True)
class NoisePath(Family):
    """A family whose states lie on a path from a prior's noise to embedded tokens.

    Attributes:
      prior: law of the noise.
      warp: warped time tau of that noise.
    """

    continuous: ClassVar[bool] = True

    prior: Gaussian | Dirichlet
    warp: TimeWarp

    def noised(self, embedding: jax.Array, batch: Batch, t: jax.Array, joint: bool = False) -> jax.Array:
        """z_t [B, L, W] of batch = {ids [B, L], noise: key [B]} at times t [B].

        Args:
          embedding: [V, W], one embedding or, with `joint`, two side by side that share their noise.
        """
        draw = self.prior.sample_joint if joint else self.prior.sample
        z0 = draw(batch["noise"], embedding, batch["ids"].shape[1])
        return interpolate(z0, embedding[batch["ids"]], t[:, None, None])

    def fresh(self, net: Network, params: Params, key: jax.Array, num: int, scale: float) -> jax.Array:
        """z0 [num, L, D] for a sampler; its distance from the prior's mean is multiplied by `scale`."""
        embedding, mean = net.embedding(params), self.prior.mean(net.embedding(params))
        z0 = self.prior.draw(self.noise_keys(key, num), embedding, net.geometry(params), net.length)
        return mean + scale * (z0 - mean)

    def noise_keys(self, key: jax.Array, num: int) -> jax.Array:
        """Keys [num] of the noise that a sampler begins at."""
        return jax.random.split(key, num)


@dataclasses.dataclass(frozen=True)
class Denoiser(NoisePath):
    """A path and a network that denoises it; the network at tau_t = tau_s is the denoiser D_t."""

    def likelihoods(self) -> dict[str, Callable]:
        """`denoising`, `context_free`, and `bound` if the prior is gaussian, because only then the path is a Gaussian diffusion."""
        bound = {"bound": self.bound} if self.prior.name == "gaussian" else {}
        return {"denoising": self.denoising, "context_free": self.context_free} | bound

    def bound(self, net: Network, params: Params, batch: Batch, key: jax.Array) -> jax.Array:
        """An unbiased estimate, one per row, of an upper bound on -log p(ids): nats [B] for batch = {ids [B, L]}."""
        if self.prior.name != "gaussian":
            raise ValueError(f"the likelihood bound needs the gaussian prior, not {self.prior.name!r}")
        num = batch["ids"].shape[0]
        ratio_key, noise_key, last_key = jax.random.split(key, 3)
        embedding, head = net.embedding(params), net.head(params)
        # For V > D the ambient warp saturates while the embedded state is still noisy, so t_max uses the embedded warp.
        t_max = TimeWarp("gaussian", "embedded", net.vocab, net.width).t(TAU_MAX)
        ratio_max = t_max / (1 - t_max)
        ratio = ratio_max * stratified(ratio_key, num)

        def posterior(keys, t):
            z = self.noised(embedding, {"ids": batch["ids"], "noise": keys}, t)
            return net.apply(params, z, self.warp.tau(t))

        hidden = posterior(jax.random.split(noise_key, num), ratio / (1 + ratio))
        miss = net.embed(params, batch["ids"]) - vocab.softmax_embed(head, hidden, embedding)
        miss = jnp.matmul(miss, geometry(embedding).whiten, precision=HIGHEST)
        path = ratio_max * ratio * jnp.sum(miss**2, (1, 2))
        last = posterior(jax.random.split(last_key, num), jnp.full((num,), t_max))
        return path + vocab.cross_entropy(head, last, batch["ids"]).sum(-1)

    def denoising(self, net: Network, params: Params, batch: Batch, key: jax.Array, tau: float) -> jax.Array:
        """Cross-entropy of the denoiser at one warped time, whatever its training loss was: nats per token [B]."""
        num = batch["ids"].shape[0]
        batch = {**batch, "noise": jax.random.split(key, num)}
        tau = jnp.full((num,), tau)
        hidden = net.apply(params, self.noised(net.embedding(params), batch, self.warp.t(tau)), tau)
        return vocab.cross_entropy(net.head(params), hidden, batch["ids"]).mean(-1)

    def context_free(
        self, net: Network, params: Params, batch: Batch, key: jax.Array, tau: float, log_marginals: jax.Array
    ) -> jax.Array:
        """`denoising` by the best classifier that reads each position alone, softmax( log p(v at position l) + log-likelihood ).

        With the same key it sees the same noise as `denoising`.

        Args:
          log_marginals: [L, V] log p(v at position l) in the training data.
        """
        num = batch["ids"].shape[0]
        batch = {**batch, "noise": jax.random.split(key, num)}
        t = self.warp.t(jnp.full((num,), tau))
        geo = geometry(net.embedding(params))
        features = own_position_features(geo, self.noised(net.embedding(params), batch, t), t)
        # The position is a one-hot feature, and log_marginals a block of the matrix, so that one product adds both terms.
        positions = jnp.broadcast_to(jnp.eye(net.length), (num, net.length, net.length))
        matrix = jnp.concatenate([own_position_matrix(geo), log_marginals], 0)
        head = jax.tree_util.Partial(_linear, matrix)
        return vocab.cross_entropy(head, jnp.concatenate([features, positions], -1), batch["ids"]).mean(-1)


@dataclasses.dataclass(frozen=True)
class PathSampler(Denoiser, Prompted):
    """A denoiser that writes text: `steps` network calls move noise along the path, on a uniform grid of tau.

    Attributes:
      noise_scale: factor on every draw of noise; below 1, samples are less diverse and more coherent (compare the truncated latents
        of 1809.11096).
      guidance: 1 samples the network itself; above 1, samples move away from the same network with dropout (2406.02507).
    """

    any_steps: ClassVar[bool] = True

    noise_scale: float = setting(
        1.0, "sampler: size of every draw of noise; below 1 less diverse and more coherent", "(0, 1]"
    )
    guidance: float = setting(
        1.0, "sampler: above 1, away from the same network with dropout", "[0, inf)", note="1: none"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.guidance != 1 and self.prompt_guidance != 1:
            raise ValueError("objective.guidance and objective.prompt_guidance both mix predictions: set only one")

    def begin(self, net: Network, params: Params, key: jax.Array, num: int) -> jax.Array:
        """The noise at which a sampler begins, [num, L, D]."""
        return self.fresh(net, params, key, num, self.noise_scale)

    @abc.abstractmethod
    def step(self, net: Network, params: Params, predict: Predictor, num: int) -> Callable:
        """The function (z [num, L, D], (tau, tau_next, key)) -> (z at tau_next, the prediction that moved it there)."""

    @abc.abstractmethod
    def end(self, predict: Predictor, z: jax.Array, tau: jax.Array, key: jax.Array) -> jax.Array:
        """ids [num, L] from states z by the last network call; tau [num] is the grid's last value before 1."""

    def sample(self, net: Network, params: Params, key: jax.Array, num: int, steps: int) -> jax.Array:
        """ids [num, L] by exactly `steps` network calls. Raises ValueError for fewer than 1, unless they are traced."""
        return self.walk(net, params, key, num, steps).finished(steps)

    def trajectory(self, net: Network, params: Params, key: jax.Array, num: int, steps: int) -> jax.Array:
        """ids [steps, num, L]: the likeliest tokens at each call of `sample` with the same key; the last are its samples."""
        walk = self.walk(net, params, key, num, steps)
        z, ids = jax.lax.scan(walk.move, walk.start, jnp.arange(steps - 1))
        return jnp.concatenate([ids, walk.end(z)[None]])

    def walk(self, net: Network, params: Params, key: jax.Array, num: int, steps: int) -> Walk:
        """`sample` a network call at a time; its state is z [num, L, D]."""
        check_steps(steps)
        params = net.prepared(params)
        predict = Predictor(net, params, self.guidance)
        start, rest = jax.random.split(key)
        z = self.begin(net, params, start, num)
        step = self.step(net, params, predict, num)

        # Times and keys of a call follow from its number, so that a program need not know how many there will be.
        def move(z, i):
            z, prediction = step(z, (i / steps, (i + 1) / steps, jax.random.fold_in(rest, i)))
            return z, prediction.argmax()

        def end(z):
            last = jnp.asarray(steps - 1)
            return self.end(predict, z, jnp.full((num,), last / steps), jax.random.fold_in(rest, last))

        return Walk(z, move, end)


def _linear(matrix, features):
    return jnp.matmul(features, matrix, precision=HIGHEST)
