"""A network trained by the real step comes to the exact optimum of its loss, and its samples to the law of the data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import toy

from flowlm.engine.optimizers import make_optimizer, make_schedule
from flowlm.engine.state import init_state, make_step
from flowlm.maths.prior import Gaussian
from flowlm.maths.time_warp import TimeWarp
from flowlm.objectives.flow import Flow

VOCAB, LENGTH, WIDTH, BATCH, STEPS = 6, 4, 32, 128, 1200


def test_a_tiny_network_learns_a_finite_law():
    sequences, weights = oracle.correlated_law(VOCAB, LENGTH, num=8, seed=0)
    warp = TimeWarp("gaussian", "ambient", VOCAB, WIDTH)
    family = Flow(Gaussian(), warp)
    net = toy.network(VOCAB, LENGTH, width=WIDTH, input="both", time_scale=1000.0, learned_positions=True)
    schedule = make_schedule(3e-3, "cosine", 50, STEPS)
    optimizer = make_optimizer(schedule, b1=0.9, b2=0.99, weight_decay=0.0, decay_pattern="kernel$", clip_norm=1.0)
    step = make_step(net, family, optimizer, seed=0, ema_decay=0.99, accumulation=1, dropout=False)
    table, logits = jnp.asarray(sequences), jnp.log(jnp.asarray(weights))

    @functools.partial(jax.jit, compiler_options=toy.OPTIMIZED)
    def train(state):
        def batch(number):
            return table[jax.random.categorical(jax.random.key(number), logits, shape=(BATCH,))]

        return jax.lax.fori_loop(0, STEPS, lambda number, state: step(state, batch(number))[0], state)

    state = jax.jit(lambda: init_state(net, family, optimizer, seed=0))()
    fresh, learnt = state.ema, train(state).ema

    # Both losses on the same rows, times and noise, which neither has seen. The oracle's embedding does not matter where V < D.
    ids = table[jax.random.categorical(jax.random.key(10**6), logits, shape=(8192,))]
    batch = {"ids": ids, **family.draw(jax.random.key(10**6 + 1), len(ids))}

    def loss(net):
        return jax.jit(lambda params: family.loss(net, params, None, batch, None)[0]["cross_entropy"].mean())

    optimum, params = oracle.oracle(sequences, weights, np.asarray(learnt["embedding"]), warp)
    best, reached = float(loss(optimum)(params)), loss(net)
    assert best < float(reached(learnt)) < 1.1 * best < 0.5 * float(reached(fresh))

    sample = jax.jit(lambda params, key: family.sample(net, params, key, 2048, 64), compiler_options=toy.OPTIMIZED)

    def distance(params):
        return oracle.total_variation(sample(params, jax.random.key(1)), sequences, weights)

    assert distance(learnt) < 0.1 < 0.5 < distance(fresh)
