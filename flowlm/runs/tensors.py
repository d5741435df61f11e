"""Parameters as safetensors, in the names of the reference network (models/reference.py): the form that is sent to others."""

import os
from typing import Any

import jax
import numpy as np

from flowlm.models.network import Network
from flowlm.models.reference import from_reference, to_reference
from flowlm.system import storage

FILE = "model.safetensors"


def _library():
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("safetensors are read and written with their library: pip install -e .[export]") from error
    return safetensors


def read(path: str | os.PathLike) -> tuple[dict[str, jax.Array], int]:
    """({name: array}, the step that they are of, 0 where it is not told) of a file.

    Raises:
      ImportError: the library is not installed. ValueError: the file is damaged.
    """
    library = _library()
    try:
        with library.safe_open(path, "flax") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return held, int((file.metadata() or {}).get("step", 0))
    except (library.SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def has_run(directory: str | os.PathLike) -> bool:
    """Whether a directory is a run in this form: its settings are beside the file, and they are ours and not the reference's."""
    directory = storage.path(directory)
    settings = directory / "config.json"
    return (directory / FILE).exists() and settings.exists() and "objective" in storage.read_json(settings)


def load(directory: str | os.PathLike, net: Network, abstract_params: Any) -> tuple[Any, int]:
    """(parameters, step) of a directory with FILE, in the places that `abstract_params` says.

    Raises:
      ImportError, ValueError: as `read`; or they are not the parameters of this network.
    """
    held, step = read(storage.path(directory) / FILE)
    params = from_reference({name: np.asarray(a, np.float32) for name, a in held.items()}, net, str(directory))
    return jax.device_put(params, jax.tree.map(lambda a: a.sharding, abstract_params)), step


def written(params: Any, step: int, dtype: np.dtype) -> tuple[bytes, int]:
    """(what FILE holds of these parameters, how many numbers those are). Raises ImportError: the library is not installed."""
    arrays = {name: np.ascontiguousarray(np.asarray(a, dtype)) for name, a in to_reference(params).items()}
    # One entry of metadata: the library keeps several in no fixed order.
    return _library().numpy.save(arrays, {"step": str(step)}), sum(a.size for a in arrays.values())
