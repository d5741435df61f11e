"""Distribution matching against exact laws: finite differences of the KL by quadrature, and laws that need no training to know."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from oracle import correlated_law, log_prob_head, oracle
from toy import FunctionNetwork, overriding

from flowlm import config
from flowlm.maths.prior import geometry
from flowlm.maths.time_warp import TimeWarp
from flowlm.objectives import make_family
from flowlm.objectives.base import Auxiliary, Teacher
from flowlm.objectives.matched import FORMS, WEIGHTS

# --- The formulas: one position, a student that writes K points of the simplex, and a law of data over V tokens.

RNG = np.random.default_rng(0)
POINTS = 3
SHARES = np.array([0.5, 0.3, 0.2])
TIMES = (0.3, 0.55)


def quadrature(dimensions, nodes=40):
    """(nodes [N, R], weights [N]) of N(0, I_R)."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    grid = np.stack(np.meshgrid(*[x] * dimensions, indexing="ij"), -1).reshape(-1, dimensions)
    weights = functools.reduce(np.multiply.outer, [w / w.sum()] * dimensions).ravel()
    return grid, weights


def log_mixture(u, points, shares, t):
    """log of sum_k shares_k N(u; t points_k, (1 - t)^2 I), white coordinates, up to a constant; and p(k | u)."""
    square = ((u[:, None] - t * points[None]) ** 2).sum(-1)
    score = np.log(shares) - square / (2 * (1 - t) ** 2)
    top = score.max(1, keepdims=True)
    total = np.log(np.exp(score - top).sum(1, keepdims=True)) + top
    return total[:, 0], np.exp(score - total)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def setting(vocab, width, seed=0):
    """(embedding [V, D], whiten [D, R], law of data [V], logits of the student's points [K, V])."""
    rng = np.random.default_rng(seed)
    embedding = rng.standard_normal((vocab, width)) / np.sqrt(width)
    whiten = np.asarray(geometry(jnp.asarray(embedding, jnp.float32)).whiten, np.float64)
    return embedding, whiten, rng.dirichlet(np.full(vocab, 2.0)), rng.standard_normal((POINTS, vocab))


def divergence(logits, t, embedding, whiten, data):
    """KL( law of the student's noised point || that of noised data ), in white coordinates."""
    codes = embedding @ whiten
    points = softmax(logits) @ codes
    noise, weights = quadrature(codes.shape[1])
    total = 0.0
    for share, point in zip(SHARES, points, strict=True):
        u = t * point + (1 - t) * noise
        total += share * weights @ (log_mixture(u, points, SHARES, t)[0] - log_mixture(u, codes, data, t)[0])
    return total


def slope(logits, form, t, embedding, whiten, data):
    """The gradient of the student's loss at a time with the exact denoisers of both laws, its expectation by quadrature."""
    return np.asarray(jax.grad(matching)(jnp.asarray(logits, jnp.float32), logits, form, t, embedding, whiten, data))


def matching(live, logits, form, t, embedding, whiten, data):
    codes = embedding @ whiten
    wide = codes.shape[0] > codes.shape[1]
    fixed = softmax(logits)
    points = fixed @ codes
    noise, weights = quadrature(codes.shape[1])
    total = 0.0
    for k, share in enumerate(SHARES):
        u = t * points[k] + (1 - t) * noise
        mine = log_mixture(u, points, SHARES, t)[1] @ fixed  # E[x1 | u] of the student
        theirs = log_mixture(u, codes, data, t)[1]
        losses = FORMS[form](
            jnp.broadcast_to(live[k], mine.shape),
            jnp.log(jnp.asarray(mine, jnp.float32)),
            jnp.log(jnp.asarray(theirs, jnp.float32) + 1e-30),
            WEIGHTS["kl"](jnp.float32(t)),
            jnp.asarray(codes, jnp.float32) if wide else None,
        )
        total += share * jnp.sum(jnp.asarray(weights, jnp.float32) * losses)
    return total


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize(("vocab", "width"), [(2, 2), (4, 2), (3, 1)])
def test_probability_has_the_gradient_of_the_kl(vocab, width, t):
    embedding, whiten, data, logits = setting(vocab, width)
    gradient = slope(logits, "probability", t, embedding, whiten, data)
    expected, h = np.zeros_like(logits), 1e-5
    for i in np.ndindex(*logits.shape):
        step = np.zeros_like(logits)
        step[i] = h
        either = [divergence(logits + sign * step, t, embedding, whiten, data) for sign in (1, -1)]
        expected[i] = (either[0] - either[1]) / (2 * h)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(gradient, expected, atol=2e-3 * np.abs(expected).max() + 1e-6)


