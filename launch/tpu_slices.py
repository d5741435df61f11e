"""Slices of TPUs as Cloud TPU sells them: what they are called, how many chips they have, and which mesh fits on them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

AXES = ("replica", "data", "model")


@dataclass(frozen=True)
class Kind:
    """A generation of TPU: its slices are called `NAME-N`, N being one of `sizes`, and have N / `per_chip` chips.

    JAX sees one device a chip on all of these. runtime: the image of its machines.
    """

    name: str
    runtime: str
    sizes: tuple[int, ...]
    per_chip: int = 1


_SLICES = (1, 4, 8, 16, 32, 64, 128, 256)
_CUBES = tuple(2**n for n in range(3, 12))  # numbered by cores, two a chip
KINDS = (
    Kind("v4", "tpu-ubuntu2204-base", _CUBES, per_chip=2),
    Kind("v5litepod", "v2-alpha-tpuv5-lite", _SLICES),
    Kind("v5p", "v2-alpha-tpuv5", _CUBES, per_chip=2),
    Kind("v6e", "v2-alpha-tpuv6e", _SLICES),
)


def _found(accelerator: str) -> tuple[Kind, int]:
    name, _, size = accelerator.rpartition("-")
    for kind in KINDS:
        if kind.name == name and size in map(str, kind.sizes):
            return kind, int(size) // kind.per_chip
    known = "; ".join(f"{kind.name}-N with N of {', '.join(map(str, kind.sizes))}" for kind in KINDS)
    raise ValueError(f"unknown --accelerator {accelerator!r}: known are {known}")


def chips(accelerator: str) -> int:
    """Chips of an accelerator type, which are JAX's devices. Raises ValueError listing the known ones."""
    return _found(accelerator)[1]


def runtime(accelerator: str) -> str:
    """The image of an accelerator type's machines. Raises ValueError listing the known types."""
    return _found(accelerator)[0].runtime


def check_mesh(mesh: Mapping[str, Any], accelerator: str) -> None:
    """Raises ValueError unless the product of the axes of `config.mesh` is the number of chips (-1 takes what is left)."""
    check_devices(mesh, chips(accelerator), accelerator, "chips", "--accelerator")


def check_devices(mesh: Mapping[str, Any], have: int, name: str, devices: str, flag: str) -> None:
    """Raises ValueError unless the product of the axes of `config.mesh` is `have` (-1 takes what is left).

    Args:
      name: what has them, and devices: what they are, as the error calls them.
      flag: the one that chooses another number.
    """
    sizes = {axis: mesh[axis] for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    fits = have % fixed == 0 if -1 in sizes.values() else have == fixed
    if not fits:
        axes = ", ".join(f"mesh.{axis} = {size}" for axis, size in sizes.items())
        raise ValueError(
            f"{name} has {have} {devices}, and the mesh ({axes}) {fixed}"
            f"{' or a multiple' if -1 in sizes.values() else ''}: change --config.mesh or {flag}"
        )
