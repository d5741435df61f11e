"""The two-network flow map of the paper's first version (2602.16813 v1), an ablation.

    X_{s,t}(x) = x + (t-s) b_s(x) + (t-s)^2 g_{s,t}(x) / 2

b is a frozen flow's velocity. g is a second network, whose output is a free vector rather than a distribution; it is trained on
the squared residual of the semigroup X_{s,t} = X_{u,t}(X_{s,u}). This family is the first stage and writes no samples. The
second stage fits one softmax network to the map (objective.target `residual` of flow_map.py, with this run as its teacher).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.lax import stop_gradient

from flowlm.maths import identities as flow_map
from flowlm.maths import vocab
from flowlm.maths.identities import transport
from flowlm.maths.time_sampling import PAIRS, pairs
from flowlm.models.network import Network, Params
from flowlm.objectives.base import Auxiliary, Batch, Losses, Teacher
from flowlm.objectives.denoiser import NoisePath
from flowlm.objectives.flow_map import check_two_times
from flowlm.objectives.targets import at
from flowlm.system.settings import setting


@dataclasses.dataclass(frozen=True)
class Residual(NoisePath):
    """The second network of a two-network flow map.

    Attributes:
      teacher: whether there is a teacher, which the family needs as its frozen flow.
      boundary: share of rows with (tau_s, tau_t) = (0, 1).
      pairs: how the times of the other rows are drawn (time_sampling.PAIRS).
    """

    teacher: bool = False
    boundary: float = setting(1 / 32, "share of the rows with (s, t) = (0, 1)", "[0, 1]")
    pairs: str = setting("uniform_diff", "how the times of the others are drawn", choices=PAIRS)

    def __post_init__(self):
        super().__post_init__()
        if not self.teacher:
            raise ValueError("the family residual follows a teacher: give --config.teacher=RUNDIR")

    def check(self, family: str, model: Mapping[str, Any]) -> None:
        """Also raises ValueError if the network does not read two times, or not the noise."""
        check_two_times(model)
        super().check(family, model)

    def start(self, net: Network, params: Params, teacher: Teacher | None, origin: Params | None) -> Params:
        """The flow's network with an output of zero, so that the map begins as one Euler step."""
        return net.mute(super().start(net, params, teacher, origin))

    def draw(self, key: jax.Array, num: int) -> Batch:
        """{tau_s: [num], tau_t: [num], noise: a key for each row [num]}."""
        times, noise = jax.random.split(key)
        tau_s, tau_t = pairs(times, num, round(num * self.boundary), self.pairs)
        return {"tau_s": tau_s, "tau_t": tau_t, "noise": jax.random.split(noise, num)}

    def loss(self, net: Network, params: Params, aux: Auxiliary, batch: Batch, keys: jax.Array | None) -> Losses:
        """({residual_map: [B]}, {}). u lies at the midpoint of tau_s and tau_t; the embedding stays the flow's."""
        embedding = stop_gradient(net.embedding(aux.teacher.flow))
        params = net.with_embedding(params, embedding)
        fixed = stop_gradient(params)
        tau_s, tau_t = batch["tau_s"], batch["tau_t"]
        tau_u = (tau_s + tau_t) / 2
        s, u, t = (self.warp.t(tau) for tau in (tau_s, tau_u, tau_t))
        z = self.noised(embedding, batch, s)

        head, flow_head = net.head(params), net.head(aux.teacher.flow)
        flow_s = flow_head, net.apply(aux.teacher.flow, z, tau_s, tau_s)
        first = head, net.apply(fixed, z, tau_s, tau_u)
        euler = transport(z, vocab.softmax_embed(*flow_s, embedding), at(s), at(u))
        bend = vocab.over_logits(lambda g: g @ embedding, (first,))
        middle = stop_gradient(euler + at((u - s) ** 2 / 2) * bend)
        second = head, net.apply(fixed, middle, tau_u, tau_t)
        flow_u = flow_head, net.apply(aux.teacher.flow, middle, tau_u, tau_u)
        live = head, net.apply(params, z, tau_s, tau_t, keys)
        match = vocab.over_logits(flow_map.residual_map, (live, first, second, flow_s, flow_u), (s, u, t))
        return {"residual_map": match.loss.mean(-1)}, {}
