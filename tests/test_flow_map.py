"""Flow maps against the exact one of a finite data law: identities, objectives, the whole family, its sampler."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_map_oracle import DirichletFlow, GaussianFlow, column, network, parameters
from jax.tree_util import Partial
from oracle import total_variation
from toy import FunctionNetwork, overriding

from flowlm import config
from flowlm.maths import identities as flow_map
from flowlm.maths import vocab
from flowlm.maths.identities import eulerian_weight, lagrangian_weight, semigroup_weight, transport
from flowlm.maths.time_sampling import pairs
from flowlm.maths.time_warp import TimeWarp
from flowlm.models.attention import soft_cap
from flowlm.objectives import make_family
from flowlm.objectives.base import Auxiliary, Teacher
from flowlm.objectives.guidance import Prediction

# V <= D, V > D, and the prior on the simplex.
FLOWS = {"wide": (GaussianFlow, 6, 8), "narrow": (GaussianFlow, 8, 4), "dirichlet": (DirichletFlow, 5, 6)}
GAUSSIAN = ("wide", "narrow")


@functools.cache
def setting(name):
    """(flow, warp)."""
    cls, size, width = FLOWS[name]
    return cls(size, width), TimeWarp(cls.prior, "embedded", size, width)


@functools.cache
def exact(name, num=48):
    """Everything exact at random s < u < t, uniform in warped time up to .99, where t = .8 (.4 on the simplex)."""
    flow, warp = setting(name)
    rng = np.random.default_rng(0)
    s, u, t = (np.interp(tau, *warp.table[1::-1]) for tau in np.sort(rng.uniform(0, 0.99, (3, num)), 0))
    z = flow.state(rng, s)
    (x, delta), (middle, first) = flow.map(z, s, t), flow.map(z, s, u)
    return SimpleNamespace(
        **dict(s=s, u=u, t=t, z=z, x=x, middle=middle, embedding=flow.embedding, flow=flow),
        **dict(delta=delta, first=first, second=flow.delta(middle, u, t)),
        **dict(at_start=flow.denoiser(z, s), at_middle=flow.denoiser(middle, u), at_end=flow.denoiser(x, t)),
        **dict(dt=flow.d_dt(z, s, t), along=flow.d_flow(z, s, t)),
    )


# Identities


@pytest.mark.parametrize("name", FLOWS)
def test_transport_is_the_flow(name):
    e = exact(name)
    np.testing.assert_allclose(transport(e.z, e.delta @ e.embedding, column(e.s), column(e.t)), e.x, atol=1e-5)
    np.testing.assert_allclose(e.delta.sum(-1), 1, atol=1e-9)
    assert np.abs(e.x - e.z).max() > 0.3


@pytest.mark.parametrize("name", FLOWS)
def test_identities(name):
    e = exact(name)
    s, u, t = map(column, (e.s, e.u, e.t))
    lam = semigroup_weight(s, u, t)
    np.testing.assert_allclose(lam * e.first + (1 - lam) * e.second, e.delta, atol=1e-5)
    np.testing.assert_allclose(e.at_end - lagrangian_weight(s, t) * e.dt, e.delta, atol=1e-5)
    np.testing.assert_allclose(e.at_start + eulerian_weight(s, t) / (1 - t) * e.along, e.delta, atol=1e-5)
    for derivative in (e.dt, e.along):  # else the last two would say little
        assert np.median(np.abs(derivative).max((1, 2))) > 0.05


@pytest.mark.parametrize("name", FLOWS)
def test_empty_intervals_and_ends(name):
    flow, _ = setting(name)
    s, z = exact(name).s, exact(name).z
    np.testing.assert_allclose(flow.delta(z, s, s), flow.denoiser(z, s), atol=1e-9)
    zero, one = jnp.zeros(3), jnp.ones(3)
    half = jnp.full(3, 0.5)
    np.testing.assert_allclose(transport(z[0, :1], z[0, 1:], 0.0, 1.0), z[0, 1:], rtol=1e-6)
    np.testing.assert_array_equal(semigroup_weight(half, half, half), zero)
    np.testing.assert_array_equal(semigroup_weight(half, one * 0.7, one), zero)  # at t = 1 only the last part counts
    np.testing.assert_array_equal(lagrangian_weight(half, one), zero)


@pytest.mark.parametrize("end", [0.8, 1.0])
def test_step_weights_are_what_the_steps_do(end):
    """Euler steps compose to one transport by the weighted mean of their denoisers; the weights sum to 1."""
    rng = np.random.default_rng(1)
    u = np.concatenate([[0.1], np.sort(rng.uniform(0.1, end, 5)), [end]])
    means = rng.standard_normal((6, 4))
    weights = [flow_map.step_weight(u[0], u[i], u[i + 1], end) for i in range(6)]
    z = start = rng.standard_normal(4)
    for i in range(6):
        z = transport(z, means[i], u[i], u[i + 1])
    np.testing.assert_allclose(sum(weights), 1, atol=1e-6)
    assert min(weights) >= 0
    np.testing.assert_allclose(transport(start, np.array(weights) @ means, u[0], end), z, atol=1e-5)


# Objectives as functions of one token's logits


def formulas(e):
    """{name: (formula of what the live network says, what it says when it is exact)}; logits have arbitrary shifts."""
    rng = np.random.default_rng(2)

    def shift(p):
        return 3 * rng.standard_normal((*p.shape[:-1], 1))

    def logits(p):
        return jnp.asarray(np.log(p + 1e-12) + shift(p), jnp.float32)

    def moving(d):
        return (logits(e.delta), jnp.asarray(d / (e.delta + 1e-12) + shift(d), jnp.float32))

    first, second, start, end = map(logits, (e.first, e.second, e.at_start, e.at_end))
    s, u, t = (jnp.asarray(a[:, None], jnp.float32) for a in (e.s, e.u, e.t))
    lam, c, k = semigroup_weight(s, u, t), lagrangian_weight(s, t), eulerian_weight(s, t)

    def bend(delta, d, s, t):
        return jnp.asarray(2 * (delta - d) / column((1 - s) * (t - s)), jnp.float32)

    bends = bend(e.first, e.at_start, e.s, e.u), bend(e.second, e.at_middle, e.u, e.t)
    return {
        "diagonal": (lambda x: flow_map.diagonal(x, start), logits(e.at_start)),
        "psd": (lambda x: flow_map.psd(x, first, second, lam), logits(e.delta)),
        "psd_squared": (lambda x: flow_map.psd_squared(x, first, second, lam), logits(e.delta)),
        "residual": (lambda x: flow_map.residual(x, start, bend(e.delta, e.at_start, e.s, e.t), k), logits(e.delta)),
        "residual_map": (
            lambda g: flow_map.residual_map(g, *bends, start, logits(e.at_middle), s, u, t),
            bend(e.delta, e.at_start, e.s, e.t),
        ),
        "lsd": (lambda x: flow_map.lsd(x, end, c), moving(e.dt)),
        "lsd_logit": (lambda x: flow_map.lsd_logit(x, end, c), moving(e.dt)),
        "csd": (lambda x: flow_map.csd(x, end, s, t), moving(e.dt)),
        "ecld": (lambda x: flow_map.ecld(x, end, s, t), moving(e.dt)),
        "esd": (lambda x: flow_map.esd(x, start, t, k), moving(e.along)),
        "esd_logit": (lambda x: flow_map.esd_logit(x, start, t, k), moving(e.along)),
    }


SQUARED = ("psd_squared", "csd", "esd", "residual", "residual_map")
FIXED_TARGET = ("diagonal", "psd", *SQUARED)
EXACT = [(n, o) for n in GAUSSIAN for o in ("diagonal", "psd", "lsd", "lsd_logit", "esd_logit", *SQUARED)]
EXACT += [("dirichlet", o) for o in ("diagonal", "psd", "lsd", *SQUARED)]


def gradient_norm(formula, live):
    """Per token, over logits and, where the loss has a gradient in it, their tangent."""
    grads = jax.grad(lambda x: formula(x).loss.sum())(live)
    return np.sqrt(sum((np.asarray(g) ** 2).sum(-1) for g in jax.tree.leaves(grads)))


def nudged(live, size=0.3):
    def noise(x):
        return x + size * np.random.default_rng(3).standard_normal(x.shape)

    return jax.tree.map(noise, live)


@pytest.mark.parametrize(("name", "objective"), EXACT)
def test_objectives_are_stationary_at_the_exact_map(name, objective):
    """Where no logarithm was clamped, which the logit forms do even there."""
    formula, live = formulas(exact(name))[objective]
    match, free = formula(live), np.asarray(formula(live).clamped) == 0
    assert free.mean() > (0.2 if "logit" in objective else 0.999)
    assert gradient_norm(formula, live)[free].max() < 2e-5
    assert np.asarray(match.distance)[free].max() < 1e-9
    assert gradient_norm(formula, nudged(live))[free].mean() > 5e-4
    assert np.asarray(formula(nudged(live)).distance)[free].mean() > 1e-5
    if objective in SQUARED:
        assert match.loss.max() < 1e-9
    if objective in FIXED_TARGET:
        assert formula(nudged(live)).loss.mean() > match.loss.mean() + 1e-5


@pytest.mark.parametrize("name", GAUSSIAN)
def test_clamped_share_is_how_often_the_exact_ratio_is_small(name):
    """The brackets are D_t(X) / delta and (1 - t) D_s / delta at the exact map."""
    e = exact(name)
    reached, positive = e.delta > 1e-4, np.maximum(e.delta, 1e-30)  # below 1e-4 differences are noise
    for objective, top in (("lsd_logit", e.at_end), ("esd_logit", column(1 - e.t) * e.at_start)):
        ratio = np.maximum(top / positive, 1e-30)
        formula, live = formulas(e)[objective]
        clear = (np.abs(np.log(ratio / flow_map.FLOOR)) > 0.05) & reached | (e.delta == 0)
        clear = clear.all(-1)
        small = ((ratio < flow_map.FLOOR) & reached).mean(-1)
        assert clear.sum() > 10
        np.testing.assert_allclose(np.asarray(formula(live).clamped)[clear], small[clear], atol=1e-6)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_steps_of_the_exact_flow_reach_the_exact_map(name):
    """The gradient of teacher_steps at the exact map vanishes like 1 / m."""
    e = exact(name)
    live = jnp.log(jnp.asarray(e.delta, jnp.float32) + 1e-12)
    norms = []
    for m in (16, 64):
        u = np.linspace(e.s, e.t, m + 1)
        z, parts, weights = e.z, [], []
        for i in range(m):
            parts.append(np.log(e.flow.denoiser(z, u[i]) + 1e-12))
            weights.append(np.asarray(flow_map.step_weight(e.s, u[i], u[i + 1], e.t))[:, None])
            z = z + column(u[i + 1] - u[i]) * e.flow.velocity(z, u[i])
        norms.append(gradient_norm(lambda x, a=(*parts, *weights): flow_map.teacher_steps(x, *a), live).mean())
    assert norms[1] < norms[0] / 3 < 0.02


def test_ecld_bounds_csd():
    """|a + b|^2 <= 2 |a|^2 + 2 |b|^2 and |p - q|^2 <= KL(q, p): twice ecld is above csd, whatever the network says."""
    rng = np.random.default_rng(4)
    shape = (20_000, 4)
    for scale in (0.3, 2.0, 8.0):
        logits, tangent, flow = (jnp.asarray(scale * rng.standard_normal(shape), jnp.float32) for _ in range(3))
        s, t = np.sort(rng.uniform(0, 1, (2, len(logits))), 0).astype(np.float32)
        csd = flow_map.csd((logits, tangent), flow, s, t).loss
        ecld = flow_map.ecld((logits, tangent), flow, s, t).loss
        q = jax.nn.softmax(flow)
        entropy = -jnp.sum(q * jnp.log(q), -1)
        np.testing.assert_array_less(csd, 2 * (ecld - entropy) + 1e-5)
        # A delta that does not move: then no factor is needed, and what is left is the cross-entropy.
        still = jnp.ones_like(tangent)
        csd = flow_map.csd((logits, still), flow, s, t).loss
        ecld = flow_map.ecld((logits, still), flow, s, t).loss
        np.testing.assert_array_less(csd, ecld - entropy + 1e-5)
        np.testing.assert_allclose(ecld, -jnp.sum(q * jax.nn.log_softmax(logits), -1), rtol=1e-5, atol=1e-6)


def test_ecld_is_stationary_where_delta_stands_still_and_not_in_general():
    formula, live = formulas(exact("wide"))["ecld"]
    assert gradient_norm(formula, live).mean() > 0.05
    flow = jax.random.normal(jax.random.key(0), (8, 6))
    s, t = jnp.full(8, 0.2), jnp.full(8, 0.6)

    def still(x):
        return flow_map.ecld((x, jnp.zeros((8, 6))), flow, s, t)

    assert gradient_norm(still, flow).max() < 1e-6 < 1e-2 < gradient_norm(still, nudged(flow)).min()


@pytest.mark.parametrize("objective", ["lsd", "lsd_logit", "csd", "ecld", "esd", "esd_logit"])
@pytest.mark.parametrize("t", [0.999, 1 - 1e-6, 1.0])
def test_nothing_overflows_near_the_end(objective, t):
    """Certain networks that move fast, at t = 1 too: values and gradients stay finite."""
    rng = np.random.default_rng(5)

    def draw(scale):
        return jnp.asarray(scale * rng.standard_normal((200, 6)), jnp.float32)

    live, flow, s, t = (draw(30), draw(1e4)), draw(30), jnp.linspace(0, 0.99, 200) * t, jnp.full(200, t, jnp.float32)
    k, c = eulerian_weight(s, t), lagrangian_weight(s, t)
    weights = {"esd": (t, k), "esd_logit": (t, k), "csd": (s, t), "ecld": (s, t)}.get(objective, (c,))
    match, pull = jax.vjp(lambda x: getattr(flow_map, objective)(x, flow, *weights), live)
    grads = pull(jax.tree.map(jnp.ones_like, match))
    for value in jax.tree.leaves((match, grads)):
        assert np.isfinite(value).all()
    if objective == "esd_logit" or (objective == "lsd_logit" and t[0] < 1 - 1e-3):
        assert match.clamped.mean() > 0.1


def test_negative_brackets_are_clamped_and_counted():
    p, tangent = np.array([0.5, 0.3, 0.2]), np.array([4.0, 0.0, -4.0])
    zeta = tangent - p @ tangent  # 2.8, -1.2, -5.2
    live = (jnp.log(p), jnp.asarray(tangent))
    flow = jnp.zeros(3)
    match = flow_map.lsd_logit(live, flow, jnp.float32(0.5))  # brackets 2.4, .4, -1.6
    np.testing.assert_allclose(match.clamped, 1 / 3)
    target = 1 / np.array([2.4, 0.4, flow_map.FLOOR])
    np.testing.assert_allclose(match.loss, -(target / target.sum()) @ np.log(p), rtol=1e-5)
    match = flow_map.esd_logit(live, flow, jnp.float32(0.4), jnp.float32(0.3))  # brackets -.24, .96, 2.16
    np.testing.assert_allclose(match.clamped, 1 / 3)
    target = 1 / np.array([flow_map.FLOOR, 0.6 - 0.3 * zeta[1], 0.6 - 0.3 * zeta[2]])
    np.testing.assert_allclose(match.loss, -(target / target.sum()) @ np.log(p), rtol=1e-5)


# The vocabulary axis


def sorted_sparsemax(x):
    order = np.sort(x.astype(np.float64), -1)[..., ::-1]
    total, k = np.cumsum(order, -1), np.arange(1, x.shape[-1] + 1)
    size = (1 + k * order > total).sum(-1, keepdims=True)
    threshold = (np.take_along_axis(total, size - 1, -1) - 1) / size
    return np.maximum(x - threshold, 0)


@pytest.mark.parametrize("size", [2, 7, 50_257])
@pytest.mark.parametrize("scale", [1e-3, 0.3, 1.0, 10.0])
def test_sparsemax_equals_the_sorted_algorithm(size, scale):
    x = (scale * np.random.default_rng(6).standard_normal((20, size))).astype(np.float32)
    np.testing.assert_allclose(jax.jit(vocab.sparsemax)(x), sorted_sparsemax(x), atol=2e-6)


def test_sparsemax_with_ties_and_of_the_simplex_itself():
    rows = [[0, 0, 0, 0], [1, 1, 0, 0], [5, 5, 5, -5], [0.5, 0.5, 0, 0], [2, 1, 1, 1], [1, 0, 0, 0], [-9, -9, -8, -8]]
    x = np.array(rows, np.float32)
    np.testing.assert_allclose(vocab.sparsemax(x), sorted_sparsemax(x), atol=1e-6)
    p = np.random.default_rng(7).dirichlet(np.ones(30), 50).astype(np.float32)
    np.testing.assert_allclose(vocab.sparsemax(p), p, atol=1e-6)
    np.testing.assert_allclose(vocab.sparsemax(np.zeros((1, 30_000), np.float32)), 1 / 30_000, rtol=1e-3)


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1.0])
def test_nucleus_equals_a_plain_loop(top_p):
    logits = (3 * np.random.default_rng(8).standard_normal((5, 40))).astype(np.float32)
    logits[:, -3:] = -25.0 - np.arange(3)  # a tail that float32 sums do not feel
    kept = np.asarray(vocab.nucleus(logits, top_p))
    for row, result in zip(logits, kept, strict=True):
        p = np.exp(row.astype(np.float64))
        p, held, expected = p / p.sum(), 0.0, np.full(len(row), -np.inf)
        for v in np.argsort(-p):
            if held < top_p:
                expected[v], held = row[v], held + p[v]
        np.testing.assert_array_equal(result, expected.astype(np.float32))


LOGIT_CAP = 30.0


def capped(kernel, bias, hidden):
    return soft_cap(hidden @ kernel + bias, LOGIT_CAP)


@pytest.mark.parametrize("span", [100, 4, 5, 1, None])
def test_over_logits_equals_the_dense_computation(span, monkeypatch):
    """Value and gradient, with tangents, through a soft-capped head; spans that divide the length and that do not."""
    monkeypatch.setattr(vocab, "SMALL", 0)
    batch, length, width, size = 3, 12, 5, 7
    keys = iter(jax.random.split(jax.random.key(9), 12))

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    params = {"kernel": 12 * normal(width, size), "bias": normal(size), "other": normal(width, size)}
    params |= {k: normal(batch, length, width) for k in ("hidden", "tangent", "second")}
    params |= {"row": normal(batch), "token": normal(batch, length)}
    weights = normal(batch, length)

    def formula(moving, flow, row, token):
        (logits, slope), p = moving, jax.nn.softmax(flow)
        return {"a": jnp.sum(p * jnp.sin(logits) + row[..., None] * slope * p, -1), "b": token * jnp.max(slope, -1)}

    def ours(a):
        moving = Partial(capped, a["kernel"], a["bias"]), a["hidden"], a["tangent"]
        flow = Partial(capped, a["other"], a["bias"]), a["second"]
        return vocab.over_logits(formula, (moving, flow), (a["row"], a["token"]), span)

    def dense(a):
        raw = a["hidden"] @ a["kernel"] + a["bias"]
        slope = (1 - jnp.tanh(raw / LOGIT_CAP) ** 2) * (a["tangent"] @ a["kernel"])
        flow = LOGIT_CAP * jnp.tanh((a["second"] @ a["other"] + a["bias"]) / LOGIT_CAP)
        row = jnp.broadcast_to(a["row"][:, None], (batch, length))
        return formula((LOGIT_CAP * jnp.tanh(raw / LOGIT_CAP), slope), flow, row, a["token"])

    (value, pull), (expected, pull_dense) = jax.vjp(ours, params), jax.vjp(dense, params)
    cotangent = {"a": weights, "b": weights**2}

    def close(a, b):
        return np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)

    jax.tree.map(close, value, expected)
    jax.tree.map(close, pull(cotangent)[0], pull_dense(cotangent)[0])


# The whole family on an oracle network


def family(name, **changes):
    _, warp = setting(name)
    return make_family(warp=warp, **{"teacher": True, **config.objective("flow_map").to_dict(), **changes})


def rows(fam, flow, num, seed=0):
    rng = np.random.default_rng(seed)
    ids = flow.sequences[rng.choice(len(flow.weights), num, p=flow.weights)]
    return {"ids": jnp.asarray(ids), **fam.draw(jax.random.key(seed), num)}


def judge(fam, net, params, batch, teacher=None):
    """tilt of the live logits -> (losses, metrics, {loss: |gradient of every row in the tilt|})."""
    aux = Auxiliary(teacher=Teacher(params if teacher is None else teacher), ema=params)

    def losses(tilt):
        losses, metrics = fam.loss(net, {**params, "tilt": tilt}, aux, batch, None)
        return losses, (losses, metrics)

    compiled = jax.jit(jax.jacfwd(losses, has_aux=True))

    def at(tilt):
        jacobian, (losses, metrics) = jax.tree.map(np.asarray, compiled(jnp.zeros(net.vocab) + jnp.float32(tilt)))
        return losses, metrics, {k: np.linalg.norm(v, axis=-1) for k, v in jacobian.items()}

    return at


def anything():
    """(net, params) of a network of the `wide` setting that is nothing in particular, and certain of nothing."""
    flow, _ = setting("wide")
    kernel = jnp.asarray(np.random.default_rng(13).standard_normal((8, 6)), jnp.float32)

    def apply(params, z, tau_s, tau_t, keys=None):
        return jnp.sin(2 * z @ kernel + tau_s[:, None, None]) + jnp.cos(
            z[..., ::-1] @ kernel + 3 * tau_t[:, None, None]
        )

    net, params = network(flow, None)
    return overriding(net, apply=apply), params


TILT = 0.5 * np.random.default_rng(10).standard_normal(8)
ALL = ("psd", "psd_squared", "lsd", "lsd_logit", "csd", "esd", "esd_logit")


def assert_stationary(fam, net, params, batch, teacher=None):
    """Every row's gradient vanishes at the oracle (float32: 1e-4 of 1) and does not at a tilt of its logits."""
    at = judge(fam, net, params, batch, teacher)
    _, metrics, grads = at(0)
    free = metrics["clamped"] == 0
    assert free.mean() > (0.15 if "logit" in fam.target else 0.999)
    assert grads[fam.target][free].max() < 5e-4
    assert np.sqrt(metrics["distance"][free]).max() < 5e-4
    assert grads["diagonal"].max() < 5e-4
    _, _, tilted = at(TILT[: net.vocab])
    for name, where in ((fam.target, free), ("diagonal", slice(None))):
        assert tilted[name][where].mean() > 50 * grads[name][where].max()


