"""Compiles one program of a run with the TPU compiler for a slice that is not here, and says what it needs of every chip.

Code generation takes most of a compilation, and nothing of it is needed here. So every program is compiled in a process of its own,
with XLA's dumps on, and that process is stopped as soon as the report of its memory lies there: seconds at any number of chips.
"""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from flowlm.engine import sampling, sharding
from flowlm.engine.build import abstract_state, abstract_teacher, build, jit_step
from flowlm.engine.flops import count_flops
from flowlm.objectives.autoregressive import Autoregressive
from flowlm.scale import hlo
from flowlm.scale.costs import CHIPS, Chip, roofline
from flowlm.scale.dense import DenseFlow

# Variables of a process that compiles for TPUs where there are none: without them libtpu looks for its cloud, or for a lock file.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is found there is not compiled, hence not dumped
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
}


# ---- Programs ----------------------------------------------------------------------------------------------------


class Program(NamedTuple):
    """A program of a run.

    Attributes:
      traced: ready to lower.
      devices: how many run it.
      rows: sequences of one run, over all devices.
    """

    traced: jax.stages.Traced
    devices: int
    rows: int


def trace_step(
    config: ConfigDict, devices: Sequence[Any], per_device: int | None = None, dense: bool = False
) -> Program:
    """The training step of a run on these devices, without an array being made.

    Args:
      per_device: sequences on each device, in place of config.batch_size over all. A teacher has the student's size; what
        config.teacher names is not read.
      dense: the same step of a flow written over the whole vocabulary, for comparison.

    Raises:
      ValueError: bad settings, or a batch that does not divide over the devices.
    """
    experiment = build(config, config.model.vocab_size)
    if dense:
        experiment = experiment._replace(family=DenseFlow(experiment.family.prior, experiment.family.warp))
    layout = sharding.make_layout(config, devices)
    # per_device is a chip's share of the batch, since with a model axis several chips work on one row.
    rows = config.batch_size if per_device is None else per_device * layout.mesh.size
    sharding.check_batch(rows, config.accumulation, experiment.family.group, layout.devices)
    state = abstract_state(experiment, layout)
    teacher = abstract_teacher(config, experiment, layout)
    ids = jax.ShapeDtypeStruct((rows, config.data.length), jnp.int32, sharding=layout.rows)
    return Program(jit_step(config, experiment, layout, state).trace(state, ids, teacher), layout.mesh.size, rows)


def _key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))


def trace_sampler(config: ConfigDict, devices: Sequence[Any], per_device: int | None = None) -> Program:
    """One call of the sampler that evaluations use, in one step, or in as many as an autoregressive model needs."""
    del per_device  # a call draws the same number of rows everywhere
    experiment = build(config, config.model.vocab_size)
    net, family = experiment.net, experiment.family
    layout, steps = sharding.make_layout(config, devices), planned_steps(config)
    sampler = sampling.Sampler(net, sampling.named_sampler(family)[1], layout)
    params = abstract_state(experiment, layout).params
    if family.continuous:
        shapes = jax.eval_shape(net.prepared, params)
        params = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, layout.places(shapes)
        )
    return Program(sampler.trace(params, _key(), steps), layout.mesh.size, sampler.rows)


def planned_steps(config: ConfigDict) -> int:
    """The steps of the sampler that is planned."""
    family = build(config, config.model.vocab_size).family
    return config.data.length - 1 if isinstance(family, Autoregressive) else 1


def trace_held_out(
    config: ConfigDict, devices: Sequence[Any], per_device: int | None = None, name: str | None = None
) -> Program:
    """One call of a likelihood of held-out rows that evaluations compute.

    Args:
      name: of the likelihood; by default the bound, or where there is none the cross-entropy.
    """
    del per_device  # evaluation.held_out_batch says how many rows
    experiment, layout = build(config, config.model.vocab_size), sharding.make_layout(config, devices)
    family, rows = experiment.family, min(config.evaluation.held_out, config.evaluation.held_out_batch)
    likelihoods = family.likelihoods()
    name = name or ("bound" if "bound" in likelihoods else "denoising")
    fn = sampling.on_rows(layout, experiment.net, likelihoods[name])
    ids = jax.ShapeDtypeStruct((rows, config.data.length), jnp.int32)
    tau = () if name == "bound" else (jax.ShapeDtypeStruct((), jnp.float32),)
    marginals = jax.ShapeDtypeStruct((config.data.length, config.model.vocab_size), jnp.float32)
    extra = (marginals,) if name == "context_free" else ()
    params = abstract_state(experiment, layout).params
    return Program(fn.trace(params, ids, _key(), *tau, *extra), layout.mesh.size, rows)


