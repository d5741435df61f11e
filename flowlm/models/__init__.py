"""Networks as records of pure functions: embed -> apply -> unembed.

The network reads a state z = x @ E, never x. What it is fed (`input`) and what is added to its logits (`output`) use
the one thing that is known exactly, the own-position log-likelihood of every token given z_l (interpolant.py):

    input   raw        z
            scaled     z / sqrt( t^2 mean_v |E_v|^2 / D + (1 - t)^2 tr(G) / D )
            posterior  softmax( own-position log-likelihood ) @ E: bounded, sharp, blind to the noise at t = 0
            both       posterior + scaled z through a second D x D matrix
    output  plain            soft-capped logits
            likelihood_skip  soft-capped logits + own-position log-likelihood (at tau_s)

All but `raw` and `plain` need the gaussian prior.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.tree_util import Partial

from flowlm import vocab
from flowlm.interpolant import MIN_NOISE, own_position_features, own_position_matrix
from flowlm.models.dit import LOGIT_CAP, DiT, soft_cap
from flowlm.prior import HIGHEST, geometry
from flowlm.time_warp import TimeWarp

INPUTS = ("raw", "scaled", "posterior", "both")
OUTPUTS = ("plain", "likelihood_skip")
SIZES = {
    "test": dict(width=32, blocks=2, heads=2, cond=32),
    "tiny": dict(width=128, blocks=4, heads=4, cond=64),
    "small": dict(width=768, blocks=12, heads=12, cond=128),
}


@dataclasses.dataclass(frozen=True)
class Network:
    """Pure functions of a parameter tree; no state.

    Attributes:
      init: key -> params.
      apply: (params, z [B, L, D], tau_s [B], tau_t [B] | None, key | None) -> hidden [B, L, F]. Dropout only with a key.
      head: params -> a pytree mapping hidden [..., F] to float32 logits [..., V] (what vocab.py works on).
      vocab: V. length: L. width: D.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[..., jax.Array]
    head: Callable[[Any], vocab.Head]
    vocab: int
    length: int
    width: int

    def embedding(self, params) -> jax.Array:
        """E [V, D]."""
        return params["embedding"]

    def embed(self, params, ids_or_probs: jax.Array) -> jax.Array:
        """Token ids [B, L] or simplex points [B, L, V] to states [B, L, D]."""
        if jnp.issubdtype(ids_or_probs.dtype, jnp.integer):
            return self.embedding(params)[ids_or_probs]
        return ids_or_probs @ self.embedding(params)

    def unembed(self, params, hidden: jax.Array) -> jax.Array:
        """Logits [B, L, V]; for small cases and tests: training and sampling go through vocab.py."""
        return self.head(params)(hidden)


def _readout(dtype, kernel, bias, matrix, hidden):
    width = kernel.shape[0]
    out = jnp.matmul(hidden[..., :width].astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)
    logits = soft_cap(out + bias, LOGIT_CAP)
    if matrix is not None:
        logits = logits + jnp.matmul(hidden[..., width:], matrix, precision=HIGHEST)
    return logits


def _own_position_logits(matrix, features):
    return jnp.matmul(features, matrix, precision=HIGHEST)


def make_network(
    *,
    vocab_size: int,
    length: int,
    warp: TimeWarp,
    width: int,
    blocks: int,
    heads: int,
    cond: int,
    dropout: float,
    input: str,
    output: str,
    time_embeddings: int,
    time_scale: float,
    gate_init: float,
    learned_positions: bool,
    causal: bool,
    remat: str,
    dtype: str,
) -> Network:
    """Builds the network; every argument is a field of the experiments' `model` section.

    Raises:
      ValueError: an unknown input, output, remat or dtype, heads that do not divide the width, or an input or output that
        needs the gaussian prior.
    """
    if input not in INPUTS:
        raise ValueError(f"unknown model.input {input!r}: choose one of {list(INPUTS)}")
    if output not in OUTPUTS:
        raise ValueError(f"unknown model.output {output!r}: choose one of {list(OUTPUTS)}")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"unknown model.dtype {dtype!r}: choose float32 or bfloat16")
    if remat not in ("none", "dots", "full"):
        raise ValueError(f"unknown model.remat {remat!r}: choose none, dots or full")
    if time_embeddings not in (1, 2):
        raise ValueError(f"model.time_embeddings is 1 (flow) or 2 (flow map), got {time_embeddings}")
    if width % (2 * heads):
        raise ValueError(f"model.width {width} must be a multiple of twice model.heads {heads} (rotary attention)")
    if (input, output) != ("raw", "plain") and input != "scaled" and warp.prior != "gaussian":
        raise ValueError(
            f"model.input {input!r} with model.output {output!r} needs the gaussian prior, not {warp.prior!r}: "
            "use input 'raw' or 'scaled' and output 'plain'"
        )
    compute = jnp.dtype(dtype)
    module = DiT(
        vocab=vocab_size,
        length=length,
        width=width,
        blocks=blocks,
        heads=heads,
        cond=cond,
        dropout=dropout,
        time_embeddings=time_embeddings,
        time_scale=time_scale,
        gate_init=gate_init,
        learned_positions=learned_positions,
        mixes_raw=input == "both",
        causal=causal,
        remat=remat,
        dtype=compute,
    )

    def init(key):
        z, tau = jnp.zeros((1, length, width)), jnp.zeros((1,))
        return module.init(key, z, z, tau, tau, True)["params"]

    def scaled(embedding, z, t):
        energy = jnp.sum(embedding**2) / width  # tr(G) / D
        t = t[:, None, None]
        noise = jnp.maximum(1 - t, MIN_NOISE)
        return z / jnp.sqrt(t**2 * energy / vocab_size + noise**2 * energy)

    def apply(params, z, tau_s, tau_t=None, key=None):
        embedding = params["embedding"]
        frozen, t, raw, features = stop_gradient(embedding), warp.t(tau_s), None, None
        if input in ("posterior", "both") or output == "likelihood_skip":
            geo = geometry(frozen)
            features = own_position_features(geo, z, t)
        if input in ("scaled", "both"):
            raw = scaled(frozen, z, t)
        if input == "scaled":
            x = raw
        elif input in ("posterior", "both"):
            x = vocab.softmax_embed(Partial(_own_position_logits, own_position_matrix(geo)), features, embedding)
        else:
            x = z
        tau_t = tau_s if tau_t is None else tau_t
        rngs = {} if key is None else {"dropout": key}
        hidden = module.apply({"params": params}, x, raw, tau_s, tau_t, key is None, rngs=rngs)
        if output == "likelihood_skip":
            hidden = jnp.concatenate([hidden, features], -1)
        return hidden

    def head(params):
        matrix = own_position_matrix(geometry(params["embedding"])) if output == "likelihood_skip" else None
        return Partial(functools.partial(_readout, compute), params["unembed_kernel"], params["unembed_bias"], matrix)

    return Network(init, apply, head, vocab_size, length, width)
