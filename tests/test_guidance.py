"""Guided predictions draw what they say, to the far tail."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from toy import OPTIMIZED

from flowlm.objectives.guidance import Prediction

TAIL = -17.0
STRONG = jnp.concatenate([jnp.zeros(1), jnp.full(64, TAIL)])


def shown(hidden):
    """The logits of the strong network where the state is 0, and of a weak one, certain of the first token, where it is 1."""
    weak = jnp.concatenate([jnp.zeros(1), jnp.full(64, -200.0)])
    return jnp.where(hidden > 0.5, weak, STRONG)


def test_a_guided_draw_has_the_far_tail():
    """guidance 2 doubles 64 probabilities of e^-17. Plain float32 Gumbel noise ends near 16 and draws them far too rarely."""
    shape = (16, 4096, 1)
    draw = jax.jit(
        lambda key: (Prediction(Partial(shown), (jnp.zeros(shape), jnp.ones(shape)), 2.0).draw(key) > 0).sum(),
        compiler_options=OPTIMIZED,
    )
    calls = 64
    count = sum(int(draw(jax.random.key(i))) for i in range(calls))
    expected = calls * 16 * 4096 * 2 * 64 * np.exp(TAIL)
    assert abs(count - expected) < 2.5 * np.sqrt(expected) < 0.7 * expected
