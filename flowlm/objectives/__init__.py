"""Generative families, one file each, behind one contract.

A family is a frozen dataclass of its hyperparameters with
    draw(key, num) -> {name: [num, ...]}                      the random part of a global batch, added to batch["ids"]
    loss(net, params, aux, batch, key) -> (losses, metrics)   dicts of per-example arrays [B]; losses are summed
    sample(net, params, key, num, steps) -> ids [num, L]
    bound(net, params, batch, key) -> nats [B]                where it has one
Means, meshes and microbatches are the training step's affair.
"""

from flowlm.objectives.flow import Flow
from flowlm.prior import PRIORS
from flowlm.time_warp import TimeWarp

FAMILIES = {"flow": Flow}


def make_family(family: str, warp: TimeWarp, *, loss: str, eta: float, temperature: float | None):
    """The family named in an experiment's `objective` section. Raises ValueError for an unknown one."""
    if family not in FAMILIES:
        raise ValueError(f"unknown objective.family {family!r}: choose one of {sorted(FAMILIES)}")
    return FAMILIES[family](PRIORS[warp.prior](), warp, loss, eta, temperature)
