"""The flow map language model, FMLM (2602.16813), and every published objective that learns a flow map of text.

A network delta(z; tau_s, tau_t) learns to jump along a flow from s to t (flow_map.py has the algebra and the targets):

    diagonal rows      s = t        cross-entropy to the teacher's denoiser; without a teacher, to the tokens
    off-diagonal rows  s < t        one of TARGETS, 1/32 of them by default at the boundary (tau_s, tau_t) = (0, 1)

    psd, psd_squared   semigroup    no derivative; from the map itself, cut at u
    teacher_steps      semigroup    m Euler steps of the teacher's flow; no bootstrap
    lsd, lsd_logit     Lagrangian   where does the flow push at the end of the jump?
    csd, ecld          Lagrangian   2602.12233: squared error through the derivative; a cross-entropy bounding it
    esd, esd_logit     Eulerian     what if the jump began a little later?
    residual           a two-network map, fitted by one (residual.py: the first version of the paper)

    sample  N jumps on a uniform grid of tau, with gamma re-noising between them; N = 1 is one network call

Rows that end at t = 1 learn by the semigroup in all Lagrangian and Eulerian targets: there their identities do not suffice.

With `teacher_temperature` the flow is that of the teacher's softmax(logits / temperature): one jump cannot be sharpened by
drawing, its flow can. The teacher is frozen; the student keeps its embedding, and so sees the same states. With
`train_embedding` both see one x0 through their own embeddings: a state is then [z @ E_student, z @ E_teacher].
"""

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.tree_util import Partial

from flowlm.maths import identities as flow_map
from flowlm.maths import vocab
from flowlm.maths.identities import Match, eulerian_weight, lagrangian_weight, semigroup_weight, transport
from flowlm.maths.time_sampling import PAIRS, pairs, stratified
from flowlm.maths.time_warp import TimeWarp
from flowlm.objectives.denoiser import PathSampler
from flowlm.objectives.guidance import Predictor
from flowlm.system.settings import setting


class Delta(NamedTuple):
    """A network with its parameters, frozen or live, as what it is here: delta(z; tau_s, tau_t).

    Attributes:
      apply: (z, tau_s, tau_t, keys) -> hidden. head: hidden -> logits.
    """

    apply: Callable
    head: vocab.Head

    def see(self, *args) -> tuple[vocab.Head, jax.Array]:
        """(head, hidden), what `vocab.over_logits` reads."""
        return self.head, self.apply(*args)

    def tempered(self, temperature: float) -> "Delta":
        """The same network with softmax(logits / temperature) for its distribution."""
        return self if temperature == 1 else self._replace(head=Partial(_tempered, self.head, temperature))


def _tempered(head, temperature, hidden):
    return head(hidden) / temperature


class Networks(NamedTuple):
    """What a target is made of.

    Attributes:
      live: the student. map: whose delta targets are made of. flow: whose denoiser. residual: g of residual.py, or None.
      embedding: of the joint state. warp: of its time.
    """

    live: Delta
    map: Delta
    flow: Delta
    residual: Delta | None
    embedding: jax.Array
    warp: TimeWarp

    def times(self, rows: dict) -> tuple[jax.Array, ...]:
        """t of the rows' tau_s and tau_t."""
        return self.warp.t(rows["tau_s"]), self.warp.t(rows["tau_t"])

    def mean(self, readout) -> jax.Array:
        """delta @ E of a (head, hidden), in the joint state."""
        return vocab.softmax_embed(*readout[:2], self.embedding)

    def moving(self, z, rows: dict, keys, through: bool):
        """(head, hidden, d/dt hidden) of the live delta_{s,t}; the gradient goes through the derivative or not."""
        _, t = self.times(rows)
        hidden, tangent = flow_map.d_dt(lambda tau: self.live.apply(z, rows["tau_s"], tau, keys), self.warp, t)
        return self.live.head, hidden, tangent if through else stop_gradient(tangent)


def at(time: jax.Array) -> jax.Array:
    """[B] -> [B, 1, 1]."""
    return time[:, None, None]


def _semigroup(match):
    def target(self, nets: Networks, z, rows, keys) -> Match:
        (s, t), u = nets.times(rows), nets.warp.t(rows["tau_u"])
        first = nets.map.see(z, rows["tau_s"], rows["tau_u"])
        middle = transport(z, nets.mean(first), at(s), at(u))
        second = nets.map.see(middle, rows["tau_u"], rows["tau_t"])
        live = nets.live.see(z, rows["tau_s"], rows["tau_t"], keys)
        return vocab.over_logits(match, (live, first, second), (semigroup_weight(s, u, t),))

    return target


