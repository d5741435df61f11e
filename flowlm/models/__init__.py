"""Networks as records of pure functions: embed -> apply -> unembed.

The network reads a state z = x @ E, never x. What it is fed (`input`) and what is added to its logits (`output`) use
the one thing that is known exactly, the own-position log-likelihood of every token given z_l (interpolant.py):

    input   raw        z
            scaled     z / sqrt( t^2 mean_v |E_v|^2 / D + (1 - t)^2 tr(G) / D )
            posterior  softmax( own-position log-likelihood ) @ E: bounded, sharp, blind to the noise at t = 0
            both       posterior + scaled z through a second D x D matrix
            white      posterior under a learnt prior over tokens + z @ whiten / sqrt( t^2 / V + (1 - t)^2 ) through a second
                       matrix, white as in prior.Geometry: the likelihood is linear in it, no direction too weak to be seen
    output  plain            soft-capped logits
            likelihood_skip  soft-capped logits + own-position log-likelihood (at tau_s)
            early_skip       the same, weighted max(0, 1 - (tau_s / EARLY)^2): where a sampler's state is nearly all noise, hence
                             distributed as in training, what its own position says can be taken at its word

    With `white` the learnt prior over tokens is in the logits too.

    preview            adds what `posterior` will be at warped time PREVIEW, before that time, through a matrix of its own:
                       a flow map at s = 0 must act on the noise, and this says which token it leans to

All but `raw`, `scaled` and `plain` need the gaussian prior.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.lax import stop_gradient
from jax.tree_util import Partial

from flowlm import vocab
from flowlm.interpolant import MIN_NOISE, own_position_features, own_position_matrix
from flowlm.models.attention import check, soft_cap
from flowlm.models.dit import DiT, LossWeight
from flowlm.prior import HIGHEST, Geometry, geometry
from flowlm.time_warp import TimeWarp

INPUTS = ("raw", "scaled", "posterior", "both", "white")
PREVIEW = 0.2
OUTPUTS = ("plain", "likelihood_skip", "early_skip")
EARLY = 0.2
PRIOR_SCALE = 10.0  # of the learnt prior's parameter, which would take too long to reach its size by itself
WEAK_DROPOUT = 0.1
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
      apply: (params, z [B, L, D], tau_s [B], tau_t [B] | None, keys [B] | None) -> hidden [B, L, F]. Dropout only with keys.
      weak: `apply` with dropout of at least WEAK_DROPOUT; needs the keys. For autoguidance.
      head: params -> a pytree mapping hidden [..., F] to float32 logits [..., V] (what vocab.py works on).
      decode: (params, cache, ids [B]) -> (cache, hidden [B, 1, F]): `apply` on one more token of a causal network.
      empty_cache: B -> the cache before the first token.
      gathering: fn -> the same network, whose blocks call fn on their parameters to make them whole (sharding.py).
      vocab: V. length: L. width: D.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[..., jax.Array]
    weak: Callable[..., jax.Array]
    head: Callable[[Any], vocab.Head]
    vocab: int
    length: int
    width: int
    decode: Callable[..., tuple[Any, jax.Array]] | None = None
    empty_cache: Callable[[int], Any] | None = None
    gathering: Callable[[Callable], "Network"] | None = None

    def embedding(self, params) -> jax.Array:
        """E [V, D]; with a mask token [V + 1, D], the last row is the mask's."""
        return params["embedding"]

    def geometry(self, params) -> Geometry:
        """prior.geometry of E; what `prepared` has put there, if it has."""
        return _geometry(params)

    def prepared(self, params):
        """params that carry the geometry of E, so that a sampler of many steps or calls computes it once."""
        return {**params, "geometry": _geometry(params)}

    def with_embedding(self, params, embedding: jax.Array):
        """params with another E [V, D]."""
        return {**params, "embedding": embedding}

    def adopt(self, params, teacher):
        """Fresh params with all that a one-time network has, so that both compute the same function of (z, tau_s).

        What the teacher lacks (the second time embedding, further inputs) gets a last layer of zeros.
        Raises ValueError where shapes or names differ.
        """
        mine, theirs = flatten_dict(params, sep="/"), flatten_dict(teacher, sep="/")
        theirs = {k: v for k, v in theirs.items() if not k.startswith("loss_weight/")}
        for name, value in theirs.items():
            if name not in mine or mine[name].shape != value.shape:
                raise ValueError(
                    f"the teacher's {name} {value.shape} does not fit the student's "
                    f"{mine[name].shape if name in mine else 'network, which has none'}"
                )
        mute = {k: jnp.zeros_like(v) if k.startswith("time_t/out/") else v for k, v in mine.items()}
        return unflatten_dict(mute | theirs, sep="/")

    def mute(self, params):
        """params whose logits are zero."""
        silent = ("unembed_kernel", "unembed_bias", "log_prior")
        return {**params, **{k: jnp.zeros_like(params[k]) for k in silent if k in params}}

    def weighted(self, params, loss: jax.Array, tau_s: jax.Array, tau_t: jax.Array) -> jax.Array:
        """exp(-w) loss + w with the learned w(tau_s, tau_t) where the network has one; [B] each, otherwise as it is."""
        if "loss_weight" not in params:
            return loss
        w = LossWeight().apply({"params": params["loss_weight"]}, tau_s, tau_t)
        return jnp.exp(-w) * loss + w

    def embed(self, params, ids_or_probs: jax.Array) -> jax.Array:
        """Token ids [B, L] or simplex points [B, L, V] to states [B, L, D]."""
        if jnp.issubdtype(ids_or_probs.dtype, jnp.integer):
            return self.embedding(params)[ids_or_probs]
        return ids_or_probs @ self.embedding(params)

    def unembed(self, params, hidden: jax.Array) -> jax.Array:
        """Logits [B, L, V]; for small cases and tests: training and sampling go through vocab.py."""
        return self.head(params)(hidden)


