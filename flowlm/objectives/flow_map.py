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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.tree_util import Partial

from flowlm import flow_map, vocab
from flowlm.flow_map import Match, eulerian_weight, lagrangian_weight, semigroup_weight, transport
from flowlm.objectives.denoiser import Denoiser
from flowlm.objectives.guidance import Prediction, Predictor
from flowlm.time_sampling import PAIRS, pairs, stratified


class Player(NamedTuple):
    """One network in the game, frozen or live: apply(z, tau_s, tau_t, keys) -> hidden, and its head."""

    apply: Callable
    head: vocab.Head

    def see(self, *args):
        """(head, hidden), what `vocab.over_logits` reads."""
        return self.head, self.apply(*args)

    def tempered(self, temperature: float) -> "Player":
        """The same network with softmax(logits / temperature) for its distribution."""
        return self if temperature == 1 else self._replace(head=Partial(_tempered, self.head, temperature))


def _tempered(head, temperature, hidden):
    return head(hidden) / temperature


class Game(NamedTuple):
    """live: the student. map: whose delta targets are made of. flow: whose denoiser. residual: g of residual.py, or None.

    embedding: of the joint state.
    """

    live: Player
    map: Player
    flow: Player
    residual: Player | None
    embedding: jax.Array
    warp: Any

    def times(self, rows) -> tuple[jax.Array, ...]:
        """t of the rows' tau_s and tau_t."""
        return self.warp.t(rows["tau_s"]), self.warp.t(rows["tau_t"])

    def mean(self, readout) -> jax.Array:
        """delta @ E of a (head, hidden), in the joint state."""
        return vocab.softmax_embed(*readout[:2], self.embedding)

    def moving(self, z, rows, keys, through: bool):
        """(head, hidden, d/dt hidden) of the live delta_{s,t}; the gradient goes through the derivative or not."""
        _, t = self.times(rows)
        hidden, tangent = flow_map.d_dt(lambda tau: self.live.apply(z, rows["tau_s"], tau, keys), self.warp, t)
        return self.live.head, hidden, tangent if through else stop_gradient(tangent)


def at(time: jax.Array) -> jax.Array:
    """[B] -> [B, 1, 1]."""
    return time[:, None, None]


def _semigroup(match):
    def target(self, game: Game, z, rows, keys) -> Match:
        (s, t), u = game.times(rows), game.warp.t(rows["tau_u"])
        first = game.map.see(z, rows["tau_s"], rows["tau_u"])
        middle = transport(z, game.mean(first), at(s), at(u))
        second = game.map.see(middle, rows["tau_u"], rows["tau_t"])
        live = game.live.see(z, rows["tau_s"], rows["tau_t"], keys)
        return vocab.over_logits(match, (live, first, second), (semigroup_weight(s, u, t),))

    return target


def _teacher_steps(self, game: Game, z, rows, keys) -> Match:
    (s, t), live = game.times(rows), game.live.see(z, rows["tau_s"], rows["tau_t"], keys)
    parts, weights, u = [], [], s
    for i in range(self.teacher_steps):
        tau = rows["tau_s"] + (rows["tau_t"] - rows["tau_s"]) * i / self.teacher_steps
        u_next = game.warp.t(rows["tau_s"] + (rows["tau_t"] - rows["tau_s"]) * (i + 1) / self.teacher_steps)
        parts.append(game.flow.see(z, tau, tau))
        weights.append(flow_map.step_weight(s, u, u_next, t))
        z, u = transport(z, game.mean(parts[-1]), at(u), at(u_next)), u_next
    return vocab.over_logits(flow_map.teacher_steps, (live, *parts), tuple(weights))


def _lagrangian(match, weights=lambda s, t: (lagrangian_weight(s, t),), through=False):
    def target(self, game: Game, z, rows, keys) -> Match:
        s, t = game.times(rows)
        moving = game.moving(z, rows, keys, through)
        end = stop_gradient(transport(z, game.mean(moving), at(s), at(t)))
        flow = game.flow.see(end, rows["tau_t"], rows["tau_t"])
        return vocab.over_logits(match, (moving, flow), weights(s, t))

    return target


def _but_at_end(inside, at_end):
    """`inside`, but rows with t = 1 learn by the semigroup: there the other identities do not tell the right delta from others.

    The Lagrangian one says only that delta is a fixed point of D_1, which every clean text is: cross-entropy to it makes the
    likeliest likelier, so that one step collapses, and csd, whose weights vanish there, has no gradient. The Eulerian says nothing
    (squared form) or is singular (logit form).
    """
    semigroup = _semigroup(at_end)

    def target(self, game: Game, z, rows, keys) -> Match:
        match = inside(self, game, z, rows, keys)
        if self.boundary == 0:
            return match
        ends = rows["tau_t"][:, None] == 1
        return jax.tree.map(lambda a, b: jnp.where(ends, a, b), semigroup(self, game, z, rows, keys), match)

    return target