PROGRAMS: dict[str, Callable[..., Program]] = {
    "train": trace_step,
    "dense": partial(trace_step, dense=True),
    "sample": trace_sampler,
    "held_out": trace_held_out,
    "denoising": partial(trace_held_out, name="denoising"),
    "context_free": partial(trace_held_out, name="context_free"),
}


# ---- Topologies --------------------------------------------------------------------------------------------------


class Topology(NamedTuple):
    """`CHIP:SHAPE`, or `CHIP:SHAPE:SLICES` of that shape."""

    name: str
    chip: Chip
    shape: str
    slices: int

    def devices(self) -> list:
        """Devices that exist for the compiler alone. Slow, and only for a process with ENVIRONMENT set."""
        from jax.experimental import topologies

        slices = {"num_slices": self.slices} if self.slices > 1 else {}
        kind = f"{self.name.partition(':')[0]}:{self.shape}"
        return topologies.get_topology_desc(kind, "tpu", **self.chip.options, **slices).devices


def parse_topology(name: str) -> Topology:
    """Raises ValueError for what is not offered, and lists what is: the compiler itself takes any shape."""
    chip, _, rest = name.partition(":")
    shape, _, slices = rest.partition(":")
    if chip not in CHIPS or shape not in CHIPS[chip].shapes or not re.fullmatch(r"([1-9]\d*)?", slices):
        known = "; ".join(f"{chip}: {', '.join(known.shapes)}" for chip, known in CHIPS.items())
        raise ValueError(
            f"unknown --topology {name!r}: give CHIP:SHAPE, or CHIP:SHAPE:SLICES for several slices, of {known}"
        )
    return Topology(name, CHIPS[chip], shape, int(slices or 1))


def check_compiler() -> None:
    """Raises ImportError without the TPU compiler."""
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("flowlm plan --topology needs the TPU compiler, libtpu: pip install -e .[tpu-plan]")


# ---- One compilation ---------------------------------------------------------------------------------------------


def compile_here(directory: Path) -> None:
    """The child: compiles what `directory`/request.json asks for; leaves counts.json, dumps, and error.json if it fails."""
    request = json.loads((directory / "request.json").read_text())
    config = ConfigDict(request["config"]).lock()
    try:
        devices = parse_topology(request["topology"]).devices()
        program = PROGRAMS[request["program"]](config, devices, request["per_chip"])
        counts = {"chips": program.devices, "rows": program.rows, "flops": count_flops(program.traced.jaxpr)}
        counts["kernels"] = count_flops(program.traced.jaxpr, kernels_only=True)
        (directory / "counts.json").write_text(json.dumps(counts))
        options = {"xla_dump_to": str(directory / "dump"), "xla_dump_hlo_pass_re": "tpu-spmd-partitioning"}
        program.traced.lower().compile(compiler_options=options)
    except Exception as error:
        (directory / "error.json").write_text(json.dumps([type(error).__name__, str(error)]))


def needed_memory(message: str) -> float | None:
    """Bytes of HBM that a compiler's complaint speaks of; None if it is of something else."""
    if "Ran out of memory" not in message and "RESOURCE_EXHAUSTED" not in message:
        return None
    sizes = [float(n) * 1024 ** ("KMGT".index(unit) + 1) for n, unit in re.findall(r"([\d.]+)([KMGT])\b", message)]
    return max(sizes, default=math.inf)


