"""What distillation of a discrete diffusion can gain: its loss minimised over all functions of a state, not over networks.

The law is finite and so are the states, so a student is a table of logits, one for each state and time, and its teacher the exact
one. A model that draws every token by itself writes rows that the law has not; a student takes in one step what its teacher takes
in two and is worth something only if fewer of its rows are such.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.tree_util import Partial
from toy import OPTIMIZED, FunctionNetwork

from flowlm.maths.time_warp import TimeWarp
from flowlm.objectives.base import Auxiliary, Teacher
from flowlm.objectives.discrete import EPS
from flowlm.objectives.masked import Masked
from flowlm.objectives.matched_discrete import MatchedMasked, MatchedUniform
from flowlm.objectives.uniform import Uniform, alpha_of

V, L, UPDATES, BATCH = 4, 3, 800, 256
SEQUENCES, WEIGHTS = oracle.correlated_law(V, L, 10, 3)


def exact_table(kind, times):
    """log p(token at a position | the others of the state) [times, states, L, V] of the law, floored at log 1e-6."""
    size = V + (kind == "masked")
    states = np.stack(np.unravel_index(np.arange(size**L), (size,) * L), -1)
    same = states[:, None] == SEQUENCES[None]  # [states, K, L]
    if kind == "masked":
        like = np.broadcast_to(np.where(same | (states == V)[:, None], 1.0, 1e-12), (len(times), *same.shape))
    else:
        alpha = np.asarray(alpha_of(np.asarray(times)))[:, None, None, None]
        like = np.maximum(alpha * same + (1 - alpha) / V, 1e-12)
    others = np.log(like).sum(-1, keepdims=True) - np.log(like)
    posterior = WEIGHTS[:, None] * np.exp(others - others.max(2, keepdims=True))
    posterior /= posterior.sum(2, keepdims=True)
    return np.log(np.maximum(np.einsum("tskl,klv->tslv", posterior, np.eye(V)[SEQUENCES]), 1e-6))


def tabular(kind, steps):
    """(net, parameters of the exact teacher): logits looked up by state and by time, a multiple of 1 / steps."""
    size, times = V + (kind == "masked"), np.arange(steps + 1) / steps

    def apply(params, z, alpha, tau_t=None, keys=None):
        state = jnp.argmax(z, -1) @ (size ** jnp.arange(L)[::-1])
        at = 0 if kind == "masked" else jnp.round((1 - alpha) / (1 - EPS) * steps).astype(int)
        return params["table"][at, state]

    def head(params):
        return Partial(oracle.log_prob_head)

    teacher = {"embedding": jnp.eye(size), "table": jnp.asarray(exact_table(kind, times), jnp.float32)}
    return FunctionNetwork(apply, head, V, L, size), teacher


def descended(loss, optimizer, start, teacher):
    """Tables after UPDATES steps down loss(tables, teacher, key)."""

    @functools.partial(jax.jit, compiler_options=OPTIMIZED)
    def fit(teacher, start):
        def update(carry, key):
            tables, state = carry
            change, state = optimizer.update(jax.grad(loss)(tables, teacher, key), state)
            return (optax.apply_updates(tables, change), state), None

        return jax.lax.scan(update, (start, optimizer.init(start)), jax.random.split(jax.random.key(0), UPDATES))[0][0]

    return fit(teacher, start)


def distilled(family, net, teacher, steps):
    """The student's table that the family's own loss ends at, started at its teacher's."""
    optimizer = optax.adam(optax.linear_schedule(0.1, 0.0, UPDATES))
    data, logits = jnp.asarray(SEQUENCES), jnp.log(jnp.asarray(WEIGHTS))

    def loss(table, teacher, key):
        rows, times, draws = jax.random.split(key, 3)
        batch = {"ids": data[jax.random.categorical(rows, logits, shape=(BATCH,))], **family.draw(draws, BATCH)}
        if isinstance(family, Uniform):  # at the times that its sampler asks for
            batch["r"] = jax.random.randint(times, (BATCH,), 1, steps + 1) / steps
        losses, _ = family.loss(net, teacher | {"table": table}, Auxiliary(Teacher(teacher)), batch, None)
        return sum(each.mean() for each in losses.values())

    return teacher | {"table": descended(loss, optimizer, teacher["table"], teacher)}


