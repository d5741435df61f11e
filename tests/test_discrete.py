"""Masked and uniform discrete diffusion against enumeration, plain loops and the exact law."""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toy
from jax.tree_util import Partial
from toy import OPTIMIZED, FunctionNetwork, overriding

from flowlm.maths import vocab
from flowlm.maths.time_warp import TimeWarp
from flowlm.objectives import discrete, uniform
from flowlm.objectives.base import Auxiliary, Teacher
from flowlm.objectives.discrete import EPS
from flowlm.objectives.masked import Masked
from flowlm.objectives.uniform import Uniform, alpha_of

V, L = 5, 3
WARP = TimeWarp("gaussian", "ambient", V, 16)


def networks(**fields):
    net = toy.network(vocab=V, length=L, **fields)
    return net, toy.perturbed(net.init(jax.random.key(0))), toy.perturbed(net.init(jax.random.key(0)), seed=1)


def masks():
    return networks(mask_token=True, time_embeddings=0)


def logits_of(net, params, ids, time):
    ids, time = jnp.asarray(ids), jnp.asarray(time, jnp.float32)
    return np.asarray(net.unembed(params, net.apply(params, net.embed(params, ids), time)), np.float64)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def a_batch(family, num=64, seed=0):
    ids = np.random.default_rng(seed).integers(V, size=(num, L))
    return {"ids": jnp.asarray(ids), **family.draw(jax.random.key(seed), num)}


# Masked diffusion


def test_masked_loss_is_the_plain_loop():
    net, params, _ = masks()
    family = Masked()
    batch = a_batch(family)
    noised = np.asarray(family.noised(net, batch))
    log_p = log_softmax(logits_of(net, params, noised, np.zeros(64)))
    expected = [
        sum(-log_p[i, j, y] / float(batch["r"][i]) for j, y in enumerate(row) if noised[i, j] == V) / L
        for i, row in enumerate(np.asarray(batch["ids"]))
    ]
    losses, _ = family.loss(net, params, Auxiliary(), batch, None)
    np.testing.assert_allclose(losses["diffusion"], expected, rtol=1e-4)


def test_a_token_is_masked_with_probability_r():
    net, _, _ = masks()
    batch = a_batch(Masked(), 30_000)
    share = (np.asarray(Masked().noised(net, batch)) == V).mean(1) - np.asarray(batch["r"])
    assert abs(share.mean()) < 5 * share.std() / np.sqrt(len(share))
    for low in (0.0, 0.5):
        part = share[(batch["r"] > low) & (batch["r"] < low + 0.5)]
        assert abs(part.mean()) < 5 * part.std() / np.sqrt(len(part))


def exact(sequences, weights, kind):
    """The exact posterior of every token of the finite law as a network without parameters."""
    data, size = jnp.asarray(sequences), V + (kind == "masked")

    def apply(params, z, alpha, tau_t=None, keys=None):
        ids = jnp.argmax(z, -1)
        same = data[None] == ids[:, None]  # [B, K, L]
        if kind == "masked":
            like = jnp.where(same | (ids == V)[:, None], 0.0, -50.0)
        else:
            alpha = alpha[:, None, None]
            like = jnp.log(jnp.maximum(alpha * same + (1 - alpha) / V, 1e-30))
        if "known" in params:
            like = jnp.where(params["known"][:, None], jnp.where(same, 0.0, -1e4), like)
        # The optimum of the uniform loss is what the other tokens say; a mask says nothing of itself anyway.
        others = like.sum(-1, keepdims=True) - like
        posterior = jax.nn.softmax(jnp.log(jnp.asarray(weights))[:, None] + others, 1)
        return jnp.log(jnp.einsum("bkl,klv->blv", posterior, jax.nn.one_hot(data, V)) + 1e-30)

    def head(params):
        return Partial(oracle.log_prob_head)

    return FunctionNetwork(apply, head, V, L, size), {"embedding": jnp.eye(size)}


SEQUENCES, WEIGHTS = oracle.correlated_law(V, L, 8, 0)
FAMILIES = {"masked": Masked(), "uniform": Uniform(warp=WARP)}


def sample(kind, net, params, key, num, steps):
    """Samples [num, L]. Parameters are an argument, because XLA would spend seconds on folding what follows from constants."""

    @functools.partial(jax.jit, compiler_options=OPTIMIZED)
    def draw(params, key):
        return FAMILIES[kind].sample(net, params, key, num, steps)

    return np.asarray(draw(params, key))