def _eulerian(match):
    def target(self, game: Game, z, rows, keys) -> Match:
        s, t = game.times(rows)
        flow = game.flow.see(z, rows["tau_s"], rows["tau_s"])
        step = lambda tau, z: game.live.apply(z, tau, rows["tau_t"], keys)
        hidden, tangent = flow_map.d_flow(step, game.warp, s, z, stop_gradient(game.mean(flow)))
        moving = game.live.head, hidden, stop_gradient(tangent)
        return vocab.over_logits(match, (moving, flow), (t, eulerian_weight(s, t)))

    return target


def _residual(self, game: Game, z, rows, keys) -> Match:
    s, t = game.times(rows)
    live = game.live.see(z, rows["tau_s"], rows["tau_t"], keys)
    others = game.flow.see(z, rows["tau_s"], rows["tau_s"]), game.residual.see(z, rows["tau_s"], rows["tau_t"])
    return vocab.over_logits(flow_map.residual, (live, *others), (eulerian_weight(s, t),))


TARGETS = {
    "psd": _semigroup(flow_map.psd),
    "psd_squared": _semigroup(flow_map.psd_squared),
    "teacher_steps": _teacher_steps,
    "residual": _residual,
    "lsd": _but_at_end(_lagrangian(flow_map.lsd), flow_map.psd),
    "lsd_logit": _but_at_end(_lagrangian(flow_map.lsd_logit), flow_map.psd),
    "csd": _but_at_end(_lagrangian(flow_map.csd, lambda s, t: (s, t), through=True), flow_map.psd),
    "ecld": _but_at_end(_lagrangian(flow_map.ecld, lambda s, t: (s, t), through=True), flow_map.psd),
    "esd": _but_at_end(_eulerian(flow_map.esd), flow_map.psd_squared),
    "esd_logit": _but_at_end(_eulerian(flow_map.esd_logit), flow_map.psd),
}


