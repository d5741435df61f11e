"""The network equals the reference PyTorch network: its weights mapped in, its inputs and outputs matched."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowlm.models import make_network
from flowlm.time_warp import TimeWarp

VOCAB, LENGTH, WIDTH, BLOCKS, HEADS, COND = 61, 12, 48, 2, 4, 24


def load(name):
    with np.load(Path(__file__).parent / "data" / "flm_reference" / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def params_from(arrays):
    """The reference's state-dict names to ours; torch keeps matrices as [out, in]."""

    def linear(name, bias=True):
        out = {"kernel": arrays[f"{name}.weight"].T}
        return out | {"bias": arrays[f"{name}.bias"]} if bias else out

    timed = "sigma_map.mlp.0.weight" in arrays

    def block(i):
        p = f"blocks.{i}"
        modulation = {"modulation": {"linear": linear(f"{p}.adaLN_modulation")}} if timed else {}
        return modulation | {
            "norm1": {"scale": arrays[f"{p}.norm1.weight"]},
            "norm2": {"scale": arrays[f"{p}.norm2.weight"]},
            "qkv": {"kernel": arrays[f"{p}.attn_qkv.weight"].T.reshape(WIDTH, 3, HEADS, -1)},
            "out": linear(f"{p}.attn_out", bias=False),
            "mlp_in": linear(f"{p}.mlp.0"),
            "mlp_out": linear(f"{p}.mlp.2"),
        }

    def time(name):
        return {"in": linear(f"{name}.mlp.0"), "out": linear(f"{name}.mlp.2")}

    params = {
        "embedding": arrays["vocab_embed.embedding"],
        "unembed_kernel": arrays["output_layer.linear.weight"].T,
        "unembed_bias": arrays["output_layer.linear.bias"],
        "norm": {"scale": arrays["output_layer.norm_final.weight"]},
        "blocks": jax.tree.map(lambda *a: np.stack(a), *(block(i) for i in range(BLOCKS))),
    }
    if timed:
        params |= {"modulation": {"linear": linear("output_layer.adaLN_modulation")}, "time_s": time("sigma_map")}
    if "sigma_map_prime.mlp.0.weight" in arrays:
        params["time_t"] = time("sigma_map_prime")
    return jax.tree.map(jnp.asarray, params)


def network(times, **fields):
    fields = {"attention_cap": 50.0, "attention": "xla", "logit_cap": 30.0, "causal": False} | fields
    return make_network(
        vocab_size=VOCAB,
        length=LENGTH,
        warp=TimeWarp("gaussian", "ambient", VOCAB, WIDTH),
        width=WIDTH,
        blocks=BLOCKS,
        heads=HEADS,
        cond=COND,
        dropout=0.1,
        input="raw",
        preview=False,
        output="plain",
        time_embeddings=times,
        time_scale=1.0,
        end_time_scale=1.0,
        gate_init=0.0,
        learned_positions=False,
        mask_token=False,
        remat="none",
        dtype="float32",
        loss_weight=False,
        **fields,
    )


def test_logits_match_the_autoregressive_reference():
    """It is causal, knows no time and has no soft-caps; token by token with the cache it says the same."""
    arrays = load("ar")
    net, params = network(0, attention_cap=0.0, logit_cap=0.0, causal=True), params_from(arrays)
    ids = jnp.asarray(arrays["io/ids"])
    hidden = net.apply(params, net.embed(params, ids), jnp.zeros(len(ids)))
    np.testing.assert_allclose(net.unembed(params, hidden), arrays["io/logits"], atol=1e-4)
    cache, step = net.empty_cache(len(ids)), jax.jit(net.decode)
    for i in range(LENGTH):
        cache, hidden = step(params, cache, ids[:, i])
        np.testing.assert_allclose(net.unembed(params, hidden)[:, 0], arrays["io/logits"][:, i], atol=1e-4)


@pytest.mark.parametrize(("name", "times"), [("flm", 1), ("fmlm", 2)])
def test_logits_match_the_reference(name, times):
    arrays = load(name)
    net = network(times)
    params = params_from(arrays)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda a: a.shape, shapes)
    io = {k.removeprefix("io/"): v for k, v in arrays.items() if k.startswith("io/")}
    tau_s = jnp.asarray(io["tau_s"])
    tau_t = jnp.asarray(io["tau_t"]) if times == 2 else None
    for state, logits in (("x", "logits"), ("ids", "logits_from_ids")):
        hidden = net.apply(params, net.embed(params, jnp.asarray(io[state])), tau_s, tau_t)
        uncapped = hidden @ params["unembed_kernel"] + params["unembed_bias"]
        np.testing.assert_allclose(uncapped, io[logits], atol=1e-4)
        if state == "x":
            capped = jax.nn.log_softmax(net.unembed(params, hidden))
            np.testing.assert_allclose(capped, io["log_probs_capped30"], atol=1e-4)