@pytest.mark.parametrize(("vocab", "width"), [(2, 2), (4, 2)])
def test_logit_is_its_natural_gradient(vocab, width):
    """The Fisher matrix of a softmax, diag(p) - p p^T, takes the step in logits to the gradient of `probability`."""
    embedding, whiten, data, logits = setting(vocab, width, seed=1)
    given = 0.4, embedding, whiten, data
    natural, plain = slope(logits, "logit", *given), slope(logits, "probability", *given)
    p = softmax(logits)
    fisher = np.einsum("kv,vw->kvw", p, np.eye(vocab)) - np.einsum("kv,kw->kvw", p, p)
    np.testing.assert_allclose(np.einsum("kvw,kw->kv", fisher, natural), plain, atol=1e-5)
    assert np.abs(natural).max() > 1e-3
    assert np.sum(natural * plain) > 0  # a descent direction of the same functional


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_where_the_laws_agree(form):
    """Any denoisers that say the same leave the student alone, and others do not."""
    logits, flow, other = (jnp.asarray(RNG.standard_normal((5, 4)), jnp.float32) for _ in range(3))
    for codes in (None, jnp.asarray(RNG.standard_normal((4, 2)), jnp.float32)):
        gradient = jax.grad(lambda a, phi, codes=codes: FORMS[form](a, phi, flow, jnp.ones(5), codes).sum())
        assert np.abs(gradient(logits, flow)).max() < 1e-6
        assert np.abs(gradient(logits, other)).max() > 1e-2


def test_ratio_is_a_bounded_step_along_log():
    """For denoisers that differ little its gradient is that of `log`; for any others no row's exceeds 2."""
    logits, flow, other = (jnp.asarray(RNG.standard_normal((50, 6)), jnp.float32) for _ in range(3))

    def gradient(form, phi, scale=1.0):
        return np.asarray(jax.grad(lambda a: FORMS[form](a, phi, scale * flow, jnp.ones(50)).sum())(logits))

    near = flow + 1e-2 * other
    np.testing.assert_allclose(gradient("ratio", near), gradient("log", near), atol=2e-4)
    assert np.abs(gradient("log", near)).max() > 1e-3
    far = np.abs(gradient("ratio", -100 * other, 100)).sum(-1)
    assert 0.5 < far.max() <= 2 and np.abs(gradient("log", -100 * other, 100)).sum(-1).max() > 10


def test_both_raises_a_token_that_the_student_has_dropped():
    """The flow gives it .3, the student and so the auxiliary next to nothing; `ratio` has the student's own e^-20 as a factor."""
    logits, flow = jnp.array([[0.0, 0.0, -20.0]]), jnp.log(jnp.array([[0.4, 0.3, 0.3]]))
    auxiliary = jnp.log(jnp.array([[0.5, 0.49, 0.01]]))
    gradients = {
        form: np.asarray(jax.grad(lambda a, form=form: FORMS[form](a, auxiliary, flow, jnp.ones(1)).sum())(logits))[0]
        for form in ("ratio", "both")
    }
    assert np.abs(gradients["ratio"][2]) < 1e-6
    np.testing.assert_allclose(gradients["both"] - gradients["ratio"], [0.1, 0.19, -0.29], atol=1e-6)


# --- The family: student, auxiliary and flow are parameters of one function, told apart by what they hold.

SEQUENCES, WEIGHTS_OF_DATA = correlated_law(4, 2, 5, seed=3)
START = np.array([0.6, 0.1, 0.1, 0.1, 0.1])  # a student's law over the same sequences


def family(vocab, width, **changes):
    warp = TimeWarp("gaussian", "ambient", vocab, width)
    return make_family(warp=warp, **{"teacher": True, **config.objective("matched").to_dict(), **changes})


