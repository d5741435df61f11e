"""Distribution matching after the flow map (2609.40235; 2602.19066 and 2603.20155 do it for discrete diffusion).

A map that is learnt point by point averages where its capacity ends. Here only the *law* of the student's samples must be right:
the student descends the KL between its noised samples and noised data. The gradient of this KL needs two denoisers: D_T of the
frozen flow, and D_phi of an auxiliary network that follows the student. With l = logits of delta_{s,1}(z_s), p = softmax(l), x1
the student's sample, and fresh noise z0':

    z_t = (1 - t) z0' + t x1 @ E,      d = p_phi - p_T,      p_phi = D_phi(z_t), p_T = D_T(z_t)

    student      probability  w <p, d>                  has the gradient of the KL with respect to x1
                 logit        w <l, d>                  has the natural gradient, which does not vanish where p is nearly one-hot
                 log          w <p, log p_phi - log p_T>
                 ratio        w x cross-entropy of p to q ~ p p_T / p_phi: `log` as one bounded step of exponentiated gradient
                 both         the sum of `ratio` and `logit`
    auxiliary    cross-entropy of p_phi to x1           is updated K times for each update of the student

`log` and `ratio` use p_phi / p_T because a token's own noised value can make both denoisers almost certain, so that d vanishes. In
the ratio that evidence cancels, and only the evidence of the other tokens is left. But `log` and `ratio` cannot raise a token to
which p gives nothing, because their gradient has the factor p; `logit` can, and so `both` leaves out less of the flow's law.

At s = 0 a share of the noise's variance may be one draw for all positions (`shared_noise`): each of them then sees at once what
text is to be written, and need not ask the others. At every position it is the prior's noise all the same, and the law that is
matched does not depend on it.

x1 is p (`soft`), or the likeliest token with p's gradient (`hard`). If V > D, the score is a vector in the space of z, so d is
projected on the part that z shows: d P, P = E G^-1 E^T = codes codes^T. `config.teacher` names the run of the map at which the
student starts, and that run names its flow. Student, auxiliary and flow see the same states, because all keep the teacher's
embedding. Rows that are not matched keep the map's own objective.

    sample  as a flow map: one call, or N calls with re-noising in between
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from flowlm.maths import identities, vocab
from flowlm.maths.interpolant import interpolate
from flowlm.maths.prior import HIGHEST, geometry
from flowlm.maths.time_sampling import stratified
from flowlm.models.network import Network, Params
from flowlm.objectives import prompts
from flowlm.objectives.base import Auxiliary, Batch, Losses, Teacher, Update
from flowlm.objectives.flow_map import FlowMap
from flowlm.objectives.rows import Split, split_of
from flowlm.objectives.targets import Delta
from flowlm.system.settings import setting

# Bound on the log-ratio in nats: two denoisers differ by more only at states on which neither was trained.
LIMIT = 3.0
SHARED = 11  # tells the keys of the noise that positions share from those of their own


def difference(auxiliary: jax.Array, flow: jax.Array, codes: jax.Array | None) -> jax.Array:
    """softmax(auxiliary) - softmax(flow) of logits [..., V], projected on the span of codes [V, R] if these are given."""
    d = jax.nn.softmax(auxiliary) - jax.nn.softmax(flow)
    dot = partial(jnp.matmul, precision=HIGHEST)
    return d if codes is None else dot(dot(d, codes), codes.T)


def probability(
    logits: jax.Array, auxiliary: jax.Array, flow: jax.Array, weight: jax.Array, codes: jax.Array | None = None
) -> jax.Array:
    """w <softmax(logits), d> of one token."""
    d = stop_gradient(difference(auxiliary, flow, codes))
    return weight * jnp.sum(jax.nn.softmax(logits) * d, -1)


def logit(
    logits: jax.Array, auxiliary: jax.Array, flow: jax.Array, weight: jax.Array, codes: jax.Array | None = None
) -> jax.Array:
    """w <logits, d>, whose gradient with respect to the logits is w d."""
    return weight * jnp.sum(logits * stop_gradient(difference(auxiliary, flow, codes)), -1)


def log(
    logits: jax.Array, auxiliary: jax.Array, flow: jax.Array, weight: jax.Array, codes: jax.Array | None = None
) -> jax.Array:
    """w <softmax(logits), log softmax(auxiliary) - log softmax(flow)>; codes are not used, because this is no score of z."""
    ratio = stop_gradient(jax.nn.log_softmax(auxiliary) - jax.nn.log_softmax(flow))
    return weight * jnp.sum(jax.nn.softmax(logits) * ratio, -1)


def ratio(
    logits: jax.Array, auxiliary: jax.Array, flow: jax.Array, weight: jax.Array, codes: jax.Array | None = None
) -> jax.Array:
    """w x cross-entropy of softmax(logits) to a constant q ~ softmax(logits) p_T / p_phi; the gradient's L1 norm is at most 2 w."""
    log_p = jax.nn.log_softmax(logits)
    gain = jnp.clip(jax.nn.log_softmax(flow) - jax.nn.log_softmax(auxiliary), -LIMIT, LIMIT)
    return -weight * jnp.sum(stop_gradient(jax.nn.softmax(log_p + gain)) * log_p, -1)


