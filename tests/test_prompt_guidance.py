"""Guidance by prompts against the closed form p_c^w p_u^(1-w), and against a network's own probabilities in numpy."""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import test_discrete
import toy
from command_line import error_of
from test_prompts import WARP, WIDTH, built, conditional
from test_prompts import L as LENGTH
from test_prompts import V as VOCAB
from test_trained import make_run
from toy import OPTIMIZED, overriding

import flowlm
from flowlm.maths.prior import Gaussian
from flowlm.objectives import prompts
from flowlm.objectives.flow import Flow
from flowlm.objectives.flow_map import FlowMap
from flowlm.objectives.masked import Masked
from flowlm.objectives.prompts import UNKNOWN, Guided, Shown
from flowlm.objectives.uniform import Uniform

NUM = 2000
SEQUENCES = np.array([*itertools.product(range(VOCAB), repeat=LENGTH)])
WEIGHTS = np.random.default_rng(0).dirichlet(np.ones(len(SEQUENCES)))
LIKELIEST = SEQUENCES[WEIGHTS.argmax()]
# Prompts that leave one token to be written, the second and the last.
GAPS = np.array([np.where(np.arange(LENGTH) == place, UNKNOWN, LIKELIEST) for place in (1, LENGTH - 1)])

# --- the law that is written -------------------------------------------------------------------------------------


def marginals(given):
    """p(token at each position | given) [L, V] in the law of all sequences."""
    rows, weights = conditional(given, SEQUENCES, WEIGHTS)
    return np.einsum("k,klv->lv", weights, np.eye(VOCAB)[rows])


def guided_law(given, guidance):
    """p_c^w p_u^(1-w) [V] of the one token that is to be written."""
    (place,) = np.flatnonzero(given == UNKNOWN)
    law = marginals(given)[place] ** guidance * marginals(np.full(LENGTH, UNKNOWN))[place] ** (1 - guidance)
    return law / law.sum()


def exact(kind):
    """(family, net, params) of the exact posteriors of the law."""
    if kind in ("flow", "flow_map"):
        embedding = np.random.default_rng(0).standard_normal((VOCAB, WIDTH)) / np.sqrt(WIDTH)
        settings = {"eta": 1.0} if kind == "flow" else {"temperature": 1.0}
        family = {"flow": Flow, "flow_map": FlowMap}[kind](Gaussian(), WARP, prompts=0.5, **settings)
        return family, *oracle.oracle(SEQUENCES, WEIGHTS, embedding, WARP)
    net, params = test_discrete.exact(SEQUENCES, WEIGHTS, kind)
    family = Masked() if kind == "masked" else Uniform(warp=replace(WARP, kind="ambient"), prompts=0.5)
    return family, replace(net, length=LENGTH), params


def distances(family, net, params, guidance, steps):
    """Total variation to the guided law of each of GAPS, of samples that guidance made."""
    rows = jnp.asarray(np.repeat(GAPS, NUM, 0))
    family = replace(family, prompt_guidance=guidance)

    @functools.partial(jax.jit, compiler_options=OPTIMIZED)
    def draw(params, key):
        return prompts.sample(family, net, params, key, rows, steps)

    ids = np.asarray(draw(params, jax.random.key(steps)))
    known = rows != UNKNOWN
    np.testing.assert_array_equal(ids[known], rows[known])
    written = ids[~known].reshape(len(GAPS), NUM)
    counts = np.array([np.bincount(each, minlength=VOCAB) / NUM for each in written])
    return np.abs(counts - [guided_law(given, guidance) for given in GAPS]).sum(1) / 2


@pytest.mark.parametrize(
    ("kind", "steps"),
    [("masked", 3), ("flow_map", 1)]
    + [pytest.param(*each, marks=pytest.mark.slow) for each in (("flow", 32), ("uniform", 1), ("uniform", 32))],
)
def test_guidance_sharpens_the_law_of_a_token_as_the_closed_form_says(kind, steps, monkeypatch):
    """Masked diffusion needs no training with prompts for it."""
    monkeypatch.setattr(test_discrete, "V", VOCAB)
    made = exact(kind)
    assert all(np.abs(guided_law(given, 2) - guided_law(given, 1)).sum() / 2 > 0.1 for given in GAPS)
    assert (distances(*made, 2.0, steps) < 0.03).all()


# --- the network -------------------------------------------------------------------------------------------------


