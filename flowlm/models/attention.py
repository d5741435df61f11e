"""Soft-capped softmax attention, one function with its implementation named (`model.attention`).

xla      any device, any derivative; scores [B, H, L, L] are held, or recomputed with remat
splash   the TPU kernel: scores never leave the chip; reverse mode only, lengths in multiples of 128 unless causal
cudnn    the GPU kernel: reverse mode only, bfloat16, no soft-cap
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

PLATFORM = {"xla": None, "splash": "tpu", "cudnn": "gpu"}
TILE = 128  # splash's blocks are multiples of it
AT_ONCE = 8  # rows in one call of splash: its statistics take 128 lanes a number, too much memory for all rows at once


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap tanh(x / cap): nearly the identity for small x, never beyond cap; x itself for a cap of 0."""
    return x if cap == 0 else cap * jnp.tanh(x / cap)


def check_attention(implementation: str, *, cap: float, causal: bool, length: int, dtype: str) -> None:
    """Raises ValueError for an implementation, one of PLATFORM, that cannot do what is asked of it."""
    if implementation == "splash" and length % TILE and not causal:
        raise ValueError(f"model.attention splash takes lengths in multiples of {TILE}, not {length}: use xla")
    if implementation == "cudnn" and (cap != 0 or dtype != "bfloat16"):
        raise ValueError(
            f"model.attention cudnn has no soft-cap and runs in bfloat16, but model.attention_cap is {cap:g} and model.dtype "
            f"{dtype}: set them to 0 and bfloat16, or use xla"
        )


def runs_on(implementation: str, platform: str) -> bool:
    """Whether an implementation runs on devices of this platform: cpu, gpu, tpu."""
    return PLATFORM[implementation] in (None, platform)


def native(platform: str, **asked: Any) -> str:
    """The implementation made for devices of this platform if it can do what is asked of it (as of `check_attention`), else xla."""
    for name in (name for name in PLATFORM if PLATFORM[name] == platform):
        try:
            check_attention(name, **asked)
        except ValueError:
            continue
        return name
    return "xla"


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cap: float,
    causal: bool = False,
    implementation: str = "xla",
    first: jax.Array | int = 0,
) -> jax.Array:
    """softmax( soft_cap( q k^T / sqrt(d) ) ) v over [B, L, H, d]; scores and softmax in float32.

    Args:
      causal: queries are positions first, first + 1, .. and see the keys up to their own; `first` is 0 but for xla.
    """
    if implementation == "splash":
        return _splash(q, k, v, cap, causal)
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    scores = jnp.einsum("blhd,bmhd->bhlm", q, k, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5
    scores = soft_cap(scores, cap)
    if causal:
        visible = jnp.arange(k.shape[1]) <= first + jnp.arange(q.shape[1])[:, None]
        scores = jnp.where(visible, scores, -jnp.inf)
    return jnp.einsum("bhlm,bmhd->blhd", jax.nn.softmax(scores).astype(v.dtype), v)


def _splash(q, k, v, cap, causal):
    length = q.shape[1]
    # Padding is only added behind causal rows, where no position sees it.
    padded = -(-length // TILE) * TILE
    block = next(size for size in (512, 256, TILE) if padded % size == 0)
    names = ("block_q", "block_kv", "block_kv_compute")
    names += ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    sizes = splash_attention.BlockSizes(**dict.fromkeys(names, block))

    def of_rows(q, k, v):
        heads = q.shape[2]
        mask = (splash_attention.CausalMask if causal else splash_attention.FullMask)((padded, padded))
        kernel = splash_attention.make_splash_mha(
            splash_attention.MultiHeadMask([mask] * heads),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=sizes,
            attn_logits_soft_cap=cap or None,
        )

        def pad(a):
            return jnp.pad(jnp.moveaxis(a, 2, 1), ((0, 0), (0, 0), (0, padded - length), (0, 0)))

        q, k, v = pad(q / np.sqrt(q.shape[-1]).astype(q.dtype)), pad(k), pad(v)
        out = jax.lax.map(lambda qkv: kernel(*qkv), (q, k, v), batch_size=AT_ONCE)
        return jnp.moveaxis(out, 1, 2)[:, :length]

    # XLA cannot partition a Pallas kernel, so the axes of the mesh that are still Auto are made manual by shard_map.
    mesh = jax.sharding.get_abstract_mesh()
    left = [name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto]
    if not left:
        return of_rows(q, k, v)
    rows = tuple(name for name in ("replica", "data") if name in left)
    spec = P(rows or None, None, "model" if "model" in left else None)
    return jax.shard_map(of_rows, in_specs=(spec, spec, spec), out_specs=spec, axis_names=set(left), check_vma=False)(
        q, k, v
    )
