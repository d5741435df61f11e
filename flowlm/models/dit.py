"""The diffusion transformer of the reference (2602.16813): rotary attention, adaLN-zero, both logits soft-capped by default.

    block   x <- x + g1 * Attention( LN(x) (1 + s1) + b1 );   x <- x + g2 * MLP( LN(x) (1 + s2) + b2 )
    head    logits = 30 tanh( (LN(x) (1 + s) + b) W / 30 ),   attention scores 50 tanh( q.k / sqrt(d) / 50 )

with (b, s, g) = Linear(cond), cond = SiLU( temb_s(tau_s) + temb_t(tau_t) ); without time embeddings they are (0, 0, 1).
Parameters and normalisation are float32, products run in `dtype`. The embedding and the output matrix are parameters of
this module too, but network.py and vocab.py apply them.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowlm.models.attention import attention

SINUSOIDS = 256


def rotary(x: jax.Array, first: jax.Array | int = 0, base: float = 1e4) -> jax.Array:
    """Rotates the halves of each head of x [B, L, H, d] by angles proportional to position first, first + 1, .. (2104.09864)."""
    length, half = x.shape[1], x.shape[-1] // 2
    angle = (first + jnp.arange(length))[:, None] / base ** (jnp.arange(half) / half)[None, :]
    cos, sin = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    left, right = (half.astype(jnp.float32) for half in jnp.split(x, 2, -1))
    # Halves are cut and joined in x's own type, because in float32 they would take twice the memory and be no better.
    return jnp.concatenate([(left * cos - right * sin).astype(x.dtype), (right * cos + left * sin).astype(x.dtype)], -1)


class TokenDense(nn.DenseGeneral):
    """`nn.DenseGeneral` on [B, L, D] as one [B L, D] product: weight gradients then contract one axis, twice as fast on CPU."""

    def __call__(self, x):
        out = super().__call__(x.reshape(-1, x.shape[-1]))
        return out.reshape(*x.shape[:-1], *out.shape[1:])


def dropout(x: jax.Array, keys: jax.Array | None, purpose: jax.Array | int, rate: float) -> jax.Array:
    """x [B, L, W] with its entries zeroed with probability `rate`, each row by its own key [B]: the same on every mesh."""
    if keys is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, purpose), 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0)


class TimeEmbedding(nn.Module):
    """tau [B] -> [B, cond]: 256 sinusoids of `scale` * tau and a small MLP."""

    cond: int
    scale: float

    @nn.compact
    def __call__(self, tau):
        half = SINUSOIDS // 2
        angle = self.scale * tau[:, None] * jnp.exp(-jnp.log(1e4) * jnp.arange(half) / half)
        x = nn.Dense(self.cond, name="in")(jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1))
        return nn.Dense(self.cond, name="out")(nn.silu(x))


class LossWeight(nn.Module):
    """w(tau_s, tau_t) [B], zero at initialisation: the log of how noisy a loss is at these times (1705.07115)."""

    @nn.compact
    def __call__(self, tau_s, tau_t):
        times = [TimeEmbedding(32, 1.0, name=name)(tau) for name, tau in (("time_s", tau_s), ("time_t", tau_t))]
        return nn.Dense(1, kernel_init=nn.initializers.zeros, name="out")(nn.silu(sum(times)))[:, 0]


class Modulation(nn.Module):
    """cond [B, C] -> `parts` vectors [B, 1, width] each, all zero at initialisation (adaLN-zero)."""

    parts: int
    width: int

    @nn.compact
    def __call__(self, cond):
        out = nn.Dense(self.parts * self.width, kernel_init=nn.initializers.zeros, name="linear")(cond)
        return jnp.split(out[:, None, :], self.parts, -1)


class Block(nn.Module):
    """Transformer block number `index` on x [B, L, width], written for `nn.scan`: returns (x, cache). Dropout with keys [B].

    With a cache (k, v) [B, M, heads, d], x are the tokens from `position` on, which see what the cache holds up to them.
    """

    width: int
    heads: int
    dropout: float
    gate_init: float
    attention_cap: float
    attention: str
    causal: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, cond, keys, position, index, cache):
        batch, length, _ = x.shape
        dense = functools.partial(TokenDense, dtype=self.dtype)
        norm = functools.partial(nn.LayerNorm, use_bias=False, epsilon=1e-5)
        half = (0.0, 0.0, 1 - self.gate_init)
        modulation = half + half if cond is None else Modulation(6, self.width, name="modulation")(cond)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation

        h = (norm(name="norm1")(x) * (1 + scale1) + shift1).astype(self.dtype)
        shape = (3, self.heads, self.width // self.heads)
        q, k, v = jnp.moveaxis(dense(shape, use_bias=False, name="qkv")(h), 2, 0)
        q, k = rotary(q, position), rotary(k, position)
        if cache is not None:
            k, v = cache = tuple(jax.lax.dynamic_update_slice_in_dim(a, b, position, 1) for a, b in zip(cache, (k, v)))
        kind = self.attention if cache is None else "xla"
        out = attention(q, k, v, self.attention_cap, self.causal, kind, position).reshape(batch, length, self.width)
        out = dense(self.width, use_bias=False, name="out")(out)
        x = x + (self.gate_init + gate1) * dropout(out, keys, 2 * index, self.dropout)

        h = (norm(name="norm2")(x) * (1 + scale2) + shift2).astype(self.dtype)
        h = dense(self.width, name="mlp_out")(nn.gelu(dense(4 * self.width, name="mlp_in")(h)))
        return x + (self.gate_init + gate2) * dropout(h, keys, 2 * index + 1, self.dropout), cache


class DiT(nn.Module):
    """Everything with parameters. `__call__` maps inputs [B, L, width] and warped times [B] to hidden [B, L, width].

    With a cache of every block's keys and values, (k, v) [blocks, B, M, heads, d], it returns (hidden, cache).
    """

    vocab: int
    mask_token: bool  # one more row of the embedding, which stands for no token
    length: int
    width: int
    blocks: int
    heads: int
    cond: int
    dropout: float
    time_embeddings: int  # 0: not conditioned on time; 1: on tau_s; 2: on (tau_s, tau_t)
    time_scale: float
    end_time_scale: float
    gate_init: float
    attention_cap: float
    attention: str  # attention.py
    learned_positions: bool
    mixes: tuple[str, ...]  # further inputs, each through a matrix of that name
    causal: bool
    remat: str  # none | dots: keep products, recompute the rest | full: recompute blocks
    dtype: jnp.dtype
    whole: Callable | None = None  # all-gathers the stored parameters of a block just before it runs (sharding.py)

    @nn.compact
    def __call__(self, z, extra, tau_s, tau_t, keys=None, cache=None, position=0):
        def uniform(key, shape):
            return jax.random.uniform(key, shape, minval=-1, maxval=1) / self.width**0.5

        self.param("embedding", uniform, (self.vocab + self.mask_token, self.width))
        self.param("unembed_kernel", nn.initializers.zeros, (self.width, self.vocab))
        self.param("unembed_bias", nn.initializers.zeros, (self.vocab,))

        x = z.astype(jnp.float32)
        for name, y in zip(self.mixes, extra, strict=True):
            # The matrix starts at zero, because unit-sized noise through a random one would drown the posterior, small as E is.
            x = x + TokenDense(self.width, use_bias=False, kernel_init=nn.initializers.zeros, name=f"mix_{name}")(y)
        if self.learned_positions:
            positions = self.param("positions", nn.initializers.normal(0.02), (self.length, self.width))
            x = x + jax.lax.dynamic_slice_in_dim(positions, position, x.shape[1])
        cond = None
        if self.time_embeddings > 0:
            cond = TimeEmbedding(self.cond, self.time_scale, name="time_s")(tau_s)
        if self.time_embeddings > 1:
            cond = cond + TimeEmbedding(self.cond, self.end_time_scale, name="time_t")(tau_t)
        cond = None if cond is None else nn.silu(cond)

        block = Block
        if self.whole is not None:

            def gathered(variables):
                return {"params": self.whole(variables["params"])}

            block = nn.map_variables(Block, "params", gathered)
        if self.remat != "none":
            policy = jax.checkpoint_policies.dots_saveable if self.remat == "dots" else None
            block = nn.remat(block, prevent_cse=False, policy=policy)
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, 0),
            length=self.blocks,
            unroll=1,
        )
        fields = self.width, self.heads, self.dropout, self.gate_init, self.attention_cap, self.attention
        stack = stack(*fields, self.causal, self.dtype, name="blocks")
        x, filled = stack(x, cond, keys, position, jnp.arange(self.blocks), cache)

        shift, scale = (0.0, 0.0) if cond is None else Modulation(2, self.width, name="modulation")(cond)
        hidden = nn.LayerNorm(use_bias=False, epsilon=1e-5, name="norm")(x) * (1 + scale) + shift
        return hidden if cache is None else (hidden, filled)
