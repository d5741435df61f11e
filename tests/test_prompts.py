"""Prompts against exact conditional laws, and what no family may change: given tokens, and the loss by them."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import test_discrete
import toy
from toy import OPTIMIZED, drawn, run_config

from flowlm.engine import build as assembly
from flowlm.engine.optimizers import make_optimizer, make_schedule
from flowlm.engine.sampling import Sampler, named_sampler
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.engine.state import init_state, make_step
from flowlm.maths.prior import Gaussian
from flowlm.maths.time_warp import TimeWarp
from flowlm.objectives import prompts
from flowlm.objectives.autoregressive import Autoregressive
from flowlm.objectives.base import Auxiliary, Teacher
from flowlm.objectives.flow import Flow
from flowlm.objectives.masked import Masked
from flowlm.objectives.prompts import UNKNOWN, Shown, Told
from flowlm.objectives.uniform import Uniform

V, L, WIDTH = 4, 4, 6
SEQUENCES, WEIGHTS = oracle.correlated_law(V, L, 40, 0)
WARP = TimeWarp("gaussian", "embedded", V, WIDTH)
NUM = 1000  # samples of each prompt


def prompts_of(patterns, sequence):
    """Rows of the sequence's tokens where a pattern has 1."""
    return np.where(np.array(patterns, bool), sequence, UNKNOWN)


# A prefix, a suffix, a gap, a span and scattered tokens of one sequence, which leave several others possible.
PATTERNS = (1, 1, 0, 0), (0, 0, 1, 1), (1, 0, 0, 1), (0, 1, 1, 0), (0, 1, 0, 0)
PROMPTS = prompts_of(PATTERNS, SEQUENCES[np.argmax(WEIGHTS)])


def conditional(given, sequences=SEQUENCES, weights=WEIGHTS):
    """(the sequences that a prompt leaves, their law given the prompt)."""
    left = ((sequences == given) | (given == UNKNOWN)).all(1)
    return sequences[left], weights[left] / weights[left].sum()


def distances(ids):
    """Total variation to the conditional law of each of PROMPTS, for rows ids [number of prompts, N, L]."""
    return np.array([oracle.total_variation(rows, *conditional(given)) for rows, given in zip(ids, PROMPTS)])


def noise_of(num):
    """The expected distance of `num` exact draws, for each of PROMPTS."""
    laws = [conditional(given)[1] for given in PROMPTS]
    return np.array([np.sqrt(law * (1 - law) / (2 * np.pi * num)).sum() for law in laws])


def written(family, net, params, steps, num=NUM):
    """Samples [number of prompts, num, L] of each of PROMPTS."""
    given = jnp.asarray(np.repeat(PROMPTS, num, 0))

    @functools.partial(jax.jit, compiler_options=OPTIMIZED)
    def draw(params, key):
        return prompts.sample(family, net, params, key, given, steps)

    return np.asarray(draw(params, jax.random.key(steps))).reshape(len(PROMPTS), num, L)


def test_the_prompts_leave_something_to_draw():
    assert all(len(conditional(given)[0]) > 2 for given in PROMPTS)


# --- exact conditional laws --------------------------------------------------------------------------------------


def exact_flow(vocab=V, width=WIDTH):
    embedding = np.random.default_rng(0).standard_normal((vocab, width)) / np.sqrt(width)
    return oracle.oracle(SEQUENCES, WEIGHTS, embedding, WARP)


