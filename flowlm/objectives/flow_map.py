"""The flow map language model, FMLM (2602.16813), and every published objective that learns a flow map of text.

A network delta(z; tau_s, tau_t) learns to jump along a flow from s to t (identities.py has the algebra, targets.py the targets):

    diagonal rows      s = t        cross-entropy to the teacher's denoiser; without a teacher, to the tokens
    off-diagonal rows  s < t        one of TARGETS, 1/32 of them by default at the boundary (tau_s, tau_t) = (0, 1)

    psd, psd_squared   semigroup    the map's own two jumps, s to u and u to t; no derivative
    teacher_steps      semigroup    m Euler steps of the teacher's flow; no bootstrap
    lsd, lsd_logit     Lagrangian   how the jump changes with its end t, by the flow there
    csd, ecld          Lagrangian   2602.12233: squared error through the derivative; a cross-entropy that bounds it
    esd, esd_logit     Eulerian     how the jump changes with its start, moved along the flow
    residual                        a two-network map, which one network is fitted to (residual.py: the paper's first version)

    sample  N jumps on a uniform grid of tau, with gamma re-noising between them; N = 1 is one network call

With Lagrangian and Eulerian targets, rows that end at t = 1 learn by the semigroup, because these two identities do not determine
delta there (targets.py).

With `teacher_temperature` the student learns the flow of softmax(logits / temperature) of the teacher, because a single jump cannot
be sharpened by how its tokens are drawn. The teacher is frozen. The student keeps the teacher's embedding, so that both see the
same states. With `train_embedding` each sees the same x_t through its own embedding: a state is
[x_t @ E_student, x_t @ E_teacher].
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from flowlm.maths import identities as flow_map
from flowlm.maths import vocab
from flowlm.maths.identities import Match, transport
from flowlm.maths.time_sampling import PAIRS, pairs, stratified
from flowlm.models.network import Network, Params
from flowlm.objectives import prompts
from flowlm.objectives.base import Auxiliary, Batch, Losses
from flowlm.objectives.denoiser import PathSampler
from flowlm.objectives.guidance import Predictor
from flowlm.objectives.rows import Split, split_of
from flowlm.objectives.targets import TARGETS, Delta, Networks
from flowlm.system.settings import setting


def check_two_times(model: Mapping[str, Any]) -> None:
    """Raises ValueError if a network with the settings `model` cannot learn a flow map."""
    if model["time_embeddings"] != 2:
        raise ValueError("a flow map reads two times: set model.time_embeddings to 2")
    if model["input"] == "posterior":
        raise ValueError(
            "a flow map is a function of the noise, and model.input posterior does not show it at s = 0: use both or white"
        )


@dataclasses.dataclass(frozen=True)
class FlowMap(PathSampler):
    """The flow map: jumps along a flow, learnt from a teacher or from themselves.

    Attributes:
      teacher: whether there is a teacher.
      target: what off-diagonal rows learn, one of TARGETS.
      targets_from: `student` or `ema`, whose delta makes the semigroup targets, and without a teacher whose denoiser is the flow.
      diagonal: share of rows with s = t, a fraction with a denominator of at most 16.
      boundary: share of the off-diagonal rows with (tau_s, tau_t) = (0, 1).
      pairs: how the times of all other off-diagonal rows are drawn (time_sampling.PAIRS).
      tau_max: upper end of tau_t of these other rows.
      cut: where u lies, at the `midpoint` of tau_s and tau_t or `uniform` between them.
      teacher_steps: m of the target `teacher_steps`.
      known: whether a sampler begins at the noise that training saw, of which there are `noises` draws.
      noises: number of draws of noise that rows begin at, again and again; 0 means that every row has fresh noise.
      teacher_temperature: the student follows the flow of softmax(logits / temperature) of the teacher.
      adaptive: exponent r of the weight sg(|q - p|^2 + c)^-r of each row; 0 means no weight.
      surgery: whether to project the off-diagonal gradient off the diagonal one where they conflict (2604.09784; engine/state.py).
      train_embedding: whether a student trains its embedding; False keeps the teacher's. Without a teacher it is always trained.
      gamma: the sampler's re-noising: 0 adds no fresh noise between its steps, 1 replaces all old noise by fresh.
      temperature: the sampler's last step takes the argmax if this is None, and otherwise draws from softmax(logits / temperature).
      top_p: share of the probability that these draws keep.
    """

    teacher: bool = False
    known: bool = False
    target: str = setting("psd", "what off-diagonal rows learn", choices=TARGETS)
    targets_from: str = setting("student", "whose delta targets are made of", choices=("student", "ema"))
    diagonal: float = setting(0.5, "share of the rows with s = t", "[0, 1)")
    boundary: float = setting(1 / 32, "share of the other rows with (s, t) = (0, 1)", "[0, 1]")
    pairs: str = setting("uniform_diff", "how the times of the others are drawn", choices=PAIRS)
    tau_max: float = setting(1.0, "upper end of the others' tau_t", "(0, 1]")
    cut: str = setting("midpoint", "where a semigroup target cuts a jump", choices=("midpoint", "uniform"))
    teacher_steps: int = setting(4, "Euler steps of the target of that name", "[1, inf)")
    noises: int = setting(0, "draws of noise that rows begin at, again and again", "[0, inf)", note="0: fresh ones")
    teacher_temperature: float = setting(
        1.0, "below 1 the flow of softmax(logits / temperature): less diverse and more coherent", "(0, inf)"
    )
    adaptive: float = setting(0.0, "exponent of the adaptive weight", "[0, inf)", note="0: none")
    surgery: bool = setting(False, "project conflicting gradients")
    train_embedding: bool = setting(False, "train the student's embedding too")
    gamma: float = setting(0.0, "sampler: re-noising between steps, 0 none to 1 all", "[0, 1]")
    top_p: float = setting(1.0, "sampler: share of the probability of drawn tokens that is kept", "(0, 1]")
    temperature: float | None = setting(
        None,
        "sampler: of tokens drawn in place of the argmax",
        "[0, inf)",
        note="0: the likeliest token, None: no draw",
        optional=float,
    )

    def __post_init__(self):
        super().__post_init__()
        split_of(self.diagonal, "diagonal", below=True)
        if TARGETS[self.target].follows and not self.teacher:
            raise ValueError(f"objective.target {self.target} follows a teacher: give --config.teacher=RUNDIR")
        if self.teacher_temperature != 1 and (not self.teacher or self.target == "residual"):
            raise ValueError(
                "objective.teacher_temperature sharpens a frozen flow: it needs --config.teacher and another target than residual, "
                "whose first stage learnt the flow as it is"
            )
        if self.target == "esd_logit" and self.tau_max == 1:
            raise ValueError(
                "objective.target esd_logit is singular at t = 1: set objective.tau_max below 1, such as 0.99, or use the "
                "stable form, esd"
            )

    def check(self, family: str, model: Mapping[str, Any]) -> None:
        """Also raises ValueError if the network does not read two times, or not the noise."""
        check_two_times(model)
        super().check(family, model)

    def samplers(self) -> dict[str, "FlowMap"]:
        """`map`, which uses all of the noise; with `noises` also `map-known`, which begins at the noise that training saw; and a
        sampler that follows the settings if noise_scale is not 1.
        """
        scale = f"-noise{self.noise_scale:g}" if self.noise_scale != 1 else ""
        full = dataclasses.replace(self, noise_scale=1.0)
        known = {"map-known": dataclasses.replace(full, known=True)} if self.noises else {}
        return known | {"map": full} | {f"map{scale}": self}

    def noise_keys(self, key: jax.Array, num: int) -> jax.Array:
        """Keys [num] of the noise that a sampler begins at."""
        return known_keys(key, num, self.noises) if self.known else super().noise_keys(key, num)

    @property
    def _split(self) -> Split:
        return split_of(self.diagonal, "diagonal")

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the losses whose gradients surgery needs separately; without surgery the sum alone."""
        names = ("diagonal", self.target) if self.diagonal > 0 else (self.target,)
        return names if self.surgery else ("loss",)

    @property
    def differentiates(self) -> bool:
        """Whether the target takes forward derivatives of the network."""
        return TARGETS[self.target].differentiates

    @property
    def group(self) -> int:
        """Number of rows that stay together in a microbatch; in each group the first few are diagonal."""
        return self._split.group

    def draw(self, key: jax.Array, num: int) -> Batch:
        """Times and noise keys of a global batch of num rows, a multiple of `group`."""
        on = self._split.count(num)
        off = num - on
        boundary = round(off * self.boundary)
        keys = jax.random.split(key, 4)
        tau_s, tau_t = pairs(keys[0], off, boundary, self.pairs, self.tau_max)
        share = 0.5 if self.cut == "midpoint" else jax.random.uniform(keys[1], (off,))
        same = stratified(keys[2], on) if on else jnp.zeros((0,))
        join = self._split.join
        return {
            "tau_s": join(same, tau_s),
            "tau_u": join(same, tau_s + share * (tau_t - tau_s)),
            "tau_t": join(same, tau_t),
            "noise": known_keys(keys[3], num, self.noises) if self.noises else jax.random.split(keys[3], num),
        }

    def loss(self, net: Network, params: Params, aux: Auxiliary, batch: Batch, keys: jax.Array | None) -> Losses:
        """({diagonal: [B1], TARGET: [B2]}, metrics) for batch = {ids [B, L]} | draw(...), B1 + B2 = B."""
        embedding = net.embedding(params)
        width = embedding.shape[1]
        if self.teacher and not self.train_embedding:
            embedding = stop_gradient(embedding)
            params = net.with_embedding(params, embedding)
        joint = self.train_embedding and self.teacher
        if joint:
            embedding = jnp.concatenate([embedding, stop_gradient(net.embedding(aux.teacher.flow))], 1)

        on, off = self._split.apart(batch)
        on_keys, off_keys = self._split.apart(keys)
        losses, networks = {}, partial(self._networks, net, params, aux, embedding, width)
        if self.diagonal > 0:
            nets = networks(on)
            z = self.noised(embedding, on, self.warp.t(on["tau_s"]), joint)
            live = nets.live.see(z, on["tau_s"], on["tau_s"], on_keys)
            if self.teacher:
                match = vocab.over_logits(flow_map.diagonal, (live, nets.flow.see(z, on["tau_s"], on["tau_s"])))
                loss = self._adapted(match, on, 1e-2)
            else:
                loss = prompts.mean(vocab.cross_entropy(*live, on["ids"]), on)
            losses["diagonal"] = net.weighted(params, loss, on["tau_s"], on["tau_s"])
        z = self.noised(embedding, off, self.warp.t(off["tau_s"]), joint)
        match = TARGETS[self.target].match(self, networks(off), z, off, off_keys)
        losses[self.target] = net.weighted(params, self._adapted(match, off, 1e-6), off["tau_s"], off["tau_t"])
        return losses, {"distance": prompts.mean(match.distance, off), "clamped": prompts.mean(match.clamped, off)}

    def _networks(self, net, params, aux, embedding, width, rows) -> Networks:
        """What targets are computed from; every one of the networks sees what the rows give."""
        net = prompts.prompted(net, rows)

        def delta(params, side) -> Delta:
            return Delta(lambda z, *args: net.apply(params, z[..., side], *args), net.head(params))

        def frozen(params):
            return delta(params, slice(-width, None))

        mine = slice(0, width)
        model = delta(stop_gradient(params) if self.targets_from == "student" else aux.ema, mine)
        flow = frozen(aux.teacher.flow).tempered(self.teacher_temperature) if self.teacher else model
        residual = frozen(aux.teacher.residual) if self.target == "residual" else None
        return Networks(delta(params, mine), model, flow, residual, stop_gradient(embedding), self.warp)

    def _adapted(self, match: Match, rows: Batch, floor: float) -> jax.Array:
        distance = prompts.mean(match.distance, rows)
        return prompts.mean(match.loss, rows) * (distance + floor) ** -self.adaptive

    def step(self, net: Network, params: Params, predict: Predictor, num: int) -> Callable:
        """A jump to a time beyond tau_next, where only the share of old noise that is kept remains; then gamma of fresh noise."""
        center = self.prior.mean(net.embedding(params))

        def jump(z, inputs):
            tau, tau_next, key = inputs
            fresh_key, weak_key = jax.random.split(key)
            s, sigma = self.warp.t(tau), 1 - self.warp.t(tau_next)
            kept = sigma * (1 - self.gamma**2) ** 0.5
            to = jnp.full((num,), self.warp.tau(1 - kept))
            prediction = predict(z, jnp.full((num,), tau), to, weak_key)
            mean = prediction.mean(net.embedding(params))
            z = transport(z, mean, s, 1 - kept) + (kept - sigma) * mean
            if self.gamma > 0:
                fresh = self.fresh(net, params, fresh_key, num, self.noise_scale)
                z = z + self.gamma * sigma * (fresh - center)
            return z + (sigma - kept) * center, prediction

        return jump

    def end(self, predict: Predictor, z: jax.Array, tau: jax.Array, key: jax.Array) -> jax.Array:
        """The jump to t = 1; its tokens are the likeliest or drawn. It does not depend on gamma."""
        weak_key, token_key = jax.random.split(key)
        prediction = predict(z, tau, jnp.ones_like(tau), weak_key)
        if self.temperature is None:
            return prediction.argmax()
        return prediction.draw(token_key, self.temperature, self.top_p)


def known_keys(key: jax.Array, num: int, noises: int) -> jax.Array:
    """Keys [num] drawn from the same `noises` ones, whatever `key` is; jobs with the same PRNG have the same."""
    first = jax.random.key(0, impl=jax.random.key_impl(key))
    return jax.vmap(jax.random.fold_in, (None, 0))(first, jax.random.randint(key, (num,), 0, noises))
