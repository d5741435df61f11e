"""Gumbel coupling against its own law: noise that is normal whatever the model, and a map that is known without training."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from oracle import log_prob_head, total_variation
from orbax.checkpoint.experimental import v1 as ocp
from scipy import special, stats
from toy import FunctionNetwork, run_config, train_only

import flowlm
from flowlm import config as settings
from flowlm.engine.build import build
from flowlm.engine.flops import network_evaluations
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.exchange.export import export
from flowlm.maths.time_warp import TimeWarp
from flowlm.models.network import Network
from flowlm.objectives import make_family
from flowlm.objectives.base import Auxiliary, Teacher
from flowlm.objectives.gumbel import coupled, coupled_states
from flowlm.runs.metrics import read_metrics
from flowlm.scale.ahead_of_time import trace_step

V, L = 4, 4  # a start token and three that depend on each other


@dataclasses.dataclass(frozen=True)
class Table(Network):
    """An autoregressive model that is a table: params["logits"] [L - 1, V ** (L - 2), V], by position and what came before."""

    vocab: int = V
    length: int = L
    width: int = V

    def apply(self, params, z, tau_s, tau_t=None, keys=None):
        ids = jnp.argmax(z, -1)
        before = [jnp.zeros(len(ids), jnp.int32)]
        for place in range(1, self.length - 1):
            before.append(before[-1] * self.vocab + ids[:, place])
        return jnp.stack([params["logits"][place, index] for place, index in enumerate(before)], 1)

    def head(self, params):
        return Partial(log_prob_head)

    def empty_cache(self, num):
        return jnp.int32(0), jnp.zeros(num, jnp.int32)

    def decode(self, params, cache, ids):
        place, before = cache
        before = jnp.where(place > 0, before * self.vocab + ids, 0)
        return (place + 1, before), params["logits"][place, before][:, None]


def teacher(seed=0, scale=2.0):
    """A table, and its law: (teacher, sequences [V ** 3, L], weights)."""
    table = scale * np.random.default_rng(seed).standard_normal((L - 1, V ** (L - 2), V)).astype(np.float32)
    sequences = np.array([(0, *rest) for rest in itertools.product(range(V), repeat=L - 1)])
    params = {"logits": jnp.asarray(table), "embedding": jnp.eye(V)}
    logits = Table().apply(params, jax.nn.one_hot(sequences[:, :-1], V), None)
    each = np.take_along_axis(special.log_softmax(np.asarray(logits, np.float64), -1), sequences[:, 1:, None], -1)
    return Teacher(params, net=Table()), sequences, np.exp(each.sum((1, 2)))


def drawn_rows(sequences, weights, num, seed=0):
    return jnp.asarray(sequences[np.random.default_rng(seed).choice(len(sequences), num, p=weights)])


@pytest.fixture(scope="module")
def noise():
    """x0 [20000, L, V] of rows that the teacher could have drawn, the rows and the teacher."""
    taught, sequences, weights = teacher()
    ids = drawn_rows(sequences, weights, 20_000)
    keys = jax.random.split(jax.random.key(1), len(ids))
    draw = jax.jit(lambda ids, keys: coupled_states(taught, ids, keys, jnp.eye(V)))
    return np.asarray(draw(ids, keys), np.float64), np.asarray(ids), taught


def gumbels(x0):
    """xi of noise, in float64, each tail by the logarithm that is exact there."""
    return -np.log(-special.log_ndtr(np.asarray(x0, np.float64)))


# --- The noise ---------------------------------------------------------------------------------------------------


def test_the_coupled_noise_is_normal(noise):
    """Every coordinate of every position, in its moments and by Kolmogorov and Smirnov; so are all coordinates together."""
    x0, *_ = noise
    n = len(x0)
    values = x0.reshape(n, -1)
    moments = [(values**k).mean(0) for k in (1, 2, 3, 4)]
    for moment, expected, spread in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert np.abs(moment - expected).max() < 4 * np.sqrt(spread / n)
    least = min(stats.kstest(column, "norm").pvalue for column in values.T)
    assert least > 1e-3 and stats.kstest(values.ravel(), "norm").pvalue > 1e-3
    radius = (values**2).sum(1)
    assert stats.kstest(radius, "chi2", args=(values.shape[1],)).pvalue > 1e-3


def test_positions_and_tokens_are_independent(noise):
    """The noise, its squares, and whether it is large, at all pairs of coordinates: no correlation beyond its standard error."""
    x0, *_ = noise
    for seen in (x0, x0**2, x0 > 1):
        correlations = np.corrcoef(seen.reshape(len(x0), -1).T)
        others = correlations[~np.eye(len(correlations), dtype=bool)]
        assert np.abs(others).max() < 4.5 / np.sqrt(len(x0))
        assert np.std(others) < 1.3 / np.sqrt(len(x0))


def test_losers_that_are_drawn_freely_are_found_out(noise):
    """The same tests on a coupling without the truncation: its tokens are no longer the largest, nor is its noise normal."""
    _, ids, taught = noise
    logits = taught.net.apply(taught.flow, jax.nn.one_hot(ids[:, :-1], V), None)
    waits = jax.random.exponential(jax.random.key(0), (*logits.shape[:-1], V + 1))
    winner = jax.nn.one_hot(ids[:, 1:], V, dtype=bool)
    free = jnp.where(winner, coupled(logits, jnp.asarray(ids[:, 1:]), waits), stats.norm.ppf(np.exp(-waits[..., :-1])))
    assert stats.kstest(np.ravel(free), "norm").pvalue < 1e-12
    assert ((np.asarray(logits) + gumbels(free)).argmax(-1) != ids[:, 1:]).mean() > 0.1


@pytest.mark.parametrize("scale", [0.0, 2.0, 10.0, 30.0])
def test_the_largest_reconstructed_gumbel_is_the_token_every_time(scale):
    """Whatever the rows are: here they are uniform, of which the model holds many for all but impossible."""
    taught, *_ = teacher(1, scale)
    taught.flow["logits"] = jnp.clip(taught.flow["logits"], -30, 30)
    ids = jax.random.randint(jax.random.key(0), (5_000, L), 0, V).at[:, 0].set(0)
    keys = jax.random.split(jax.random.key(2), len(ids))
    x0 = jax.jit(lambda: coupled_states(taught, ids, keys, jnp.eye(V)))()[:, 1:]
    logits = np.asarray(taught.net.apply(taught.flow, jax.nn.one_hot(ids[:, :-1], V), None), np.float64)
    np.testing.assert_array_equal((logits + gumbels(x0)).argmax(-1), ids[:, 1:])


def test_it_is_the_posterior_of_the_paper():
    """Written a second time in float64, logarithms of logarithms and all, from the same uniform numbers."""
    rng = np.random.default_rng(0)
    logits, ids = 3 * rng.standard_normal((4000, 7)), rng.integers(0, 7, 4000)
    u = rng.uniform(0.01, 0.99, (4000, 8))
    waits = np.float32(-np.log(u))
    uniform, top = np.exp(-np.float64(waits[:, :-1])), special.logsumexp(logits, -1)
    largest = top - np.log(np.float64(waits[:, -1]))  # M ~ Gumbel(logsumexp l)

    def below(a):
        return np.exp(-np.exp(-a))

    xi = -np.log(-np.log(uniform * below(largest[:, None] - logits)))
    np.put_along_axis(xi, ids[:, None], largest[:, None] - np.take_along_axis(logits, ids[:, None], 1), 1)
    expected = stats.norm.ppf(below(xi))
    usual = np.abs(expected) < 6  # beyond, these formulas are no better in float64
    assert usual.mean() > 0.95
    x0 = jax.jit(coupled)(jnp.float32(logits), jnp.asarray(ids), jnp.asarray(waits))
    np.testing.assert_allclose(np.asarray(x0)[usual], expected[usual], rtol=2e-5, atol=2e-6)


def test_extreme_logits_stay_finite():
    """At +-30, at minus infinity and with waits at both ends of float32; the winner is even one that cannot be."""
    logits = jnp.array([30.0, -30.0, 0.0, -jnp.inf])
    ends = jnp.float32([1e-38, 1e-14, 1.0, 16.0, 100.0])
    waits = jnp.stack(jnp.meshgrid(*[ends] * 5), -1).reshape(-1, 5)
    for token in range(4):
        x0 = np.asarray(coupled(jnp.broadcast_to(logits, (len(waits), 4)), jnp.full(len(waits), token), waits))
        assert np.isfinite(x0).all() and np.abs(x0).max() < 13
    # The exact winner of a token that has e^-60 of the probability: exp(-xi) = e^-60 T.
    x0 = coupled(jnp.array([30.0, -30.0]), jnp.int32(1), jnp.ones(3))
    np.testing.assert_allclose(x0[1], stats.norm.isf(np.exp(-60.0)), rtol=1e-6)


def test_chunks_change_nothing():
    taught, sequences, weights = teacher()
    ids, keys = drawn_rows(sequences, weights, 8), jax.random.split(jax.random.key(0), 8)
    embedding = jnp.asarray(np.random.default_rng(0).standard_normal((V, 6)), jnp.float32)
    states = jax.jit(functools.partial(coupled_states, taught), static_argnames="span")
    whole = states(ids, keys, embedding)
    np.testing.assert_allclose(states(ids, keys, embedding, span=3), whole, rtol=1e-6, atol=1e-6)
    alone = states(ids[5:6], keys[5:6], embedding)
    np.testing.assert_allclose(alone, whole[5:6], rtol=1e-6, atol=1e-6)  # a row's noise is its own


def test_no_noise_over_tokens_and_vocabulary_outlives_its_chunk():
    """By XLA's own account states and their gradient need less than half of what all noise would."""
    batch, length, width, size = 8, 128, 16, 4096
    params = {"embedding": jnp.zeros((size, width)), "kernel": jnp.zeros((width, size))}
    net = FunctionNetwork(
        lambda params, z, *_, **__: z, lambda params: Partial(jnp.dot, b=params["kernel"]), size, length, width
    )
    ids, keys = jnp.zeros((batch, length), jnp.int32), jax.random.split(jax.random.key(0), batch)

    def loss(embedding):
        return jnp.square(coupled_states(Teacher(params, net=net), ids, keys, embedding, span=2)).sum()

    memory = jax.jit(jax.grad(loss)).lower(params["embedding"]).compile().memory_analysis().temp_size_in_bytes
    assert memory < batch * length * size * 4 / 2