@pytest.mark.parametrize("kind", FAMILIES)
def test_bound_is_tight_at_the_exact_posterior_and_loose_elsewhere(kind):
    """It never lies below the entropy; for the exact posterior discrete diffusion's gap is what EPS leaves."""
    net, params = exact(SEQUENCES, WEIGHTS, kind)
    rng = np.random.default_rng(1)
    num = 60_000
    ids = jnp.asarray(SEQUENCES[rng.choice(len(WEIGHTS), num, p=WEIGHTS)])

    def bound(net):
        return np.asarray(
            jax.jit(lambda key: FAMILIES[kind].bound(net, params, {"ids": ids}, key))(jax.random.key(0)), np.float64
        )

    nats, entropy = bound(net), oracle.entropy(WEIGHTS)
    stderr = nats.std() / np.sqrt(num)
    assert stderr < 0.02 * entropy
    assert abs(nats.mean() - entropy) < 5 * stderr + 5e-3
    flat = overriding(net, apply=lambda params, z, *args, **kw: 0.1 * net.apply(params, z, *args, **kw))
    assert bound(flat).mean() > entropy + 10 * stderr


@pytest.mark.parametrize("kind", FAMILIES)
def test_samples_reach_the_law_as_steps_grow_and_one_step_draws_every_token_by_itself(kind):
    net, params = exact(SEQUENCES, WEIGHTS, kind)
    num = 20_000

    def draw(steps):
        return sample(kind, net, params, jax.random.key(steps), num, steps)

    assert oracle.total_variation(draw(128), SEQUENCES, WEIGHTS) < 0.04
    marginals = np.einsum("k,klv->lv", WEIGHTS, np.eye(V)[SEQUENCES])
    everything = np.array(list(itertools.product(range(V), repeat=L)))
    independent = np.prod([marginals[j][everything[:, j]] for j in range(L)], 0)
    assert oracle.total_variation(draw(1), everything, independent) < 0.04
    assert oracle.total_variation(draw(1), SEQUENCES, WEIGHTS) > 0.3


@pytest.mark.parametrize("kind", FAMILIES)
def test_one_step_mixes_pairs_as_independent_draws_do(kind):
    """new york, san diego: a draw of both words at once is wrong half of the time, if each is right by itself."""
    pairs = np.array([[0, 1, 4], [2, 3, 4]])
    net, params = exact(pairs, np.array([0.5, 0.5]), kind)
    ids = sample(kind, net, params, jax.random.key(0), 20_000, 1)
    assert (ids[:, 2] == 4).mean() > 0.99
    possible = (ids[:, None, :2] == pairs[:, :2]).all(-1).any(-1)
    assert abs(possible.mean() - 0.5) < 0.02
    many = sample(kind, net, params, jax.random.key(0), 4_000, 256)
    assert (many[:, None, :2] == pairs[:, :2]).all(-1).any(-1).mean() > 0.97


def test_a_masked_prediction_is_kept_while_nothing_changes():
    net, params = exact(SEQUENCES, WEIGHTS, "masked")
    calls = []

    def counted(*args, **kwargs):
        jax.debug.callback(lambda: calls.append(1))
        return net.apply(*args, **kwargs)

    ids = Masked().sample(overriding(net, apply=counted), params, jax.random.key(0), 1, 100)
    jax.effects_barrier()
    assert 2 <= len(calls) <= L + 1
    assert (np.asarray(ids) < V).all()


def test_the_greedy_last_step_takes_the_likeliest():
    for kind, family in FAMILIES.items():
        net, params = exact(SEQUENCES, WEIGHTS, kind)
        family = replace(family, greedy=True)
        ids = np.asarray(jax.jit(lambda key, f=family, n=net, p=params: f.sample(n, p, key, 512, 1))(jax.random.key(0)))
        best = np.einsum("k,klv->lv", WEIGHTS, np.eye(V)[SEQUENCES]).argmax(-1)
        if kind == "masked":
            assert (ids == best).all()
        else:  # the kernel favours what is there a little, EPS of it
            assert (ids == best).mean() > 0.95


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_sdtt_target_and_loss_by_hand(divergence):
    """Where the first step unmasked a position the target is the first prediction, elsewhere the second; KL in full."""
    net, params, taught = masks()
    family = Masked(teacher=True, jump=0.5, divergence=divergence)
    batch = a_batch(family, 256)
    noised, r = np.asarray(family.noised(net, batch)), np.asarray(batch["r"])
    head, hidden = family.two_steps(net, taught, jnp.asarray(noised), batch["r"], batch["noise"])
    target = np.asarray(head(hidden), np.float64)
    first = logits_of(net, taught, noised, np.zeros(256))
    picked = (noised == V) & (np.asarray(discrete.rows(batch["noise"], 2, L)) < np.minimum(0.25 / r, 1)[:, None])
    assert 30 < picked.sum() < (noised == V).sum() - 30
    # The second look: redo it from what the first step wrote, which depends on the keys alone.
    drawn = np.asarray(
        vocab.categorical(
            head,
            net.apply(taught, net.embed(taught, jnp.asarray(noised)), jnp.zeros(256)),
            jax.vmap(jax.random.fold_in, (0, None))(batch["noise"], 1),
        )
    )
    after = np.where(picked, drawn, noised)
    second = logits_of(net, taught, after, np.zeros(256))
    expected = np.where(picked[..., None], first, second)
    np.testing.assert_allclose(target[noised == V], expected[noised == V], atol=2e-4)
    log_p, log_q = log_softmax(expected), log_softmax(logits_of(net, params, noised, np.zeros(256)))
    if divergence == "reverse":
        log_p, log_q = log_q, log_p
    nats = np.where(noised == V, (np.exp(log_p) * (log_p - log_q)).sum(-1), 0).sum(1)
    nats /= np.maximum((noised == V).sum(1), 1)
    losses, _ = family.loss(net, params, Auxiliary(Teacher(taught)), batch, None)
    np.testing.assert_allclose(losses["sdtt"], nats, atol=1e-4)