def compile_point(config: ConfigDict, topology: Topology, program: str, per_chip: int | None = None) -> dict:
    """One program on one topology, as numbers for JSON; bytes, FLOPs and seconds of one chip and run unless named otherwise.

    Raises:
      ValueError: settings or a batch that do not fit the topology. RuntimeError: the compiler fails for another reason
        than memory.
    """
    with tempfile.TemporaryDirectory(prefix="flowlm-plan-") as name:
        directory = Path(name)
        request = {"config": json.loads(config.to_json()), "topology": topology.name, "program": program}
        (directory / "request.json").write_text(json.dumps(request | {"per_chip": per_chip}))
        with (directory / "log").open("w") as log:
            line = [sys.executable, "-m", "flowlm.scale.ahead_of_time", name]
            child = subprocess.Popen(line, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)
        try:
            while child.poll() is None and not _dumped(directory):
                time.sleep(0.1)
        finally:
            child.kill()
            child.wait()
        if not _dumped(directory):
            return _failed(directory, topology)

        def newest(pattern):
            return max((directory / "dump").glob(pattern), key=lambda p: p.stat().st_mtime).read_text()

        memory = hlo.memory(
            newest("*after_optimizations-memory-usage-report.txt"), newest("*after_optimizations-buffer-assignment.txt")
        )
        partitioned = hlo.parse(newest("*after_tpu-spmd-partitioning*.txt"))
        final = hlo.parse(newest("*after_optimizations.txt"))
        counts = json.loads((directory / "counts.json").read_text())
    return _numbers(topology, counts, memory, partitioned, final)


def _dumped(directory: Path) -> bool:
    """Whether the dumps that are read are whole. Both of these must be, because which is the last depends on the compiler."""

    def whole(pattern: str, sign: str) -> bool:
        paths = [p for p in (directory / "dump").glob(pattern) if time.time() - p.stat().st_mtime > 0.1]
        return any(re.search(sign, path.read_text()) for path in paths)

    # The last computation of a program is its entry, and a brace closes it.
    return whole("*optimizations-memory-usage-report.txt", "Total bytes: .*\n") and whole(
        "*after_optimizations.txt", r"(?s)\nENTRY .*\n\}\s*\Z"
    )


def _failed(directory: Path, topology: Topology) -> dict:
    """What is known of a program that the compiler refused: no more than the memory it needs."""
    path = directory / "error.json"
    if not path.exists():
        raise RuntimeError(
            f"compiling for {topology.name} ended without a word:\n{(directory / 'log').read_text()[-800:]}"
        )
    kind, message = json.loads(path.read_text())
    needed = needed_memory(message)
    if needed is None:
        raise (ValueError if kind == "ValueError" else RuntimeError)(f"{topology.name}: {message}")
    counts = json.loads((directory / "counts.json").read_text())
    hbm = {"total": needed, "reserved": topology.chip.reserved, "limit": topology.chip.hbm}
    return {**counts, "per_chip": counts["rows"] / counts["chips"], "hbm": hbm, "fits": False}


def _numbers(
    topology: Topology, counts: Mapping, memory: hlo.Memory, partitioned: hlo.Module, final: hlo.Module
) -> dict:
    chip, unknown = topology.chip, []
    products = hlo.products(partitioned)
    kernels = counts["kernels"] / counts["chips"]
    kinds: dict[str, dict] = defaultdict(lambda: {"count": 0.0, "bytes": 0.0, "wire": 0.0})
    for each in hlo.collectives(final):
        for key, value in (("count", 1), ("bytes", each.bytes), ("wire", each.wire)):
            kinds[each.kind][key] += each.times * value
    dcn = kinds["dcn"]["wire"] if "dcn" in kinds else 0.0
    wire = sum(kind["wire"] for kind in kinds.values()) - dcn
    traffic, passes = hlo.traffic(final), sum(flops * times for flops, times in products) + kernels
    list(hlo.walk(final, unknown))
    hbm = {**memory._asdict(), "reserved": chip.reserved, "limit": chip.hbm}
    return {
        **counts,
        "per_chip": counts["rows"] / counts["chips"],
        "hbm": hbm,
        "fits": memory.total + chip.reserved <= chip.hbm,
        "flops_per_chip": sum(flops for flops, _ in products) + kernels,
        "passes_per_chip": passes,
        "traffic": traffic,
        "collectives": kinds,
        "wire": wire,
        "dcn": dcn,
        "loops_of_unknown_length": unknown,
        "roofline": roofline(chip, passes, traffic, wire)._asdict(),
    }


def total(point: Mapping) -> float:
    """Bytes of HBM that a program needs of a chip, with what the runtime keeps."""
    return point["hbm"]["total"] + point["hbm"]["reserved"]


if __name__ == "__main__":
    compile_here(Path(sys.argv[1]))