@pytest.mark.parametrize("eta", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_a_flow_that_sees_what_is_given_writes_the_conditional_law(eta):
    net, params = exact_flow()
    family = Flow(Gaussian(), WARP, eta=eta, prompts=0.5)
    assert (distances(written(family, net, params, 32)) < 2 * noise_of(NUM) + 0.015).all()


@pytest.mark.parametrize(("kind", "share"), [("masked", 0.0), pytest.param("uniform", 0.5, marks=pytest.mark.slow)])
def test_discrete_diffusion_that_sees_what_is_given_writes_the_conditional_law(kind, share, monkeypatch):
    """Masked diffusion without having been trained so, because clean tokens among masks are what it always sees."""
    monkeypatch.setattr(test_discrete, "V", V)
    net, params = test_discrete.exact(SEQUENCES, WEIGHTS, kind)
    net = dataclasses.replace(net, length=L)
    family = (
        Masked(prompts=share)
        if kind == "masked"
        else Uniform(warp=dataclasses.replace(WARP, kind="ambient"), prompts=share)
    )
    assert (distances(written(family, net, params, 32)) < 2 * noise_of(NUM) + 0.02).all()


@pytest.mark.parametrize(
    "kind", ["ancestral", *(pytest.param(each, marks=pytest.mark.slow) for each in ("euler", "uniform"))]
)
def test_replacement_comes_nearer_to_the_conditional_law_but_is_not_it(kind, monkeypatch):
    """With the exact denoiser that was never shown anything. Beside it: the prompt written over what has not heard of it."""
    if kind == "uniform":
        monkeypatch.setattr(test_discrete, "V", V)
        net, params = test_discrete.exact(SEQUENCES, WEIGHTS, kind)
        net = dataclasses.replace(net, length=L)
        family = Uniform(warp=dataclasses.replace(WARP, kind="ambient"))
    else:
        net, params = exact_flow()
        family = Flow(Gaussian(), WARP, eta=float(kind == "ancestral"))
    told = distances(written(family, net, params, 32))
    deaf = family.sample(net, params, jax.random.key(0), NUM, 64)
    over = distances(np.where(PROMPTS[:, None] == UNKNOWN, deaf, PROMPTS[:, None]))
    assert (told < 0.7 * over).all()
    assert told.max() > 3 * noise_of(NUM).max()


def test_one_step_of_replacement_knows_nothing_of_the_prompt():
    net, params = exact_flow()
    family = Flow(Gaussian(), WARP)
    given = jnp.asarray(np.repeat(PROMPTS, 50, 0))
    ids = prompts.sample(family, net, params, jax.random.key(0), given, 1)
    deaf = family.sample(net, params, jax.random.key(0), len(given), 1)
    np.testing.assert_array_equal(ids, np.where(given == UNKNOWN, deaf, given))


def test_a_prefix_of_an_autoregressive_model_is_followed_exactly():
    """Against its probabilities of all rows that begin so."""
    net = toy.network(V, L, causal=True, time_embeddings=0)
    params, family = toy.perturbed(net.init(jax.random.key(0)), 0.5), Autoregressive(start_token=1)
    every = np.array([row for row in itertools.product(range(V), repeat=L) if row[:2] == (1, 2)])
    law = np.exp(-np.asarray(family.bound(net, params, {"ids": jnp.asarray(every)}, None), np.float64))
    law /= law.sum()
    num = 20_000
    given = jnp.tile(jnp.array([1, 2, UNKNOWN, UNKNOWN]), (num, 1))
    ids = jax.jit(lambda key: prompts.sample(family, net, params, key, given, L - 1))(jax.random.key(0))
    noise = np.sqrt(law * (1 - law) / (2 * np.pi * num)).sum()
    assert oracle.total_variation(np.asarray(ids), every, law) < 2 * noise
    assert np.abs(law - 1 / len(law)).sum() / 2 > 0.2


@pytest.mark.parametrize("given", [(1, UNKNOWN, 2, UNKNOWN), (UNKNOWN, 1, UNKNOWN, UNKNOWN)])
def test_anything_but_a_prefix_is_refused_by_autoregression(given):
    prompts.check(Autoregressive(), np.array([[1, 2, UNKNOWN, UNKNOWN], [UNKNOWN] * 4]))
    prompts.check(Masked(), np.array([given]))
    with pytest.raises(ValueError, match=r"goes on from a prefix, .*: write `TEXT \.\.\.`, or take a run of another"):
        prompts.check(Autoregressive(), np.array([given]))


# --- all families ------------------------------------------------------------------------------------------------

STUDENTS = ("matched", "gumbel", "matched_masked", "matched_uniform")


def built(family, share=0.0, **changes):
    """(net, family, params) of one block and rows of six tokens."""
    changes = {"model.blocks": 1, "model.learned_positions": True, "data.length": 6} | changes
    changes |= {"objective.prompts": share} if share else {}
    changes |= {"teacher": "a run"} if family in STUDENTS else {}
    config = run_config("", family, **changes)
    made = assembly.build(config, config.model.vocab_size)
    return made.net, made.family, drawn(made.net, scale=0.3)


@pytest.mark.parametrize(
    ("family", "share"),
    [("flow_map", 0.5), ("masked", 0.5), ("uniform", 0.0), ("autoregressive", 0.0)]
    + [
        pytest.param(each, 0.5, marks=pytest.mark.slow)
        for each in ("flow", "matched", "uniform", "matched_masked", "matched_uniform")
    ]
    + [pytest.param(each, 0.0, marks=pytest.mark.slow) for each in ("flow", "flow_map", "matched", "gumbel", "masked")],
)
def test_given_tokens_come_back_as_given_in_ten_thousand_samples(family, share):
    net, family, params = built(family, share)
    num, rng = 10_000, np.random.default_rng(0)
    known = rng.random((num, net.length)) < rng.random((num, 1))
    if family.conditions == "prefix":
        known = np.sort(known, 1)[:, ::-1]
    given = np.where(known, rng.integers(net.vocab, size=known.shape), UNKNOWN).astype(np.int32)
    steps = {"prefix": net.length - 1}.get(family.conditions, 1 if type(family).__name__ == "Gumbel" else 2)
    sampler = Sampler(net, named_sampler(family)[1], Layout(make_mesh(data=1)), 2000, prompted=True)
    ids = sampler(params, jax.random.key(0), num, steps, given=given)
    np.testing.assert_array_equal(ids[known], given[known])
    assert len(np.unique(ids[~known])) > 5 and ids.min() >= 0


OBJECTIVES = {
    "flow": ("flow", {}),
    "student of masked": ("masked", {"teacher": "a run"}),
    "uniform": ("uniform", {}),
}
OTHERS = {
    "matched": ("matched", {"objective.matched": 0.5, "objective.auxiliary_updates": 1}),
    "flow map by a derivative": ("flow_map", {"teacher": "a run", "objective.target": "csd"}),
    "flow map alone": ("flow_map", {"teacher": None}),
    "masked": ("masked", {}),
    "student of uniform": ("uniform", {"teacher": "a run"}),
    "matched masked": ("matched_masked", {"objective.tie": 0.5}),
    "matched uniform": ("matched_uniform", {}),
}


@pytest.mark.parametrize(
    ("family", "settings"),
    [*OBJECTIVES.values(), *(pytest.param(*each, marks=pytest.mark.slow) for each in OTHERS.values())],
    ids=[*OBJECTIVES, *OTHERS],
)
def test_a_loss_is_of_the_rest_alone_and_sees_what_is_given(family, settings):
    """Other tokens under what is given change no number of it; another gift does, and so does another mark."""
    net, family, params = built(family, 0.5, **settings)
    other = drawn(net, scale=0.3, seed=1)
    aux = Auxiliary(Teacher(other), other, jnp.int32(1))

    @jax.jit
    def losses(params, batch):
        params = {"student": params, "auxiliary": other} if family.updates else params
        return family.loss(net, params, aux, batch, None)[0]

    num, rng = 32, np.random.default_rng(0)
    ids, others = rng.integers(net.vocab, size=(2, num, net.length))
    known = np.zeros(ids.shape, bool)
    known[:, [0, 3]] = True
    batch = {"ids": jnp.asarray(ids), **family.draw(jax.random.key(0), num)}
    batch["given"] = jnp.asarray(np.where(known, ids, UNKNOWN))
    told = losses(params, batch)
    under = losses(params, batch | {"ids": jnp.asarray(np.where(known, others, ids))})
    jax.tree.map(np.testing.assert_array_equal, told, under)
    assert all(np.isfinite(loss).all() for loss in told.values())
    another = losses(params, batch | {"given": jnp.asarray(np.where(known, others, UNKNOWN))})
    marked = losses({**params, "mark": -params["mark"]}, batch)
    for name, loss in told.items():
        changed = loss[loss != 0]  # rows of masked diffusion without a mask have none
        assert len(changed) > 5 and (changed != another[name][loss != 0]).mean() > 0.9
        assert name == "auxiliary" or (changed != marked[name][loss != 0]).mean() > 0.9


def test_the_mean_is_over_the_tokens_that_are_not_given():
    values, given = jnp.arange(8.0).reshape(2, 4), jnp.array([[3, UNKNOWN, UNKNOWN, 0], [UNKNOWN] * 4])
    np.testing.assert_allclose(prompts.mean(values, {"given": given}), [1.5, 5.5])
    np.testing.assert_array_equal(prompts.mean(values, {"ids": given}), values.mean(-1))


def test_the_loss_of_a_flow_is_least_at_the_conditional_posterior():
    """Prompts as training draws them, the same noise for all: every tilt of the exact logits is worse."""
    family, num = Flow(Gaussian(), WARP, prompts=1.0), 8192
    ids = jnp.asarray(SEQUENCES[np.random.default_rng(1).choice(len(WEIGHTS), num, p=WEIGHTS)])
    batch = {"ids": ids, "given": prompts.drawn(jax.random.key(3), ids, 1.0), **family.draw(jax.random.key(2), num)}

    def loss(net, params):
        return float(jax.jit(lambda: family.loss(net, params, None, batch, None)[0]["cross_entropy"].mean())())

    net, params = exact_flow()
    best = loss(net, params)
    for seed in range(3):
        tilt = 0.3 * np.random.default_rng(seed).standard_normal(V)
        assert loss(*oracle.oracle(SEQUENCES, WEIGHTS, np.asarray(params["embedding"]), WARP, tilt)) > best
    # A network that is deaf to what is given is worse still.
    deaf = toy.overriding(
        net, apply=lambda params, *a, **k: net.apply({**params, "known": jnp.zeros((num, L), bool)}, *a, **k)
    )
    assert loss(deaf, params) > best + 0.05


# --- what is drawn -----------------------------------------------------------------------------------------------


def test_prompts_are_prefixes_suffixes_spans_gaps_and_scattered_tokens():
    """Frequencies of all patterns of six tokens against counting: kinds, numbers of tokens and places are equally likely."""
    length, share, num = 6, 0.75, 60_000
    behind = length - 1
    expected = {}

    def add(shown, probability):
        pattern = (True, *shown)
        expected[pattern] = expected.get(pattern, 0) + share * probability / 4 / behind

    for count in range(behind):
        add([i < count for i in range(behind)], 1)
        add([i >= behind - count for i in range(behind)], 1)
        for start in range(behind):
            add([(i - start) % behind < count for i in range(behind)], 1 / behind)
        scattered = [*itertools.combinations(range(behind), count)]
        for chosen in scattered:
            add([i in chosen for i in range(behind)], 1 / len(scattered))
    expected[(False,) * length] = 1 - share
    ids = jnp.full((num, length), 7)
    given = np.asarray(prompts.drawn(jax.random.key(0), ids, share))
    assert set(np.unique(given)) == {UNKNOWN, 7}
    found, counts = np.unique(given != UNKNOWN, axis=0, return_counts=True)
    assert {tuple(row) for row in found.tolist()} == set(expected)
    for row, count in zip(found.tolist(), counts):
        p = expected[tuple(row)]
        assert abs(count / num - p) < 5 * np.sqrt(p * (1 - p) / num), row
    assert (given == UNKNOWN).any(1).all()


# --- the network -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"input": "both", "preview": True},
        *(pytest.param({"input": each}, marks=pytest.mark.slow) for each in ("raw", "scaled", "posterior", "white")),
    ],
    ids=str,
)
def test_a_given_token_is_fed_clean_whatever_the_time_and_the_state(fields):
    """Where all are given, a network without time does what it does at t = 1, plus the mark."""
    net = toy.network(time_embeddings=0, prompts=True, **fields)
    params = toy.perturbed(net.init(jax.random.key(0)))
    given = jnp.asarray(np.random.default_rng(0).integers(net.vocab, size=(3, net.length)))
    noise = jax.random.normal(jax.random.key(1), (3, net.length, net.width))
    clean = net.apply({**params, "mark": 0}, net.embed(params, given), jnp.ones(3))
    without = {**params, "mark": jnp.zeros_like(params["mark"])}
    for tau in (0.0, 0.4):
        ours = Shown(net, given).apply(without, noise, jnp.full(3, tau))
        np.testing.assert_allclose(ours, clean, atol=1e-4)
    marked = Shown(net, given).apply(params, noise, jnp.zeros(3))
    assert np.abs(marked - clean).max() > 1e-2


