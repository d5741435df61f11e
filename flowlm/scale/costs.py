"""What a step costs on paper: FLOPs in closed form, chips as published, and the roofline of what is counted (engine/flops.py).

    forward  = N (24 D^2 + 4 L D) + 2 D V   FLOPs a token: N blocks of width D, length L, V tokens; the conditioning once a row
    training = 3 forward                    the network's own share of a step; recomputation, noise and teachers come on top

Only products are counted, two FLOPs for each multiplication with its addition.
"""

from collections.abc import Mapping
from typing import NamedTuple

from flowlm.models.dit import SINUSOIDS


class Chip(NamedTuple):
    """One device of a TPU topology: a chip, or half of one where a chip is two devices.

    Its speeds are the published ones (cloud.google.com/tpu/docs), because none was measured here.

    Attributes:
      flops: bfloat16 FLOP/s.
      bandwidth: of HBM, bytes/s.
      links: bytes/s that it sends to its neighbours, all links together.
      hbm: bytes that the compiler lets a program have, as its own error says.
      reserved: bytes of hbm that programs are never given.
      shapes: topologies that are offered.
      kinds: what jax calls such a device (`device_kind`).
      options: of `get_topology_desc`.
    """

    flops: float
    bandwidth: float
    links: float
    hbm: float
    shapes: tuple[str, ...]
    kinds: tuple[str, ...] = ()
    options: Mapping[str, str] = {}
    reserved: float = 258 * 2**20


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
CHIPS = {
    "v4": Chip(275e12, 1228e9, 300e9, 30.75 * 2**30, _CUBES, ("TPU v4",), {"chip_config_name": "megacore"}),
    "v5e": Chip(197e12, 819e9, 200e9, 15.75 * 2**30, _FLAT, ("TPU v5 lite", "TPU v5e")),
    "v5p": Chip(
        459e12,
        2765e9,
        600e9,
        95.74 * 2**30,
        (*_CUBES, "8x8x16", "8x16x16", "16x16x16", "16x16x24"),
        ("TPU v5", "TPU v5p"),
    ),
    "v6e": Chip(918e12, 1600e9, 400e9, 31.25 * 2**30, _FLAT, ("TPU v6 lite", "TPU v6e")),
    # Two devices a chip: half of 2,307 TFLOP/s, 7,380 GB/s and 600 GB/s each.
    "tpu7x": Chip(1153.5e12, 3690e9, 300e9, 94.75 * 2**30, _CUBES[:5], ("TPU7x",)),
}
# bfloat16 FLOP/s of devices by what jax calls them, no sparsity; of GPUs as in NVIDIA's data sheets. The slower cards of a name
# ("H100 PCIe", "H200 NVL") and parts of one (MIG) are others.
PEAKS = {kind: chip.flops for chip in CHIPS.values() for kind in chip.kinds} | {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L40S": 362e12,
}
# The share of the roofline that an estimate of time supposes. It is an assumption, because nothing ran.
EFFICIENCY = 0.5


def forward_flops(
    width: int, blocks: int, cond: int, time_embeddings: int, vocab: int, length: int, with_output: bool = True
) -> float:
    """FLOPs a token of one pass of the network with input `raw`, and of its output layer."""
    row = 0.0
    if time_embeddings:
        row = time_embeddings * 2 * (SINUSOIDS * cond + cond**2) + 2 * cond * width * (6 * blocks + 2)
    return blocks * (24 * width**2 + 4 * length * width) + with_output * 2 * width * vocab + row / length


class Roofline(NamedTuple):
    """Seconds of a step: what its products, its HBM traffic and its wires take at published peaks, and what that suggests.

    Attributes:
      compute: what its products take.
      memory: what its HBM traffic takes.
      network: what its wires take.
      floor: the largest of the three; no step is faster.
      estimate: floor / EFFICIENCY.
      bound: which one is the largest.
    """

    compute: float
    memory: float
    network: float
    floor: float
    estimate: float
    bound: str


def roofline(chip: Chip, flops: float, traffic: float, wire: float) -> Roofline:
    """The floor of a step on one chip.

    Args:
      chip: what runs it.
      flops: FLOPs of the step, each counted as often as the multiplier passes.
      traffic: bytes of HBM.
      wire: bytes sent.
    """
    parts = {"compute": flops / chip.flops, "memory": traffic / chip.bandwidth, "network": wire / chip.links}
    bound = max(parts, key=parts.get)
    return Roofline(**parts, floor=parts[bound], estimate=parts[bound] / EFFICIENCY, bound=bound)