def _teacher_steps(self, nets: Networks, z, rows, keys) -> Match:
    (s, t), live = nets.times(rows), nets.live.see(z, rows["tau_s"], rows["tau_t"], keys)
    parts, weights, u = [], [], s
    for i in range(self.teacher_steps):
        tau = rows["tau_s"] + (rows["tau_t"] - rows["tau_s"]) * i / self.teacher_steps
        u_next = nets.warp.t(rows["tau_s"] + (rows["tau_t"] - rows["tau_s"]) * (i + 1) / self.teacher_steps)
        parts.append(nets.flow.see(z, tau, tau))
        weights.append(flow_map.step_weight(s, u, u_next, t))
        z, u = transport(z, nets.mean(parts[-1]), at(u), at(u_next)), u_next
    return vocab.over_logits(flow_map.teacher_steps, (live, *parts), tuple(weights))


def _lagrangian(match, weights=lambda s, t: (lagrangian_weight(s, t),), through=False):
    def target(self, nets: Networks, z, rows, keys) -> Match:
        s, t = nets.times(rows)
        moving = nets.moving(z, rows, keys, through)
        end = stop_gradient(transport(z, nets.mean(moving), at(s), at(t)))
        flow = nets.flow.see(end, rows["tau_t"], rows["tau_t"])
        return vocab.over_logits(match, (moving, flow), weights(s, t))

    return target


def _but_at_end(inside, at_end):
    """`inside`, but rows with t = 1 learn by the semigroup: there the other identities do not tell the right delta from others.

    The Lagrangian one says only that delta is a fixed point of D_1, which every clean text is: cross-entropy to it makes the
    likeliest likelier, so that one step collapses, and csd, whose weights vanish there, has no gradient. The Eulerian says nothing
    (squared form) or is singular (logit form).
    """
    semigroup = _semigroup(at_end)

    def target(self, nets: Networks, z, rows, keys) -> Match:
        match = inside(self, nets, z, rows, keys)
        if self.boundary == 0:
            return match
        ends = rows["tau_t"][:, None] == 1
        return jax.tree.map(lambda a, b: jnp.where(ends, a, b), semigroup(self, nets, z, rows, keys), match)

    return target


def _eulerian(match):
    def target(self, nets: Networks, z, rows, keys) -> Match:
        s, t = nets.times(rows)
        flow = nets.flow.see(z, rows["tau_s"], rows["tau_s"])

        def step(tau, z):
            return nets.live.apply(z, tau, rows["tau_t"], keys)

        hidden, tangent = flow_map.d_flow(step, nets.warp, s, z, stop_gradient(nets.mean(flow)))
        moving = nets.live.head, hidden, stop_gradient(tangent)
        return vocab.over_logits(match, (moving, flow), (t, eulerian_weight(s, t)))

    return target


def _residual(self, nets: Networks, z, rows, keys) -> Match:
    s, t = nets.times(rows)
    live = nets.live.see(z, rows["tau_s"], rows["tau_t"], keys)
    others = nets.flow.see(z, rows["tau_s"], rows["tau_s"]), nets.residual.see(z, rows["tau_s"], rows["tau_t"])
    return vocab.over_logits(flow_map.residual, (live, *others), (eulerian_weight(s, t),))


class Target(NamedTuple):
    """What off-diagonal rows learn.

    Attributes:
      match: (family, networks, z, rows, keys) -> flow_map.Match.
      differentiates: it takes forward derivatives of the network. follows: it cannot do without a teacher.
    """

    match: Callable
    differentiates: bool = False
    follows: bool = False


def _lagrangian_target(inside, **changes) -> Target:
    return Target(_but_at_end(_lagrangian(inside, **changes), flow_map.psd), differentiates=True)


_both_times = dict(weights=lambda s, t: (s, t), through=True)
TARGETS = {
    "psd": Target(_semigroup(flow_map.psd)),
    "psd_squared": Target(_semigroup(flow_map.psd_squared)),
    "teacher_steps": Target(_teacher_steps, follows=True),
    "residual": Target(_residual, follows=True),
    "lsd": _lagrangian_target(flow_map.lsd),
    "lsd_logit": _lagrangian_target(flow_map.lsd_logit),
    "csd": _lagrangian_target(flow_map.csd, **_both_times),
    "ecld": _lagrangian_target(flow_map.ecld, **_both_times),
    "esd": Target(_but_at_end(_eulerian(flow_map.esd), flow_map.psd_squared), differentiates=True),
    "esd_logit": Target(_but_at_end(_eulerian(flow_map.esd_logit), flow_map.psd), differentiates=True),
}