def networks(width=4, start=START):
    """(net, student, auxiliary, flow). The student writes one of the sequences by the size of a projection of its noise."""
    embedding = RNG.standard_normal((4, width)) / np.sqrt(width)
    warp = TimeWarp("gaussian", "ambient", 4, width)
    exact, flow = oracle(SEQUENCES, WEIGHTS_OF_DATA, embedding, warp)
    theirs, _ = oracle(SEQUENCES, np.asarray(start), embedding, warp)
    one_hot = jax.nn.one_hot(SEQUENCES, 4)
    norm = float(np.linalg.norm(embedding[:, 0]))

    def choose(params, z):
        """log of a law over sequences, each row's own, nearly certain: cut the normal law of z at the student's shares."""
        share = jax.scipy.stats.norm.cdf(z[:, 0, 0] / norm)[:, None]
        edges = jnp.cumsum(jax.nn.softmax(params["shares"]))
        return 60 * (jnp.minimum(share - edges + jax.nn.softmax(params["shares"]), edges - share))

    def apply(params, z, tau_s, tau_t=None, keys=None):
        if "shares" in params:
            weights = jax.nn.softmax(choose(params, z))
            return jnp.log(jnp.einsum("bk,klv->blv", weights, one_hot) + 1e-6)
        net = theirs if "follows" in params else exact
        return net.apply(params, z, tau_s) + params.get("tilt", 0.0)

    net = FunctionNetwork(apply, lambda params: Partial(log_prob_head), 4, 2, width)
    student = {**flow, "shares": jnp.log(jnp.asarray(start, jnp.float32))}
    return net, student, {**flow, "follows": jnp.zeros(()), "tilt": jnp.zeros(4)}, flow


def gradients(fam, net, student, auxiliary, flow, num=4096, step=1):
    rng = np.random.default_rng(0)
    ids = SEQUENCES[rng.choice(len(SEQUENCES), num, p=WEIGHTS_OF_DATA)]
    batch = {"ids": jnp.asarray(ids), **fam.draw(jax.random.key(0), num)}

    def loss(params, name):
        losses, _ = fam.loss(net, params, Auxiliary(Teacher(flow), None, jnp.int32(step)), batch, None)
        return losses[name].mean()

    params = {"student": student, "auxiliary": auxiliary}
    return {name: jax.jit(jax.grad(functools.partial(loss, name=name)))(params) for name in ("matching", "auxiliary")}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("output", ["hard", "soft"])
@pytest.mark.parametrize("width", [4, 2])
def test_mass_moves_from_what_is_written_too_often(form, output, width):
    """The first sequence has .6 of the student's law and less of the data's: descent makes it less, at V <= D and V > D."""
    net, student, auxiliary, flow = networks(width)
    fam = family(4, width, form=form, output=output, weight="kl", taus=(0.1, 0.9))
    found = gradients(fam, net, student, auxiliary, flow)["matching"]["student"]["shares"]
    over = START - WEIGHTS_OF_DATA
    assert found[0] > 0 and over[0] > 0
    exact = np.asarray(found) @ over / (np.linalg.norm(found) * np.linalg.norm(over))
    assert exact > 0.3, (found, over)


def test_losses_move_their_own_network_alone():
    net, student, auxiliary, flow = networks()
    found = gradients(family(4, 4), net, student, auxiliary, flow, num=256)
    norms = {
        name: {part: float(sum(jnp.abs(a).sum() for a in jax.tree.leaves(tree))) for part, tree in parts.items()}
        for name, parts in found.items()
    }
    assert norms["matching"]["auxiliary"] == norms["auxiliary"]["student"] == 0
    assert norms["matching"]["student"] > 0
    assert all(float(jnp.abs(tree["embedding"]).max()) == 0 for parts in found.values() for tree in parts.values())


def test_the_student_stands_still_until_the_auxiliary_has_followed():
    net, student, auxiliary, flow = networks()
    fam = family(4, 4, auxiliary_updates=3)
    moved = [
        np.abs(gradients(fam, net, student, auxiliary, flow, 256, step)["matching"]["student"]["shares"]).max()
        for step in range(6)
    ]
    assert [bool(m) for m in moved] == [False, False, True, False, False, True]


@pytest.mark.parametrize("output", ["hard", "soft"])
def test_the_auxiliary_is_best_as_the_denoiser_of_what_the_student_writes(output):
    """At the exact denoiser of the student's law its gradient vanishes within the noise of the draw, and not at the data's."""
    net, student, auxiliary, flow = networks()
    fam = family(4, 4, output=output)
    at = gradients(fam, net, student, auxiliary, flow, num=16384)["auxiliary"]["auxiliary"]["tilt"]
    data = {**flow, "tilt": jnp.zeros(4)}
    elsewhere = gradients(fam, net, student, data, flow, num=16384)["auxiliary"]["auxiliary"]["tilt"]
    assert np.abs(at).max() < 0.006
    assert np.abs(elsewhere).max() > 5 * np.abs(at).max()


