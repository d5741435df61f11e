"""The network equals the reference PyTorch network: its weights mapped in, its inputs and outputs matched."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowlm.maths.time_warp import TimeWarp
from flowlm.models.network import Transformer
from flowlm.models.reference import from_reference

VOCAB, LENGTH, WIDTH, BLOCKS, HEADS, COND = 61, 12, 48, 2, 4, 24


def load(name):
    with np.load(Path(__file__).parent / "data" / "flm_reference" / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def params_from(arrays, net):
    """Our parameters of the reference's weights."""
    return from_reference({k: v for k, v in arrays.items() if not k.startswith("io/")}, net, "the fixture")


def network(times, **fields):
    fields = {"attention_cap": 50.0, "attention": "xla", "logit_cap": 30.0, "causal": False} | fields
    return Transformer(
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
    net = network(0, attention_cap=0.0, logit_cap=0.0, causal=True)
    params = params_from(arrays, net)
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
    params = params_from(arrays, net)
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