# --- The family --------------------------------------------------------------------------------------------------


def family(**changes):
    chosen = {**settings.objective("gumbel").to_dict(), **changes}
    return make_family(warp=TimeWarp("gaussian", "ambient", V, V), teacher=True, **chosen)


WIDTH = 6


def exact_student(taught, shift=0.0):
    """The map itself, token by token: argmax of logits and Gumbels. shift: added to the Gumbels of the first token."""
    embedding = np.linalg.qr(np.random.default_rng(3).standard_normal((WIDTH, WIDTH)))[0][:V]  # V rows, orthonormal

    def apply(params, z, tau_s, tau_t=None, keys=None):
        assert tau_t is not None
        x0 = jnp.matmul(z, params["embedding"].T, precision="highest")
        # In logarithms of the times of arrival, whose smallest is the largest Gumbel.
        xi = -jnp.log(-jax.scipy.special.log_ndtr(x0)) + shift * jax.nn.one_hot(0, V)
        cache, ids = taught.net.empty_cache(len(z)), jnp.zeros(len(z), jnp.int32)
        row = [ids]
        for place in range(1, L):
            cache, logits = taught.net.decode(taught.flow, cache, ids)
            ids = jnp.argmax(logits[:, 0] + xi[:, place], -1).astype(jnp.int32)
            row.append(ids)
        return 1e3 * jax.nn.one_hot(jnp.stack(row, 1), V)

    net = FunctionNetwork(apply, lambda params: Partial(log_prob_head), V, L, WIDTH)
    return net, {"embedding": jnp.asarray(embedding, jnp.float32)}


