"""What a run remembers, and one step of training as a pure function of it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from flowlm.engine.optimizers import update_ema
from flowlm.engine.sharding import Layout
from flowlm.models.network import Network, Params
from flowlm.objectives import prompts
from flowlm.objectives.base import Auxiliary, Batch, Family, Teacher

# What a step draws randomness for. Every key is a function of (seed, step, purpose); none is stored.
BATCH, DROPOUT, INIT, SAMPLE, EVALUATION, PROMPTS = range(6)


class TrainState(NamedTuple):
    """step [] int32; params, ema and opt_state are trees of arrays, no functions. ema is of the network that writes alone."""

    step: jax.Array
    params: Params
    ema: Params
    opt_state: optax.OptState


def purpose_key(seed: int, step: jax.Array | int, purpose: int) -> jax.Array:
    """The key of one purpose at one step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), purpose)


def init_state(
    net: Network,
    family: Family,
    optimizer: optax.GradientTransformation,
    seed: int,
    teacher: Teacher | None = None,
    origin: Params | None = None,
) -> TrainState:
    """A fresh state: what the family makes of fresh parameters, a teacher, or those of another run, `origin`.

    The moving average starts at the parameters of the network that writes.
    """
    params = family.start(net, net.init(purpose_key(seed, 0, INIT)), teacher, origin)
    ema = jax.tree.map(jnp.copy, family.student(params))
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def _project(gradient, other):
    """`gradient` without its part against `other`, where they conflict (gradient surgery, 2001.06782)."""

    def dot(a, b):
        return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

    against = jnp.minimum(dot(gradient, other), 0) / jnp.maximum(dot(other, other), 1e-30)
    return jax.tree.map(lambda g, o: g - against * o, gradient, other)


def _batch(family: Family, seed: int, step: jax.Array, ids: jax.Array, dropout: bool) -> Batch:
    """Rows ids [B, L] with all that a step draws for them."""
    batch = {"ids": ids, **family.draw(purpose_key(seed, step, BATCH), ids.shape[0])}
    if family.prompts > 0:
        batch["given"] = prompts.drawn(purpose_key(seed, step, PROMPTS), ids, family.prompts)
    if dropout:
        batch["dropout"] = jax.random.split(purpose_key(seed, step, DROPOUT), ids.shape[0])
    return batch


def make_step(
    net: Network,
    family: Family,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    ema_decay: float,
    accumulation: int,
    dropout: bool,
    layout: Layout | None = None,
) -> Callable:
    """step(state, ids [B, L], teacher) -> (state, metrics): one update on a global batch, `accumulation` microbatches at a time.

    Times and keys are drawn for the global batch before it is split, a key for every row, so neither accumulating nor the mesh
    changes any number but by rounding. `teacher` is what aux.teacher shows to the family, or None. Metrics: `loss`, the mean of
    each named loss and metric over its rows, `grad_norm` before clipping, `param_norm` after the update.

    Args:
      layout: how state and batch lie on a mesh (sharding.Layout); None for one device.
    """
    group, names = family.group, family.parts

    def gradients(net, params, aux, batch):
        """(metrics, {part of the loss: its gradient}) of one microbatch."""

        def losses(params):
            losses, metrics = family.loss(net, params, aux, batch, batch.get("dropout"))
            parts = {name: value.sum() / batch["ids"].shape[0] for name, value in losses.items()}
            parts |= {"loss": sum(parts.values())}
            means = {name: value.mean() for name, value in (losses | metrics).items()}
            return {name: parts[name] for name in names}, {"loss": parts["loss"], **means}

        parts, pullback, metrics = jax.vjp(losses, params, has_aux=True)

        def pick(name):
            return {other: jnp.float32(other == name) for other in parts}

        return metrics, {name: pullback(pick(name))[0] for name in parts}

    def accumulated(net, whole, params, aux, batch):
        """The same for all rows of a device. `whole` makes parameters usable, and its transpose goes back, once."""
        params, back = jax.vjp(whole, params)
        aux = whole(aux)
        if accumulation == 1:
            metrics, grads = gradients(net, params, aux, batch)
        else:

            def split(a):
                a = jnp.moveaxis(a.reshape(-1, accumulation, group, *a.shape[1:]), 1, 0)
                return a.reshape(accumulation, -1, *a.shape[3:])

            def add(total, rows):
                out = gradients(net, params, aux, rows)
                return jax.tree.map(lambda a, b: a + b / accumulation, total, out), None

            parts = jax.tree.map(split, batch)
            shapes = jax.eval_shape(partial(gradients, net), params, aux, jax.tree.map(lambda a: a[0], parts))
            zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (metrics, grads), _ = jax.lax.scan(add, zero, parts)
        return metrics, {name: back(g)[0] for name, g in grads.items()}

    alone = partial(accumulated, net, lambda tree: tree)
    compute = alone if layout is None else layout.on_rows(accumulated, net, names)

    def step(state: TrainState, ids: jax.Array, teacher=None):
        batch = _batch(family, seed, state.step, ids, dropout)
        if layout is not None:
            batch = jax.lax.with_sharding_constraint(batch, layout.rows)
        metrics, grads = compute(state.params, Auxiliary(teacher, state.ema, state.step), batch)
        first, *others = grads.values()
        grads = jax.tree.map(lambda *g: sum(g), first, *(_project(g, first) for g in others))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = update_ema(state.ema, family.student(params), state.step, ema_decay)
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
        return TrainState(state.step + 1, params, ema, opt_state), metrics | norms

    return step
