"""Generative families, one file each, behind one contract.

A family is a frozen dataclass of its hyperparameters with
    draw(key, num) -> {name: [num, ...]}                      the random part of a global batch, added to batch["ids"]
    loss(net, params, aux, batch, keys) -> (losses, metrics)  dicts of per-example arrays; the names of `losses` share the
                                                              batch's rows, and their sum over rows / B is the loss
    sample(net, params, key, num, steps) -> ids [num, L]
    bound(net, params, batch, key) -> nats [B]                where it has one
    trajectory(net, params, key, num, steps) -> [steps, num, L]   what `sample` would write at each of its steps, where it has one
and, where they differ from the defaults, `group` (rows that stay together in a microbatch; 1), `parts` (names of losses whose
conflicting gradients are projected; ("loss",), their sum). A family that takes a teacher has start(net, params, teacher) -> the
student's first parameters. `keys` [B] are for dropout, or None. Means, meshes and microbatches are the training step's affair. A
family without `sample` is a stage on the way to one that has it.
"""

from flowlm.objectives.autoregressive import Autoregressive
from flowlm.objectives.flow import Flow
from flowlm.objectives.flow_map import FlowMap
from flowlm.objectives.masked import Masked
from flowlm.objectives.residual import Residual
from flowlm.objectives.uniform import Uniform
from flowlm.prior import PRIORS
from flowlm.time_warp import TimeWarp


def _flow(prior, warp, *, teacher, loss, eta, temperature, noise_scale, guidance):
    if teacher:
        raise ValueError("config.teacher is for distillation: the family flow has none, flow_map does")
    return Flow(prior, warp, loss, eta, temperature, noise_scale, guidance)


def _autoregressive(prior, warp, *, teacher, start, temperature, top_p):
    if teacher:
        raise ValueError("config.teacher is for distillation: the family autoregressive has none")
    return Autoregressive(start, temperature, top_p)


def _masked(prior, warp, *, teacher, jump, divergence, temperature, top_p, greedy):
    return Masked(teacher, jump, divergence, temperature, top_p, greedy)


def _uniform(
    prior, warp, *, teacher, jump, divergence, curriculum_steps, curriculum_temperature, temperature, top_p, greedy
):
    curriculum = curriculum_steps, curriculum_temperature
    return Uniform(warp, teacher, jump, divergence, *curriculum, temperature, top_p, greedy)


FAMILIES = {
    "flow": _flow,
    "flow_map": FlowMap,
    "residual": Residual,
    "autoregressive": _autoregressive,
    "masked": _masked,
    "uniform": _uniform,
}

# What a family asks of the settings of its network.
NEEDS = {f.__name__.lower(): f.needs for f in (Autoregressive, Masked, Uniform)}
MAY = {"masked": Masked.may}  # and puts up with


def make_family(family: str, warp: TimeWarp, teacher: bool, **settings):
    """The family of an experiment's `objective` section, with a teacher or without. Raises ValueError for bad settings."""
    if family not in FAMILIES:
        raise ValueError(f"unknown objective.family {family!r}: choose one of {sorted(FAMILIES)}")
    return FAMILIES[family](PRIORS[warp.prior](), warp, teacher=teacher, **settings)