def losses(fam, net, params, taught, ids):
    batch = {"ids": ids, **fam.draw(jax.random.key(7), len(ids))}
    return np.asarray(jax.jit(lambda: fam.loss(net, params, Auxiliary(taught), batch, None)[0]["cross_entropy"])())


@pytest.mark.parametrize("texts", ["data", "teacher"])
def test_the_map_itself_has_a_loss_of_zero_and_writes_the_law(texts):
    """Every row of 2,000, and a map that is wrong has not; one step writes the teacher's law to within its sampling error."""
    taught, sequences, weights = teacher()
    fam, (net, params) = family(texts=texts), exact_student(taught)
    rows = drawn_rows(sequences, weights, 2_000)
    assert losses(fam, net, params, taught, rows).max() == 0
    assert losses(fam, *exact_student(taught, 0.5), taught, rows).mean() > 10

    num = 40_000
    ids = np.asarray(jax.jit(lambda key: fam.sample(net, params, key, num, 1))(jax.random.key(0)))
    expected = 0.5 * np.sqrt(2 / np.pi * weights * (1 - weights) / num).sum()  # of a draw from the law itself
    assert total_variation(ids, sequences, weights) < 1.4 * expected
    assert total_variation(ids, sequences, np.roll(weights, 1)) > 10 * expected


