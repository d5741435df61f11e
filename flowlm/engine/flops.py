"""What training costs, counted: the products of a step, and the same as so many passes of the network."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend import core
from ml_collections import ConfigDict

from flowlm.engine.build import abstract_teacher, build
from flowlm.engine.state import init_state, make_step
from flowlm.maths import vocab


def _inner(value):
    """Every jaxpr among the parameters of an equation."""
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _inner(each)


def count_flops(
    jaxpr: core.Jaxpr | core.ClosedJaxpr, kernels_only: bool = False, branch: Callable[..., float] = max
) -> float:
    """FLOPs of all products of a jaxpr, over all devices: the body of a scan as often as it runs, of a branch the dearest.

    A Pallas kernel counts as its body times its grid. A `while` counts once: its length is not in the jaxpr.

    Args:
      kernels_only: only those inside Pallas kernels, which no count from HLO can see.
      branch: which of several branches counts, max or min.
    """

    def count(jaxpr, inside):
        total = 0.0
        for eqn in jaxpr.eqns:
            name, params, deeper = eqn.primitive.name, eqn.params, inside
            if name == "dot_general" and inside:
                (contracted, _), _ = params["dimension_numbers"]
                shape = eqn.invars[0].aval.shape
                total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[d] for d in contracted)
                continue
            times = 1
            if name == "scan":
                times = params["length"]
            elif name == "pallas_call":
                times, deeper = math.prod(params["grid_mapping"].grid), True
            elif name == "shard_map":  # its body is what one device does
                axes = next(
                    value for key, value in params.items() if key.endswith("manual_axes")
                )  # jax renames it at times
                times = math.prod(params["mesh"].shape[axis] for axis in axes)
            parts = [count(each, deeper) for value in params.values() for each in _inner(value)]
            total += times * (branch(parts, default=0.0) if name == "cond" else sum(parts))
        return total

    return count(getattr(jaxpr, "jaxpr", jaxpr), not kernels_only)


def network_evaluations(config: ConfigDict) -> float:
    """What a row of a batch costs in a training step, as passes forward of the network: teachers and auxiliaries included.

    Products are counted, of the step and of one pass with its output layer. A backward pass is two, so that training a network by
    itself costs about three. Networks that move only in some steps count by their share of them.
    """
    experiment = build(config, config.model.vocab_size, trained=True)
    net, family, optimizer, _ = experiment
    rows = 2 * family.group
    state = jax.eval_shape(lambda: init_state(net, family, optimizer, 0))
    ids = jax.ShapeDtypeStruct((rows, net.length), jnp.int32)
    step = make_step(net, family, optimizer, seed=0, ema_decay=0.9, accumulation=1, dropout=False)
    training = jax.make_jaxpr(step)(state, ids, abstract_teacher(config, experiment))

    def forward(params, ids, tau):
        return vocab.argmax(net.head(params), net.apply(params, net.embed(params, ids), tau))

    once = count_flops(jax.make_jaxpr(forward)(state.ema, ids, jax.ShapeDtypeStruct((rows,), jnp.float32)))
    most, least = (count_flops(training, branch=branch) for branch in (max, min))
    every = max((update.every for update in family.updates.values()), default=1)
    return (least + (most - least) / every) / once
