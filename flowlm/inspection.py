"""What a path is: a run, what was exported of one, or a checkpoint that can be imported."""

import hashlib
import json
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from flowlm import importing, run_directory, storage
from flowlm.checkpoint import has_params
from flowlm.config import flat
from flowlm.experiment import load_trained
from flowlm.export import checksum, restore
from flowlm.sharding import Layout


class Inspected(NamedTuple):
    """kind: what it is, in words. params: the parameter tree (the averaged one), of step `step`."""

    kind: str
    config: ConfigDict
    params: Any
    step: int


def inspect(path, layout: Layout, weights: str = "ema") -> Inspected:
    """Reads whatever flowlm writes or imports.

    Args:
      weights: of a .ckpt, `ema` or `live`.

    Raises:
      FileNotFoundError: there is nothing of that kind. ValueError, RuntimeError: it is damaged, or not what its manifest says.
    """
    path = storage.path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if importing.is_importable(path):
        run = importing.load(path, weights)
        return Inspected("parameters that can be imported", run.config, run.params, run.step)
    if (path / "manifest.json").exists():
        return _programs(path)
    run = load_trained(path, layout)
    kind = "parameters of a run" if has_params(path) else "run"
    return Inspected(kind, run.config, run.params, run.step)


def _programs(path) -> Inspected:
    manifest = json.loads((path / "manifest.json").read_text())
    for name, digest in manifest["sha256"].items():
        if not (path / name).exists() or hashlib.sha256((path / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{path / name} is not the file that was exported: its sha256 is not the manifest's")
    with (path / "weights.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        params = restore(dict(arrays))
    kind = f"programs: {manifest['steps']} sampling steps, for {', '.join(manifest['platforms'])}"
    return Inspected(kind, run_directory.load(path)[0], params, manifest["step"])


def show(found: Inspected) -> None:
    """Prints what it is, every setting, every array, and the checksum of their values."""
    console = Console(width=120 if not Console().is_terminal else None)
    arrays = flatten_dict(found.params, sep="/")
    settings = Table("setting", "value", title="Settings")
    for key, value in flat(found.config.to_dict()).items():
        settings.add_row(key, str(value))
    table = Table("parameter", "shape", title="Parameters")
    for column in ("numbers", "root mean square"):
        table.add_column(column, justify="right")
    for name, array in sorted(arrays.items()):
        values = np.asarray(array, np.float32)
        table.add_row(name, str(values.shape), f"{values.size:,}", f"{np.sqrt(np.mean(values**2)):.4g}")
    console.print(settings, table)
    print(f"{found.kind}\nfamily      {found.config.objective.family}\nstep        {found.step}")
    print(f"parameters  {sum(a.size for a in arrays.values()):,}\nchecksum    {checksum(found.params)}")