def softmax(logits):
    powers = np.exp(np.asarray(logits, np.float64) - np.max(logits, -1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("mask", [False, True])
def test_a_prediction_is_the_powers_of_those_with_and_without_the_prompt(mask):
    """Both by the network itself, fed by hand: clean marked tokens, and none of them. Masks leave out what is given."""
    net = toy.network(prompts=True, mask_token=mask, blocks=1)
    params, rng = toy.perturbed(net.init(jax.random.key(0))), np.random.default_rng(0)
    ids = rng.integers(net.vocab, size=(3, net.length))
    known = rng.random(ids.shape) < 0.5
    z = rng.standard_normal((*ids.shape, net.width)).astype(np.float32)
    embedding, tau = np.asarray(params["embedding"]), jnp.full(3, 0.3)

    def probs(params, z):
        return softmax(net.unembed(params, jax.jit(net.apply)(params, z, tau)))

    with_prompt = probs({**params, "known": jnp.asarray(known)}, np.where(known[..., None], embedding[ids], z))
    without = probs(params, np.where(known[..., None], embedding[-1], z) if mask else z)
    given = jnp.asarray(np.where(known, ids, UNKNOWN))
    hidden = jax.jit(Guided(net, given, 1.0).apply)(params, z, tau)
    for guidance in (0.0, 0.5, 1.0, 3.0):
        found = softmax(Guided(net, given, guidance).unembed(params, hidden))
        expected = with_prompt**guidance * without ** (1 - guidance)
        expected /= expected.sum(-1, keepdims=True)
        np.testing.assert_allclose(found, np.where(known[..., None], without, expected), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize(
    "family", ["masked", *(pytest.param(each, marks=pytest.mark.slow) for each in ("flow_map", "uniform"))]
)
def test_without_guidance_nothing_changes_and_with_it_each_step_is_a_second_call(family):
    net, family, params = built(family, 0.5)
    given = jnp.asarray(np.where(np.arange(net.length) % 2, UNKNOWN, 5)[None].repeat(4, 0))
    calls = []

    def apply(*arguments, **named):
        calls.append(len(calls))
        return net.apply(*arguments, **named)

    counted = overriding(net, apply=apply)

    def program(family, net):
        del calls[:]
        return jax.make_jaxpr(lambda key: prompts.sample(family, net, params, key, given, 3))(jax.random.key(0))

    def direct(key):
        ids = family.sample(Shown(counted, given), params, key, 4, 3)
        return jnp.where(given == UNKNOWN, ids, given)

    plain, count = str(program(family, counted)), len(calls)
    assert plain == str(jax.make_jaxpr(direct)(jax.random.key(0)))
    assert plain != str(program(replace(family, prompt_guidance=1.5), counted)) and len(calls) == 2 * count


def test_guided_logits_are_made_a_chunk_at_a_time():
    """No array of the program has an axis of the vocabulary beside those of rows and of positions."""
    vocab, num = 4096, 64
    net = toy.network(vocab, 64, width=8, heads=1, blocks=1, time_embeddings=2, prompts=True)
    family = FlowMap(Gaussian(), net.warp, prompts=0.5, prompt_guidance=2.0, temperature=0.8)
    params = jax.eval_shape(net.init, jax.random.key(0))
    given = jax.ShapeDtypeStruct((num, 64), jnp.int32)
    text = str(jax.make_jaxpr(lambda *a: prompts.sample(family, net, *a, 2))(params, jax.random.key(0), given))
    assert f"[{num},64,8]" in text and f"[{num},64,{vocab}]" not in text and f",{vocab}]" in text


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "share", "message"),
    [
        (
            "flow",
            0.0,
            "needs a run that learnt to write with and without a prompt, and this one's objective.prompts is 0",
        ),
        ("uniform", 0.0, "objective.prompts is 0: leave it out, or take a run with a share between 0 and 1"),
        ("flow", 1.0, "objective.prompts is 1: leave it out"),
        ("masked", 1.0, "objective.prompts is 1: leave it out"),
    ],
)
def test_guidance_needs_a_run_that_writes_with_and_without_a_prompt(family, share, message):
    with pytest.raises(ValueError, match=rf"objective.prompt_guidance 1.5 .*{message}"):
        built(family, share, **{"objective.prompt_guidance": 1.5})
    assert built("masked", 0.0, **{"objective.prompt_guidance": 1.5})[1].prompt_guidance == 1.5


def test_two_kinds_of_guidance_are_not_mixed():
    with pytest.raises(ValueError, match="guidance and objective.prompt_guidance both mix predictions: set only one"):
        built("flow", 0.5, **{"objective.prompt_guidance": 1.5, "objective.guidance": 2.0})


def test_the_command_and_python_take_it(tmp_path):
    """Draws at 1 are those without the setting; above, others. Autoregression has no such setting."""
    run = make_run(tmp_path / "flow", "flow", **{"objective.prompts": 0.5})
    prompt = "the old ___:3 feeds ..."
    plain = flowlm.load(run).sample(4, 2, prompt=prompt)
    assert flowlm.load(run, prompt_guidance=1.0).sample(4, 2, prompt=prompt) == plain
    guided = flowlm.load(run, prompt_guidance=4.0)
    assert guided.sample(4, 2, prompt=prompt) != plain
    assert guided.sample(4, 2) == flowlm.load(run).sample(4, 2)
    words = "sample", run, "--steps=2", f"--prompt={prompt}"
    assert "prompt_guidance must be at least 0" in error_of(*words, "--objective=prompt_guidance=-1")
    run = make_run(tmp_path / "autoregressive", "autoregressive")
    assert "has no 'prompt_guidance'" in error_of(
        "sample", run, "--steps=18", "--prompt=the ...", "--objective=prompt_guidance=2.0"
    )
