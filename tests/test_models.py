"""Inputs and outputs of the network against their formulas in numpy, and its switches against each other."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.experimental.pallas.ops.tpu import splash_attention

from flowlm.config import defaults
from flowlm.engine.build import build
from flowlm.engine.sharding import make_layout, make_mesh
from flowlm.models import dit
from flowlm.models.attention import attention

SHAPES = [(12, 16), (40, 16)]  # V < D and V > D


def own_position(e, z, t):
    """log p(z_l | y_l = v) up to a constant, by the dense formula where V <= D, through G^-1 otherwise; float64."""
    e, z, t = (np.asarray(a, np.float64) for a in (e, z, t))
    t = t[:, None, None]
    inverse = np.linalg.pinv(e)
    norms = np.diag(e @ inverse)
    return t * (z @ inverse) / (1 - t) ** 2 - t**2 * norms / (2 * (1 - t) ** 2)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def case(vocab, width, **fields):
    net = toy.network(vocab=vocab, width=width, **fields)
    params = toy.perturbed(net.init(jax.random.key(0)))
    tau = jnp.array([0.2, 0.6, 0.9])
    z = 0.5 * jax.random.normal(jax.random.key(2), (3, net.length, width))
    return net, params, z, tau


def body_input(monkeypatch, net, params, z, tau):
    """What reaches the transformer's first block, by replacing the blocks with nothing: then it is what is normalised behind."""
    seen = []

    def spy(method, args, kwargs, context):
        if context.module.path == ("norm",):
            seen.append(np.asarray(args[0]))
        return method(*args, **kwargs)

    monkeypatch.setattr(dit.Block, "__call__", lambda self, x, *_: (x, None))
    with nn.intercept_methods(spy):
        net.apply(params, z, tau)
    return seen[0]


@pytest.mark.parametrize(("vocab", "width"), SHAPES)
@pytest.mark.parametrize("kind", ["raw", "scaled", "posterior", "both"])
def test_inputs_follow_their_formulas(monkeypatch, kind, vocab, width):
    net, params, z, tau = case(vocab, width, input=kind)
    e = np.asarray(params["embedding"], np.float64)
    t = np.asarray(toy.TimeWarp("gaussian", "ambient", vocab, width).t(tau), np.float64)
    posterior = softmax(own_position(e, z, t)) @ e
    gram = np.trace(e.T @ e) / width
    signal = np.mean(np.sum(e**2, 1)) / width
    scaled = np.asarray(z) / np.sqrt(t**2 * signal + (1 - t) ** 2 * gram)[:, None, None]
    expected = {"raw": np.asarray(z), "scaled": scaled, "posterior": posterior}
    if kind == "both":
        expected["both"] = posterior + scaled @ np.asarray(params["mix_raw"]["kernel"], np.float64)
    np.testing.assert_allclose(body_input(monkeypatch, net, params, z, tau), expected[kind], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("vocab", "width"), SHAPES)
def test_white_input(monkeypatch, vocab, width):
    """Known up to a rotation: the products of any two positions are those of G^-1, to scale."""
    net, params, z, tau = case(vocab, width, input="white")
    e, z64 = np.asarray(params["embedding"], np.float64), np.asarray(z, np.float64)
    t = np.asarray(toy.TimeWarp("gaussian", "ambient", vocab, width).t(tau), np.float64)
    prior = np.linspace(-0.2, 0.2, vocab)
    params["log_prior"] = jnp.asarray(prior, jnp.float32)
    posterior = softmax(own_position(e, z, t) + net.prior_scale * prior) @ e
    mixed = body_input(monkeypatch, net, params, z, tau) - posterior
    white = mixed @ np.linalg.pinv(np.asarray(params["mix_raw"]["kernel"], np.float64))
    x = z64 @ np.linalg.pinv(e) / np.sqrt(t**2 / vocab + (1 - t) ** 2)[:, None, None]
    expected = x @ x.swapaxes(1, 2)
    np.testing.assert_allclose(white @ white.swapaxes(1, 2), expected, atol=2e-2 * np.abs(expected).max())


def test_preview_is_the_posterior_of_a_later_time(monkeypatch):
    net, params, z, tau = case(12, 16, preview=True)
    e = np.asarray(params["embedding"], np.float64)
    warp = toy.TimeWarp("gaussian", "ambient", 12, 16)
    tau = jnp.array([0.0, 0.1, 0.9])
    later = np.asarray(warp.t(jnp.maximum(tau, net.preview_time)), np.float64)
    ahead = softmax(own_position(e, z, later)) @ e
    expected = np.asarray(z) + ahead @ np.asarray(params["mix_preview"]["kernel"], np.float64)
    np.testing.assert_allclose(body_input(monkeypatch, net, params, z, tau), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("vocab", "width"), SHAPES)
