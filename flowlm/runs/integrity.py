"""Tells whether what is read is what was written, by sums of arrays and manifests of files.

A training state may be large and spread over many hosts, so its arrays are summed where they lie, on the devices, when they are
saved and again when they are read:

    sum over i of bits_i w_i  (mod 2^32),   bits_i: element i as unsigned integers, w_i: an odd number that depends on i

An odd w_i has an inverse, so any one flipped bit changes the sum, and a w_i of its own for each i shows elements that changed
places. Sums of integers do not depend on their order: they are the same on every mesh. This costs one pass over the arrays,
each device its own, and a number for each to be exchanged.

A directory that is written once, such as an export, has a manifest (system/manifest.py). While the other files are
written it says that they are, so that a directory whose writer was killed is not taken for what it was to be.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from flowlm.engine.sharding import path_of
from flowlm.system import manifest, processes, storage
from flowlm.system.manifest import MANIFEST, UNFINISHED


@jax.jit
def _sum(block: jax.Array, starts: jax.Array, strides: jax.Array) -> jax.Array:
    """The part of an array's sum that a block of it makes, which begins at `starts` of an array with such strides."""
    width = {1: jnp.uint8, 2: jnp.uint16}.get(block.dtype.itemsize, jnp.uint32)
    bits = block.astype(width) if block.dtype == bool else jax.lax.bitcast_convert_type(block, width)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        index += (jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) + starts[axis]) * strides[axis]
    mixed = index * np.uint32(0x9E3779B1)  # 2^32 over the golden ratio: neighbours get weights far apart
    return jnp.sum(bits.astype(jnp.uint32) * ((mixed ^ (mixed >> 15)) | 1), dtype=jnp.uint32)


def _blocks(array: jax.Array) -> Iterator[tuple]:
    """The arguments of `_sum` for the blocks of an array in this process, each block once over all processes."""
    shape = array.shape + (2,) * (array.dtype.itemsize == 8)  # 8 bytes are summed as two words
    strides = np.array([math.prod(shape[axis + 1 :]) % 2**32 for axis in range(len(shape))], np.uint32)
    for block in array.addressable_shards:
        if block.replica_id == 0:
            start = [place.start or 0 for place in block.index] + [0] * (len(shape) - array.ndim)
            yield block.data, np.array(start, np.uint32), strides


def sums(tree: Any) -> np.ndarray:
    """Sums uint32 [n] of a tree of n arrays that may lie on the devices of several processes; all must call."""
    # No program spans processes, so only finished sums are exchanged. All programs are started before the first is waited for.
    # Blocks of one shape have one program, which is compiled once for all states that have such blocks.
    started = [[_sum(*block) for block in _blocks(jnp.asarray(array))] for array in jax.tree.leaves(tree)]
    total = np.array([np.sum(parts, dtype=np.uint32) for parts in jax.device_get(started)], np.uint32)
    return processes.total(total)


def changed(tree: Any, kept: np.ndarray) -> list[str]:
    """Paths of the arrays whose sums are not those that `sums` gave of the same tree; all processes must call."""
    paths = [path_of(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return [path for path, now, then in zip(paths, sums(tree), kept, strict=True) if now != then]


def checksum(params: Any) -> str:
    """sha256 of a parameter tree's names, shapes and float32 values: the same for the same values, whatever holds them."""
    digest = hashlib.sha256()
    for path, value in sorted(flatten_dict(params, sep="/").items()):
        value = np.asarray(value, np.float32)
        digest.update(f"{path} {value.shape} ".encode())
        digest.update(value.astype("<f4").tobytes())
    return digest.hexdigest()


def begin(directory: str | os.PathLike) -> None:
    """Makes `directory` one that is refused (`check_finished`) until it is sealed."""
    directory = storage.path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    storage.write_text(directory / MANIFEST, json.dumps({UNFINISHED: True}) + "\n")


def check_finished(directory: str | os.PathLike) -> None:
    """Raises ValueError where who wrote a directory was ended before its last file."""
    place = storage.path(directory) / MANIFEST
    try:
        told = json.loads(place.read_text()) if place.is_file() else {}
    except ValueError:
        return  # damaged, which `check_files` says
    if isinstance(told, dict) and UNFINISHED in told:
        raise ValueError(f"{directory} was not written to its end: remove it and make it again")


def seal(directory: str | os.PathLike, facts: Mapping[str, Any], read: Callable[[], Any]) -> None:
    """Writes `directory`/manifest.json: the facts, the sha256 of every file that is there, and that of all this.

    Args:
      facts: what the directory is, and the `checksum` of its parameters.
      read: gives the parameters as they are read from it.

    Raises:
      RuntimeError: those are others; the directory is refused from then on.
    """
    directory = storage.path(directory)
    digests = {name: manifest.digest(file) for name, file in manifest.files(directory)}
    facts = json.loads(json.dumps(dict(facts) | {"sha256": digests}))
    storage.write_text(directory / MANIFEST, json.dumps(facts | {"manifest": manifest.own(facts)}, indent=2) + "\n")
    kept = False
    try:
        kept = checksum(read()) == facts["checksum"]
    finally:
        if not kept:
            begin(directory)
    if not kept:
        raise RuntimeError(f"{directory} does not give back the parameters that were written there: use another disk")


def check_files(directory: str | os.PathLike) -> dict[str, Any] | None:
    """The facts of a directory's manifest, each of whose files is what it says; None where there is no such manifest.

    Of several processes all must call; the first reads the files, since one answer is enough for all.

    Raises:
      ValueError: names the file that is missing or changed; or as `check_finished`.
    """
    directory = storage.path(directory)
    if not (directory / MANIFEST).exists():
        return None
    check_finished(directory)
    wrong = None
    try:
        facts = manifest.read(directory)
        if facts is None:
            return None
    except ValueError:
        wrong = MANIFEST
    if wrong is None and processes.is_first():
        wrong = next(manifest.wrong(directory, facts), None)
    if not processes.all_agree(wrong is None):
        raise ValueError(
            f"{directory / (wrong or MANIFEST)} is not the file that was written, as {MANIFEST} knows it: restore it from a copy "
            f"(or remove {MANIFEST} if you changed it on purpose)"
        )
    return facts
