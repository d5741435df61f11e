"""What the off-diagonal rows of a flow map learn (flow_map.py): how each of TARGETS is computed from the networks.

A target is a function (family, networks, z, rows, keys) -> Match. It calls the networks at the rows' times, and a formula of
maths/identities.py turns their outputs into a Match, token by token.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.tree_util import Partial

from flowlm.maths import identities as flow_map
from flowlm.maths import vocab
from flowlm.maths.identities import Match, eulerian_weight, lagrangian_weight, semigroup_weight, transport
from flowlm.maths.time_warp import TimeWarp
from flowlm.objectives.base import Batch

if TYPE_CHECKING:
    from flowlm.objectives.flow_map import FlowMap


class Delta(NamedTuple):
    """A network with its parameters, frozen or live, as the two-time denoiser delta(z; tau_s, tau_t).

    Attributes:
      apply: (z, tau_s, tau_t, keys) -> hidden.
      head: hidden -> logits.
    """

    apply: Callable
    head: vocab.Head

    def see(self, *args: jax.Array | None) -> vocab.Readout:
        """(head, hidden) at the arguments of `apply`, which `vocab.over_logits` reads."""
        return self.head, self.apply(*args)

    def tempered(self, temperature: float) -> "Delta":
        """The same network with logits / temperature."""
        return self if temperature == 1 else self._replace(head=Partial(_tempered, self.head, temperature))


def _tempered(head, temperature, hidden):
    return head(hidden) / temperature


class Networks(NamedTuple):
    """The networks that a target is computed from.

    Attributes:
      live: the student, which the loss trains.
      map: the network whose delta makes the targets: the student or its moving average, without gradients.
      flow: the network whose denoiser makes the targets: the teacher, or `map` without one.
      residual: g of residual.py, or None.
      embedding: E of the states [V, W]; two embeddings side by side if the student trains its own.
      warp: warped time of the states.
    """

    live: Delta
    map: Delta
    flow: Delta
    residual: Delta | None
    embedding: jax.Array
    warp: TimeWarp

    def times(self, rows: Batch) -> tuple[jax.Array, ...]:
        """(s, t) [B] of the rows' tau_s and tau_t."""
        return self.warp.t(rows["tau_s"]), self.warp.t(rows["tau_t"])

    def mean(self, readout: vocab.Readout | vocab.MovingReadout) -> jax.Array:
        """delta @ E [B, L, W] of a (head, hidden)."""
        return vocab.softmax_embed(*readout[:2], self.embedding)

    def moving(self, z: jax.Array, rows: Batch, keys: jax.Array | None, through: bool) -> vocab.MovingReadout:
        """(head, hidden, d/dt hidden) of the live delta_{s,t}; `through` says whether gradients pass through the derivative."""
        _, t = self.times(rows)
        hidden, tangent = flow_map.d_dt(lambda tau: self.live.apply(z, rows["tau_s"], tau, keys), self.warp, t)
        return self.live.head, hidden, tangent if through else stop_gradient(tangent)


def at(time: jax.Array) -> jax.Array:
    """time [B] as [B, 1, 1], which broadcasts against states."""
    return time[:, None, None]


def _semigroup(match):
    def target(self: "FlowMap", nets: Networks, z: jax.Array, rows: Batch, keys: jax.Array | None) -> Match:
        (s, t), u = nets.times(rows), nets.warp.t(rows["tau_u"])
        first = nets.map.see(z, rows["tau_s"], rows["tau_u"])
        middle = transport(z, nets.mean(first), at(s), at(u))
        second = nets.map.see(middle, rows["tau_u"], rows["tau_t"])
        live = nets.live.see(z, rows["tau_s"], rows["tau_t"], keys)
        return vocab.over_logits(match, (live, first, second), (semigroup_weight(s, u, t),))

    return target


def _teacher_steps(self: "FlowMap", nets: Networks, z: jax.Array, rows: Batch, keys: jax.Array | None) -> Match:
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
    def target(self: "FlowMap", nets: Networks, z: jax.Array, rows: Batch, keys: jax.Array | None) -> Match:
        s, t = nets.times(rows)
        moving = nets.moving(z, rows, keys, through)
        end = stop_gradient(transport(z, nets.mean(moving), at(s), at(t)))
        flow = nets.flow.see(end, rows["tau_t"], rows["tau_t"])
        return vocab.over_logits(match, (moving, flow), weights(s, t))

    return target


def _but_at_end(inside, at_end):
    """`inside`, but rows with t = 1 learn by the semigroup `at_end`, because the other identities do not determine delta there.

    At t = 1 the Lagrangian identity says only that delta is a fixed point of D_1, and every clean text is one. Cross-entropy to D_1
    makes the likeliest token likelier, so that one-step samples collapse; csd has no gradient there, because its weights vanish.
    The Eulerian identity says nothing (squared form) or is singular (logit form).
    """
    semigroup = _semigroup(at_end)

    def target(self: "FlowMap", nets: Networks, z: jax.Array, rows: Batch, keys: jax.Array | None) -> Match:
        match = inside(self, nets, z, rows, keys)
        if self.boundary == 0:
            return match
        ends = rows["tau_t"][:, None] == 1
        return jax.tree.map(lambda a, b: jnp.where(ends, a, b), semigroup(self, nets, z, rows, keys), match)

    return target


def _eulerian(match):
    def target(self: "FlowMap", nets: Networks, z: jax.Array, rows: Batch, keys: jax.Array | None) -> Match:
        s, t = nets.times(rows)
        flow = nets.flow.see(z, rows["tau_s"], rows["tau_s"])

        def step(tau, z):
            return nets.live.apply(z, tau, rows["tau_t"], keys)

        hidden, tangent = flow_map.d_flow(step, nets.warp, s, z, stop_gradient(nets.mean(flow)))
        moving = nets.live.head, hidden, stop_gradient(tangent)
        return vocab.over_logits(match, (moving, flow), (t, eulerian_weight(s, t)))

    return target


def _residual(self: "FlowMap", nets: Networks, z: jax.Array, rows: Batch, keys: jax.Array | None) -> Match:
    s, t = nets.times(rows)
    live = nets.live.see(z, rows["tau_s"], rows["tau_t"], keys)
    others = nets.flow.see(z, rows["tau_s"], rows["tau_s"]), nets.residual.see(z, rows["tau_s"], rows["tau_t"])
    return vocab.over_logits(flow_map.residual, (live, *others), (eulerian_weight(s, t),))


class Target(NamedTuple):
    """What off-diagonal rows learn.

    Attributes:
      match: (family, networks, z, rows, keys) -> Match.
      differentiates: whether `match` takes forward derivatives of the network.
      follows: whether `match` needs a teacher.
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
