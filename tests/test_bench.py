"""The formulations of the benchmark are of one model; its arithmetic by hand; what does not fit is said."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from command_line import error_of, flowlm

from flowlm.config import objective
from flowlm.engine.flops import count_flops
from flowlm.maths.prior import Gaussian
from flowlm.maths.time_warp import TimeWarp
from flowlm.models.attention import native
from flowlm.objectives import make_family
from flowlm.objectives.base import Auxiliary
from flowlm.objectives.flow import Flow
from flowlm.scale import bench
from flowlm.scale.bench import compare
from flowlm.scale.costs import CHIPS, PEAKS, forward_flops
from flowlm.scale.dense import DenseFlow, dense_sample

SIGMAS = 5


@pytest.mark.parametrize(("vocab", "width"), [(24, 16), (8, 16)])
def test_mean_loss_and_gradients_agree(vocab, width):
    length, rows, draws = 3, 64, 128
    net = toy.network(vocab=vocab, length=length, width=width, blocks=1)
    params = jax.jit(lambda key: toy.perturbed(net.init(key), scale=0.15))(jax.random.key(0))
    warp = TimeWarp("gaussian", "ambient", vocab, width)
    ids = jnp.broadcast_to(jnp.arange(length), (rows, length))  # all rows alike: gradients have a mean to speak of

    def estimates(family, seed):
        """Loss, dE and one block matrix's gradient, each with one independent estimate for every draw of the noise."""

        def loss(params, key):
            losses, _ = family.loss(net, params, Auxiliary(), {"ids": ids, **family.draw(key, rows)}, None)
            return losses["cross_entropy"].mean()

        def one(params, key):
            value, grads = jax.value_and_grad(loss)(params, key)
            return value[None], grads["embedding"].ravel(), grads["blocks"]["qkv"]["kernel"].ravel()

        keys = jax.random.split(jax.random.key(seed), draws)

        def every(params, keys):
            return jax.lax.map(lambda key: one(params, key), keys)

        out = jax.jit(every)(params, keys)
        return [np.asarray(a, np.float64) for a in out]

    for ours, theirs in zip(
        estimates(Flow(Gaussian(), warp), 2), estimates(DenseFlow(Gaussian(), warp), 3), strict=True
    ):
        error = np.sqrt((ours.var(0) + theirs.var(0)) / draws)
        assert np.all(np.abs(ours.mean(0) - theirs.mean(0)) < SIGMAS * error + 1e-7)
        # Small against the signal, or the line above would find nothing. Without the noise's share dE is 12 errors off.
        assert np.linalg.norm(error) < 0.1 * np.linalg.norm(theirs.mean(0))


def test_the_bare_step_is_the_network_alone():
    """Its products are three passes of the network in closed form: nothing of the vocabulary."""
    sizes = dict(width=16, blocks=2, cond=8)
    net = toy.network(vocab=24, length=4, time_embeddings=0, **sizes)
    family = bench.Bare(Gaussian(), TimeWarp("gaussian", "ambient", 24, 16))

    def loss(params, ids):
        batch = {"ids": ids, **family.draw(jax.random.key(0), 2)}
        return family.loss(net, params, Auxiliary(), batch, None)[0]["square"].mean()

    params, ids = jax.eval_shape(net.init, jax.random.key(0)), jax.ShapeDtypeStruct((2, 4), jnp.int32)
    counted = count_flops(jax.make_jaxpr(jax.grad(loss))(params, ids))
    token = forward_flops(**sizes, time_embeddings=0, vocab=24, length=4, with_output=False)
    assert counted == 2 * 4 * 3 * token