def _geometry(params):
    return params["geometry"] if "geometry" in params else geometry(params["embedding"])


def _log_prior(params):
    return PRIOR_SCALE * params["log_prior"] if "log_prior" in params else 0.0


def _readout(dtype, cap, kernel, bias, prior, matrix, hidden):
    width = kernel.shape[0]
    out = jnp.matmul(hidden[..., :width].astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)
    logits = soft_cap(out + bias, cap) + prior
    if matrix is not None:
        logits = logits + jnp.matmul(hidden[..., width:], matrix, precision=HIGHEST)
    return logits


def _own_position_logits(matrix, prior, features):
    return jnp.matmul(features, matrix, precision=HIGHEST) + prior


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
    preview: bool,
    output: str,
    time_embeddings: int,
    time_scale: float,
    end_time_scale: float,
    gate_init: float,
    attention_cap: float,
    attention: str,
    logit_cap: float,
    learned_positions: bool,
    mask_token: bool,
    causal: bool,
    remat: str,
    dtype: str,
    loss_weight: bool,
) -> Network:
    """Builds the network; every argument is a field of the experiments' `model` section.

    Raises:
      ValueError: an unknown input, output, remat, dtype or attention, heads that do not divide the width, an input or output that
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
    check(attention, cap=attention_cap, causal=causal, length=length, dtype=dtype)
    if width % (2 * heads):
        raise ValueError(f"model.width {width} must be a multiple of twice model.heads {heads} (rotary attention)")
    knows_noise = input not in ("raw", "scaled") or output != "plain" or preview
    if mask_token and (knows_noise or input == "scaled"):
        raise ValueError("model.mask_token is for discrete diffusion: use input 'raw', output 'plain' and no preview")
    if knows_noise and warp.prior != "gaussian":
        raise ValueError(
            f"model.input {input!r} with model.output {output!r} and model.preview {preview} needs the gaussian prior, not "
            f"{warp.prior!r}: use input 'raw' or 'scaled', output 'plain' and no preview"
        )
    compute = jnp.dtype(dtype)
    module = DiT(
        vocab=vocab_size,
        mask_token=mask_token,
        length=length,
        width=width,
        blocks=blocks,
        heads=heads,
        cond=cond,
        dropout=dropout,
        time_embeddings=time_embeddings,
        time_scale=time_scale,
        end_time_scale=end_time_scale,
        gate_init=gate_init,
        attention_cap=attention_cap,
        attention=attention,
        learned_positions=learned_positions,
        mixes=("raw",) * (input in ("both", "white")) + ("preview",) * preview,
        causal=causal,
        remat=remat,
        dtype=compute,
    )

    def init(key):
        z, tau = jnp.zeros((1, length, width)), jnp.zeros((1,))
        raw = z[..., : min(vocab_size, width)] if input == "white" else z
        extra = (raw,) * (input in ("both", "white")) + (z,) * preview
        params = module.clone(attention="xla").init(key, z, extra, tau, tau)["params"]
        if input == "white":
            params["log_prior"] = jnp.zeros((vocab_size,))
        if loss_weight:
            params["loss_weight"] = LossWeight().init(key, tau, tau)["params"]
        return params

    def scaled(embedding, z, t):
        energy = jnp.sum(embedding**2) / width  # tr(G) / D
        t = t[:, None, None]
        noise = jnp.maximum(1 - t, MIN_NOISE)
        return z / jnp.sqrt(t**2 * energy / vocab_size + noise**2 * energy)

    def white(geo, z, t):
        t = t[:, None, None]
        noise = jnp.maximum(1 - t, MIN_NOISE)
        return jnp.matmul(z, geo.whiten, precision=HIGHEST) / jnp.sqrt(t**2 / vocab_size + noise**2)

    def run(module, params, z, tau_s, tau_t=None, keys=None):
        embedding = params["embedding"]
        frozen, t, extra, features = stop_gradient(embedding), warp.t(tau_s), (), None
        if knows_noise:
            geo = _geometry(params)
            features = own_position_features(geo, z, t)
            posterior = Partial(_own_position_logits, own_position_matrix(geo), _log_prior(params))
        if input in ("raw", "scaled"):
            x = z if input == "raw" else scaled(frozen, z, t)
        else:
            x = vocab.softmax_embed(posterior, features, embedding)
        if input == "both":
            extra += (scaled(frozen, z, t),)
        if input == "white":
            extra += (white(geo, z, t),)
        if preview:
            ahead = own_position_features(geo, z, jnp.maximum(t, warp.t(PREVIEW)))
            extra += (vocab.softmax_embed(posterior, ahead, embedding),)
        tau_t = tau_s if tau_t is None else tau_t
        hidden = module.apply({"params": params}, x, extra, tau_s, tau_t, keys)
        if output == "early_skip":
            features = features * jnp.maximum(0.0, 1 - (tau_s / EARLY) ** 2)[:, None, None]
        if output != "plain":
            hidden = jnp.concatenate([hidden, features], -1)
        return hidden

    def head(params):
        matrix = None if output == "plain" else own_position_matrix(_geometry(params))
        kernel, bias = params["unembed_kernel"], params["unembed_bias"]
        return Partial(functools.partial(_readout, compute, logit_cap), kernel, bias, _log_prior(params), matrix)

    def empty_cache(num):
        shape = (blocks, num, length, heads, width // heads)
        return {
            "position": jnp.zeros((), jnp.int32),
            "keys": jnp.zeros(shape, compute),
            "values": jnp.zeros(shape, compute),
        }

    def decode(params, cache, ids):
        z, position, time = params["embedding"][ids[:, None]], cache["position"], jnp.zeros(ids.shape)
        filled = cache["keys"], cache["values"]
        hidden, (keys, values) = module.apply({"params": params}, z, (), time, time, None, filled, position)
        return {"position": position + 1, "keys": keys, "values": values}, hidden

    streams = (decode, empty_cache) if causal and input == "raw" else (None, None)

    def network(whole=None):
        own = module.clone(whole=whole)
        weak = own.clone(dropout=max(dropout, WEAK_DROPOUT))
        apply, weak = functools.partial(run, own), functools.partial(run, weak)
        return Network(init, apply, weak, head, vocab_size, length, width, *streams, gathering=network)

    return network()
