"""The times at which samplers ask the network, written from their formulas by hand: the law of the samples hardly sees them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import network, overriding, run_config

from flowlm.maths.time_warp import TimeWarp
from flowlm.objectives import make_family

VOCAB, WIDTH, NUM = 12, 16, 3
WARP = TimeWarp("gaussian", "identity", VOCAB, WIDTH)  # tau is t
UNTOLD = -1.0  # stands for a second time that the network is not told
NET = network(warp="identity", time_embeddings=2)
PARAMS = NET.init(jax.random.key(0))


def family(name, **settings):
    objective = run_config("", name).objective.to_dict() | settings
    del objective["family"]
    return make_family(name, WARP, False, **objective)


def asked(sample, steps):
    """(tau_s, tau_t) of every call of the network by `sample`(net, params, key, num, steps), in order."""
    calls = []

    def apply(params, z, tau_s, tau_t=None, keys=None):
        assert z.shape == (NUM, 6, WIDTH) and tau_s.shape == (NUM,)

        def note(tau_s, tau_t):
            assert (tau_s == tau_s[0]).all() and (tau_t == tau_t[0]).all()
            calls.append((float(tau_s[0]), float(tau_t[0])))

        jax.debug.callback(note, tau_s, jnp.full((NUM,), UNTOLD) if tau_t is None else tau_t, ordered=True)
        return jnp.zeros((NUM, 6, WIDTH))

    sample(overriding(NET, apply=apply, weak=apply), PARAMS, jax.random.key(1), NUM, steps)
    jax.effects_barrier()
    return calls


GRID = {1: [0.0], 2: [0.0, 0.5], 5: [0.0, 0.2, 0.4, 0.6, 0.8]}


@pytest.mark.parametrize("steps", GRID)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_flow_asks_at_k_of_n(guidance, steps):
    """Call k of N is at tau = k / N: the first at 0, the last one step before 1. With guidance the weak network is asked too."""
    calls = asked(family("flow", guidance=guidance).sample, steps)
    times = [(tau, UNTOLD) for tau in GRID[steps] for _ in range(int(guidance))]
    np.testing.assert_allclose(calls, times, atol=1e-6)


# With re-noising gamma a jump goes on to where only sqrt(1 - gamma^2) of the noise of its end is left; the last jump goes to 1.
ENDS = {
    0.0: {1: [1.0], 2: [0.5, 1.0], 5: [0.2, 0.4, 0.6, 0.8, 1.0]},
    0.6: {1: [1.0], 2: [0.6, 1.0], 5: [0.36, 0.52, 0.68, 0.84, 1.0]},  # 1 - 0.8 (1 - k / N)
}


@pytest.mark.parametrize("steps", GRID)
@pytest.mark.parametrize("gamma", ENDS)
def test_the_flow_map_jumps_from_k_of_n(gamma, steps):
    calls = asked(family("flow_map", gamma=gamma).sample, steps)
    np.testing.assert_allclose(calls, [*zip(GRID[steps], ENDS[gamma][steps], strict=True)], atol=1e-6)


def test_a_trajectory_asks_at_the_times_of_its_samples():
    assert asked(family("flow").trajectory, 5) == asked(family("flow").sample, 5)
    assert asked(family("flow_map", gamma=0.6).trajectory, 5) == asked(family("flow_map", gamma=0.6).sample, 5)