@pytest.mark.parametrize("target", ALL)
def test_every_row_is_stationary_at_the_oracle(target):
    flow, warp = setting("wide")
    net, params = network(flow, warp)
    fam = family("wide", target=target, tau_max=0.95 if target == "esd_logit" else 1.0, cut="uniform")
    assert_stationary(fam, net, params, rows(fam, flow, 256))


@pytest.mark.parametrize("target", ["psd", "lsd", "esd"])
def test_every_row_is_stationary_where_v_exceeds_d(target):
    flow, warp = setting("narrow")
    net, params = network(flow, warp)
    fam = family("narrow", target=target, pairs="uniform_pair", boundary=0.25)
    assert_stationary(fam, net, params, rows(fam, flow, 256))


@pytest.mark.parametrize("target", ["psd", "csd", "esd"])
def test_student_and_teacher_may_have_different_embeddings(target):
    """Where V <= D both see x0 itself through their own; the exact map of x is the same."""
    flow, warp = setting("wide")
    net, teacher = network(flow, warp)
    other = np.random.default_rng(11).standard_normal(flow.embedding.shape) / 2
    fam = family("wide", target=target, train_embedding=True)
    assert_stationary(fam, net, parameters(other), rows(fam, flow, 256), teacher)


def test_both_stages_of_the_two_network_map_are_stationary_at_the_oracle():
    """g = 2 (delta - D_s) / ((1-s)(t-s)): the first stage's residual is zero, and the second's delta is exact."""
    flow, warp = setting("wide")
    net, params = network(flow, warp)

    def apply(p, z, tau_s, tau_t, keys=None):
        logits = net.apply(p, z, tau_s, tau_t)
        k = eulerian_weight(warp.t(tau_s), warp.t(tau_t))[:, None, None]
        bend = jax.nn.softmax(logits) - jax.nn.softmax(net.apply(p, z, tau_s, tau_s))
        return jnp.where(p["bends"], p["gain"] * 2 * bend / jnp.maximum(k, 1e-3), logits)

    two = overriding(net, apply=apply)
    flow_params = params | {"bends": False, "gain": 1.0}
    bends = flow_params | {"bends": True}
    teacher = Teacher(flow_params, bends)

    def far(batch):
        return np.asarray(eulerian_weight(warp.t(batch["tau_s"]), warp.t(batch["tau_t"])) > 0.02)

    first = make_family(warp=warp, teacher=True, **config.objective("residual").to_dict())
    batch = rows(first, flow, 256)
    loss = jax.jit(lambda p: first.loss(two, p, Auxiliary(teacher), batch, None)[0]["residual_map"])
    exact = np.asarray(loss(bends))[far(batch)]
    assert far(batch).mean() > 0.8 and exact.max() < 1e-4
    assert np.asarray(loss(bends | {"gain": 0.5}))[far(batch)].mean() > 100 * exact.mean()

    second = family("wide", target="residual", diagonal=0.0)
    batch = rows(second, flow, 256)
    loss = jax.jit(lambda teacher: second.loss(two, flow_params, Auxiliary(teacher), batch, None)[0]["residual"])
    exact = np.asarray(loss(teacher))[far(batch)]
    assert exact.max() < 1e-5
    assert np.asarray(loss(Teacher(flow_params, bends | {"gain": 0.5})))[far(batch)].mean() > 1e-3


