"""A trained model taken out of its run, in one of three forms, each in a new directory with config, tokenizer and versions.

params       the averaged parameters alone (Orbax): what takes a run directory takes this too, on any mesh
safetensors  the same in the reference's names (models/reference.py), with a model card (card.py); `flowlm push` sends it
jax          programs that run without flowlm (examples/run_exported.py):
                 sampler.jax    (weights, seed uint32 [], rows int32 [b]) -> ids int32 [b, L], those of `flowlm sample --seed`
                 denoiser.jax   (weights, state, tau_s [b], tau_t [b]) -> logits float32 [b, L, V]; state is z float32
                                [b, L, D], or ids int32 [b, L] of a discrete diffusion or an autoregressive model
                 weights.npz    {path: array}; bfloat16 as the uint16 of its bits, which the programs undo
             b is any number of rows; the values of `rows` are not read.

Each has a manifest.json that says what it is, with the sha256 of every file but the card (integrity.py). Until all files are there,
and the parameters were read back as they were, it says that the export is unfinished, and whatever reads exports refuses it.
"""

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import export as jax_export
from ml_collections import ConfigDict

from flowlm.config import flat
from flowlm.engine.sampling import named_sampler
from flowlm.engine.sharding import Layout
from flowlm.exchange.card import make_card
from flowlm.exchange.inspection import inspect, restore
from flowlm.runs import directory as run_directory
from flowlm.runs import integrity, tensors
from flowlm.runs.checkpoint import save_params
from flowlm.runs.integrity import checksum
from flowlm.runs.model import check_drawing
from flowlm.runs.trained import Trained, load_trained
from flowlm.system import storage
from flowlm.system.manifest import CARD

FORMATS = ("params", "safetensors", "jax")
DTYPES = ("float32", "bfloat16")
PLATFORMS = ("cpu", "cuda", "tpu")


def export(
    directory: str | os.PathLike,
    out: str | os.PathLike,
    layout: Layout,
    *,
    format: str,
    dtype: str = "float32",
    steps: int | None = None,
    sampler: str | None = None,
    objective: Mapping[str, Any] | None = None,
    published: str | None = None,
) -> None:
    """Writes what `load_trained` reads in `directory` to the new directory `out`.

    Args:
      dtype: of the parameters in the files; whoever loads them computes as the settings say.
      steps: for `jax`, the number of sampling steps.
      sampler: for `jax`, one of the family's samplers (default: the last).
      objective: settings of the run's `objective` section to replace.
      published: for `safetensors`, the place on the Hub that it is for; the card tells then how the run was made and judged.

    Raises:
      ValueError, FileNotFoundError: bad arguments, or as load_trained. ImportError: names the extra. RuntimeError: the parameters
        cannot be read back.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown --format {format!r}: choose one of {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown --dtype {dtype!r}: choose float32 or bfloat16")
    if (format == "jax") != (steps is not None) or (sampler and format != "jax"):
        raise ValueError(
            "--format=jax needs --steps=N, a number of sampling steps; the others take neither --steps nor --sampler"
        )
    run_directory.check_empty(out)
    needed = {"safetensors": "safetensors", "jax": "flatbuffers"}.get(format)
    try:
        __import__(needed or "jax")
    except ImportError as error:
        raise ImportError(f"--format={format} needs {needed}: pip install -e .[export]") from error
    if format == "jax":
        check_drawing(directory, [steps], sampler, **(objective or {}))
    run = load_trained(directory, layout, objective)
    params, out = jax.tree.map(np.asarray, run.params), storage.path(out)
    facts, files = _facts(run, params, dtype) | {"format": format}, {}
    if format == "jax":
        files = _programs(run, params, dtype, steps, sampler)
        facts |= {"steps": steps, "platforms": PLATFORMS, "jax": jax.__version__}
    elif format == "safetensors":
        files[tensors.FILE], count = tensors.written(params, run.step, jnp.dtype(dtype))
        card = make_card(run, facts | {"count": count}, published or ".", directory if published else None)
        files[CARD] = card.encode()
    integrity.begin(out)
    run_directory.prepare_workdir(out, _portable(run.config), run.tokenizer, copied=True)
    if format == "params":
        save_params(out, params, run.step, jnp.dtype(dtype))
    for name, content in files.items():
        (out / name).write_bytes(content)
    integrity.seal(out, facts, lambda: inspect(out, layout).params)


def _portable(config: ConfigDict) -> ConfigDict:
    """Settings whose places below the home directory begin with `~`, because whoever reads an export has another home."""
    home, out = f"{Path.home()}/", config.copy_and_resolve_references()
    found = {name: value for name, value in flat(config.to_dict()).items() if str(value).startswith(home)}
    out.update_from_flattened_dict({name: f"~/{value.removeprefix(home)}" for name, value in found.items()})
    return out


def _facts(run: Trained, params, dtype: str) -> dict[str, Any]:
    return {
        "family": run.config.objective.family,
        "step": run.step,
        "length": run.config.data.length,
        "vocab": run.tokenizer.vocab_size,
        "start": run.tokenizer.start,
        "dtype": dtype,
        "checksum": checksum(jax.tree.map(lambda a: a.astype(jnp.dtype(dtype)), params)),
    }


def _programs(run: Trained, params, dtype: str, steps: int, sampler: str | None) -> dict[str, bytes]:
    net, (_, family) = run.experiment.net, named_sampler(run.experiment.family, sampler)
    has_noise = family.continuous

    def sample(weights, seed, rows):
        tree = restore(weights)
        tree = net.prepared(tree) if has_noise else tree
        key = jax.random.fold_in(jax.random.key(seed), 0)  # as sampling.Sampler draws its first rows
        return family.sample(net, tree, key, rows.shape[0], steps)

    def denoise(weights, state, tau_s, tau_t):
        tree = restore(weights)
        z = state if has_noise else net.embed(tree, state)
        return net.unembed(tree, net.apply(tree, z, tau_s, tau_t))

    flat = {k: a.astype(jnp.dtype(dtype)) for k, a in flatten_dict(params, sep="/").items()}
    weights = {k: a.view(np.uint16) if a.dtype == jnp.bfloat16 else a for k, a in flat.items()}
    shapes = {k: jax.ShapeDtypeStruct(a.shape, a.dtype) for k, a in weights.items()}
    (rows,) = jax_export.symbolic_shape("b")
    array = jax.ShapeDtypeStruct
    state = array((rows, net.length, net.width), jnp.float32) if has_noise else array((rows, net.length), jnp.int32)
    times = array((rows,), jnp.float32)
    file = io.BytesIO()
    np.savez(file, **weights)
    return {
        run_directory.PROGRAM: _serialized(sample, shapes, array((), jnp.uint32), array((rows,), jnp.int32)),
        "denoiser.jax": _serialized(denoise, shapes, state, times, times),
        "weights.npz": file.getvalue(),
    }


def _serialized(program: Callable, *shapes) -> bytes:
    return bytes(jax_export.export(jax.jit(program), platforms=PLATFORMS)(*shapes).serialize())