def test_ratios_are_of_the_same_round():
    flow = [{"seconds": [1.0, 2.0, 9.0], "step": 10}, {"seconds": [3.0, 3.0, 3.0], "step": 10}]
    dense = [{"seconds": [4.0, 4.0, 4.0], "step": 40}, {"seconds": [5.0, 4.0, 9.0], "step": 50}]
    result = compare(flow, dense)
    assert result["seconds"] == {"ours": 2.5, "theirs": 4.5, "ratio": 2.5 / 4.5, "low": 0.5, "high": 0.6}
    assert (result["step"]["low"], result["step"]["high"]) == (0.2, 0.25)


@pytest.fixture
def draws():
    """Of V 24, D 16: {formulation: ids of its argument}, the network, one set of parameters that tells tokens apart, the family."""
    fields = {**objective("flow_map").to_dict(), "teacher": True}
    family = make_family(warp=TimeWarp("gaussian", "ambient", 24, 16), **fields)
    net, out = toy.network(vocab=24, time_embeddings=2), {}
    for name in ("sample", "dense_sample", "forward"):
        out[name], params, _ = bench._sampling(name, net, family, 4)
    plain = {name: value for name, value in params.items() if name != "geometry"}
    # Little but the state decides, and its law is far from white.
    plain = toy.perturbed(plain, scale=0.05)
    plain["embedding"] *= jnp.geomspace(0.1, 1, 16)
    kernel = jax.random.normal(jax.random.key(2), (16, 24))
    params = net.prepared(plain | {"unembed_bias": jnp.zeros(24), "unembed_kernel": kernel})
    return {name: lambda of, draw=draw: np.asarray(draw(params, of)) for name, draw in out.items()}, net, params, family


def test_one_step_sampling_is_the_bare_forward_of_its_noise(draws):
    """What the sides of sample/forward and dense_sample/forward share: all but the draw of the noise."""
    of, net, params, family = draws
    key = jax.random.key(1)
    ids = of["sample"](key)
    np.testing.assert_array_equal(ids, of["forward"](family.fresh(net, params, jax.random.split(key)[0], 4, 1.0)))
    assert len(np.unique(ids)) >= 3
    x0 = np.stack([jax.random.normal(row, (net.length, net.vocab)) for row in jax.random.split(key, 4)])
    dense = of["dense_sample"](key)
    np.testing.assert_array_equal(dense, of["forward"](jnp.float32(x0 @ np.asarray(params["embedding"]))))
    assert len(np.unique(dense)) >= 3


def test_dense_samples_have_the_law_of_samples(draws):
    """How often each token, and each pair of neighbours, is written."""
    _, net, params, family = draws
    num = 8192

    def frequencies(draw):
        ids = np.asarray(jax.jit(draw)(jax.random.key(7)))
        one = np.eye(net.vocab)[ids].mean(0).ravel()
        return np.concatenate([one, np.bincount(ids[:, 0] * net.vocab + ids[:, 1], minlength=net.vocab**2) / num])

    ours = frequencies(lambda key: family.sample(net, params, key, num, 1))
    theirs = frequencies(lambda key: dense_sample(net, params, key, num))
    error = np.sqrt((ours * (1 - ours) + theirs * (1 - theirs)) / num)
    assert np.all(np.abs(ours - theirs) <= SIGMAS * error + 2 / num)
    # Noise of another covariance is seen (of another size it is not: the network normalises its state).
    white = params | {"geometry": params["geometry"]._replace(color=jnp.eye(16))}
    other = frequencies(lambda key: family.sample(net, white, key, num, 1))
    assert np.any(np.abs(other - theirs) > 2 * SIGMAS * error + 2 / num)


SETTINGS = {"batch": 2, "length": 8, "vocab": 16, "width": 4, "blocks": 2}