def test_without_prompts_nothing_is_added():
    plain, prompted = built("flow")[0], built("flow", 0.5)[0]
    shapes, more = (jax.eval_shape(net.init, jax.random.key(0)) for net in (plain, prompted))
    assert more.keys() - shapes.keys() == {"mark"} and more["mark"].shape == (32,)
    assert plain == dataclasses.replace(prompted, prompts=False)


def test_what_is_told_is_certain_at_every_temperature_and_share():
    net, params = exact_flow()
    told = Told(net, jnp.asarray(PROMPTS))
    hidden = told.apply(
        params, jax.random.normal(jax.random.key(0), (*PROMPTS.shape, WIDTH)), jnp.full(len(PROMPTS), 0.2)
    )
    logits, plain = told.unembed(params, hidden), net.unembed(params, hidden[..., :-1])
    known = PROMPTS != UNKNOWN
    np.testing.assert_array_equal(np.asarray(logits)[~known], np.asarray(plain)[~known])
    for temperature in (1e-3, 1.0, 1e3):
        probs = np.asarray(jax.nn.softmax(logits / temperature))[known]
        np.testing.assert_array_equal(probs, np.eye(V)[PROMPTS[known]])


@pytest.mark.parametrize("family", ["flow_map", pytest.param("masked", marks=pytest.mark.slow)])
def test_one_step_with_a_prompt_costs_what_one_without_does(family):
    """One network call, and at most 1.05 of the operations, of a network of the tiny size."""
    changes = {"model.width": 128, "model.blocks": 4, "model.heads": 4, "model.cond": 64, "data.length": 19}
    net, family, params = built(family, 0.5, **changes)
    shapes = jax.eval_shape(lambda: net.prepared(params) if family.continuous else params)
    layout = Layout(make_mesh(data=1))

    def operations(**prompted):
        traced = Sampler(net, family, layout, 64, **prompted).trace(shapes, jax.random.key(0), 1)
        return traced.lower().compile().cost_analysis()["flops"], str(traced.jaxpr).count("dot_general")

    (without, products), (given, products_given) = operations(), operations(prompted=True)
    assert given <= 1.05 * without and products_given == products