def test_ecld_is_not_stationary_at_the_oracle():
    flow, warp = setting("wide")
    net, params = network(flow, warp)
    fam = family("wide", target="ecld")
    assert judge(fam, net, params, rows(fam, flow, 256))(0)[2]["ecld"].mean() > 0.03


def test_steps_of_the_teacher_are_stationary_as_they_grow_in_number():
    flow, warp = setting("wide")
    net, params = network(flow, warp, steps=24)
    mean = {}
    for m in (2, 6):
        fam = family("wide", target="teacher_steps", teacher_steps=m, boundary=0.0, tau_max=0.9)
        mean[m] = judge(fam, net, params, rows(fam, flow, 128))(0)[2]["teacher_steps"].mean()
    assert mean[6] < mean[2] / 2 < 0.05


def test_without_a_teacher_the_tokens_and_the_map_itself_take_its_place():
    """Token cross-entropy is stationary on average, off the diagonal every row is."""
    flow, warp = setting("wide")
    net, params = network(flow, warp)
    fam = family("wide", teacher=False, target="lsd", diagonal=0.75)
    batch = rows(fam, flow, 2048)

    def losses(tilt):
        return fam.loss(net, {**params, "tilt": tilt}, Auxiliary(), batch, None)[0]

    gradients = jax.jit(jax.jacfwd(losses))
    grads = jax.tree.map(np.asarray, gradients(params["tilt"]))
    assert len(grads["diagonal"]) == 3 * len(grads["lsd"]) == 1536
    stderr = grads["diagonal"].std(0) / np.sqrt(1536)
    np.testing.assert_array_less(np.abs(grads["diagonal"].mean(0)), 5 * stderr + 1e-7)
    assert np.abs(grads["lsd"]).max() < 5e-4
    tilted = gradients(jnp.asarray(4 * TILT[:6], jnp.float32))["diagonal"]
    assert (np.abs(tilted.mean(0)) / np.maximum(stderr, 1e-3)).max() > 6