# Uniform diffusion


def test_uniform_loss_is_the_formula_of_the_paper():
    net, params, _ = networks()
    family = Uniform(warp=WARP)
    batch = a_batch(family)
    alpha = np.asarray(alpha_of(batch["r"]), np.float64)
    y = np.asarray(family.noised(net, batch["ids"], batch["noise"], alpha_of(batch["r"])))
    p = np.exp(log_softmax(logits_of(net, params, y, alpha)))
    expected = np.zeros(64)
    for i, j in itertools.product(range(64), range(L)):
        clean, at = np.eye(V)[batch["ids"][i, j]], y[i, j]
        one, mine = (V * alpha[i] * x + 1 - alpha[i] for x in (clean, p[i, j]))
        inner = V / one[at] - V / mine[at] - (one / one[at] * np.log(mine[at] * one / (mine * one[at]))).sum()
        expected[i] += -(1 - EPS) / (V * alpha[i]) * inner / L
    losses, _ = family.loss(net, params, Auxiliary(), batch, None)
    np.testing.assert_allclose(losses["diffusion"], expected, rtol=2e-3, atol=1e-4)


def test_reverse_kernel_is_bayes_rule():
    """q(x_s | x_t, x0) by enumeration of the forward chain, mixed over p(x0) as the paper does: in the likelihood of x_s."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, V))
    y = rng.integers(V, size=6)
    alpha, alpha_next = np.full(6, 0.4), np.full(6, 0.7)
    ours = np.exp(
        log_softmax(np.asarray(uniform.reverse(*map(jnp.asarray, (logits, y, alpha, alpha_next))), np.float64))
    )
    p = np.exp(log_softmax(logits))

    def chain(a):
        return a * np.eye(V) + (1 - a) / V  # [from, to]

    for i in range(6):
        joint = (p[i] @ chain(0.7)) * chain(0.4 / 0.7)[:, y[i]]
        np.testing.assert_allclose(ours[i], joint / joint.sum(), rtol=1e-4)
        np.testing.assert_allclose(joint.sum(), (p[i] @ chain(0.4))[y[i]])


def test_noised_tokens_follow_alpha():
    net, _, _ = networks()
    family = Uniform(warp=WARP)
    batch = a_batch(family, 30_000)
    alpha = np.asarray(alpha_of(batch["r"]))
    y = np.asarray(family.noised(net, batch["ids"], batch["noise"], alpha_of(batch["r"])))
    gap = (y == np.asarray(batch["ids"])).mean(1) - (alpha + (1 - alpha) / V)
    assert abs(gap.mean()) < 5 * gap.std() / np.sqrt(len(gap))
    moved = y[y != np.asarray(batch["ids"])]
    counts = np.bincount(moved, minlength=V) / len(moved)
    np.testing.assert_allclose(counts, 1 / V, atol=5 * np.sqrt(0.25 / len(moved)))


def test_latent_argmax_is_a_uniform_token_at_its_alpha():
    """What the curriculum shows is a softened view of the very token that enters the loss; its slope is the derivative."""
    num = 4096
    ids = jnp.asarray(np.random.default_rng(0).integers(V, size=(num, L)))
    keys, tau = jax.random.split(jax.random.key(0), num), jnp.full((num,), 0.4)
    e = jax.random.normal(jax.random.key(1), (V, 8))
    times = (WARP.t(tau), WARP.t(jnp.full((num,), 0.9)))
    far, near = (np.asarray(y) for y in vocab.gaussian_latents(keys, ids, e, times))
    for y, alpha in ((far, 0.4), (near, 0.9)):
        right = (y == np.asarray(ids)).mean()
        assert abs(right - (alpha + (1 - alpha) / V)) < 5 * 0.5 / np.sqrt(num * L)
    # The same noise: what is right early is right later.
    assert (near == np.asarray(ids))[far == np.asarray(ids)].all()
    sharp, _ = vocab.gaussian_latents(keys, ids, e, times, 1e-4)
    assert np.isclose(sharp, np.asarray(e)[far], atol=1e-2).all(-1).mean() > 0.999
    family = Uniform(warp=WARP)
    r = jnp.linspace(0.05, 0.95, 7)
    _, alpha, slope = family.latent_times(r)
    low, high = (np.asarray(family.latent_times(r + h)[1], np.float64) for h in (-1e-2, 1e-2))
    np.testing.assert_allclose(slope, (high - low) / 2e-2, rtol=2e-2)


def test_a_row_s_latents_depend_on_its_own_key_alone(monkeypatch):
    ids, e = jnp.zeros((4, L), jnp.int32), jnp.eye(V)
    keys, t = jax.random.split(jax.random.key(0), 4), jnp.full((4,), 0.3)
    whole = vocab.gaussian_latents(keys, ids, e, (t,))[0]
    parts = [vocab.gaussian_latents(keys[i : i + 1], ids[:1], e, (t[:1],), span=2)[0] for i in range(4)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    head, hidden = Partial(oracle.log_prob_head), jnp.zeros((4, L, V))
    whole = vocab.categorical(head, hidden, keys)
    parts = [vocab.categorical(head, hidden[:1], keys[i : i + 1], span=2) for i in range(4)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_dcd_loss_by_hand(divergence):
    net, params, taught = networks()
    family = Uniform(warp=WARP, teacher=True, jump=0.25, divergence=divergence)
    batch = a_batch(family)
    alpha, later = (np.asarray(alpha_of(r)) for r in (batch["r"], jnp.maximum(batch["r"] - 0.25, 0)))
    times = tuple(WARP.t(jnp.asarray(a)) for a in (alpha, later))
    y, y_next = vocab.gaussian_latents(batch["noise"], batch["ids"], params["embedding"], times)
    mine = log_softmax(logits_of(net, params, y, alpha))
    target = log_softmax(logits_of(net, taught, y_next, later))
    if divergence == "reverse":
        mine, target = target, mine
    expected = (np.exp(target) * (target - mine)).sum(-1).mean(-1)
    losses, _ = family.loss(net, params, Auxiliary(Teacher(taught)), batch, None)
    np.testing.assert_allclose(losses["dcd"], expected, atol=1e-4)


def test_the_curriculum_ends_at_its_step():
    net, params, _ = networks()
    plain, batch = Uniform(warp=WARP), a_batch(Uniform(warp=WARP))
    staged = replace(plain, curriculum_steps=10, curriculum_temperature=0.3)

    def at(family, step):
        return np.asarray(family.loss(net, params, Auxiliary(step=jnp.int32(step)), batch, None)[0]["diffusion"])

    np.testing.assert_allclose(at(staged, 10), at(plain, 10), rtol=1e-4)
    assert np.abs(at(staged, 9) - at(plain, 9)).max() > 1e-2


def test_the_loss_of_soft_latents_by_hand():
    net, params, _ = networks()
    family = Uniform(warp=WARP, curriculum_steps=10, curriculum_temperature=0.3)
    batch = a_batch(family)
    t, alpha, slope = family.latent_times(batch["r"])
    e = params["embedding"]
    y, z = (vocab.gaussian_latents(batch["noise"], batch["ids"], e, (t,), T)[0] for T in (None, 0.3))
    logits = net.unembed(params, net.apply(params, z, alpha))

    def wide(a):
        return jnp.broadcast_to(a[:, None], y.shape)

    expected = uniform.diffusion(logits, batch["ids"], y, wide(alpha), wide(slope)).mean(-1)
    losses, _ = family.loss(net, params, Auxiliary(step=jnp.int32(0)), batch, None)
    np.testing.assert_allclose(losses["diffusion"], expected, rtol=1e-4)


def test_kl_is_kl():
    a, b = np.random.default_rng(0).standard_normal((2, 4, V))
    p, q = log_softmax(a), log_softmax(b)
    np.testing.assert_allclose(discrete.kl(jnp.asarray(a), jnp.asarray(b)), (np.exp(p) * (p - q)).sum(-1), rtol=1e-5)
