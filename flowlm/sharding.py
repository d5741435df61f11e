"""Where arrays live: the mesh, the batch and the state.

Decided outside the model. The mesh has one axis, `data`; one device is the mesh of size one. RULES is the one table of
(regular expression on the parameter path -> axes); the same function places parameters, EMA and optimizer moments.
"""

import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

RULES: tuple[tuple[str, P], ...] = ((r".*", P()),)


def make_mesh(data: int, devices=None) -> Mesh:
    """A mesh over `data` of the devices (jax.devices()), all of them for -1. Raises ValueError if there are not that many."""
    devices = jax.devices() if devices is None else devices
    data = len(devices) if data == -1 else data
    if not 1 <= data <= len(devices):
        raise ValueError(
            f"mesh.data = {data}, but {len(devices)} devices are here: set mesh.data to -1 or at most that"
        )
    if len({getattr(device, "slice_index", 0) for device in devices[:data]}) > 1:  # jax.make_mesh knows one slice only
        return Mesh(np.asarray(devices[:data]), ("data",), axis_types=(AxisType.Auto,))
    # Linen's contractions fail on the Explicit axes that make_mesh gives by default.
    return jax.make_mesh((data,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:data])


def path_of(path) -> str:
    """A tree path as `a/b/c`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def state_shardings(abstract_state, mesh: Mesh):
    """The sharding of every array of a state tree, by RULES: the first pattern found in its path."""

    def place(path, _):
        name = path_of(path)
        return NamedSharding(mesh, next(spec for pattern, spec in RULES if re.search(pattern, name)))

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def check_batch(batch_size: int, accumulation: int, group: int, mesh: Mesh) -> None:
    """Raises ValueError unless the global batch divides over microbatches, devices and groups of rows that stay together."""
    if accumulation < 1:
        raise ValueError(f"accumulation is a number of microbatches, at least 1, got {accumulation}")
    parts = accumulation * mesh.size * group
    if batch_size < 1 or batch_size % parts:
        raise ValueError(
            f"batch_size {batch_size} is not a multiple of accumulation {accumulation} x {mesh.size} devices"
            f"{f' x groups of {group} rows (objective.diagonal)' if group > 1 else ''}: "
            f"use {max(1, batch_size // parts) * parts} or {(batch_size // parts + 1) * parts}"
        )


def global_rows(rows, start: int, batch_size: int, length: int, mesh: Mesh) -> jax.Array:
    """Rows start .. start + batch_size of an endless stream as one global array [batch_size, length], sharded over `data`.

    Args:
      rows: (start, stop) -> int32 [stop - start, length]; each host asks only for what its devices hold.
    """

    def part(index):
        first, last, _ = index[0].indices(batch_size)
        return np.asarray(rows(start + first, start + last), np.int32)

    return jax.make_array_from_callback((batch_size, length), NamedSharding(mesh, P("data")), part)