def test_targets_from_the_moving_average():
    """A tilted student is measured against the exact map, which is what the moving average is."""
    flow, warp = setting("wide")
    net, params = network(flow, warp)
    fam = family("wide", target="psd", targets_from="ema")
    batch = rows(fam, flow, 128)
    _, off = fam._split.apart(batch)

    def distance(fam):
        tilted = {**params, "tilt": jnp.asarray(TILT[:6], jnp.float32)}
        run = jax.jit(
            lambda batch: fam.loss(net, tilted, Auxiliary(Teacher(params), params), batch, None)[1]["distance"]
        )
        return np.asarray(run(batch))

    z = fam.noised(params["embedding"], off, warp.t(off["tau_s"]))
    logits = jax.jit(net.apply)(params, z, off["tau_s"], off["tau_t"])
    error = jnp.square(jax.nn.softmax(logits) - jax.nn.softmax(logits + TILT[:6])).sum(-1).mean(-1)
    np.testing.assert_allclose(distance(fam), error, atol=1e-5)
    assert np.abs(distance(replace(fam, targets_from="student")) - error).max() > 1e-2


def test_teacher_temperature_sharpens_the_flow_and_nothing_else():
    flow, warp = setting("wide")
    net, params = network(flow, warp)
    fam = family("wide", target="teacher_steps", teacher_steps=1, teacher_temperature=0.5)
    batch = rows(fam, flow, 128)
    tilted = {**params, "tilt": jnp.asarray(TILT[:6], jnp.float32)}
    losses, _ = jax.jit(lambda batch: fam.loss(net, tilted, Auxiliary(Teacher(params), params), batch, None))(batch)
    for part, name, end in zip(fam._split.apart(batch), ("diagonal", "teacher_steps"), ("tau_s", "tau_t"), strict=True):
        z = fam.noised(params["embedding"], part, warp.t(part["tau_s"]))
        taught = jax.nn.softmax(jax.jit(net.apply)(params, z, part["tau_s"], part["tau_s"]) / 0.5)
        mine = jax.nn.log_softmax(jax.jit(net.apply)(params, z, part["tau_s"], part[end]) + TILT[:6])
        np.testing.assert_allclose(losses[name], -(taught * mine).sum(-1).mean(-1), rtol=1e-4)