def test_rows_at_noise_and_at_noised_data():
    fam = family(4, 4, at_noise=0.75, taus=(0.2, 0.6))
    rows = {name: np.asarray(a) for name, a in fam.draw(jax.random.key(0), 64).items() if name != "noise"}
    assert (rows["tau_s"] == 0).sum() == 48
    late = np.sort(rows["tau_s"][rows["tau_s"] > 0])
    np.testing.assert_allclose(late, (np.arange(16) + 0.5) / 16, atol=0.5 / 16 + 1e-6)  # one in each stratum
    assert rows["tau_t"].min() >= 0.2 and rows["tau_t"].max() <= 0.6


@pytest.mark.parametrize("width", [4, 2])
def test_noise_that_positions_share_is_the_priors_at_each(width):
    """In white coordinates I at each position and the shared part between two, in training at s = 0 and in sampling alike."""
    net, student, auxiliary, flow = networks(width)
    seen, rows, share = [], 40_000, 0.3
    fam = family(4, width, shared_noise=share, at_noise=0.75)

    def watched(params, z, tau_s, *others):
        if "shares" in params and not seen:
            seen.append(z[tau_s == 0])
        return net.apply(params, z, tau_s, *others)

    batch = {"ids": jnp.zeros((rows, 2), jnp.int32), **fam.draw(jax.random.key(0), rows)}
    aux = Auxiliary(Teacher(flow), None, jnp.int32(0))
    fam.loss(overriding(net, apply=watched), {"student": student, "auxiliary": auxiliary}, aux, batch, None)
    seen = [seen[0], dataclasses.replace(fam, noise_scale=0.5).begin(net, flow, jax.random.key(1), rows) / 0.5]
    whiten = geometry(net.embedding(flow)).whiten
    for z in seen:
        white = np.asarray(z @ whiten).reshape(len(z), -1)
        between = np.array([[1, share], [share, 1]])
        assert len(z) >= 30_000
        np.testing.assert_allclose(np.cov(white.T), np.kron(between, np.eye(whiten.shape[1])), atol=0.03)


def test_rows_that_are_not_matched_have_the_flow_maps_loss():
    """Three of four rows are matched; the fourth part is exactly what the family flow_map makes of the same rows."""
    fam = family(4, 4, matched=0.75, diagonal=0.5)
    assert fam.group == 8
    net, _, auxiliary, flow = networks()
    ids = jnp.asarray(SEQUENCES[np.random.default_rng(1).integers(0, 5, 32)])
    batch = {"ids": ids, **fam.draw(jax.random.key(4), 32)}
    aux = Auxiliary(Teacher(flow), None, jnp.int32(1))
    losses, _ = fam.loss(net, {"student": {**flow, "tilt": jnp.ones(4)}, "auxiliary": auxiliary}, aux, batch, None)
    assert {name: len(a) for name, a in losses.items()} == {"matching": 24, "auxiliary": 24, "diagonal": 4, "psd": 4}
    plain = make_family(warp=fam.warp, teacher=True, **config.objective("flow_map").to_dict())
    rest = jax.tree.map(lambda a: a.reshape(-1, 8, *a.shape[1:])[:, 6:].reshape(-1, *a.shape[1:]), batch)
    theirs, _ = plain.loss(net, {**flow, "tilt": jnp.ones(4)}, aux, rest, None)
    for name in ("diagonal", "psd"):
        np.testing.assert_allclose(losses[name], theirs[name], rtol=1e-6)


def test_bad_settings_are_refused():
    for changes, word in (
        (dict(taus=(0.9, 0.1)), "earlier"),
        (dict(matched=0.3333), "fraction"),
        (dict(surgery=True), "surgery"),
        (dict(noises=64), "noises 64"),
        (dict(teacher=False), "teacher"),
        (dict(form="logits"), "form"),
    ):
        with pytest.raises(ValueError, match=word):
            family(4, 4, **changes)
    with pytest.raises(ValueError, match="set prior to gaussian"):
        make_family(warp=TimeWarp("dirichlet", "ambient", 4, 4), teacher=True, **config.objective("matched").to_dict())
    assert dataclasses.replace(family(4, 4), gamma=1.0).samplers()
