"""What a run remembers, and one step of training as a pure function of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flowlm.optimizers import update_ema

# What a step draws randomness for. Every key is a function of (seed, step, purpose); none is stored.
BATCH, DROPOUT, INIT, SAMPLE, EVALUATION = range(5)


class TrainState(NamedTuple):
    """step [] int32; params, ema and opt_state are trees of arrays, no functions."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


class Teacher(NamedTuple):
    """Frozen parameters in the student's architecture: a flow (or discrete diffusion), and for one target its residual."""

    flow: Any
    residual: Any = None


class Auxiliary(NamedTuple):
    """What an objective may look at beside the live parameters; absent parts are None. step: the step that is made, int32 []."""

    teacher: Teacher | None = None
    ema: Any = None
    step: jax.Array | None = None


def purpose_key(seed: int, step, purpose: int) -> jax.Array:
    """The key of one purpose at one step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), purpose)


def init_state(
    net, family, optimizer: optax.GradientTransformation, seed: int, teacher=None, origin=None
) -> TrainState:
    """A fresh state, one that the family makes of a teacher, or one with the parameters of another run, `origin`.

    The moving average starts at the parameters.
    """
    params = net.init(purpose_key(seed, 0, INIT))
    params = params if teacher is None else family.start(net, params, teacher)
    params = params if origin is None else net.adopt(params, origin)
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def _project(gradient, other):
    """`gradient` without its part against `other`, where they conflict (gradient surgery, 2001.06782)."""
    dot = lambda a, b: sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    against = jnp.minimum(dot(gradient, other), 0) / jnp.maximum(dot(other, other), 1e-30)
    return jax.tree.map(lambda g, o: g - against * o, gradient, other)


def make_step(net, family, optimizer, *, seed: int, ema_decay: float, accumulation: int, dropout: bool):
    """step(state, ids [B, L], teacher) -> (state, metrics): one update on a global batch, `accumulation` microbatches at a time.

    Times and noise keys are drawn for the global batch before it is split, so accumulating changes no number but rounding.
    `teacher` is what aux.teacher shows to the family, or None. Metrics: `loss`, the mean of each named loss
    and metric over its rows, `grad_norm` before clipping, `param_norm` after the update.
    """
    group, surgery = getattr(family, "group", 1), getattr(family, "surgery", False)

    def losses(params, aux, batch, key):
        losses, metrics = family.loss(net, params, aux, batch, key)
        parts = {name: value.sum() / batch["ids"].shape[0] for name, value in losses.items()}
        means = {name: value.mean() for name, value in (losses | metrics).items()}
        return parts if surgery else {"loss": sum(parts.values())}, {"loss": sum(parts.values()), **means}

    def gradients(params, aux, batch, key):
        """(metrics, {part of the loss: its gradient})."""
        parts, pullback, metrics = jax.vjp(lambda p: losses(p, aux, batch, key), params, has_aux=True)
        pick = lambda name: {other: jnp.float32(other == name) for other in parts}
        return metrics, {name: pullback(pick(name))[0] for name in parts}

    def step(state: TrainState, ids: jax.Array, teacher=None):
        batch = {"ids": ids, **family.draw(purpose_key(seed, state.step, BATCH), ids.shape[0])}
        key = purpose_key(seed, state.step, DROPOUT) if dropout else None
        aux = Auxiliary(teacher, state.ema, state.step)
        if accumulation == 1:
            metrics, grads = gradients(state.params, aux, batch, key)
        else:
            # Microbatch i takes groups i, i + accumulation, ...: every device keeps its share of each.
            def split(a):
                a = jnp.moveaxis(a.reshape(-1, accumulation, group, *a.shape[1:]), 1, 0)
                return a.reshape(accumulation, -1, *a.shape[3:])

            parts = jax.tree.map(split, batch)

            def add(total, part):
                index, rows = part
                out = gradients(state.params, aux, rows, None if key is None else jax.random.fold_in(key, index))
                return jax.tree.map(lambda a, b: a + b / accumulation, total, out), None

            shapes = jax.eval_shape(gradients, state.params, aux, jax.tree.map(lambda a: a[0], parts), key)
            zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (metrics, grads), _ = jax.lax.scan(add, zero, (jnp.arange(accumulation), parts))
        first, *others = grads.values()
        grads = jax.tree.map(lambda *g: sum(g), first, *(_project(g, first) for g in others))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = update_ema(state.ema, params, state.step, ema_decay)
        norms = {"grad_norm": optax.global_norm(grads), "param_norm": optax.global_norm(params)}
        return TrainState(state.step + 1, params, ema, opt_state), metrics | norms

    return step