@pytest.mark.parametrize("target", ["lsd", "lsd_logit", "ecld"])
def test_one_text_for_all_noise_is_no_solution(target):
    """A jump from noise to the end that writes one clean text whatever the noise satisfies the Lagrangian identity there."""
    flow, warp = setting("wide")
    net, params = network(flow, warp)
    text = jax.nn.one_hot(flow.sequences[0], net.vocab)

    def apply(p, z, tau_s, tau_t, keys=None):
        whole = ((tau_s == 0) & (tau_t == 1))[:, None, None]
        return jnp.where(whole, 8 * text + p["tilt"], net.apply(p, z, tau_s, tau_t))

    fam = family("wide", target=target, boundary=1.0, diagonal=0.0)
    batch = rows(fam, flow, 64)
    assert judge(fam, overriding(net, apply=apply), params, batch)(0)[2][target].mean() > 0.1


@pytest.mark.parametrize("target", [name for name in ALL if name != "esd_logit"])
def test_the_boundary_pair_alone_is_learnt(target):
    """One step is trained at (0, 1): every row there has a gradient where delta is too flat, and none at the oracle."""
    flow, warp = setting("wide")
    net, params = network(flow, warp)

    def flat(p, z, tau_s, tau_t, keys=None):
        whole = ((tau_s == 0) & (tau_t == 1))[:, None, None]
        logits = net.apply(p, z, tau_s, tau_t)
        return jnp.where(whole, logits / 20 + p["tilt"], logits)

    fam = family("wide", target=target, boundary=1.0, diagonal=0.0)
    batch = rows(fam, flow, 64)
    assert (batch["tau_t"] == 1).all()
    losses, metrics, grads = judge(fam, net, params, batch)(0)
    assert np.isfinite(losses[target]).all() and np.isfinite(grads[target]).all()
    assert grads[target].max() < 5e-4
    assert np.sqrt(metrics["distance"]).max() < 5e-4
    assert judge(fam, overriding(net, apply=flat), params, batch)(0)[2][target].min() > 5e-3


