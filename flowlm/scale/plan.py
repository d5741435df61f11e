"""Says what a run needs of the chips that it is meant for, before any is rented.

The training step, the sampler and the held-out likelihood of an experiment are compiled by the TPU compiler for a named topology,
on a CPU host and without a TPU (ahead_of_time.py). Memory, products and bytes on the wire are what the compiler decided (hlo.py);
times are a roofline of published peaks (costs.py); none was measured.
"""

import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
from ml_collections import ConfigDict

from flowlm.engine import sharding
from flowlm.engine.build import build
from flowlm.objectives.flow import Flow
from flowlm.scale.ahead_of_time import (
    Topology,
    check_compiler,
    compile_point,
    needed_memory,
    parse_topology,
    total,
    trace_step,
)
from flowlm.scale.costs import EFFICIENCY, forward_flops
from flowlm.scale.evaluations import evaluation_costs, likelihood_program
from flowlm.scale.tables import GIB, print_plan

RESOLUTION = 1 / 32  # share of itself by which the batch that is found may be too small
MOST = 2**14  # sequences on a chip, the most that are tried


# ---- The largest batch -------------------------------------------------------------------------------------------


def largest_batch(need: Callable[[int], float], unit: int, limit: float, needs: Mapping[int, float]) -> int:
    """The largest multiple of `unit` whose need is at most `limit`, to within RESOLUTION of itself; 0 if none is.

    A bisection, but to save compilations it tries where the line through two known needs meets the limit, not the middle.

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
        # Before any failure the guess is at least slightly above `low`; afterwards it stays an eighth of the gap inside both ends.
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
    evaluating: Callable[[int], Mapping[str, Any]] | None = None,
) -> None:
    """Plans a run on every topology, prints the table and, with `out`, writes plan.json, plan.md and plan.png there.

    Args:
      per_chip: sequences on each chip, in place of config.batch_size over all.
      largest: also search the most that fit.
      dense: compile also the step of the flow written over the whole vocabulary.
      evaluating: rows of a sampler's call -> the work of the run's evaluations (evaluations.py); without it they are not planned.

    Raises:
      ValueError: bad settings, an unknown topology, `dense` for another family than flow. ImportError: no TPU compiler.
    """
    places = [parse_topology(name) for name in topologies]
    experiment = build(config, config.model.vocab_size)
    if dense and type(experiment.family) is not Flow:
        raise ValueError(f"--dense is of the family flow, not {config.objective.family}")
    check_compiler()
    family = experiment.family
    names = ["train", *["dense"] * dense, *["sample"] * bool(family.samplers())]
    names += ["held_out"] * bool(family.likelihoods())
    if evaluating is not None:
        names += [name for name in map(likelihood_program, family.likelihoods()) if name not in names]
    points = []
    with ThreadPoolExecutor(2) as pool:
        try:
            jobs = {
                (p.name, name): pool.submit(compile_point, config, p, name, per_chip) for p in places for name in names
            }
            for place in places:
                point = {"topology": place.name, **{name: jobs[place.name, name].result() for name in names}}
                points.append({**point, "estimate": _estimate(config, place, point["train"])})
                if evaluating is not None:
                    points[-1]["evaluation"] = evaluation_costs(config, point, evaluating)
            if largest:
                unit = config.accumulation * experiment.family.group
                most = partial(_most, config, unit)
                found = [pool.submit(most, *pair) for pair in zip(places, points, strict=True)]
                for point, job in zip(points, found, strict=True):
                    point["largest_per_chip"] = job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    report = {"points": points, "efficiency": EFFICIENCY, "versions": versions, "config": json.loads(config.to_json())}
    print_plan(report, out)


def _most(config: ConfigDict, unit: int, place: Topology, point: Mapping) -> int:
    """The largest batch of training, from the point that is known already."""

    def need(rows):
        return total(compile_point(config, place, "train", rows))

    known = {int(point["train"]["per_chip"]): total(point["train"])}
    return largest_batch(need, unit, place.chip.hbm, known)


def network_flops(config: ConfigDict) -> float:
    """FLOPs that training the network itself takes for a token: three forward passes, in closed form."""
    model = config.model
    fields = {name: model[name] for name in ("width", "blocks", "cond", "time_embeddings")}
    return 3 * forward_flops(**fields, vocab=model.vocab_size, length=config.data.length)


def _estimate(config: ConfigDict, place: Topology, point: Mapping) -> dict:
    """What the roofline suggests for training. Its `mfu` is the share of the chip's peak that network_flops alone are."""
    network = network_flops(config)
    tokens = point["per_chip"] * config.data.length
    out = {"network_flops_per_token": network, "flops_per_token": point["flops"] / (point["rows"] * config.data.length)}
    if "roofline" in point:
        seconds = point["roofline"]["estimate"]
        out |= {"mfu": network * tokens / seconds / place.chip.flops, "tokens_per_second_per_chip": tokens / seconds}
    return out


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
        if needed_memory(str(error)) is None:
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
    unit, device = config.accumulation * experiment.family.group, jax.devices()[0]
    source = "given"
    if limit is None:
        limit, source = _limit(device)
    first = unit * max(1, config.batch_size // sharding.make_layout(config).mesh.size // unit)
    need = partial(device_need, config)
    largest = largest_batch(need, unit, limit, {first: need(first)})
    print(f"{device.device_kind}: {limit / GIB:.2f} GiB ({source})")
    print(f"largest batch that fits: {largest:,} sequences of {config.data.length} tokens on each device")
    return largest