def test_likelihood_skip_adds_the_own_position_term(vocab, width):
    net, params, z, tau = case(vocab, width, output="likelihood_skip")
    plain = toy.network(vocab=vocab, width=width)
    logits = net.unembed(params, net.apply(params, z, tau))
    t = toy.TimeWarp("gaussian", "ambient", vocab, width).t(tau)
    added = np.asarray(logits) - np.asarray(plain.unembed(params, plain.apply(params, z, tau)))
    expected = own_position(params["embedding"], z, t)
    np.testing.assert_allclose(added, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


def test_early_skip_is_a_context_free_posterior_that_fades():
    """With silent blocks an early state's logits are prior + nearly all of the likelihood; late ones' the prior alone."""
    net, params, z, _ = case(12, 16, input="white", output="early_skip")
    tau = jnp.array([0.05, 0.2, 0.9])
    params = {**params, "log_prior": jnp.linspace(-0.2, 0.2, 12), "unembed_kernel": jnp.zeros((16, 12))}
    params["unembed_bias"] = jnp.zeros((12,))
    logits = net.unembed(params, net.apply(params, z, tau))
    t = toy.TimeWarp("gaussian", "ambient", 12, 16).t(tau)
    weight = np.array([1 - 1 / 16, 0, 0])[:, None, None]
    expected = net.prior_scale * np.linspace(-0.2, 0.2, 12) + weight * own_position(params["embedding"], z, t)
    np.testing.assert_allclose(logits, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["posterior", "both"])
def test_what_forms_a_likelihood_carries_no_gradient(kind):
    """Moving E where it forms the likelihood is not a direction of descent: the gradient in E is that of `@ E` alone."""
    net, params, z, tau = case(12, 16, input=kind)
    t = toy.TimeWarp("gaussian", "ambient", 12, 16).t(tau)
    posterior = jnp.asarray(softmax(own_position(params["embedding"], z, t)), jnp.float32)
    scale = jnp.sum(params["embedding"] ** 2) / 16
    raw = z / jnp.sqrt(t**2 * scale / 12 + (1 - t) ** 2 * scale)[:, None, None]
    plain = toy.network(vocab=12, width=16)

    def ours(e):
        return jnp.sum(net.apply({**params, "embedding": e}, z, tau) ** 2)

    def frozen(e):
        x = posterior @ e + (raw @ params["mix_raw"]["kernel"] if kind == "both" else 0)
        return jnp.sum(plain.apply(params, x, tau) ** 2)

    ours, frozen = jax.grad(ours)(params["embedding"]), jax.grad(frozen)(params["embedding"])
    np.testing.assert_allclose(ours, frozen, rtol=5e-3, atol=5e-3 * float(jnp.abs(frozen).max()))


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_and_bfloat16_do_the_same_thing(remat):
    net, params, z, tau = case(12, 16)

    def loss(net):
        return lambda p: jnp.mean(net.unembed(p, net.apply(p, z, tau)) ** 2)

    value, grads = jax.value_and_grad(loss(net))(params)
    value_remat, grads_remat = jax.value_and_grad(loss(toy.network(remat=remat)))(params)
    np.testing.assert_allclose(value_remat, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads_remat, grads)
    half = loss(toy.network(dtype="bfloat16"))(params)
    assert 0 < abs(half - value) < 0.05 * value


def test_causal_output_does_not_read_the_future():
    for causal in (True, False):
        net, params, z, tau = case(12, 16, causal=causal)
        out = net.apply(params, z, tau)
        moved = net.apply(params, z.at[:, 4].multiply(-1.0), tau)
        before = np.abs(out - moved)[:, :4].max()
        assert before == 0 if causal else before > 1e-4


def test_positions_are_told_apart_only_when_they_are_learned():
    """With equal states everywhere attention averages equal values: rotary angles alone leave every position the same."""
    for learned in (False, True):
        net, params, z, tau = case(12, 16, learned_positions=learned)
        out = np.asarray(net.apply(params, jnp.ones_like(z), tau))
        assert (np.abs(out - out[:, :1]).max() > 1e-2) == learned


def test_second_time_matters_and_dropout_needs_keys():
    net, params, z, tau = case(12, 16, time_embeddings=2, dropout=0.5)
    out = net.apply(params, z, tau, tau)
    np.testing.assert_array_equal(out, net.apply(params, z, tau))
    assert np.abs(out - net.apply(params, z, tau, jnp.ones(3))).max() > 1e-3
    assert (
        np.abs(out - net.apply(params, z, tau, tau, keys=jax.random.split(jax.random.key(0), z.shape[0]))).max() > 1e-3
    )


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        (dict(input="row"), "row"),
        (dict(output="skip"), "skip"),
        (dict(dtype="float16"), "float16"),
        (dict(heads=3), "heads"),
        (dict(prior="dirichlet", input="both"), "gaussian prior"),
        (dict(prior="dirichlet", output="likelihood_skip"), "gaussian prior"),
    ],
)
def test_bad_fields_are_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        toy.network(**fields)


