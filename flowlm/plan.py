"""What a run needs of the chips it is meant for, before any is rented.

The training step and the sampler of an experiment are compiled by the TPU compiler for a named topology, on a CPU host and
without a TPU. Memory, products and bytes on the wire are what the compiler decided (hlo.py); times are a roofline of
published peaks (costs.py) and nothing that was measured.

Code generation takes most of a compilation and none of it is needed. So every program is compiled in a process of its own,
with XLA's dumps on, and that process is stopped as soon as the report of its memory lies there: seconds at any number of chips.
"""

import importlib.metadata
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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from flowlm import evaluation, hlo, sharding, train_state
from flowlm.costs import CHIPS, EFFICIENCY, Chip, count_flops, forward_flops, roofline
from flowlm.curves import draw_panels
from flowlm.experiment import abstract_state, build, jit_step
from flowlm.objectives.autoregressive import Autoregressive
from flowlm.objectives.dense_flow import DenseFlow
from flowlm.objectives.flow import Flow

# Of a process that compiles for TPUs where there are none: without them libtpu looks for its cloud, or for a lock file.
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
RESOLUTION = 1 / 32  # to which the largest batch is found
MOST = 2**14  # sequences on a chip, where that search ends
GIB = 2**30


# ---- Programs ----------------------------------------------------------------------------------------------------


class Program(NamedTuple):
    """traced: ready to lower. devices: that run it. rows: sequences of one run, over all of them."""

    traced: jax.stages.Traced
    devices: int
    rows: int


def trace_step(
    config: ConfigDict, devices: Sequence[Any], per_device: int | None = None, dense: bool = False
) -> Program:
    """The training step of a run on these devices, without an array being made.

    Args:
      per_device: sequences on each device, in place of config.batch_size over all. A teacher has the student's network; what
        config.teacher names is not read.
      dense: the same step of a flow written over the whole vocabulary, for comparison.

    Raises:
      ValueError: bad settings, or a batch that does not divide over the devices.
    """
    experiment = build(config, config.model.vocab_size)
    if dense:
        experiment = experiment._replace(family=DenseFlow(experiment.family.prior, experiment.family.warp))
    layout = sharding.make_layout(config, devices)
    # A chip's share: with a model axis several chips work on one row.
    rows = config.batch_size if per_device is None else per_device * layout.mesh.size
    sharding.check_batch(rows, config.accumulation, getattr(experiment.family, "group", 1), layout.devices)
    state = abstract_state(experiment, layout)
    teacher = None
    if config.teacher:
        two = config.objective.to_dict().get("target") == "residual"
        teacher = train_state.Teacher(state.params, state.params if two else None)
    ids = jax.ShapeDtypeStruct((rows, config.data.length), jnp.int32, sharding=layout.rows)
    return Program(jit_step(config, experiment, layout, state).trace(state, ids, teacher), layout.mesh.size, rows)


def trace_sampler(config: ConfigDict, devices: Sequence[Any], per_device: int | None = None) -> Program:
    """One call of the sampler that evaluations use, in one step, or in as many as an autoregressive model needs."""
    del per_device  # a call draws the same number of rows everywhere
    experiment = build(config, config.model.vocab_size)
    net, family = experiment.net, experiment.family
    layout = sharding.make_layout(config, devices)
    steps = config.data.length - 1 if isinstance(family, Autoregressive) else 1
    sampler = evaluation.Sampler(net, [*evaluation.samplers(family).values()][-1], steps, layout)
    params = abstract_state(experiment, layout).params
    if hasattr(family, "prior"):
        shapes = jax.eval_shape(net.prepared, params)
        params = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, layout.places(shapes)
        )
    key = jax.eval_shape(lambda: jax.random.key(0))
    return Program(sampler.trace(params, key), layout.mesh.size, sampler.rows)