def test_the_adaptive_weight_divides_by_a_power_of_the_distance():
    net, params = anything()
    fam = family("wide", target="psd")
    batch = rows(fam, setting("wide")[0], 64)
    losses, metrics, grads = judge(fam, net, params, batch)(0)
    scaled, _, scaled_grads = judge(replace(fam, adaptive=0.5), net, params, batch)(0)
    weight = (metrics["distance"] + 1e-6) ** -0.5
    np.testing.assert_allclose(scaled["psd"], losses["psd"] * weight, rtol=1e-4)
    np.testing.assert_allclose(scaled_grads["psd"], grads["psd"] * weight, rtol=1e-3, atol=1e-4)  # the weight is fixed


@pytest.mark.parametrize(("target", "through"), [("lsd", False), ("esd", False), ("csd", True), ("ecld", True)])
def test_which_gradients_pass_through_the_derivative(target, through):
    """`gain` changes the network's derivative in time and not its value."""
    net, params = anything()

    def moves(tau):
        return tau - jax.lax.stop_gradient(tau)

    def apply(params, z, tau_s, tau_t, keys=None):
        still = net.apply(params, z, tau_s, tau_t)
        return still + params["gain"] * (moves(tau_s) + 2 * moves(tau_t))[:, None, None] * jnp.arange(6.0)

    fam = family("wide", target=target)
    batch = rows(fam, setting("wide")[0], 64)

    def loss(p):
        return fam.loss(overriding(net, apply=apply), p, Auxiliary(Teacher(params | {"gain": 0.0})), batch, None)[0][
            target
        ].sum()

    gradient = jax.jit(jax.grad(loss))(params | {"gain": jnp.float32(1)})["gain"]
    assert abs(gradient) > 1e-2 if through else gradient == 0


# States of student and teacher


def seen_states(size, width, same, num=4096):
    """(z_student, z_teacher, E_student, E_teacher): the noise part of what two networks are shown on the diagonal."""
    rng = np.random.default_rng(12)
    one = rng.standard_normal((size, width)) / np.sqrt(width)
    two = one if same else rng.standard_normal((size, width)) / np.sqrt(width)
    warp = TimeWarp("gaussian", "ambient", size, width)
    seen = []

    def apply(params, z, tau_s, tau_t=None, keys=None):
        seen.append((params["embedding"], z, warp.t(tau_s)))
        return z @ jnp.zeros((width, size))

    net = FunctionNetwork(apply, lambda params: Partial(lambda hidden: hidden), size, 1, width)
    student, teacher = ({"embedding": jnp.asarray(e, jnp.float32)} for e in (one, two))
    fam = make_family(warp=warp, teacher=True, **{**config.objective("flow_map").to_dict(), "train_embedding": True})
    batch = {"ids": jnp.ones((num, 1), jnp.int32), **fam.draw(jax.random.key(0), num)}
    fam.loss(net, student, Auxiliary(teacher=Teacher(teacher)), batch, None)
    noise = []
    for embedding, z, t in seen[:2]:  # the diagonal's, student first
        t = np.asarray(t, np.float64)[:, None]
        noise.append((np.asarray(z, np.float64)[:, 0] - t * np.asarray(embedding)[1]) / (1 - t))
    early = np.asarray(seen[0][2]) < 0.9
    return *(n[early] for n in noise), one, two