# --- kernels for attention ---------------------------------------------------------------------------------------


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU kernel, executed step by step on this machine."""
    make = splash_attention.make_splash_mha
    monkeypatch.setattr(splash_attention, "make_splash_mha", functools.partial(make, interpret=True))


@pytest.mark.parametrize(("cap", "causal", "length"), [(50.0, False, 128), (0.0, True, 100)])
def test_splash_attention_is_attention(interpreted, cap, causal, length):
    q, k, v, w = (3 * jax.random.normal(key, (2, length, 2, 64)) for key in jax.random.split(jax.random.key(0), 4))
    ours, pull = jax.vjp(lambda *a: attention(*a, cap, causal, "splash"), q, k, v)
    theirs, pull_plain = jax.vjp(lambda *a: attention(*a, cap, causal), q, k, v)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    for a, b in zip(pull(w), pull_plain(w), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))


def test_splash_attention_on_a_mesh(interpreted):
    """The partitioner cannot cut a kernel: rows and heads are, inside a jitted program and inside a step's own rows."""
    mesh = make_mesh(data=4, model=2)
    q, k, v = (jax.random.normal(key, (4, 128, 2, 64)) for key in jax.random.split(jax.random.key(0), 3))
    plain = attention(q, k, v, 50.0)
    q, k, v = jax.device_put((q, k, v), jax.NamedSharding(mesh, jax.P()))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = functools.partial(attention, cap=50.0, implementation="splash")
        np.testing.assert_allclose(jax.jit(run)(q, k, v), plain, atol=1e-4)
        rows = jax.P("data")
        own = jax.shard_map(run, in_specs=(rows,) * 3, out_specs=rows, axis_names={"replica", "data"}, check_vma=False)
        np.testing.assert_allclose(jax.jit(own)(q, k, v), plain, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(attention="flash"), "flash"),
        (dict(attention="splash"), "multiples of 128, not 6"),
        (dict(attention="cudnn", dtype="bfloat16"), "attention_cap is 50"),
    ],
)
def test_attention_that_cannot_be(fields, words):
    with pytest.raises(ValueError, match=words):
        toy.network(**fields)


def test_a_derivative_needs_attention_that_has_one():
    config = defaults("flow_map")
    config.data.length = 128
    config.model.update(vocab_size=12, time_embeddings=2, input="both", attention="splash")
    config.objective.target = "lsd"
    with pytest.raises(ValueError, match="model.attention=xla"):
        build(config, 12)
    with pytest.raises(ValueError, match="splash does not run on cpu"):
        make_layout(config)


@pytest.mark.parametrize("times", [2, 3])
def test_a_deeper_network_begins_as_the_one_it_adopts(times):
    """To the last bits, and what was added has a gradient; blocks that are no multiple are refused."""
    small, large = toy.network(blocks=2), toy.network(blocks=2 * times)
    params = toy.perturbed(small.init(jax.random.key(0)))
    grown = large.adopt(large.init(jax.random.key(1)), params)
    z, tau = jax.random.normal(jax.random.key(2), (3, small.length, small.width)), jnp.array([0.0, 0.4, 0.9])

    def logits(net, params):
        return net.unembed(params, net.apply(params, z, tau))

    np.testing.assert_allclose(logits(large, grown), logits(small, params), atol=1e-5)
    gradient = jax.grad(lambda p: jnp.sum(jnp.sin(logits(large, p))))(grown)["blocks"]["mlp_out"]["kernel"]
    assert (np.abs(gradient).max((1, 2)) > 1e-4).all()
    with pytest.raises(ValueError, match="does not fit"):
        odd = toy.network(blocks=3)
        odd.adopt(odd.init(jax.random.key(1)), params)
