"""Learning-rate schedules, AdamW with clipping, and the moving average of the parameters."""

import re
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax

from flowlm.engine.sharding import path_of
from flowlm.models.network import Params
from flowlm.objectives.base import Update

SCHEDULES = ("constant", "cosine")


def make_schedule(learning_rate: float, schedule: str, warmup_steps: int, steps: int) -> optax.Schedule:
    """Linear warm-up, then constant or a cosine to zero at `steps`.

    Before a cosine the warm-up takes at most half of the steps, because a short run would else never reach the rate; a constant
    schedule does not depend on `steps`, so that a run may be lengthened.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown optimizer.schedule {schedule!r}: choose one of {list(SCHEDULES)}")
    if schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(warmup_steps, steps // 2), steps)
    return optax.join_schedules(
        [optax.linear_schedule(0.0, learning_rate, max(1, warmup_steps)), optax.constant_schedule(learning_rate)],
        [warmup_steps],
    )


def make_optimizer(
    schedule: optax.Schedule,
    updates: Mapping[str, Update] = MappingProxyType({}),
    *,
    b1: float,
    b2: float,
    weight_decay: float,
    decay_pattern: str,
    clip_norm: float,
) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm (0: none); parameters whose path matches `decay_pattern` decay.

    With `updates` the parameters are several networks by name. Each has clipping, moments and a rate of its own, and those that
    move in some steps only keep their moments in the others; the schedule runs over all steps.

    Raises ValueError for a pattern that is no regular expression.
    """
    try:
        re.compile(decay_pattern)
    except re.error as error:
        raise ValueError(f"optimizer.decay_pattern {decay_pattern!r} is no regular expression: {error}") from error

    def decays(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: bool(re.search(decay_pattern, path_of(path))), params)

    def adamw(rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.chain(
            # Either has the same empty state, so clipping can be switched off without another checkpoint's form.
            optax.clip_by_global_norm(clip_norm) if clip_norm > 0 else optax.identity(),
            optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decays),
        )

    def part(update: Update) -> optax.GradientTransformation:
        # AdamW counts the updates that it makes, of which there is one in `every` steps.
        own = adamw(lambda count: update.rate * schedule((count + 1) * update.every - 1))
        return optax.conditionally_mask(own, lambda step: step % update.every == update.every - 1)

    if not updates:
        return adamw(schedule)
    return optax.partition(
        {name: part(update) for name, update in updates.items()},
        lambda params: {name: jax.tree.map(lambda _, name=name: name, tree) for name, tree in params.items()},
    )


def update_ema(ema: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """ema <- d ema + (1 - d) params with d = min(decay, (1 + n) / (10 + n)) at the n-th update, n = step.

    Without the warm-up the average keeps decay^n of the random initialisation, which ruins samples for thousands of steps
    while the loss of the live parameters looks fine.
    """
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: d * e + (1 - d) * p, ema, params)