PROGRAMS: dict[str, Callable[..., Program]] = {
    "train": trace_step,
    "dense": partial(trace_step, dense=True),
    "sample": trace_sampler,
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


def _needed(message: str) -> float | None:
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
            line = [sys.executable, "-m", "flowlm.plan", name]
            child = subprocess.Popen(line, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)
        try:
            while child.poll() is None and not _dumped(directory):
                time.sleep(0.1)
        finally:
            child.kill()
            child.wait()
        if not _dumped(directory):
            return _failed(directory, topology)
        newest = lambda pattern: max((directory / "dump").glob(pattern), key=lambda p: p.stat().st_mtime).read_text()
        memory = hlo.memory(
            newest("*after_optimizations-memory-usage-report.txt"), newest("*after_optimizations-buffer-assignment.txt")
        )
        partitioned = hlo.parse(newest("*after_tpu-spmd-partitioning*.txt"))
        final = hlo.parse(newest("*after_optimizations.txt"))
        counts = json.loads((directory / "counts.json").read_text())
    return _numbers(topology, counts, memory, partitioned, final)


def _dumped(directory: Path) -> bool:
    """Whether the report of memory, the last of the dumps that are read, is there and whole."""
    reports = list((directory / "dump").glob("*after_optimizations-memory-usage-report.txt"))
    return any("Total bytes" in report.read_text() and time.time() - report.stat().st_mtime > 0.1 for report in reports)


def _failed(directory: Path, topology: Topology) -> dict:
    """A point of which only the need of memory is known."""
    path = directory / "error.json"
    if not path.exists():
        raise RuntimeError(
            f"compiling for {topology.name} ended without a word:\n{(directory / 'log').read_text()[-800:]}"
        )
    kind, message = json.loads(path.read_text())
    needed = _needed(message)
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


# ---- The largest batch -------------------------------------------------------------------------------------------


def largest_batch(need: Callable[[int], float], unit: int, limit: float, needs: Mapping[int, float]) -> int:
    """The largest multiple of `unit` whose need is at most `limit`, to within RESOLUTION of itself; 0 if none is.

    Bisection, but where the line through two known needs meets the limit rather than in the middle.

    Args:
      need: bytes for so many sequences, growing; infinite where that is all that is known.
      needs: what is known already, at least one.
    """
    needs = {rows // unit: bytes for rows, bytes in needs.items() if rows % unit == 0 and rows} or {1: need(unit)}
    end = MOST // unit + 1
    while True:
        low = max((n for n, bytes in needs.items() if bytes <= limit), default=0)
        high = min((n for n, bytes in needs.items() if bytes > limit), default=end)
        gap = high - low
        if gap <= max(1, RESOLUTION * low):
            return low * unit
        known = sorted((abs(bytes - limit), n, bytes) for n, bytes in needs.items() if math.isfinite(bytes))[:2]
        guess = low + gap / 2
        if len(known) == 2 and known[0][2] != known[1][2]:
            (_, n, bytes), (_, m, others) = known
            guess = n + (limit - bytes) * (n - m) / (bytes - others)
        elif known:
            guess = known[0][1] * limit / known[0][2]
        # While nothing has failed, up to the line or a little beyond; then always further in by an eighth.
        bounds = (low * (1 + 2 * RESOLUTION), end) if high == end else (low + gap / 8, high - gap / 8)
        guess = min(max(guess, bounds[0]), bounds[1])
        guess = min(max(int(guess), low + 1), high - 1)
        needs[guess] = need(guess * unit)


# ---- The command -------------------------------------------------------------------------------------------------


def plan(
    config: ConfigDict,
    topologies: Sequence[str],
    out: str | None,
    per_chip: int | None,
    largest: bool,
    dense: bool = False,
) -> None:
    """Plans a run on every topology, prints the table and, with `out`, writes plan.json, plan.md and plan.png there.

    Args:
      per_chip: sequences on each chip, in place of config.batch_size over all. largest: also search the most that fit.
      dense: compile also the step of the flow written over the whole vocabulary.

    Raises:
      ValueError: bad settings, an unknown topology, `dense` for another family than flow. ImportError: no TPU compiler.
    """
    places = [parse_topology(name) for name in topologies]
    experiment = build(config, config.model.vocab_size)
    if dense and type(experiment.family) is not Flow:
        raise ValueError(f"--dense is of the family flow, not {config.objective.family}")
    check_compiler()
    names = ["train", *["dense"] * dense, *["sample"] * bool(evaluation.samplers(experiment.family))]
    points = []
    with ThreadPoolExecutor(2) as pool:
        try:
            jobs = {
                (p.name, name): pool.submit(compile_point, config, p, name, per_chip) for p in places for name in names
            }
            for place in places:
                point = {"topology": place.name, **{name: jobs[place.name, name].result() for name in names}}
                points.append({**point, "estimate": _estimate(config, place, point["train"])})
            if largest:
                unit = config.accumulation * getattr(experiment.family, "group", 1)
                most = partial(_most, config, unit)
                found = [pool.submit(most, *pair) for pair in zip(places, points, strict=True)]
                for point, job in zip(points, found, strict=True):
                    point["largest_per_chip"] = job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    report = {"points": points, "efficiency": EFFICIENCY, "versions": versions, "config": json.loads(config.to_json())}
    _table(report, out)


def _total(point: Mapping) -> float:
    return point["hbm"]["total"] + point["hbm"]["reserved"]


def _most(config: ConfigDict, unit: int, place: Topology, point: Mapping) -> int:
    """The largest batch of training, from the point that is known already."""
    need = lambda rows: _total(compile_point(config, place, "train", rows))
    known = {int(point["train"]["per_chip"]): _total(point["train"])}
    return largest_batch(need, unit, place.chip.hbm, known)


def network_flops(config: ConfigDict) -> float:
    """Of training, FLOPs a token of the network itself: three forward passes, in closed form."""
    model = config.model
    fields = {name: model[name] for name in ("width", "blocks", "cond", "time_embeddings")}
    return 3 * forward_flops(**fields, vocab=model.vocab_size, length=config.data.length)


def _estimate(config: ConfigDict, place: Topology, point: Mapping) -> dict:
    """What the roofline suggests for training. mfu: network_flops alone, of what the chip could do in that time."""
    network = network_flops(config)
    tokens = point["per_chip"] * config.data.length
    out = {"network_flops_per_token": network, "flops_per_token": point["flops"] / (point["rows"] * config.data.length)}
    if "roofline" in point:
        seconds = point["roofline"]["estimate"]
        out |= {"mfu": network * tokens / seconds / place.chip.flops, "tokens_per_second_per_chip": tokens / seconds}
    return out


def rows_of(report: Mapping) -> list[tuple[str, list[str]]]:
    """The table: (quantity, one cell for each topology)."""
    points = report["points"]
    rows = []

    def row(label, number, show=None):
        def cell(point):
            try:
                value = number(point)
            except KeyError:  # a program that does not fit has no more to tell than that
                return "-"
            if isinstance(value, str):
                return value
            return show.format(value) if show else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

        cells = [cell(point) for point in points]
        if set(cells) != {"-"}:
            rows.append((label, cells))

    train, sample = (lambda p: p["train"]), (lambda p: p["sample"])
    row("chips", lambda p: train(p)["chips"], "{:,}")
    row("sequences per chip", lambda p: train(p)["per_chip"], "{:g}")
    row("HBM: state and batch, GiB", lambda p: train(p)["hbm"]["arguments"] / GIB)
    row("HBM: temporaries, GiB", lambda p: train(p)["hbm"]["temporaries"] / GIB)
    row("HBM: peak, GiB", lambda p: _total(train(p)) / GIB)
    row("of GiB", lambda p: train(p)["hbm"]["limit"] / GIB)
    row("fits", lambda p: "yes" if train(p)["fits"] else "**no**")
    row("most sequences per chip that fit", lambda p: p["largest_per_chip"], "{:,}")
    row("FLOPs per token, G", lambda p: p["estimate"]["flops_per_token"] / 1e9)
    row("of those the network's (closed form), G", lambda p: p["estimate"]["network_flops_per_token"] / 1e9)
    row("FLOPs per chip and step, T", lambda p: train(p)["flops_per_chip"] / 1e12)
    row("HBM traffic per chip and step, GB", lambda p: train(p)["traffic"] / 1e9)
    row("sent per chip and step, GB", lambda p: train(p)["wire"] / 1e9)
    row("sent between slices, GB", lambda p: train(p)["dcn"] / 1e9 if any(train(q).get("dcn") for q in points) else "-")
    for kind in dict.fromkeys(kind for p in points for kind in train(p).get("collectives", {}) if kind != "dcn"):
        get = lambda p, key, kind=kind: train(p)["collectives"].get(kind, {}).get(key, 0.0)
        row(f"{kind}: number, GB", lambda p, get=get: f"{get(p, 'count'):,.0f}, {get(p, 'wire') / 1e9:.3g}")
    for part in ("compute", "memory", "network"):
        row(f"roofline: {part}, ms", lambda p, part=part: 1e3 * train(p)["roofline"][part])
    row("estimate: step, ms", lambda p: 1e3 * train(p)["roofline"]["estimate"])
    row("estimate: MFU", lambda p: f"{p['estimate']['mfu']:.0%}")
    row("estimate: tokens per second and chip", lambda p: p["estimate"]["tokens_per_second_per_chip"], "{:,.0f}")
    row("written over the whole vocabulary: peak HBM, GiB", lambda p: _total(p["dense"]) / GIB)
    row("fits so", lambda p: "yes" if p["dense"]["fits"] else "**no**")
    row("sampler: sequences per chip", lambda p: sample(p)["per_chip"], "{:g}")
    row("sampler: peak HBM, GiB", lambda p: _total(sample(p)) / GIB)
    row("estimate: one call of the sampler, ms", lambda p: 1e3 * sample(p)["roofline"]["estimate"])
    return rows


def _table(report: Mapping, out: str | None) -> None:
    """Prints the table; with `out` writes it, the numbers and a picture there."""
    points, rows = report["points"], rows_of(report)
    names = ["of one chip, unless it says otherwise", *(point["topology"] for point in points)]
    table = Table(title="Planned, not run")
    for name in names:
        table.add_column(name, justify="left" if name == names[0] else "right")
    for label, cells in rows:
        table.add_row(label, *(cell.strip("*") for cell in cells))
    console = Console(width=200 if not Console().is_terminal else None)
    console.print(table)
    console.print(
        f"Times are an estimate: the largest of the three times at published peaks, divided by an efficiency of {EFFICIENCY}."
    )
    if out is None:
        return
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "plan.json").write_text(json.dumps(report, indent=2) + "\n")
    lines = [f"| {' | '.join(cells)} |" for cells in [names, *([label, *cells] for label, cells in rows)]]
    lines.insert(1, "|---" * len(names) + "|")
    (directory / "plan.md").write_text("\n".join(lines) + "\n")
    panels = {
        "HBM, peak, GiB": lambda p: _total(p["train"]) / GIB,
        "sent per chip and step, GB": lambda p: p["train"]["wire"] / 1e9,
        "most sequences per chip that fit": lambda p: p["largest_per_chip"],
        "estimated tokens per second and chip": lambda p: p["estimate"]["tokens_per_second_per_chip"],
    }
    lines: dict[str, dict[str, list]] = {name: defaultdict(list) for name in panels}
    for point in points:
        for name, number in panels.items():
            try:
                place = point["train"]["chips"], number(point)
            except KeyError:  # it does not fit, or was not asked for
                continue
            lines[name][point["topology"].partition(":")[0]].append(place)

    def finish(axes, panel):
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)

    draw_panels(directory / "plan.png", {name: line for name, line in lines.items() if line}, "chips", finish)


