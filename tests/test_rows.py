"""Rows that are asked for one by one are those that the samplers draw, whatever is computed beside them."""

import dataclasses

import jax
import numpy as np
import pytest
from toy import drawn, run_config

from flowlm.engine import build as assembly
from flowlm.engine.rows import Rows
from flowlm.engine.sampling import Sampler, named_sampler
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.maths import vocab
from flowlm.objectives.prompts import UNKNOWN

LENGTH, V = 7, 11
STEPS = 4


def sampler_of(kind, **changes):
    """(network, sampler, parameters) of a family."""
    small = {"data.length": LENGTH, "model.vocab_size": V, "model.blocks": 1}
    config = run_config("", kind, **small, **changes)
    if kind in ("matched", "gumbel"):
        config.teacher = "a run, which a sampler does not ask for"
    if kind == "autoregressive":
        config.objective.start = 0
    net, family, *_ = assembly.build(config, V, None, trained=True)
    return net, named_sampler(family)[1], drawn(net)


def written(rows, asked, steps):
    """(ids, what was seen at each call) of rows written a call at a time."""
    state, seen = rows.begin(asked, steps), []
    for i in range(steps - 1):
        state, ids = rows.move(asked, state, i, steps)
        seen.append(rows.read(ids, asked))
    ids = rows.read(rows.end(asked, state, steps), asked)
    return ids, np.stack([*seen, ids])


def asked_of(seeds, numbers, **more):
    nothing = np.full((len(seeds), LENGTH), UNKNOWN)
    return {"seed": np.array(seeds, np.uint32), "number": np.array(numbers, np.int32), "given": nothing} | more


def drawing(net, family, params):
    """one(seed, number, steps, given): row `number` of a seed by the sampler, which draws one row in a call on one device."""
    samplers = {}

    def one(seed, number, steps, given=None):
        kind = given is not None
        if kind not in samplers:
            samplers[kind] = Sampler(net, family, Layout(make_mesh(devices=jax.devices()[:1])), 1, kind)
        given = None if given is None else np.repeat(given[None], number + 1, 0)
        return samplers[kind](params, jax.random.key(seed), number + 1, steps, given=given)[number]

    return one


GIVEN = np.full((3, LENGTH), UNKNOWN)
GIVEN[:, 0], GIVEN[1, 2:4], GIVEN[2, 5] = 0, 5, 7


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("flow", {"objective.temperature": 0.9}),
        ("flow_map", {"objective.gamma": 0.5, "objective.prompts": 0.5}),
        pytest.param("matched", {"objective.shared_noise": 0.5}, marks=pytest.mark.slow),
        ("masked", {"objective.greedy": True}),
        ("uniform", {}),
    ],
)
def test_a_row_is_that_of_its_seed_whatever_is_beside_it(kind, changes):
    net, family, params = sampler_of(kind, **changes)
    rows, one = Rows(net, family, Layout(make_mesh()), params), drawing(net, family, params)
    seeds, numbers = [3, 2**32 - 1, 3], [0, 2, 1]
    together, seen = written(rows, asked_of(seeds, numbers), STEPS)
    for row, (seed, number) in enumerate(zip(seeds, numbers)):
        np.testing.assert_array_equal(together[row], one(seed, number, STEPS))
    assert ((seen >= 0) & (seen < V)).all() and (seen[0] != seen[-1]).any()

    prompted, seen = written(rows, asked_of(seeds, numbers, given=GIVEN), STEPS)
    np.testing.assert_array_equal(prompted[2], one(seeds[2], numbers[2], STEPS, GIVEN[2]))
    assert (np.where(GIVEN == UNKNOWN, GIVEN, seen) == GIVEN).all()


def test_what_is_seen_at_a_call_of_a_flow_is_its_trajectory():
    net, family, params = sampler_of("flow")
    _, seen = written(Rows(net, family, Layout(make_mesh()), params), asked_of([5], [0]), STEPS)
    key = jax.random.fold_in(jax.random.key(5), 0)
    followed = jax.jit(lambda params, key: family.trajectory(net, params, key, 1, STEPS))(params, key)
    np.testing.assert_array_equal(seen, followed[:, :1])


@pytest.mark.parametrize(("kind", "steps"), [("autoregressive", LENGTH - 1), ("gumbel", 1)])
def test_a_family_of_one_number_of_steps_is_written_at_once(kind, steps):
    net, family, params = sampler_of(kind, **({"model.width": 16} if kind == "gumbel" else {}))
    rows, asked = Rows(net, family, Layout(make_mesh()), params, steps), asked_of([4, 9], [1, 0])
    one = drawing(net, family, params)
    ids = rows.read(rows.whole(asked), asked)
    for row in range(2):
        seed, number = (int(asked[name][row]) for name in ("seed", "number"))
        np.testing.assert_array_equal(ids[row], one(seed, number, steps))


@pytest.mark.parametrize("kind", ["uniform", "flow_map"])
def test_rows_of_one_batch_have_temperatures_of_their_own(kind):
    net, family, params = sampler_of(kind)
    rows = Rows(net, family, Layout(make_mesh()), params)
    heat = np.array([0.0, 2.0], np.float32)
    together, _ = written(rows, asked_of([6, 6], [0, 0], temperature=heat), STEPS)
    for row, temperature in enumerate(heat):
        mine = dataclasses.replace(family, temperature=float(temperature))
        np.testing.assert_array_equal(together[row], drawing(net, mine, params)(6, 0, STEPS))


def test_programs_are_shared_by_sizes():
    net, family, params = sampler_of("flow")
    rows = Rows(net, family, Layout(make_mesh(devices=jax.devices()[:1])), params)
    assert [rows.size(num) for num in (1, 2, 3, 5, 8, 9)] == [1, 2, 4, 8, 8, 16]
    assert [Rows(net, family, Layout(make_mesh()), params).size(num) for num in (1, 8, 9, 17)] == [8, 8, 16, 32]


def test_logits_of_mapped_rows_are_cut_as_those_of_a_batch():
    """Nothing of all rows, positions and tokens is held at once."""

    def largest(batch):
        head, sizes = (lambda hidden: hidden @ np.ones((4, 1000), np.float32)), []

        def of_row(hidden):
            return vocab.argmax(lambda h: (sizes.append(h.shape), head(h))[1], hidden[None])[0]

        jax.make_jaxpr(jax.vmap(of_row, axis_name=vocab.MAPPED))(np.ones((batch, 64, 4), np.float32))
        return batch * sizes[-1][1] * 1000

    assert largest(4) == 4 * 64 * 1000  # small enough to be held at once
    assert largest(256) <= vocab.SMALL