def test_the_teachers_own_texts_have_its_law():
    """Read off the losses of a student that is sure of one row: those that are not 0 are the share of the others."""
    taught, sequences, weights = teacher()
    likeliest = int(weights.argmax())
    net = FunctionNetwork(
        lambda params, z, *_, **__: 1e3 * jnp.broadcast_to(jax.nn.one_hot(sequences[likeliest], V), (len(z), L, V)),
        lambda params: Partial(log_prob_head),
        V,
        L,
        V,
    )
    rows = jnp.zeros((20_000, L), jnp.int32)  # of which only the first token is read
    found = losses(family(texts="teacher"), net, {"embedding": jnp.eye(V)}, taught, rows)
    p = weights[likeliest]
    assert abs((found == 0).mean() - p) < 4 * np.sqrt(p * (1 - p) / len(rows))


@pytest.mark.parametrize("trained", [True, False])
def test_the_embedding_is_trained_where_it_is_said(trained):
    """Its gradient is that of x0 @ E, because the network sees x0 through nothing else."""
    taught, sequences, weights = teacher()
    rows, fam = drawn_rows(sequences, weights, 16), family(train_embedding=trained)
    batch = {"ids": rows, **fam.draw(jax.random.key(7), len(rows))}
    net = FunctionNetwork(lambda params, z, *_, **__: z, lambda params: Partial(log_prob_head), V, L, V)

    @jax.jit
    def loss(embedding):
        return fam.loss(net, {"embedding": embedding}, Auxiliary(taught), batch, None)[0]["cross_entropy"].mean()

    at = jnp.asarray(np.random.default_rng(0).standard_normal((V, V)), jnp.float32)
    gradient, step = jax.grad(loss)(at), jnp.zeros((V, V)).at[1, 2].set(0.01)
    slope = float(loss(at + step) - loss(at - step)) / 0.02
    assert abs(slope) > 1e-2
    np.testing.assert_allclose(gradient[1, 2], slope if trained else 0.0, rtol=1e-2)


def test_what_it_cannot_do_is_refused():
    for changes, words in (
        (
            {"model.width": 64},
            "model.vocab_size = 99 tokens, .* model.width = 64 .*: set --config.model.width to at least 99",
        ),
        ({"prior": "dirichlet", "model.input": "raw"}, "not dirichlet: set --config.prior=gaussian"),
        ({"teacher": None}, "autoregressive model: give --config.teacher=RUNDIR"),
        ({"model.time_embeddings": 1}, "time_embeddings to 2"),
        ({"model.input": "posterior"}, "use both or white"),
        ({"objective.texts": "held_out"}, "unknown objective.texts 'held_out'"),
    ):
        with pytest.raises(ValueError, match=words):
            build(run_config("", "gumbel", **{"teacher": "its run directory"} | changes), 99)
    taught, *_ = teacher()
    with pytest.raises(ValueError, match="in one step, got 2: set evaluation.steps or --steps to 1"):
        family().sample(*exact_student(taught), jax.random.key(0), 4, 2)


# --- Runs --------------------------------------------------------------------------------------------------------

STEPS = 6


@pytest.fixture(scope="module")
def directory(data_dir, tmp_path_factory):
    """Runs of a few steps: `ar`, narrower and not as deep as its student, and a flow."""
    directory = tmp_path_factory.mktemp("gumbel")
    train_only(run_config(data_dir, "autoregressive", **{"steps": 3, "model.blocks": 1}), directory / "ar")
    train_only(run_config(data_dir, **{"steps": 2, "model.input": "both", "model.width": 104}), directory / "flow")
    return directory


@pytest.fixture(scope="module")
def student(directory, data_dir):
    """student(name, **changes) trains a student of `ar` and returns its directory; what is there goes on."""

    def run(name, **changes):
        own = {"steps": STEPS, "teacher": str(directory / "ar")}
        train_only(run_config(data_dir, "gumbel", **own | changes), directory / name)
        return directory / name

    return run


def saved(workdir, step=STEPS):
    return ocp.load(workdir / "checkpoints" / str(step))