@pytest.mark.parametrize(("size", "width"), [(20, 4), (6, 4), (5, 8)])  # V > 2D, D < V < 2D, V < D
def test_the_same_embedding_is_shown_the_same_state(size, width):
    mine, theirs, *_ = seen_states(size, width, same=True, num=256)
    assert mine.std() > 0.3
    np.testing.assert_allclose(mine, theirs, atol=2e-5)


@pytest.mark.parametrize(("size", "width"), [(20, 4), (6, 4), (5, 8)])
def test_two_embeddings_are_shown_one_x0(size, width):
    mine, theirs, one, two = seen_states(size, width, same=False)
    joint, dense = np.concatenate([mine, theirs], 1), np.concatenate([one, two], 1)
    products = joint[:, :, None] * joint[:, None, :]
    stderr = products.std(0) / np.sqrt(len(joint))
    np.testing.assert_array_less(np.abs(products.mean(0) - dense.T @ dense), 5 * stderr)


# Times


@pytest.mark.parametrize("diagonal", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("cut", ["midpoint", "uniform"])
def test_rows_are_split_by_exact_counts(diagonal, cut):
    fam = family("wide", diagonal=diagonal, boundary=1 / 16, cut=cut)
    batch = {k: np.asarray(v) for k, v in fam.draw(jax.random.key(0), 256).items() if k != "noise"}
    s, u, t = (batch[k] for k in ("tau_s", "tau_u", "tau_t"))
    assert (s == t).sum() == 256 * diagonal
    assert ((s == 0) & (t == 1)).sum() == round(256 * (1 - diagonal) / 16)
    assert (s >= 0).all() and (s <= u).all() and (u <= t).all() and (t <= 1).all()
    on, off = fam._split.apart(batch)
    assert (on["tau_s"] == on["tau_t"]).all() and (off["tau_s"] < off["tau_t"]).all()
    share = (off["tau_u"] - off["tau_s"]) / (off["tau_t"] - off["tau_s"])
    if cut == "midpoint":
        np.testing.assert_allclose(share, 0.5, atol=1e-3)
    else:
        n = len(share)
        assert abs(share.mean() - 1 / 2) < 5 * np.sqrt(1 / 12 / n) and abs(share.var() - 1 / 12) < 5 * 0.075 / n**0.5
    if diagonal:  # one in each stratum
        np.testing.assert_array_equal(np.sort(on["tau_s"] * len(on["tau_s"])).astype(int), np.arange(len(on["tau_s"])))


@pytest.mark.parametrize("tau_max", [1.0, 0.9])
def test_laws_of_pairs(tau_max):
    """Means of tau_s, tau_t and moments of second order, known in closed form."""
    num = 40_000
    truth = {  # E s, E t, E s^2, E s (t - s)
        "uniform_diff": (1 / 4, 3 / 4, 1 / 9, 1 / 12),
        "uniform_pair": (1 / 3, 2 / 3, 1 / 6, 1 / 12),
    }
    for kind, expected in truth.items():
        s, t = (np.float64(x) / tau_max for x in pairs(jax.random.key(1), num, 0, kind, tau_max))
        for values, mean in zip((s, t, s**2, s * (t - s)), expected, strict=True):
            assert abs(values.mean() - mean) < 5 * values.std() / np.sqrt(num)
    s, t = pairs(jax.random.key(2), num, num // 4, "uniform_diff", tau_max)
    np.testing.assert_allclose(((s == 0) & (t == 1)).mean(), 1 / 4)


# Noise


def test_known_noise_is_what_training_began_at():
    """Three draws, whatever the keys; `map-known` begins at the same three, and `map` at others."""
    flow, warp = setting("wide")
    net, params = network(flow, warp)
    fam = family("wide", noises=3, diagonal=0.0, boundary=1.0)

    def different(z):
        return np.unique(np.asarray(z).reshape(64, -1).round(4), axis=0)

    def begun(name, seed):
        return different(fam.samplers()[name].fresh(net, params, jax.random.key(seed), 64, 1.0))

    first, second = (
        different(fam.noised(net.embedding(params), rows(fam, flow, 64, seed), jnp.zeros(64))) for seed in (0, 1)
    )
    assert len(first) == 3
    for other in (second, begun("map-known", 2)):
        np.testing.assert_allclose(other, first, atol=2e-4)
    fresh = begun("map", 2)
    assert len(fresh) == 64 and np.abs(fresh[:, None] - first).max(-1).min() > 0.01


# Sampler


def draw_ids(fam, net, params, steps, num, seed=0):
    return np.asarray(jax.jit(lambda key: fam.sample(net, params, key, num, steps))(jax.random.key(seed)))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_jump_is_one_network_call(steps, guidance):
    net, params = anything()
    calls = {"apply": 0, "weak": 0}

    def counted(which):
        def apply(params, z, tau_s, tau_t=None, keys=None):
            jax.debug.callback(lambda: calls.update({which: calls[which] + 1}))
            return net.apply(params, z, tau_s, tau_t)

        return apply

    counting = overriding(net, apply=counted("apply"), weak=counted("weak"))
    draw_ids(family("wide", guidance=guidance, gamma=0.5), counting, params, steps, 4)
    jax.effects_barrier()
    assert calls == {"apply": steps, "weak": steps if guidance != 1 else 0}


# Re-noising keeps the law exactly at gamma 0 and 1.
@pytest.mark.parametrize(
    ("name", "steps", "gamma", "slack"),
    [("wide", 1, 0.0, 0), ("narrow", 1, 1.0, 0), ("narrow", 4, 0.0, 0), ("wide", 4, 0.5, 0.03), ("wide", 4, 1.0, 0)],
)
def test_jumps_of_the_exact_map_draw_from_the_data_law(name, steps, gamma, slack):
    flow, warp = setting(name)
    net, params = network(flow, warp, steps=24)
    num = 10_000
    ids = draw_ids(family(name, gamma=gamma), net, params, steps, num)
    noise = 2 * np.sqrt(flow.weights / (2 * np.pi * num)).sum()  # an exact sampler expects half of this
    assert total_variation(ids, flow.sequences, flow.weights) < noise + 0.005 + slack


@pytest.mark.parametrize("name", ["wide", "dirichlet"])
@pytest.mark.parametrize(("gamma", "scale"), [(0.0, 1.0), (0.6, 1.0), (1.0, 1.0), (0.6, 0.5)])
def test_states_between_jumps_are_the_interpolant_s(name, gamma, scale):
    """Where the data are one sequence, a state at t has the mean and covariance of (1 - t) z0 + t E[ids], at any gamma.

    `noise_scale` shrinks the noise around the prior's mean.
    """
    flow, warp = setting(name)
    size = len(flow.embedding)
    net, params = network(flow, warp)
    seen = []

    def apply(params, z, tau_s, tau_t=None, keys=None):
        jax.debug.callback(lambda *a: seen.append(a), z, tau_s[0], ordered=True)
        return jnp.broadcast_to(50 * jax.nn.one_hot(1, size), (*z.shape[:2], size))

    draw_ids(family(name, gamma=gamma, noise_scale=scale), overriding(net, apply=apply), params, 4, 10_000)
    jax.effects_barrier()
    cov = np.eye(size) if name == "wide" else (np.eye(size) / size - 1 / size**2) / (size + 1)
    center = np.zeros(size) if name == "wide" else np.full(size, 1 / size)
    assert len(seen) == 4
    for z, tau in seen:
        t = float(warp.t(tau))
        noise = (np.asarray(z, np.float64)[:, 0] - t * flow.embedding[1]) / (1 - t) - center @ flow.embedding
        np.testing.assert_array_less(np.abs(noise.mean(0)), 5 * noise.std(0) / 100 + 1e-5)
        products = noise[:, :, None] * noise[:, None, :]
        error = np.abs(products.mean(0) - scale**2 * flow.embedding.T @ cov @ flow.embedding)
        np.testing.assert_array_less(error, 5 * products.std(0) / 100 + 1e-5)


def test_one_step_does_not_depend_on_gamma_and_more_do():
    net, params = anything()
    one, more = ([draw_ids(family("wide", gamma=g), net, params, n, 512) for g in (0.0, 0.7)] for n in (1, 3))
    np.testing.assert_array_equal(*one)
    assert (more[0] != more[1]).any()


def test_guidance():
    """weak + 2 (strong - weak) with strong the mean of weak and p is p itself, at every step."""
    net, params = anything()

    def p(*args):
        return jax.nn.softmax(net.apply(*args[:4]))

    def q(*args):
        return jax.nn.softmax(net.apply(*args[:4]) * 0.3 + TILT[:6])

    strong = overriding(net, apply=lambda *a: jnp.log((p(*a) + q(*a)) / 2), weak=lambda *a: jnp.log(q(*a)))
    plain = family("wide", gamma=0.5)
    ids = draw_ids(plain, net, params, 3, 4096)
    assert (draw_ids(replace(plain, guidance=2.0), strong, params, 3, 4096) == ids).mean() > 0.998
    assert (draw_ids(plain, strong, params, 3, 4096) == ids).mean() < 0.97  # 1 does without the weak network


def test_guided_prediction_is_the_dense_formula():
    embedding = jax.random.normal(jax.random.key(1), (6, 4))
    strong, weak = (2 * jax.random.normal(jax.random.key(k), (3, 2, 6)) for k in (2, 3))
    p = jax.nn.softmax(weak) + 2 * (jax.nn.softmax(strong) - jax.nn.softmax(weak))
    guided = Prediction(Partial(lambda hidden: hidden), (strong, weak), 2.0)
    np.testing.assert_allclose(guided.mean(embedding), p @ embedding, atol=1e-5)
    np.testing.assert_array_equal(guided.argmax(), p.argmax(-1))
    many = tuple(jnp.tile(h, (20_000, 1, 1)) for h in guided.hidden)
    draw = jax.jit(lambda hidden, key: Prediction(guided.head, hidden, 2.0).draw(key))
    ids = np.asarray(draw(many, jax.random.key(4))).reshape(20_000, 3, 2)
    positive = np.maximum(p, 0) / np.maximum(p, 0).sum(-1, keepdims=True)
    counts = np.eye(6)[ids].mean(0)
    np.testing.assert_array_less(np.abs(counts - positive), 5 * np.sqrt(positive * (1 - positive) / 20_000) + 1e-6)

    for temperature, top_p in ((1e-4, 1.0), (1.0, 1e-4)):
        np.testing.assert_array_equal(guided.draw(jax.random.key(5), temperature, top_p), guided.argmax())


def test_a_cold_draw_is_argmax():
    net, params = anything()
    plain = family("wide", gamma=0.5)
    greedy = draw_ids(plain, net, params, 2, 512)
    for changes in (dict(temperature=1e-4), dict(temperature=1.0, top_p=1e-4)):
        assert (draw_ids(replace(plain, **changes), net, params, 2, 512) == greedy).mean() > 0.998
    assert (draw_ids(replace(plain, temperature=1.0), net, params, 2, 512) != greedy).mean() > 0.05