# ---- The device at hand ------------------------------------------------------------------------------------------


def _limit(device) -> tuple[float, str]:
    """(bytes that a program may have on a device, where that is known from)."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"], "the device's own limit"
    share = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()
    return share, "the memory of this machine, shared by its devices"


def device_need(config: ConfigDict, per_device: int) -> float:
    """Bytes that the training step needs on each device at hand, by the account of its compiler; infinite if it refuses."""
    try:
        compiled = trace_step(config, jax.devices(), per_device).traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if _needed(str(error)) is None:
            raise
        return math.inf
    account = compiled.memory_analysis()
    held = account.argument_size_in_bytes + account.output_size_in_bytes - account.alias_size_in_bytes
    return held + account.temp_size_in_bytes


def plan_device(config: ConfigDict, limit: float | None = None) -> int:
    """Finds and prints the largest batch that fits on the devices at hand. It compiles and allocates nothing.

    Args:
      limit: bytes of each device, in place of what it says itself.

    Raises:
      ValueError: bad settings.
    """
    experiment = build(config, config.model.vocab_size)
    unit, device = config.accumulation * getattr(experiment.family, "group", 1), jax.devices()[0]
    source = "given"
    if limit is None:
        limit, source = _limit(device)
    first = unit * max(1, config.batch_size // sharding.make_layout(config).mesh.size // unit)
    need = partial(device_need, config)
    largest = largest_batch(need, unit, limit, {first: need(first)})
    print(f"{device.device_kind}: {limit / GIB:.2f} GiB ({source})")
    print(f"largest batch that fits: {largest:,} sequences of {config.data.length} tokens on each device")
    return largest


if __name__ == "__main__":
    compile_here(Path(sys.argv[1]))
