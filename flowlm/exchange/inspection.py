"""Finds out what lies at a path: a run, an export of one, or a checkpoint that can be imported."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from rich.table import Column, Table

from flowlm.config import flat
from flowlm.engine.sharding import Layout
from flowlm.exchange import importing
from flowlm.models.network import Params
from flowlm.runs import directory as run_directory
from flowlm.runs import integrity
from flowlm.runs.checkpoint import has_params
from flowlm.runs.integrity import checksum
from flowlm.runs.trained import load_trained
from flowlm.system import storage
from flowlm.system.terminal import console


class Inspected(NamedTuple):
    """What was found at a path.

    Attributes:
      kind: what it is, in words.
      config: its settings.
      params: the parameter tree (the averaged one).
      step: of training, from which the parameters are.
    """

    kind: str
    config: ConfigDict
    params: Any
    step: int


def restore(weights: Mapping[str, jax.Array]) -> Params:
    """The parameter tree, float32, of the arrays in weights.npz."""
    values = {
        k: jax.lax.bitcast_convert_type(a, jnp.bfloat16) if a.dtype == jnp.uint16 else a for k, a in weights.items()
    }
    return unflatten_dict({k: a.astype(jnp.float32) for k, a in values.items()}, sep="/")


def inspect(path: str | os.PathLike, layout: Layout, weights: str = "ema") -> Inspected:
    """Reads whatever flowlm writes or imports.

    Args:
      weights: of a .ckpt, `ema` or `live`.

    Raises:
      FileNotFoundError: there is nothing of that kind. ValueError, RuntimeError: it is damaged, or not what its manifest says.
    """
    path = storage.path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if run_directory.is_importable(path):
        run = importing.load_imported(path, weights)
        return Inspected("parameters that can be imported", run.config, run.params, run.step)
    if (path / run_directory.PROGRAM).exists():
        return _programs(path)
    run = load_trained(path, layout)
    kind = "parameters of a run" if has_params(path) else "run"
    return Inspected(kind, run.config, run.params, run.step)


def _programs(path) -> Inspected:
    manifest = integrity.check_files(path)
    if manifest is None:
        raise FileNotFoundError(f"{path} has programs and no {integrity.MANIFEST}: export them again")
    with (path / "weights.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        params = restore(dict(arrays))
    kind = f"programs: {manifest['steps']} sampling steps, for {', '.join(manifest['platforms'])}"
    return Inspected(kind, run_directory.load_workdir(path)[0], params, manifest["step"])


def print_inspected(found: Inspected) -> None:
    """Prints what it is, every setting, every array, and the checksum of their values."""
    arrays = flatten_dict(found.params, sep="/")
    settings = Table("setting", Column("value", overflow="fold"), title="Settings")
    for key, value in flat(found.config.to_dict()).items():
        settings.add_row(key, str(value))
    table = Table(Column("parameter", overflow="fold"), Column("shape", no_wrap=True), title="Parameters")
    for column in ("numbers", "rms"):
        table.add_column(column, justify="right")
    for name, array in sorted(arrays.items()):
        values = np.asarray(array, np.float32)
        table.add_row(name, str(values.shape), f"{values.size:,}", f"{np.sqrt(np.mean(values**2)):.4g}")
    console().print(settings, table)
    print(f"{found.kind}\nfamily      {found.config.objective.family}\nstep        {found.step}")
    print(f"parameters  {sum(a.size for a in arrays.values()):,}\nchecksum    {checksum(found.params)}")
