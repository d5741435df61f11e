"""A run that trains two networks: each with an optimizer of its own under the one loop, and only the student leaves it."""

import itertools

import jax
import numpy as np
import optax
import pytest
from orbax.checkpoint.experimental import v1 as ocp
from toy import run_config, train_only

import flowlm
from flowlm.engine.build import abstract_state, build
from flowlm.engine.optimizers import make_optimizer
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.exchange.export import export
from flowlm.objectives.base import Update
from flowlm.runs.metrics import read_metrics

STEPS = 7


@pytest.fixture(scope="module")
def chain(data_dir, tmp_path_factory):
    """(directory, its flow, its flow map), of a few steps each."""
    directory = tmp_path_factory.mktemp("chain")
    flow, flow_map = directory / "flow", directory / "flow_map"
    train_only(run_config(data_dir, **{"steps": 4, "model.input": "both"}), flow)
    train_only(run_config(data_dir, "flow_map", steps=4, teacher=str(flow)), flow_map)
    return directory, flow, flow_map


@pytest.fixture(scope="module")
def matched(chain, data_dir):
    """matched(name, **changes) trains a student of the map and returns its directory; what is there goes on."""
    directory, _, flow_map = chain

    def run(name, **changes):
        own = {"steps": STEPS, "checkpoint.every": 1, "teacher": str(flow_map), "objective.auxiliary_updates": 3}
        train_only(run_config(data_dir, "matched", **own | changes), directory / name)
        return directory / name

    return run


def saved(workdir, step):
    return ocp.load(workdir / "checkpoints" / str(step))


def same(a, b):
    return all(
        (np.asarray(x) == np.asarray(y)).all() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_the_student_starts_as_the_map_and_the_auxiliary_as_its_flow(matched, chain):
    _, flow, flow_map = chain
    params = saved(matched("whole"), 1)["params"]  # the student has not moved yet
    assert same(params["student"], saved(flow_map, 4)["ema"])
    assert same(params["auxiliary"]["embedding"], saved(flow, 4)["ema"]["embedding"])


def test_the_student_moves_in_every_third_step_and_the_auxiliary_in_all(matched):
    run = matched("whole")
    states = [saved(run, step) for step in range(1, STEPS + 1)]
    moved = {
        part: [not same(a["params"][part], b["params"][part]) for a, b in itertools.pairwise(states)]
        for part in ("student", "auxiliary")
    }
    assert moved["student"] == [step % 3 == 2 for step in range(1, STEPS)]
    assert all(moved["auxiliary"])
    assert same(states[0]["params"]["student"]["embedding"], states[-1]["params"]["student"]["embedding"])


def test_only_the_student_is_averaged_sampled_and_exported(matched, tmp_path):
    run = matched("whole")
    assert jax.tree.structure(saved(run, STEPS)["ema"]) == jax.tree.structure(saved(run, STEPS)["params"]["student"])
    model = flowlm.load(str(run))
    ids = model.sample_ids(num=4, steps=2, seed=0)
    exported = tmp_path / "exported"
    export(run, exported, Layout(make_mesh(data=1)), format="params")
    np.testing.assert_array_equal(flowlm.load(str(exported)).sample_ids(num=4, steps=2, seed=0), ids)
    # The same parameters and sampler as a flow map's: nothing of the matching is left in what is written.
    assert same(model.run.params, saved(run, STEPS)["ema"])


def test_a_round_is_taken_up_in_its_middle_bitwise(matched):
    whole = matched("whole")
    matched("cut", steps=4)  # one step into the second round
    assert same(saved(matched("cut"), STEPS), saved(whole, STEPS))


@pytest.mark.slow
def test_microbatches_on_four_devices_match_as_one(matched):
    one = read_metrics(matched("whole"))
    parts = read_metrics(matched("parts", **{"mesh.data": 4, "mesh.fsdp": True, "accumulation": 2}))
    for key in ("loss", "auxiliary", "grad_norm"):
        ours = [[line[key] for line in lines if key in line] for lines in (one, parts)]
        np.testing.assert_allclose(*ours, rtol=2e-5, atol=2e-6, err_msg=key)


@pytest.mark.slow
def test_rows_of_both_kinds_train_together(matched):
    lines = read_metrics(matched("both", **{"objective.matched": 0.5}))
    assert {"matching", "auxiliary", "diagonal", "psd"} <= lines[-1].keys()


def test_the_flow_is_the_one_behind_the_teacher(matched, chain, data_dir):
    """Also of what was matched to a map before."""
    directory, *_ = chain
    whole = matched("whole")
    train_only(run_config(data_dir, "matched", steps=1, teacher=str(whole)), directory / "again")
    params = saved(directory / "again", 1)["params"]
    assert same(params["student"], saved(whole, STEPS)["ema"])


@pytest.mark.slow
def test_a_map_without_a_flow_follows_its_own_diagonal(chain, data_dir):
    """If asked to; else what is missing and its mend are said."""
    directory, *_ = chain
    train_only(run_config(data_dir, "flow_map", steps=2), directory / "alone")
    with pytest.raises(ValueError, match="without a flow: give --config.objective.flow=diagonal"):
        train_only(run_config(data_dir, "matched", teacher=str(directory / "alone")), directory / "refused")
    with pytest.raises(ValueError, match="begins at a flow map: give --config.teacher=RUNDIR"):
        train_only(run_config(data_dir, "matched"), directory / "refused")
    train_only(
        run_config(
            data_dir, "matched", **{"steps": 1, "teacher": str(directory / "alone"), "objective.flow": "diagonal"}
        ),
        directory / "own",
    )


def test_each_part_has_its_own_rate_and_clock():
    """Against plain AdamW on each part: the slow one as if it were alone, with the schedule read at its own steps."""
    rates = optax.linear_schedule(0.1, 0.0, 12)
    settings = dict(b1=0.9, b2=0.99, weight_decay=0.0, decay_pattern="kernel$", clip_norm=1.0)
    both = make_optimizer(rates, {"slow": Update(1.0, 3), "fast": Update(2.0, 1)}, **settings)
    params = {"slow": {"a": np.ones(3, np.float32)}, "fast": {"a": np.ones(2, np.float32)}}
    state, rng = both.init(params), np.random.default_rng(0)
    alone = {
        "slow": make_optimizer(lambda n: rates(3 * n + 2), **settings),
        "fast": make_optimizer(lambda n: 2 * rates(n), **settings),
    }
    expected, states = params, {name: alone[name].init(params[name]) for name in params}
    for step in range(9):
        grads = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), params)
        updates, state = both.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name in expected:
            if name == "fast" or step % 3 == 2:
                update, states[name] = alone[name].update(grads[name], states[name], expected[name])
                expected = expected | {name: optax.apply_updates(expected[name], update)}
        for name in expected:
            np.testing.assert_array_equal(params[name]["a"], expected[name]["a"])


