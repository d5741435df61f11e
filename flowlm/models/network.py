"""Networks as pure functions of a parameter tree: embed -> apply -> unembed.

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
            early_skip       the same, but the likelihood is weighted by max(0, 1 - (tau_s / early_until)^2): early on a sampler's
                             state is nearly all noise, so it is distributed as in training and the likelihood can be trusted

    With `white` the learnt prior over tokens is in the logits too.

    preview            feeds also, through a matrix of its own, what `posterior` would make of z at warped time preview_time:
                       a flow map at s = 0 must act on the noise, and this says which token the noise leans to

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

from flowlm.maths import vocab
from flowlm.maths.interpolant import MIN_NOISE, over_states, own_position_features, own_position_matrix
from flowlm.maths.prior import HIGHEST, Geometry, geometry
from flowlm.maths.time_warp import TimeWarp
from flowlm.maths.vocab import Head
from flowlm.models.attention import PLATFORM, check_attention, soft_cap
from flowlm.models.dit import DiT, LossWeight
from flowlm.system.settings import check_choices, setting

Params = dict[str, Any]  # a tree of parameters: arrays, and dicts of them, by name

SIZES = {
    "test": dict(width=32, blocks=2, heads=2, cond=32),
    "tiny": dict(width=128, blocks=4, heads=4, cond=64),
    "small": dict(width=768, blocks=12, heads=12, cond=128),
}


class Network:
    """Pure functions of a tree of parameters; what objectives ask of a network. It has no state.

    Attributes:
      vocab: V.
      length: L.
      width: D.
    """

    vocab: int
    length: int
    width: int

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters, float32."""
        raise NotImplementedError

    def apply(
        self,
        params: Params,
        z: jax.Array,
        tau_s: jax.Array,
        tau_t: jax.Array | None = None,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """hidden [B, L, F] of states z [B, L, D] at warped times [B]. Dropout only with keys [B]."""
        raise NotImplementedError

    def weak(
        self, params: Params, z: jax.Array, tau_s: jax.Array, tau_t: jax.Array | None, keys: jax.Array
    ) -> jax.Array:
        """`apply` with more dropout, for autoguidance."""
        raise NotImplementedError

    def head(self, params: Params) -> Head:
        """A pytree that maps hidden [..., F] to float32 logits [..., V]: what vocab.py works on."""
        raise NotImplementedError

    def embedding(self, params: Params) -> jax.Array:
        """E [V, D]; with a mask token [V + 1, D], the last row is the mask's."""
        return params["embedding"]

    def geometry(self, params: Params) -> Geometry:
        """prior.geometry of E, which is not computed again where `prepared` has put it into params."""
        return params["geometry"] if "geometry" in params else geometry(params["embedding"])

    def prepared(self, params: Params) -> Params:
        """params that carry the geometry of E, so that a sampler of many steps or calls computes it once."""
        return {**params, "geometry": self.geometry(params)}

    def with_embedding(self, params: Params, embedding: jax.Array) -> Params:
        """params with another E [V, D]."""
        return {**params, "embedding": embedding}

    def adopt(self, params: Params, teacher: Params) -> Params:
        """Fresh params with all that a one-time network has, so that both compute the same function of (z, tau_s).

        What the teacher lacks (the second time embedding, further inputs) gets a last layer of zeros. A network of k times as many
        blocks has k - 1 behind each of the teacher's that add nothing yet. Raises ValueError where shapes or names differ.
        """
        mine, theirs = flatten_dict(params, sep="/"), flatten_dict(teacher, sep="/")
        theirs = {k: v for k, v in theirs.items() if not k.startswith("loss_weight/") and (k != "mark" or k in mine)}
        theirs = {k: _grown(k, v, mine[k].shape[0]) if k in mine else v for k, v in theirs.items()}
        for name, value in theirs.items():
            if name not in mine or mine[name].shape != value.shape:
                raise ValueError(
                    f"the teacher's {name} {value.shape} does not fit the student's "
                    f"{mine[name].shape if name in mine else 'network, which has none'}"
                )
        mute = {k: jnp.zeros_like(v) if k.startswith("time_t/out/") else v for k, v in mine.items()}
        return unflatten_dict(mute | theirs, sep="/")

    def mute(self, params: Params) -> Params:
        """params whose logits are zero."""
        silent = ("unembed_kernel", "unembed_bias", "log_prior")
        return {**params, **{k: jnp.zeros_like(params[k]) for k in silent if k in params}}

    def weighted(self, params: Params, loss: jax.Array, tau_s: jax.Array, tau_t: jax.Array) -> jax.Array:
        """exp(-w) loss + w with the learned w(tau_s, tau_t), [B] each; a network without w leaves the loss as it is."""
        if "loss_weight" not in params:
            return loss
        w = LossWeight().apply({"params": params["loss_weight"]}, tau_s, tau_t)
        return jnp.exp(-w) * loss + w

    def embed(self, params: Params, ids_or_probs: jax.Array) -> jax.Array:
        """Token ids [B, L] or simplex points [B, L, V] to states [B, L, D]."""
        if jnp.issubdtype(ids_or_probs.dtype, jnp.integer):
            return self.embedding(params)[ids_or_probs]
        return ids_or_probs @ self.embedding(params)

    def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Logits [B, L, V]; for small cases and tests: training and sampling go through vocab.py."""
        return self.head(params)(hidden)


def _size(name: str, doc: str) -> Any:
    return setting(SIZES["tiny"][name], doc, "[1, inf)")


@jax.tree_util.register_static  # so that a teacher's goes with its parameters wherever they go
@dataclasses.dataclass(frozen=True)
class Transformer(Network):
    """A diffusion transformer, or one for tokens, with what stands before and behind it.

    Its fields are the experiments' `model` section and its context.

    Attributes:
      length: L, ids in a row.
      warp: warped time.
      prompts: whether it has the learnt vector that marks given tokens (objectives/prompts.py).
      whole: what a block calls to all-gather its stored parameters (sharding.py), or None where they are stored whole.
      vocab_size: V.
      width: D.

    Raises:
      ValueError: a setting that is none of its choices, heads that do not divide the width, an input or output that needs the
        gaussian prior, an implementation of attention that cannot do what is asked of it.
    """

    length: int
    warp: TimeWarp
    width: int = _size("width", "D, of embeddings and hidden states")
    blocks: int = _size("blocks", "transformer blocks")
    heads: int = _size("heads", "attention heads")
    cond: int = _size("cond", "width of the embedding of time")
    vocab_size: int = setting(
        0, "must equal the tokenizer's: a check that both sides are what you think they are", "[0, inf)"
    )
    dropout: float = setting(0.0, "share of a block's outputs that is dropped in training", "[0, 1)")
    weak_dropout: float = setting(0.1, "dropout, at least, of the weak network of autoguidance", "(0, 1)")
    input: str = setting("raw", "what the network is fed", choices=("raw", "scaled", "posterior", "both", "white"))
    prior_scale: float = setting(
        10.0, "multiplies the learnt prior of input `white`, which would take too long to reach its size", "(0, inf)"
    )
    preview: bool = setting(False, "for flow maps: also feed the posterior at warped time preview_time")
    preview_time: float = setting(0.2, "warped time of the preview", "(0, 1]")
    output: str = setting("plain", "what is added to the logits", choices=("plain", "likelihood_skip", "early_skip"))
    early_until: float = setting(0.2, "warped time at which output `early_skip` ends", "(0, 1]")
    time_embeddings: int = setting(
        1, "times that the network reads", "[0, 2]", note="0: no time, 1: a flow's, 2: a flow map's two"
    )
    time_scale: float = setting(1.0, "multiplies tau_s in the sinusoids", "(0, inf)")
    end_time_scale: float = setting(
        1.0, "multiplies tau_t; what is differentiated with respect to t should be smooth in it", "(0, inf)"
    )
    gate_init: float = setting(0.0, "residual branches start at this weight", "[0, inf)")
    attention_cap: float = setting(50.0, "soft-cap of attention scores", "[0, inf)", note="0: none")
    attention: str = setting("xla", "how attention is computed: splash is for TPUs, cudnn for GPUs", choices=PLATFORM)
    logit_cap: float = setting(30.0, "soft-cap of the logits", "[0, inf)", note="0: none")
    learned_positions: bool = setting(False, "add a learnt embedding of positions")
    mask_token: bool = setting(False, "for masked diffusion: one more embedding")
    causal: bool = setting(False, "positions see only those before them")
    remat: str = setting("none", "what the backward pass recomputes, for memory", choices=("none", "dots", "full"))
    dtype: str = setting(
        "float32", "of products only; parameters, norms and losses stay float32", choices=("float32", "bfloat16")
    )
    loss_weight: bool = setting(False, "learn exp(-w) loss + w with w a function of the times")
    prompts: bool = False
    whole: Callable | None = None

    def __post_init__(self):
        check_choices(self, "model")
        check_attention(
            self.attention, cap=self.attention_cap, causal=self.causal, length=self.length, dtype=self.dtype
        )
        if self.width % (2 * self.heads):
            raise ValueError(
                f"model.width {self.width} must be a multiple of twice model.heads {self.heads} (rotary attention)"
            )
        if self.mask_token and (self._knows_noise or self.input == "scaled"):
            raise ValueError(
                "model.mask_token is for discrete diffusion: use input 'raw', output 'plain' and no preview"
            )
        if self._knows_noise and self.warp.prior != "gaussian":
            raise ValueError(
                f"model.input {self.input!r} with model.output {self.output!r} and model.preview {self.preview} needs the "
                f"gaussian prior, not {self.warp.prior!r}: use input 'raw' or 'scaled', output 'plain' and no preview"
            )

    @property
    def vocab(self) -> int:
        """V, the tokens that may be predicted."""
        return self.vocab_size

    @property
    def _knows_noise(self) -> bool:
        return self.input not in ("raw", "scaled") or self.output != "plain" or self.preview

    @functools.cached_property
    def _module(self) -> DiT:
        return DiT(
            vocab=self.vocab_size,
            mixes=("raw",) * (self.input in ("both", "white")) + ("preview",) * self.preview,
            dtype=jnp.dtype(self.dtype),
            **{name: getattr(self, name) for name in _OF_THE_MODULE},
        )

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters, float32."""
        z, tau = jnp.zeros((1, self.length, self.width)), jnp.zeros((1,))
        raw = z[..., : min(self.vocab_size, self.width)] if self.input == "white" else z
        extra = (raw,) * (self.input in ("both", "white")) + (z,) * self.preview
        params = self._module.clone(attention="xla").init(key, z, extra, tau, tau)["params"]
        if self.input == "white":
            params["log_prior"] = jnp.zeros((self.vocab_size,))
        if self.prompts:
            params["mark"] = jnp.zeros((self.width,))
        if self.loss_weight:
            params["loss_weight"] = LossWeight().init(key, tau, tau)["params"]
        return params

    def apply(
        self,
        params: Params,
        z: jax.Array,
        tau_s: jax.Array,
        tau_t: jax.Array | None = None,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """hidden [B, L, F] of states z [B, L, D] at warped times [B]. Dropout only with keys [B]."""
        return self._apply(self._module, params, z, tau_s, tau_t, keys)

    def weak(
        self, params: Params, z: jax.Array, tau_s: jax.Array, tau_t: jax.Array | None, keys: jax.Array
    ) -> jax.Array:
        """`apply` with dropout of at least weak_dropout. For autoguidance."""
        module = self._module.clone(dropout=max(self.dropout, self.weak_dropout))
        return self._apply(module, params, z, tau_s, tau_t, keys)

    def _apply(self, module: DiT, params, z, tau_s, tau_t, keys) -> jax.Array:
        embedding = params["embedding"]
        t, extra, features, known = self.warp.t(tau_s), (), None, params.get("known")
        if known is not None:  # bool [B, L]: the state is clean there, as at t = 1
            t = jnp.where(known, 1.0, t[:, None])
        if self._knows_noise:
            geo = self.geometry(params)
            features = own_position_features(geo, z, t)
            posterior = Partial(_own_position_logits, own_position_matrix(geo), self._log_prior(params))
        if self.input == "raw":
            x = z
        elif self.input == "scaled":
            x = self._scaled(embedding, z, t)
        else:
            x = vocab.softmax_embed(posterior, features, embedding)
        if self.input == "both":
            extra += (self._scaled(embedding, z, t),)
        if self.input == "white":
            extra += (self._white(geo, z, t),)
        if self.preview:
            ahead = own_position_features(geo, z, jnp.maximum(t, self.warp.t(self.preview_time)))
            extra += (vocab.softmax_embed(posterior, ahead, embedding),)
        if known is not None and self.prompts:
            x = x + jnp.where(known[..., None], params["mark"], 0)
        hidden = module.apply({"params": params}, x, extra, tau_s, tau_s if tau_t is None else tau_t, keys)
        if self.output == "early_skip":
            features = features * jnp.maximum(0.0, 1 - (tau_s / self.early_until) ** 2)[:, None, None]
        return hidden if self.output == "plain" else jnp.concatenate([hidden, features], -1)

    def _scaled(self, embedding, z, t):
        """z at about unit size. The size of the embedding takes no gradient, since it is only a unit."""
        energy = jnp.sum(stop_gradient(embedding) ** 2) / self.width  # tr(G) / D
        t = over_states(t)
        noise = jnp.maximum(1 - t, MIN_NOISE)
        return z / jnp.sqrt(t**2 * energy / self.vocab_size + noise**2 * energy)

    def _white(self, geo: Geometry, z, t):
        t = over_states(t)
        noise = jnp.maximum(1 - t, MIN_NOISE)
        return jnp.matmul(z, geo.whiten, precision=HIGHEST) / jnp.sqrt(t**2 / self.vocab_size + noise**2)

    def _log_prior(self, params):
        return self.prior_scale * params["log_prior"] if "log_prior" in params else 0.0

    def head(self, params: Params) -> Head:
        """A pytree that maps hidden [..., F] to float32 logits [..., V]: what vocab.py works on."""
        matrix = None if self.output == "plain" else own_position_matrix(self.geometry(params))
        read = functools.partial(_readout, jnp.dtype(self.dtype), self.logit_cap)
        return Partial(read, params["unembed_kernel"], params["unembed_bias"], self._log_prior(params), matrix)

    def empty_cache(self, num: int) -> dict[str, jax.Array]:
        """The cache of `decode` before the first token of `num` rows."""
        shape = (self.blocks, num, self.length, self.heads, self.width // self.heads)
        return {
            "position": jnp.zeros((), jnp.int32),
            "keys": jnp.zeros(shape, jnp.dtype(self.dtype)),
            "values": jnp.zeros(shape, jnp.dtype(self.dtype)),
        }

    def decode(self, params: Params, cache: dict, ids: jax.Array) -> tuple[dict, jax.Array]:
        """(cache, hidden [B, 1, F]): `apply` on one more token [B] of a causal network that is fed `raw` states."""
        z, position, time = params["embedding"][ids[:, None]], cache["position"], jnp.zeros(ids.shape)
        filled = cache["keys"], cache["values"]
        hidden, (keys, values) = self._module.apply({"params": params}, z, (), time, time, None, filled, position)
        return {"position": position + 1, "keys": keys, "values": values}, hidden

    def gathering(self, whole: Callable) -> "Transformer":
        """The same network, whose blocks call `whole` to all-gather their parameters (sharding.py)."""
        return dataclasses.replace(self, whole=whole)


# Settings that the module takes as they are.
_OF_THE_MODULE = (
    "mask_token",
    "length",
    "width",
    "blocks",
    "heads",
    "cond",
    "dropout",
    "time_embeddings",
    "time_scale",
    "end_time_scale",
    "gate_init",
    "attention_cap",
    "attention",
    "learned_positions",
    "causal",
    "remat",
    "whole",
)


def _grown(name: str, value: jax.Array, blocks: int) -> jax.Array:
    """Parameters of blocks [N, ...] for a multiple of N; a block adds nothing where the last layers of its branches are zero."""
    if not name.startswith("blocks/") or blocks % value.shape[0]:
        return value
    silent = name.startswith(("blocks/out/", "blocks/mlp_out/"))
    others = [jnp.zeros_like(value) if silent else value] * (blocks // value.shape[0] - 1)
    return jnp.stack([value, *others], 1).reshape(blocks, *value.shape[1:])


def _readout(dtype, cap, kernel, bias, prior, matrix, hidden):
    width = kernel.shape[0]
    out = jnp.matmul(hidden[..., :width].astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)
    logits = soft_cap(out + bias, cap) + prior
    if matrix is not None:
        logits = logits + jnp.matmul(hidden[..., width:], matrix, precision=HIGHEST)
    return logits


def _own_position_logits(matrix, prior, features):
    return jnp.matmul(features, matrix, precision=HIGHEST) + prior