@dataclasses.dataclass(frozen=True)
class FlowMap(Denoiser):
    """Attributes:
    target: one of TARGETS.
    targets_from: `student` or `ema`: whose delta the semigroup targets are made of, and without a teacher whose denoiser.
    teacher: whether there is one.
    diagonal: share of rows with s = t, a fraction with a denominator of at most 16. boundary: share of the others at (0, 1).
    pairs: how the others are drawn (time_sampling.PAIRS). tau_max: upper end of their tau_t.
    cut: `midpoint` of tau_s and tau_t, or `uniform` between them.
    teacher_steps: m of the target of that name.
    adaptive: exponent r of the weight sg(|q - p|^2 + c)^-r, per row; 0 is none.
    surgery: project the off-diagonal gradient off the diagonal one where they conflict (2604.09784; in train_state).
    train_embedding: otherwise a student keeps its teacher's embedding; without a teacher it is always trained.
    gamma, temperature, top_p, guidance: of the sampler; temperature None decodes the last step by argmax, a number draws.
    """

    target: str
    targets_from: str
    teacher: bool
    diagonal: float
    boundary: float
    pairs: str
    tau_max: float
    cut: str
    teacher_steps: int
    teacher_temperature: float
    adaptive: float
    surgery: bool
    train_embedding: bool
    gamma: float
    temperature: float | None
    noise_scale: float
    top_p: float
    guidance: float

    def __post_init__(self):
        for name, value, known in (
            ("target", self.target, TARGETS),
            ("targets_from", self.targets_from, ("student", "ema")),
            ("pairs", self.pairs, PAIRS),
            ("cut", self.cut, ("midpoint", "uniform")),
        ):
            if value not in known:
                raise ValueError(f"unknown objective.{name} {value!r}: choose one of {sorted(known)}")
        share = Fraction(self.diagonal).limit_denominator(16)
        if abs(float(share) - self.diagonal) > 1e-6 or share == 1:
            raise ValueError(
                f"objective.diagonal {self.diagonal} must be a fraction below 1 with a denominator of at most 16, such as "
                f"{share if share < 1 else Fraction(15, 16)}: rows are split by exact counts"
            )
        if self.target in ("teacher_steps", "residual") and not self.teacher:
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

    def start(self, net, params, teacher):
        """The student's first parameters: those of the flow, so that delta_{s,t} = D_s."""
        return net.adopt(params, teacher.flow)

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
        return self.target not in ("psd", "psd_squared", "teacher_steps", "residual")

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
        part = lambda pick: jax.tree.map(
            lambda a: a.reshape(-1, group, *a.shape[1:])[:, pick].reshape(-1, *a.shape[1:]), batch
        )
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

        def player(params, side) -> Player:
            return Player(lambda z, *args: net.apply(params, z[..., side], *args), net.head(params))

        mine = slice(0, width)
        model = player(stop_gradient(params) if self.targets_from == "student" else aux.ema, mine)
        frozen = lambda params: player(params, slice(-width, None))
        flow = frozen(aux.teacher.flow).tempered(self.teacher_temperature) if self.teacher else model
        residual = frozen(aux.teacher.residual) if self.target == "residual" else None
        game = Game(player(params, mine), model, flow, residual, stop_gradient(embedding), self.warp)

        on, off = self._rows(batch)
        on_keys, off_keys = self._rows(keys)
        losses = {}
        if self.diagonal > 0:
            z = self.noised(embedding, on, self.warp.t(on["tau_s"]), joint)
            live = game.live.see(z, on["tau_s"], on["tau_s"], on_keys)
            if self.teacher:
                match = vocab.over_logits(flow_map.diagonal, (live, game.flow.see(z, on["tau_s"], on["tau_s"])))
                loss = self._adapted(match, 1e-2)
            else:
                loss = vocab.cross_entropy(*live, on["ids"]).mean(-1)
            losses["diagonal"] = net.weighted(params, loss, on["tau_s"], on["tau_s"])
        z = self.noised(embedding, off, self.warp.t(off["tau_s"]), joint)
        match = TARGETS[self.target](self, game, z, off, off_keys)
        losses[self.target] = net.weighted(params, self._adapted(match, 1e-6), off["tau_s"], off["tau_t"])
        return losses, {"distance": match.distance.mean(-1), "clamped": match.clamped.mean(-1)}

    def _adapted(self, match: Match, floor: float) -> jax.Array:
        return match.loss.mean(-1) * (match.distance.mean(-1) + floor) ** -self.adaptive

    def sample(self, net, params, key, num: int, steps: int) -> jax.Array:
        """ids [num, L] by exactly `steps` jumps; one step does not depend on gamma."""
        return self._sample(net, params, key, num, steps, lambda prediction: None)[1]

    def trajectory(self, net, params, key, num: int, steps: int) -> jax.Array:
        """The likeliest tokens at every jump of `sample` with the same key, ids [steps, num, L]; the last are its samples."""
        seen, ids = self._sample(net, params, key, num, steps, Prediction.argmax)
        return jnp.concatenate([seen, ids[None]])

    def _sample(self, net, params, key, num: int, steps: int, look):
        """(look(prediction) of all jumps but the last, stacked; ids)."""
        if steps < 1:
            raise ValueError(f"sampling takes at least 1 step, got {steps}")
        params = net.prepared(params)
        embedding, predict = net.embedding(params), Predictor(net, params, self.guidance)
        start, rest = jax.random.split(key)
        z = self.fresh(net, params, start, num, self.noise_scale)
        tau = jnp.linspace(0.0, 1.0, steps + 1)
        center = self.prior.mean(embedding)

        def jump(z, inputs):
            tau, tau_next, key = inputs
            fresh_key, weak_key = jax.random.split(key)
            s, sigma = self.warp.t(tau), 1 - self.warp.t(tau_next)
            kept = sigma * (1 - self.gamma**2) ** 0.5  # of the old noise; the jump goes on to where only this is left
            to = jnp.full((num,), self.warp.tau(1 - kept))
            prediction = predict(z, jnp.full((num,), tau), to, weak_key)
            mean = prediction.mean(embedding)
            z = transport(z, mean, s, 1 - kept) + (kept - sigma) * mean
            if self.gamma > 0:
                fresh = self.fresh(net, params, fresh_key, num, self.noise_scale)
                z = z + self.gamma * sigma * (fresh - center)
            return z + (sigma - kept) * center, look(prediction)

        keys = jax.random.split(rest, steps)
        z, seen = jax.lax.scan(jump, z, (tau[:-2], tau[1:-1], keys[:-1]))
        weak_key, token_key = jax.random.split(keys[-1])
        prediction = predict(z, jnp.full((num,), tau[-2]), jnp.ones((num,)), weak_key)
        if self.temperature is None:
            return seen, prediction.argmax()
        return seen, prediction.draw(token_key, self.temperature, self.top_p)
