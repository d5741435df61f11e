"""Generative families, one file each, that keep the contract of base.py."""

import dataclasses
from typing import Any

from flowlm.maths.prior import PRIORS
from flowlm.maths.time_warp import TimeWarp
from flowlm.objectives.autoregressive import Autoregressive
from flowlm.objectives.base import Family
from flowlm.objectives.flow import Flow
from flowlm.objectives.flow_map import FlowMap
from flowlm.objectives.gumbel import Gumbel
from flowlm.objectives.masked import Masked
from flowlm.objectives.matched import Matched
from flowlm.objectives.matched_discrete import MatchedMasked, MatchedUniform
from flowlm.objectives.residual import Residual
from flowlm.objectives.uniform import Uniform
from flowlm.system.settings import field_names

FAMILIES: dict[str, type[Family]] = {
    "flow": Flow,
    "flow_map": FlowMap,
    "matched": Matched,
    "gumbel": Gumbel,
    "residual": Residual,
    "autoregressive": Autoregressive,
    "masked": Masked,
    "uniform": Uniform,
    "matched_masked": MatchedMasked,
    "matched_uniform": MatchedUniform,
}


def make_family(family: str, warp: TimeWarp, teacher: bool, **settings: Any) -> Family:
    """The family that an experiment's `objective` section describes. Raises ValueError for bad settings."""
    if family not in FAMILIES:
        raise ValueError(f"unknown objective.family {family!r}: choose one of {sorted(FAMILIES)}")
    kind = FAMILIES[family]
    if teacher and not kind.distils:
        students = ", ".join(name for name, other in FAMILIES.items() if other.distils)
        raise ValueError(f"config.teacher is for distillation: the family {family} has none, {students} do")
    context = {"prior": PRIORS[warp.prior](), "warp": warp, "teacher": teacher}
    has = {field.name for field in dataclasses.fields(kind)}
    names = field_names(kind)
    return kind(
        **{name: value for name, value in context.items() if name in has},
        **{names[key]: value for key, value in settings.items()},
    )