def test_three_networks_are_three_networks_to_the_plan(data_dir):
    """Parameters of two, moments of two, one average: what a state of one network has, but for the average, twice."""
    layout = Layout(make_mesh(data=1))

    def size(family, **changes):
        state = abstract_state(build(run_config(data_dir, family, **changes), 99), layout)
        return {
            part: sum(a.size for a in jax.tree.leaves(getattr(state, part))) for part in ("params", "ema", "opt_state")
        }

    two, one = size("matched", teacher="its run directory"), size("flow_map", teacher="its run directory")
    assert two["params"] == 2 * one["params"] and two["ema"] == one["ema"]
    assert abs(two["opt_state"] - 2 * one["opt_state"]) < 10  # counters


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_discrete_diffusion_is_matched_by_the_same_loop(kind, data_dir, tmp_path):
    """Its student begins as its teacher, resumes bitwise in the middle of a round, and is what is averaged."""
    train_only(run_config(data_dir, kind, steps=2), tmp_path / "teacher")

    def run(name, steps):
        changes = {
            "steps": steps,
            "checkpoint.every": 1,
            "teacher": str(tmp_path / "teacher"),
            "objective.auxiliary_updates": 2,
        }
        train_only(run_config(data_dir, f"matched_{kind}", **changes), tmp_path / name)

    run("whole", 4)
    run("cut", 3)
    run("cut", 4)
    assert same(saved(tmp_path / "cut", 4), saved(tmp_path / "whole", 4))
    first, last = saved(tmp_path / "whole", 1), saved(tmp_path / "whole", 4)
    assert same(first["params"]["student"], saved(tmp_path / "teacher", 2)["ema"])
    assert not same(last["params"]["student"], first["params"]["student"])
    assert jax.tree.structure(last["ema"]) == jax.tree.structure(last["params"]["auxiliary"])
    assert flowlm.load(str(tmp_path / "whole")).sample_ids(num=2, steps=2, seed=0).shape == (2, 19)
