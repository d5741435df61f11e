"""A trained model taken out of its run, in one of three forms, each in a new directory with config, tokenizer and versions.

params       the averaged parameters alone (Orbax): what takes a run directory takes this too, on any mesh
safetensors  the same in the reference's names (reference.py), with a model card; `flowlm import` reads it back
jax          programs that run without flowlm (examples/run_exported.py):
                 sampler.jax    (weights, seed uint32 [], rows int32 [b]) -> ids int32 [b, L], those of `flowlm sample --seed`
                 denoiser.jax   (weights, state, tau_s [b], tau_t [b]) -> logits float32 [b, L, V]; state is z float32
                                [b, L, D], or ids int32 [b, L] of a discrete diffusion or an autoregressive model
                 weights.npz    {path: array}; bfloat16 as the uint16 of its bits, which the programs undo
             b is any number of rows; the values of `rows` are not read.

Each has a manifest.json that says what it is, with the sha256 of every file (integrity.py). Until all files are there, and the
parameters were read back as they were, it says that the export is unfinished, and whatever reads exports refuses it.
"""

import io
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
from flax.traverse_util import flatten_dict
from jax import export as jax_export

from flowlm.engine.sampling import named_sampler
from flowlm.engine.sharding import Layout
from flowlm.exchange import reference
from flowlm.exchange.inspection import inspect, restore
from flowlm.runs import directory as run_directory
from flowlm.runs import integrity
from flowlm.runs.checkpoint import save_params
from flowlm.runs.integrity import checksum
from flowlm.runs.model import check_drawing
from flowlm.runs.trained import Trained, load_trained
from flowlm.system import storage

FORMATS = ("params", "safetensors", "jax")
DTYPES = ("float32", "bfloat16")
PLATFORMS = ("cpu", "cuda", "tpu")
CARD = """\
# {{ family }}, {{ "{:,}".format(count) }} parameters

A language model of the family `{{ family }}`: rows of {{ length }} tokens out of {{ vocab }}, trained on `{{ data }}`.
Averaged parameters of a run of flowlm at step {{ step }}, {{ dtype }}.

`model.safetensors` has the names and layouts of the reference network (arXiv 2602.16813).
{%- if differs %} The network has more than the reference: {{ differs }}.{% endif %}
`config.json` has every setting, `tokenizer.json` is a file of the `tokenizers` library, `versions.json` says what wrote them.

    flowlm import . --to=RUNDIR
    flowlm sample --checkpoint=RUNDIR --steps={{ steps }}

sha256 of the parameters, as `flowlm inspect` prints it: `{{ checksum }}`
"""


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
) -> None:
    """Writes what `load_trained` reads in `directory` to the new directory `out`.

    Args:
      dtype: of the parameters in the files; whoever loads them computes as the settings say.
      steps: for `jax`, the number of sampling steps.
      sampler: for `jax`, one of the family's samplers (default: the last).
      objective: settings of the run's `objective` section to replace.

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
    files = {}
    if format == "jax":
        files = _programs(run, params, dtype, steps, sampler)
    elif format == "safetensors":
        files = _safetensors(run, params, dtype)
    integrity.begin(out)
    run_directory.prepare_workdir(out, run.config, run.tokenizer, copied=True)
    if format == "params":
        save_params(out, params, run.step, jnp.dtype(dtype))
    for name, content in files.items():
        (out / name).write_bytes(content)
    facts = _facts(run, params, dtype) | {"format": format}
    if format == "jax":
        facts |= {"steps": steps, "platforms": PLATFORMS, "jax": jax.__version__}
    integrity.seal(out, facts, lambda: inspect(out, layout).params)


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


def _safetensors(run: Trained, params, dtype: str) -> dict[str, bytes]:
    from safetensors.numpy import save

    arrays = {
        name: np.ascontiguousarray(np.asarray(a, jnp.dtype(dtype)))
        for name, a in reference.to_reference(params).items()
    }
    model = run.config.model
    more = [f"`{key}: {model[key]}`" for key, bare in reference.BARE.items() if model[key] != bare]
    more = ", ".join(more + ["a mark of given tokens"] * ("mark" in params))
    facts = _facts(run, params, dtype) | {"count": sum(a.size for a in arrays.values()), "data": run.config.data.name}
    steps = run.config.data.length - 1 if model.causal else 1 if model.time_embeddings == 2 else 64
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    card = environment.from_string(CARD).render(facts, differs=more, steps=steps)
    # One entry of metadata: the library keeps several in no fixed order.
    return {"model.safetensors": save(arrays, {"step": str(run.step)}), "README.md": card.encode()}


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