def test_mfu_by_hand(monkeypatch):
    """One block and token: 24 D^2 + 4 L D = 512; a row's conditioning 2 (256 128 + 128^2) a time and 2 128 D (6 N + 2)."""
    tokens, peak = 2 * 8 / 0.5, 197e12
    row, clock, output = 2 * 128 * 4 * 14, 2 * (256 * 128 + 128**2), 2 * 4 * 16
    for name, flops in {
        "flow": 3 * (2 * 512 + output + (row + clock) / 8),
        "dense": 3 * (2 * 512 + output + (row + clock) / 8),
        "bare": 3 * (2 * 512 + (row + clock) / 8),
        "psd": 3 * (2 * 512 + output + (row + 2 * clock) / 8),
        "dense_sample": 2 * 512 + output + (row + 2 * clock) / 8,
        "masked_sample": 8 * (2 * 512 + output),
    }.items():
        result = bench.rates(name, 0.5, "TPU v5 lite", SETTINGS)
        assert result == {"tokens_per_second": tokens, "mfu": pytest.approx(flops * tokens / peak)}
    assert bench.rates("flow", 0.5, "cpu", SETTINGS) == {"tokens_per_second": tokens}
    assert bench.rates("input", 0.5, "TPU v5 lite", SETTINGS) == {"tokens_per_second": tokens}


def test_a_device_is_known_by_its_whole_name():
    """As published; a slower card of the same name, or a part of one, is not taken for it."""
    published = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}
    published |= {"NVIDIA L40S": 362e12, "TPU v4": 275e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12}
    assert published.items() <= PEAKS.items()
    assert all(chip.kinds and PEAKS[kind] == chip.flops for chip in CHIPS.values() for kind in chip.kinds)
    for other in ("NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "cpu"):
        assert other not in PEAKS


def test_the_attention_of_a_device():
    asked = dict(causal=False, length=1024, dtype="bfloat16")
    assert [native("gpu", cap=cap, **asked) for cap in (50.0, 0.0)] == ["xla", "cudnn"]
    assert native("gpu", cap=0.0, **asked | {"dtype": "float32"}) == "xla"
    assert native("cpu", cap=0.0, **asked) == "xla"
    assert [native("tpu", cap=50.0, **asked | {"length": length}) for length in (1024, 1000)] == ["splash", "xla"]


def test_what_runs_out_of_memory_is_said_and_the_others_measured(tmp_path, monkeypatch):
    """The command on this machine, in processes of its own; `dense` gets a batch whose logits have 256 GiB."""
    run, out = bench._run, tmp_path / "bench.json"
    huge = {"vocab": 2**20, "width": 4, "batch": 2**15, "length": 2, "dtype": "float32"}
    monkeypatch.setattr(bench, "_run", lambda name, settings: run(name, settings | (huge if name == "dense" else {})))
    monkeypatch.setattr(bench, "DEVICE_PAIRS", ["bare/dense", "bare/bare"])
    small = [f"--{name}={value}" for name, value in SETTINGS.items()]
    shown = flowlm("bench", "--device", *small, "--rounds=2", "--repeats=1", f"--out={out}").out
    report = json.loads(out.read_text())
    assert report["settings"]["dtype"] == "bfloat16" and report["settings"]["vocab"] == 16
    assert [len(report["runs"][name]) for name in ("bare", "dense")] == [2, 1]  # what did not fit is not tried again
    assert "RESOURCE_EXHAUSTED" in report["summary"]["dense"][bench.MEMORY]
    bare, rounds = report["summary"]["bare"], [each["seconds"][0] for each in report["runs"]["bare"]]
    assert bare["seconds"] == pytest.approx(np.mean(rounds))
    assert bare["tokens_per_second"] == pytest.approx(16 / bare["seconds"])
    assert set(report["result"]) == {"bare/bare"}
    assert "dense: RESOURCE_EXHAUSTED" in shown and "cpu: bfloat16 peak not known here" in shown and "xla" in shown


def test_bad_input_is_named():
    assert "--pairs takes FIRST/SECOND of flow, dense" in error_of("bench", "--pairs=flow")
    assert "vocabb" in error_of("bench", "--vocabb=3")
    assert "flags only, got flow" in error_of("bench", "flow")