def check_two_times(model) -> None:
    """Raises ValueError where a network with the settings `model` cannot learn a flow map."""
    if model["time_embeddings"] != 2:
        raise ValueError("a flow map reads two times: set model.time_embeddings to 2")
    if model["input"] == "posterior":
        raise ValueError(
            "a flow map is a function of the noise, and model.input posterior does not show it at s = 0: use both or white"
        )


@dataclasses.dataclass(frozen=True)
class FlowMap(PathSampler):
    """Attributes:
    teacher: whether there is one.
    target: one of TARGETS.
    targets_from: `student` or `ema`: whose delta the semigroup targets are made of, and without a teacher whose denoiser.
    diagonal: share of rows with s = t, a fraction with a denominator of at most 16.
    boundary: share of the others at (0, 1).
    pairs: how the others are drawn (time_sampling.PAIRS). tau_max: upper end of their tau_t.
    cut: `midpoint` of tau_s and tau_t, or `uniform` between them.
    teacher_steps: m of the target of that name.
    teacher_temperature: the flow is that of the teacher's softmax(logits / temperature).
    adaptive: exponent r of the weight sg(|q - p|^2 + c)^-r, per row; 0 is none.
    surgery: project the off-diagonal gradient off the diagonal one where they conflict (2604.09784; in train_state).
    train_embedding: otherwise a student keeps its teacher's embedding; without a teacher it is always trained.
    gamma, temperature, top_p: of the sampler; temperature None decodes the last step by argmax, a number draws.
    noise_scale, guidance: as `PathSampler` has them.
    """

    teacher: bool = False
    target: str = setting("psd", "what off-diagonal rows learn", choices=TARGETS)
    targets_from: str = setting("student", "whose delta targets are made of", choices=("student", "ema"))
    diagonal: float = setting(0.5, "share of the rows with s = t", "[0, 1)")
    boundary: float = setting(1 / 32, "share of the other rows with (s, t) = (0, 1)", "[0, 1]")
    pairs: str = setting("uniform_diff", "how the times of the others are drawn", choices=PAIRS)
    tau_max: float = setting(1.0, "upper end of the others' tau_t", "(0, 1]")
    cut: str = setting("midpoint", "where a semigroup target cuts a jump", choices=("midpoint", "uniform"))
    teacher_steps: int = setting(4, "Euler steps of the target of that name", "[1, inf)")
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
    noise_scale: float = setting(
        1.0, "sampler: size of every draw of noise; below 1 less diverse and more coherent", "(0, 1]"
    )
    guidance: float = setting(
        1.0, "sampler: above 1, away from the same network with dropout", "[0, inf)", note="1: none"
    )

    def __post_init__(self):
        super().__post_init__()
        share = Fraction(self.diagonal).limit_denominator(16)
        if abs(float(share) - self.diagonal) > 1e-6 or share == 1:
            raise ValueError(
                f"objective.diagonal {self.diagonal} must be a fraction below 1 with a denominator of at most 16, such as "
                f"{share if share < 1 else Fraction(15, 16)}: rows are split by exact counts"
            )
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

    def check(self, family: str, model) -> None:
        """It reads two times, and the noise."""
        check_two_times(model)
        super().check(family, model)

    def samplers(self) -> dict[str, "FlowMap"]:
        """All of the noise, and what the settings say."""
        scale = f"-noise{self.noise_scale:g}" if self.noise_scale != 1 else ""
        return {"map": dataclasses.replace(self, noise_scale=1.0), f"map{scale}": self}

    @property
    def _split(self) -> tuple[int, int]:
        share = Fraction(self.diagonal).limit_denominator(16)
        return share.numerator, share.denominator

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the losses whose gradients are taken apart for surgery; otherwise their sum's."""
        names = ("diagonal", self.target) if self.diagonal > 0 else (self.target,)
        return names if self.surgery else ("loss",)

    @property
    def differentiates(self) -> bool:
        """Whether the target takes forward derivatives of the network."""
        return TARGETS[self.target].differentiates

    @property
    def group(self) -> int:
        """Rows that stay together in a microbatch: of each group the first few are diagonal."""
        return self._split[1]

    def draw(self, key: jax.Array, num: int) -> dict[str, jax.Array]:
        """Times and noise keys of a global batch of num rows, a multiple of `group`."""
        diagonal, group = self._split
        on, off = num * diagonal // group, num - num * diagonal // group
        boundary = round(off * self.boundary)
        keys = jax.random.split(key, 4)
        tau_s, tau_t = pairs(keys[0], off, boundary, self.pairs, self.tau_max)
        share = 0.5 if self.cut == "midpoint" else jax.random.uniform(keys[1], (off,))
        same = stratified(keys[2], on) if on else jnp.zeros((0,))

        def join(on_rows, off_rows):
            if diagonal == 0:
                return off_rows
            rows = on_rows.reshape(-1, diagonal), off_rows.reshape(-1, group - diagonal)
            return jnp.concatenate(rows, 1).reshape(num)

        return {
            "tau_s": join(same, tau_s),
            "tau_u": join(same, tau_s + share * (tau_t - tau_s)),
            "tau_t": join(same, tau_t),
            "noise": jax.random.split(keys[3], num),
        }

    def _rows(self, batch):
        """(diagonal rows, the others)."""
        diagonal, group = self._split

        def part(pick):
            return jax.tree.map(lambda a: a.reshape(-1, group, *a.shape[1:])[:, pick].reshape(-1, *a.shape[1:]), batch)

        return part(slice(0, diagonal)), part(slice(diagonal, None))

    def loss(self, net, params, aux, batch, keys):
        """({diagonal: [B1], TARGET: [B2]}, metrics) for batch = {ids [B, L]} | draw(...), B1 + B2 = B."""
        embedding = net.embedding(params)
        width = embedding.shape[1]
        if self.teacher and not self.train_embedding:
            embedding = stop_gradient(embedding)
            params = net.with_embedding(params, embedding)
        joint = self.train_embedding and self.teacher
        if joint:
            embedding = jnp.concatenate([embedding, stop_gradient(net.embedding(aux.teacher.flow))], 1)

        def delta(params, side) -> Delta:
            return Delta(lambda z, *args: net.apply(params, z[..., side], *args), net.head(params))

        mine = slice(0, width)
        model = delta(stop_gradient(params) if self.targets_from == "student" else aux.ema, mine)

        def frozen(params):
            return delta(params, slice(-width, None))

        flow = frozen(aux.teacher.flow).tempered(self.teacher_temperature) if self.teacher else model
        residual = frozen(aux.teacher.residual) if self.target == "residual" else None
        nets = Networks(delta(params, mine), model, flow, residual, stop_gradient(embedding), self.warp)

        on, off = self._rows(batch)
        on_keys, off_keys = self._rows(keys)
        losses = {}
        if self.diagonal > 0:
            z = self.noised(embedding, on, self.warp.t(on["tau_s"]), joint)
            live = nets.live.see(z, on["tau_s"], on["tau_s"], on_keys)
            if self.teacher:
                match = vocab.over_logits(flow_map.diagonal, (live, nets.flow.see(z, on["tau_s"], on["tau_s"])))
                loss = self._adapted(match, 1e-2)
            else:
                loss = vocab.cross_entropy(*live, on["ids"]).mean(-1)
            losses["diagonal"] = net.weighted(params, loss, on["tau_s"], on["tau_s"])
        z = self.noised(embedding, off, self.warp.t(off["tau_s"]), joint)
        match = TARGETS[self.target].match(self, nets, z, off, off_keys)
        losses[self.target] = net.weighted(params, self._adapted(match, 1e-6), off["tau_s"], off["tau_t"])
        return losses, {"distance": match.distance.mean(-1), "clamped": match.clamped.mean(-1)}

    def _adapted(self, match: Match, floor: float) -> jax.Array:
        return match.loss.mean(-1) * (match.distance.mean(-1) + floor) ** -self.adaptive

    def step(self, net, params, predict: Predictor, num: int) -> Callable:
        """A jump beyond tau_next, to where only the part of the old noise that is kept is left, and gamma of fresh noise on top."""
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
        """The jump to 1, whose tokens are the likeliest or drawn; it does not depend on gamma."""
        weak_key, token_key = jax.random.split(key)
        prediction = predict(z, tau, jnp.ones_like(tau), weak_key)
        if self.temperature is None:
            return prediction.argmax()
        return prediction.draw(token_key, self.temperature, self.top_p)