def inside(family, net, params, steps):
    """The share of 20,000 samples that are rows of the law (standard error at most .0035)."""
    ids = np.asarray(
        jax.jit(lambda params, key: family.sample(net, params, key, 20_000, steps))(params, jax.random.key(1))
    )
    return (ids[:, None] == SEQUENCES).all(-1).any(-1).mean()


FAMILIES = {
    "masked": Masked(teacher=True),
    "uniform": Uniform(warp=TimeWarp("gaussian", "ambient", V, V), teacher=True),
}


@pytest.mark.parametrize(
    ("kind", "steps"), [("masked", 1), pytest.param("masked", 2, marks=pytest.mark.slow), ("uniform", 2)]
)
def test_a_student_by_default_writes_more_rows_of_the_law_than_its_teacher(kind, steps):
    """The forward divergence has nothing to gain: its optimum is the teacher's mean prediction."""
    family = replace(FAMILIES[kind], jump=1 / steps)
    net, teacher = tabular(kind, steps)
    taught = inside(family, net, teacher, steps)
    mine = inside(family, net, distilled(family, net, teacher, steps), steps)
    forward = replace(family, divergence="forward")
    other = inside(forward, net, distilled(forward, net, teacher, steps), steps)
    assert mine > taught + 0.05
    assert other < taught + 0.015


GRID = 8  # times of the tables of two networks

MATCHED = {
    "masked": MatchedMasked(teacher=True),
    "uniform": MatchedUniform(warp=TimeWarp("gaussian", "ambient", V, V), teacher=True),
}


def matched(family, net, teacher, steps):
    """The student's table that matching ends at; both networks start at the teacher's, the auxiliary is the faster one."""
    optimizer = optax.partition(
        {
            name: optax.adam(optax.linear_schedule(rate, 0.0, UPDATES))
            for name, rate in (("student", 0.05), ("auxiliary", 0.1))
        },
        {"student": "student", "auxiliary": "auxiliary"},
    )
    data, logits = jnp.asarray(SEQUENCES), jnp.log(jnp.asarray(WEIGHTS))

    def loss(tables, teacher, key):
        rows, times, others, draws = jax.random.split(key, 4)
        batch = {"ids": data[jax.random.categorical(rows, logits, shape=(BATCH,))], **family.draw(draws, BATCH)}
        batch["r"] = jax.random.randint(times, (BATCH,), 1, steps + 1) / steps  # those that its sampler asks for
        if isinstance(family, Uniform):
            batch["r_next"] = jax.random.randint(others, (BATCH,), 1, GRID + 1) / GRID
        params = {name: teacher | {"table": table} for name, table in tables.items()}
        losses, _ = family.loss(net, params, Auxiliary(Teacher(teacher), None, jnp.int32(0)), batch, None)
        return sum(each.mean() for each in losses.values())

    start = dict.fromkeys(("student", "auxiliary"), teacher["table"])
    return teacher | {"table": descended(loss, optimizer, start, teacher)["student"]}


@pytest.mark.parametrize(
    ("kind", "steps", "tie"),
    [("masked", 2, 0.0), ("uniform", 2, 0.0), pytest.param("masked", 2, 1.0, marks=pytest.mark.slow)],
)
def test_a_matched_student_writes_more_rows_of_the_law_than_its_teacher(kind, steps, tie):
    family = replace(MATCHED[kind], tie=tie)
    net, teacher = tabular(kind, GRID)
    taught = inside(family, net, teacher, steps)
    mine = inside(family, net, matched(family, net, teacher, steps), steps)
    assert mine > taught + 0.05, (mine, taught)