def both(
    logits: jax.Array, auxiliary: jax.Array, flow: jax.Array, weight: jax.Array, codes: jax.Array | None = None
) -> jax.Array:
    """`ratio` + `logit`."""
    return ratio(logits, auxiliary, flow, weight, codes) + logit(logits, auxiliary, flow, weight, codes)


FORMS = {"probability": probability, "logit": logit, "log": log, "ratio": ratio, "both": both}
WEIGHTS = {"one": jnp.ones_like, "kl": lambda t: (t / (1 - t)) ** 2}


@dataclasses.dataclass(frozen=True)
class Matched(FlowMap):
    """A flow map whose law is matched to its flow's. It also has the attributes of `FlowMap`, for the rows that are not matched.

    Attributes:
      form: form of the student's loss, one of FORMS.
      output: x1, `soft` (the distribution p) or `hard` (the likeliest token).
      matched: share of the rows that are matched, a fraction with a denominator of at most 16.
      at_noise: share of the matched rows that begin at s = 0; the others begin at noised data, with s uniform in warped time.
      shared_noise: share of the variance of the noise at s = 0 that is one draw for all positions.
      taus: lowest and highest warped time at which laws are compared.
      weight: w as a function of the time t, one of WEIGHTS.
      auxiliary_updates: K, the auxiliary's updates for each update of the student.
      auxiliary_rate: learning rate of the auxiliary, as a multiple of the student's.
      auxiliary_times: whether the auxiliary reads `one` time, its state's, or `both`, its state's and the student's s.
      flow: whose denoiser is D_T: `named`, the flow that the teacher's run names, or `diagonal`, the teacher at s = t.
    """

    continues: ClassVar[bool] = True
    needs: ClassVar[dict] = dict(mask_token=False, loss_weight=False)

    form: str = setting("both", "of the student's loss", choices=FORMS)
    output: str = setting(
        "hard", "what the student is taken to write: its distribution, or its token", choices=("soft", "hard")
    )
    matched: float = setting(1.0, "share of the rows that are matched; the others stay a flow map's", "(0, 1]")
    at_noise: float = setting(1.0, "share of those that begin at s = 0, the others at noised data", "[0, 1]")
    shared_noise: float = setting(
        0.0, "share of the variance of the noise at s = 0 that is the same at all positions", "[0, 1)"
    )
    taus: tuple[float, ...] = setting((0.02, 0.98), "warped times between which laws are compared", "(0, 1)")
    weight: str = setting("one", "of a time: one, or the KL's own", choices=WEIGHTS)
    auxiliary_updates: int = setting(2, "updates of the auxiliary for one of the student", "[1, inf)")
    auxiliary_rate: float = setting(4.0, "the auxiliary's learning rate, as a multiple of the student's", "(0, inf)")
    auxiliary_times: str = setting(
        "one", "times that the auxiliary reads: of its state, or of the student too", choices=("one", "both")
    )
    flow: str = setting(
        "named",
        "whose denoiser is followed: the flow that the teacher's run names, or the teacher's",
        choices=("named", "diagonal"),
    )

    def __post_init__(self):
        super().__post_init__()
        split_of(self.matched, "matched")
        if not self.teacher:
            raise ValueError("the family matched begins at a flow map: give --config.teacher=RUNDIR, the run of one")
        if self.prior.name != "gaussian":
            raise ValueError(
                f"matching needs the gaussian prior's score, not {self.prior.name!r}: set prior to gaussian"
            )
        if self.surgery:
            raise ValueError("objective.surgery is for a flow map's two losses, not for matching: set it to False")
        if self.noises:
            raise ValueError(
                f"objective.noises {self.noises} is for a flow map's ends; a law is matched from fresh noise: set it to 0"
            )
        if len(self.taus) != 2 or self.taus[0] >= self.taus[1]:
            raise ValueError(
                f"objective.taus {self.taus} must be two warped times, the earlier one first, such as 0.02,0.98"
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """The sum of the losses, because losses of different networks cannot conflict."""
        return ("loss",)

    @property
    def differentiates(self) -> bool:
        """Whether there are rows of a flow map, whose target takes forward derivatives."""
        return self.matched < 1 and super().differentiates

    @property
    def updates(self) -> Mapping[str, Update]:
        """The student moves after every K updates of the auxiliary."""
        return {"student": Update(1.0, self.auxiliary_updates), "auxiliary": Update(self.auxiliary_rate)}

    @property
    def _matched(self) -> Split:
        few, group = split_of(self.matched, "matched")
        return Split(few * super().group, group * super().group) if few < group else Split(1, 1)

    @property
    def group(self) -> int:
        """Number of rows that stay together: the first are matched, the others are a whole number of groups of a flow map."""
        return self._matched.group

    def start(self, net: Network, params: Params, teacher: Teacher | None, origin: Params | None) -> Params:
        """The student begins as `origin`, which is the flow map, and the auxiliary begins as the flow."""
        student = params if origin is None else net.adopt(params, origin)
        return {"student": student, "auxiliary": params if teacher is None else net.adopt(params, teacher.flow)}

    def student(self, params: Params) -> Params:
        """The student's parameters, without the auxiliary's."""
        return params["student"]

    def draw(self, key: jax.Array, num: int) -> Batch:
        """Times and noise keys of a global batch of num rows, a multiple of `group`."""
        on = self._matched.count(num)
        keys = jax.random.split(key, 5)
        late = on - round(on * self.at_noise)
        tau_s = jax.random.permutation(keys[0], jnp.zeros((on,)).at[:late].set(stratified(keys[1], late)))
        first, last = self.taus
        rows = {
            "tau_s": tau_s,
            "tau_u": tau_s,
            "tau_t": first + (last - first) * stratified(keys[2], on),
            "noise": jax.random.split(keys[3], on),
        }
        if on == num:
            return rows
        return jax.tree.map(self._matched.join, rows, super().draw(keys[4], num - on))

    def loss(self, net: Network, params: Params, aux: Auxiliary, batch: Batch, keys: jax.Array | None) -> Losses:
        """({matching: [B1], auxiliary: [B1]} and a flow map's losses, metrics) for batch = {ids [B, L]} | draw(...).

        In steps in which the student does not move, `matching` is 0 and is not computed.
        """
        student = params["student"]
        if self._matched.group == 1:
            return self._matching(net, params, aux, batch, keys), {}
        on, off = self._matched.apart(batch)
        on_keys, off_keys = self._matched.apart(keys)
        losses, metrics = super().loss(net, student, aux, off, off_keys)
        return self._matching(net, params, aux, on, on_keys) | losses, metrics

    def begin(self, net: Network, params: Params, key: jax.Array, num: int) -> jax.Array:
        """The noise of a flow map's sampler, with the share that all positions have in common."""
        if self.shared_noise == 0:
            return super().begin(net, params, key, num)
        keys = jax.random.split(jax.random.fold_in(key, SHARED), num)
        z0 = self.fresh(net, params, key, num, 1.0)
        return self.noise_scale * self._sharing(keys, net.embedding(params), z0)

    def _sharing(self, keys, embedding, z0):
        """z0 [B, L, D] ~ N(0, G) with a part of it replaced by a draw of N(0, G) for each row."""
        common = self.prior.sample(jax.vmap(jax.random.fold_in, (0, None))(keys, SHARED), stop_gradient(embedding), 1)
        return (1 - self.shared_noise) ** 0.5 * z0 + self.shared_noise**0.5 * common

    def _matching(self, net, params, aux, rows, keys):
        net = prompts.prompted(net, rows)
        embedding = stop_gradient(net.embedding(params["student"]))
        student, auxiliary, flow = (
            net.with_embedding(tree, embedding) for tree in (params["student"], params["auxiliary"], aux.teacher.flow)
        )
        tau_s, tau, t = rows["tau_s"], rows["tau_t"], self.warp.t(rows["tau_t"])
        ends = jnp.ones_like(tau_s)
        start_keys, fresh_keys = jnp.moveaxis(jax.vmap(jax.random.split)(rows["noise"]), 1, 0)
        z = self.noised(embedding, rows | {"noise": start_keys}, self.warp.t(tau_s))
        if self.shared_noise > 0:
            z = jnp.where((tau_s == 0)[:, None, None], self._sharing(start_keys, embedding, z), z)

        def write(params):
            return net.head(params), net.apply(params, z, tau_s, ends, keys)

        written = stop_gradient(write(student))
        ids = vocab.argmax(*written)
        x1 = embedding[ids] if self.output == "hard" else vocab.softmax_embed(*written, embedding)
        z0 = self.prior.sample(fresh_keys, embedding, net.length)
        z_t = stop_gradient(interpolate(z0, x1, t[:, None, None]))
        follows = net.head(auxiliary), net.apply(auxiliary, z_t, tau, tau_s if self.auxiliary_times == "both" else None)
        if self.output == "hard":
            following = vocab.cross_entropy(*follows, ids)
        else:
            following = vocab.over_logits(identities.diagonal, (follows, written)).loss

        def match():
            wanted = Delta(lambda *args: net.apply(flow, *args), net.head(flow)).tempered(self.teacher_temperature)
            codes = geometry(embedding).codes if net.vocab > net.width else None

            def form(*args):
                return FORMS[self.form](*args, codes)

            readouts = write(student), stop_gradient(follows), stop_gradient(wanted.see(z_t, tau))
            return prompts.mean(vocab.over_logits(form, readouts, (WEIGHTS[self.weight](t),)), rows)

        moves = aux.step % self.auxiliary_updates == self.auxiliary_updates - 1
        matching = jax.lax.cond(moves, match, lambda: jnp.zeros_like(tau))
        return {"matching": matching, "auxiliary": prompts.mean(following, rows)}