def same(a, b):
    return all(
        (np.asarray(x) == np.asarray(y)).all() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_it_learns_and_is_taken_up_bitwise(student):
    whole = student("whole", steps=2 * STEPS)
    nats = [line["cross_entropy"] for line in read_metrics(whole)]
    assert nats[-1] < nats[0] - 0.1
    student("cut", steps=STEPS)
    assert same(saved(student("cut", steps=2 * STEPS), 2 * STEPS), saved(whole, 2 * STEPS))


@pytest.mark.slow
def test_eight_devices_and_microbatches_are_as_one(student):
    """Under fsdp the blocks of the teacher, of other shapes, are split and gathered too, also in texts that it draws."""
    own = {"objective.texts": "teacher"}
    one = read_metrics(student("one", **own))
    eight = read_metrics(student("eight", **own, **{"mesh.data": 8, "mesh.fsdp": True}))
    for ours, theirs in zip(one, eight, strict=True):
        np.testing.assert_allclose(theirs["loss"], ours["loss"], rtol=2e-5)
        np.testing.assert_allclose(theirs["grad_norm"], ours["grad_norm"], rtol=1e-3)


def test_only_the_student_is_sampled_and_exported(student, tmp_path):
    run = student("whole", steps=2 * STEPS)
    ids = flowlm.load(str(run)).sample_ids(num=4, steps=1, seed=0)
    assert ids.shape == (4, 19)
    with pytest.raises(ValueError, match="--steps to 1"):
        flowlm.load(str(run)).sample_ids(num=4, steps=2, seed=0)
    layout = Layout(make_mesh(data=1))
    for form in ("params", "jax"):
        export(run, tmp_path / form, layout, format=form, **({"steps": 1} if form == "jax" else {}))
    np.testing.assert_array_equal(flowlm.load(str(tmp_path / "params")).sample_ids(num=4, steps=1, seed=0), ids)


@pytest.mark.slow
def test_matching_goes_on_from_it_where_it_kept_the_flows_embedding(student, directory, data_dir):
    """One that begins as the flow, and stays in its states; one with an embedding of its own is refused."""
    flow, ar = str(directory / "flow"), str(directory / "ar")
    run = student("kept", steps=3, init_from=flow, **{"objective.train_embedding": False})
    theirs = saved(directory / "flow", 2)["ema"]
    assert same(saved(run, 3)["params"]["embedding"], theirs["embedding"])
    assert not same(saved(run, 3)["params"]["unembed_kernel"], theirs["unembed_kernel"])
    own = {"steps": 1, "teacher": flow, "model.width": 104, "init_from": str(run), "checkpoint.every": 1}
    train_only(run_config(data_dir, "matched", **own), directory / "matched")
    assert same(saved(directory / "matched", 1)["params"]["student"], saved(run, 3)["ema"])
    other = student("whole", steps=2 * STEPS)
    with pytest.raises(
        ValueError, match="init_from .*whole has another embedding than the flow of .*train_embedding=False"
    ):
        train_only(run_config(data_dir, "matched", **own | {"init_from": str(other)}), directory / "refused")
    with pytest.raises(
        ValueError, match="family 'gumbel': it cannot teach 'matched', but a run of one of these can: flow"
    ):
        train_only(run_config(data_dir, "matched", **own | {"teacher": str(run)}), directory / "refused")
    with pytest.raises(ValueError, match="family 'flow': it cannot teach 'gumbel', .* can: autoregressive$"):
        student("refused", teacher=flow)
    with pytest.raises(ValueError, match="family 'autoregressive': it cannot teach 'flow_map'"):
        train_only(run_config(data_dir, "flow_map", teacher=ar), directory / "refused")


def test_its_step_is_planned_with_the_teacher_in_memory(data_dir):
    """A causal network of the student's size, whose parameters are arguments of the step beside the state."""
    config = run_config(data_dir, "gumbel", teacher="its run directory")
    traced = trace_step(config, jax.devices()[:1]).traced
    taught = traced.in_avals[0][2] if len(traced.in_avals[0]) > 2 else None
    assert taught.net.causal and taught.net.time_embeddings == 0
    assert {"embedding", "blocks", "unembed_kernel"} <= taught.flow.keys()


@pytest.mark.parametrize(("texts", "passes"), [("data", 4), ("teacher", 5)])
def test_what_a_step_costs_counts_the_teacher(texts, passes):
    """Three passes of the student, one of the teacher, and one more, token by token, where it draws the rows."""
    wide = {
        "model.width": 512,
        "model.heads": 4,
        "data.length": 128,
    }  # where blocks, of one network as the other's, are all
    changes = {"teacher": "its run directory", "objective.texts": texts, "model.input": "scaled", **wide}
    assert network_evaluations(run_config("", "gumbel", **changes)) == pytest.approx(passes, rel=0.15)
