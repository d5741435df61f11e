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


class Auxiliary(NamedTuple):
    """What an objective may look at beside the live parameters; absent parts are None."""

    teacher: Any = None
    ema: Any = None


def purpose_key(seed: int, step, purpose: int) -> jax.Array:
    """The key of one purpose at one step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), purpose)


def init_state(net, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """A fresh state; the moving average starts at the parameters."""
    params = net.init(purpose_key(seed, 0, INIT))
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def make_step(net, family, optimizer, *, seed: int, ema_decay: float, accumulation: int, dropout: bool):
    """step(state, ids [B, L]) -> (state, metrics): one update on a global batch, `accumulation` microbatches at a time.

    Times and noise keys are drawn for the global batch before it is split, so accumulating changes no number but rounding.
    Metrics: `loss` (the sum of the named losses' means), each named loss and metric, `grad_norm` before clipping,
    `param_norm` after the update.
    """

    def mean_loss(params, aux, batch, key):
        losses, metrics = family.loss(net, params, aux, batch, key)
        means = {name: value.mean() for name, value in (losses | metrics).items()}
        return sum(means[name] for name in losses), means

    grad = jax.value_and_grad(mean_loss, has_aux=True)

    def step(state: TrainState, ids: jax.Array):
        batch = {"ids": ids, **family.draw(purpose_key(seed, state.step, BATCH), ids.shape[0])}
        key = purpose_key(seed, state.step, DROPOUT) if dropout else None
        aux = Auxiliary(ema=state.ema)
        if accumulation == 1:
            (loss, metrics), grads = grad(state.params, aux, batch, key)
        else:
            # Microbatch i takes rows i, i + accumulation, ...: every device keeps its share of each.
            parts = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, accumulation, *a.shape[1:]), 1, 0), batch)

            def add(total, part):
                index, rows = part
                out = grad(state.params, aux, rows, None if key is None else jax.random.fold_in(key, index))
                return jax.tree.map(lambda a, b: a + b / accumulation, total, out), None

            shapes = jax.eval_shape(grad, state.params, aux, jax.tree.map(lambda a: a[0], parts), key)
            zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            ((loss, metrics), grads), _ = jax.lax.scan(add, zero, (jnp.arange(accumulation), parts))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = update_ema(state.ema, params, state.step, ema_decay)
        norms = {"grad_norm": optax.global_norm(grads), "param_norm": optax.global_norm(params)}
        metrics = {"loss": loss, **metrics, **norms}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return step