# --- learning ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tiny_network_learns_the_conditional_laws():
    """By the real step, and comes nearer to them than the exact unconditional denoiser does by replacement."""
    steps, batch_size, width, num = 2500, 128, 32, 2000
    sequences, weights = oracle.correlated_law(V, L, 12, 0)
    first = int(np.bincount(sequences[:, 0]).argmax())
    last = int(np.bincount(sequences[sequences[:, 0] == first, -1]).argmax())
    gifts = np.array([[first, *[UNKNOWN] * 3], [first, UNKNOWN, UNKNOWN, last]])
    laws = [conditional(given, sequences, weights) for given in gifts]
    assert all(len(law) > 1 for _, law in laws)
    warp = TimeWarp("gaussian", "ambient", V, width)
    family = Flow(Gaussian(), warp, prompts=0.5)
    net = toy.network(V, L, width=width, input="both", time_scale=1000.0, learned_positions=True, prompts=True)
    schedule = make_schedule(3e-3, "cosine", 50, steps)
    optimizer = make_optimizer(schedule, b1=0.9, b2=0.99, weight_decay=0.0, decay_pattern="kernel$", clip_norm=1.0)
    step = make_step(net, family, optimizer, seed=0, ema_decay=0.99, accumulation=1, dropout=False)
    table, logits = jnp.asarray(sequences), jnp.log(jnp.asarray(weights))

    @functools.partial(jax.jit, compiler_options=OPTIMIZED)
    def train(state):
        def batch(number):
            return table[jax.random.categorical(jax.random.key(number), logits, shape=(batch_size,))]

        return jax.lax.fori_loop(0, steps, lambda number, state: step(state, batch(number))[0], state)

    def distance(family, net, params):
        given = jnp.asarray(np.repeat(gifts, num, 0))
        draw = jax.jit(lambda params, key: prompts.sample(family, net, params, key, given, 32))
        rows = np.asarray(draw(params, jax.random.key(0))).reshape(len(gifts), num, L)
        return np.array([oracle.total_variation(ids, *law) for ids, law in zip(rows, laws)])

    params = train(jax.jit(lambda: init_state(net, family, optimizer, seed=0))()).ema
    learnt = distance(family, net, params)
    exact, theirs = oracle.oracle(sequences, weights, np.asarray(params["embedding"]), warp)
    told = distance(Flow(Gaussian(), warp), exact, theirs)
    assert (learnt < 0.1).all() and learnt.mean() < 0.7 * told.mean()
