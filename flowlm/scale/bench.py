"""Measures memory and time of one training step, or one draw of samples, beside another's; `flowlm bench --help` says what each is.

`flow` and `dense` train one model: same parameters, same expected loss and gradient (tests/test_bench.py); each step is
loss, gradient, AdamW and moving average. Every measurement runs in a process of its own, because peak memory belongs to a
process; and they take turns, so that whatever else the machine does slows all. What runs out of memory is reported as such.
MFU is of the FLOPs in costs.py.
"""

import ctypes
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from rich.table import Table

from flowlm.config import model, objective
from flowlm.data import open_dataset
from flowlm.engine import state as train_state
from flowlm.engine.optimizers import make_optimizer
from flowlm.maths import vocab as vocabulary
from flowlm.maths.prior import Gaussian
from flowlm.maths.time_warp import TimeWarp
from flowlm.models.attention import native
from flowlm.models.network import Network, Params, Transformer
from flowlm.objectives import make_family
from flowlm.objectives.base import Auxiliary, Batch, Losses, Teacher
from flowlm.objectives.flow import Flow
from flowlm.objectives.targets import TARGETS
from flowlm.scale.costs import PEAKS, forward_flops
from flowlm.scale.dense import DenseFlow, dense_sample
from flowlm.system import storage
from flowlm.system.terminal import console

SAMPLING = ["sample", "dense_sample", "forward", "masked_sample"]
MASKED_STEPS = (
    8  # steps in which the best distilled discrete diffusion has the quality that a flow map is to have in one
)
FORMULATIONS = ["flow", "dense", "bare", "input", *TARGETS, *SAMPLING]
SMALL = model("small")
DEVICE = {
    "vocab": 50258,
    "width": SMALL.width,
    "blocks": SMALL.blocks,
    "batch": 32,
    "length": 1024,
    "remat": "full",
    "dtype": "bfloat16",
    "attention": "native",
}
DEVICE_PAIRS = ["flow/dense", "flow/bare", "sample/forward", "sample/dense_sample"]
HEAD = SMALL.width // SMALL.heads  # features of an attention head, at any width
MEMORY = "out of memory"
MEMORIES = ("resident", "peak", "step", "state + step")

MIB = 2**20


def _resident(field: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most since the last reset (VmHWM); Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _reset_peak() -> None:
    """Gives free memory back and makes now the start of VmHWM, so that what the compiler needed does not count."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


class Bare(Flow):
    """The mean square of the hidden states of noise: what a step costs whatever the vocabulary."""

    def loss(self, net: Network, params: Params, aux: Auxiliary, batch: Batch, keys: jax.Array | None) -> Losses:
        del aux
        z = jax.vmap(lambda row: jax.random.normal(row, (net.length, net.width)))(batch["noise"])
        hidden = net.apply(params, z, batch["tau"], keys=keys)
        return {"square": jnp.square(hidden).mean((1, 2))}, {}


def _reading(batch: int, length: int, repeats: int) -> list[float]:
    """Seconds of each of `repeats` batches of rows, shuffled over the whole corpus, after one that warms up."""
    rows = open_dataset("sotu", "sotu_bpe_512", length, "~/.cache/flowlm").train.shuffled(0)
    seconds = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        rows(i * batch, (i + 1) * batch)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _training(net, family, batch: int, distils: bool):
    """A training step as (compiled step, its state, its other arguments)."""
    schedule = optax.constant_schedule(3e-4)
    optimizer = make_optimizer(schedule, b1=0.9, b2=0.999, weight_decay=0.0, decay_pattern="kernel$", clip_norm=1.0)
    step = train_state.make_step(net, family, optimizer, seed=0, ema_decay=0.999, accumulation=1, dropout=False)
    ids = jax.random.randint(jax.random.key(1), (batch, net.length), 0, net.vocab, dtype=jnp.int32)
    state = jax.block_until_ready(jax.jit(lambda: train_state.init_state(net, family, optimizer, 0))())
    teacher = Teacher(jax.tree.map(jnp.copy, state.ema)) if distils else None
    return jax.jit(step, donate_argnums=0).lower(state, ids, teacher).compile(), state, (ids, teacher)


def _sampling(formulation: str, net, family, batch: int):
    """A draw of samples as (compiled draw, the parameters, its other argument)."""
    prepared = net.prepared if family.continuous else lambda params: params
    params = jax.jit(lambda key: prepared(net.init(key)))(jax.random.key(0))
    argument = jax.random.key(1)
    if formulation in ("sample", "masked_sample"):
        steps = 1 if formulation == "sample" else MASKED_STEPS

        def draw(params, key):
            return family.sample(net, params, key, batch, steps)
    elif formulation == "dense_sample":

        def draw(params, key):
            return dense_sample(net, params, key, batch)
    else:
        time = jnp.zeros((batch,))

        def draw(params, z):
            return vocabulary.argmax(net.head(params), net.apply(params, z, time, time + 1))

        argument = jax.random.normal(jax.random.key(1), (batch, net.length, net.width))
    return jax.jit(draw).lower(params, argument).compile(), params, (argument,)


def _fields(formulation: str, width: int, blocks: int) -> dict:
    """Settings that both the network and the closed form of its FLOPs take."""
    times = {"flow": 1, "dense": 1, "bare": 1, "masked_sample": 0}.get(formulation, 2)
    return {"width": width, "blocks": blocks, "cond": SMALL.cond, "time_embeddings": times}


def measure(
    formulation: str,
    *,
    vocab: int,
    width: int,
    blocks: int,
    batch: int,
    length: int,
    remat: str,
    dtype: str,
    attention_cap: float,
    attention: str,
    repeats: int,
) -> dict:
    """Compiles and runs the step or draw here: {seconds: [repeats], bytes for each view of memory, the attention that ran}.

    Raises:
      ValueError: settings that no network has. jax.errors.JaxRuntimeError: it does not fit.
    """
    if formulation == "input":
        return {"seconds": _reading(batch, length, repeats)}
    warp = TimeWarp("gaussian", "ambient", vocab, width)
    distils = formulation in TARGETS
    if formulation == "masked_sample":
        family = make_family(warp=warp, teacher=False, **objective("masked").to_dict())
    elif distils or formulation in SAMPLING:
        fields = objective("flow_map").to_dict() | {"target": formulation if distils else "psd", "tau_max": 0.99}
        family = make_family(warp=warp, teacher=True, **fields)
    else:
        family = {"flow": Flow, "dense": DenseFlow, "bare": Bare}[formulation](Gaussian(), warp)
    if attention == "native":
        asked = dict(cap=attention_cap, causal=False, length=length, dtype=dtype)
        attention = "xla" if distils and family.differentiates else native(jax.default_backend(), **asked)
    fields = _fields(formulation, width, blocks) | {"vocab_size": vocab, "heads": max(1, width // HEAD)}
    fields |= {"remat": remat, "dtype": dtype, "attention_cap": attention_cap, "attention": attention}
    fields["mask_token"] = formulation == "masked_sample"
    net = Transformer(length=length, warp=warp, **SMALL.to_dict() | fields)
    compiled, state, more = (
        _sampling(formulation, net, family, batch)
        if formulation in SAMPLING
        else _training(net, family, batch, distils)
    )
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        _reset_peak()
    before, seconds = _resident("VmRSS"), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        out = jax.block_until_ready(compiled(state, *more))
        seconds.append(time.perf_counter() - start)
        state = state if formulation in SAMPLING else out[0]
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    account = compiled.memory_analysis()
    held = account.argument_size_in_bytes + account.output_size_in_bytes - account.alias_size_in_bytes
    return {
        "seconds": seconds[1:],
        **({"resident": _resident("VmHWM") - before} if on_cpu else {}),
        **({} if peak is None else {"peak": peak}),
        "step": account.temp_size_in_bytes,
        "state + step": held + account.temp_size_in_bytes,
        "attention": attention,
    }


def _child(formulation: str, settings: dict) -> dict:
    """What `measure` gives, and the kind of the device; where it does not fit, the reason and that kind."""
    try:
        result = measure(formulation, **settings)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        result = {MEMORY: str(error).splitlines()[0]}
    return {"device": jax.devices()[0].device_kind, **result}


def _run(formulation: str, settings: dict) -> dict:
    """What `_child` gives in a process of its own, which alone holds the device, because this process never starts it."""
    flags = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "flowlm", "bench", f"--formulation={formulation}", *flags]
    # XLA preallocates GPU memory, which would hide the peak of the step itself.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if child.returncode == -signal.SIGKILL:  # as Linux ends a process that takes too much memory
        return {MEMORY: "killed by the system"}
    if child.returncode:
        raise RuntimeError(f"{formulation} failed, see above")
    return json.loads(child.stdout.splitlines()[-1])


def rates(formulation: str, seconds: float, device: str | None, settings: dict) -> dict:
    """{tokens_per_second, mfu}: the second only where the device's peak is known and a network runs.

    Training counts as three forward passes, because recomputation, noise and teachers are not the model's own work.
    """
    out = {"tokens_per_second": settings["batch"] * settings["length"] / seconds}
    if formulation != "input" and device in PEAKS:
        fields = _fields(formulation, settings["width"], settings["blocks"])
        sizes = {"vocab": settings["vocab"], "length": settings["length"], "with_output": formulation != "bare"}
        passes = MASKED_STEPS if formulation == "masked_sample" else 1 if formulation in SAMPLING else 3
        flops = passes * forward_flops(**fields, **sizes)
        out["mfu"] = flops * out["tokens_per_second"] / PEAKS[device]
    return out


def compare(ours: list[dict], theirs: list[dict]) -> dict:
    """{quantity: {ours, theirs, ratio, low, high}}: medians, their ratio, and its range over rounds (ours / theirs)."""

    def line(key, number):
        pairs = [(number(a[key]), number(b[key])) for a, b in zip(ours, theirs, strict=True)]
        ratios = [a / (b or math.nan) for a, b in pairs]  # a small draw may need no memory at all
        a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
        return {"ours": a, "theirs": b, "ratio": a / (b or math.nan), "low": min(ratios), "high": max(ratios)}

    both = [key for key in ours[0] if key in theirs[0] and key in ("seconds", *MEMORIES)]
    return {key: line(key, statistics.median if key == "seconds" else float) for key in both}


def summarize(runs: dict[str, list[dict]], settings: dict) -> dict[str, dict]:
    """For each formulation the medians over rounds: {seconds, tokens_per_second, mfu, bytes ...}, or {out of memory: why}."""
    out = {}
    for name, results in runs.items():
        if MEMORY in results[-1]:
            out[name] = {MEMORY: results[-1][MEMORY]}
            continue
        seconds = statistics.median(statistics.median(result["seconds"]) for result in results)
        out[name] = {"seconds": seconds, **rates(name, seconds, results[-1]["device"], settings)}
        for key in MEMORIES:
            if key in results[-1]:
                out[name][key] = statistics.median(result[key] for result in results)
    return out


def _show(summary: dict, results: dict, title: str) -> None:
    screen = console(132)
    views = [key for key in MEMORIES if any(key in line for line in summary.values())]
    table = Table(title=title)
    for column in ("one step or draw", "time, s", "tokens/s", "MFU", *(f"{key}, MiB" for key in views)):
        table.add_column(column, justify="right")
    for name, line in summary.items():
        if MEMORY in line:
            table.add_row(name, MEMORY)
            continue
        mfu = f"{line['mfu']:.1%}" if "mfu" in line else "-"
        memory = (f"{line[key] / MIB:,.0f}" if key in line else "-" for key in views)
        table.add_row(name, f"{line['seconds']:.3g}", f"{line['tokens_per_second']:,.0f}", mfu, *memory)
    screen.print(table)
    for name, line in summary.items():
        if MEMORY in line:
            screen.print(f"{name}: {line[MEMORY]}")
    table = Table()
    for column in ("first / second", "of", "ratio", "over rounds"):
        table.add_column(column, justify="right")
    for pair, result in results.items():
        for name, line in result.items():
            table.add_row(pair, name, f"{line['ratio']:.2f}", f"{line['low']:.2f} .. {line['high']:.2f}")
    screen.print(table)


def measure_here(formulation: str, settings: dict) -> None:
    """Prints `measure` of one formulation as JSON. Raises ValueError: there is none of that name, or no such network."""
    if formulation not in FORMULATIONS:
        raise ValueError(f"--formulation takes one of {', '.join(FORMULATIONS)}, got {formulation!r}")
    print(json.dumps(_child(formulation, settings)))


def bench(pairs: Sequence[str], settings: dict, rounds: int, out: str | None = None) -> None:
    """Measures pairs such as "flow/dense", prints their tables and writes all measurements to `out` as JSON.

    Raises:
      ValueError: pairs or settings that make no sense, or a place where nothing can be written. RuntimeError: a process failed.
    """
    split = {pair: pair.partition("/")[::2] for pair in pairs}
    for pair, names in split.items():
        if not set(names) <= set(FORMULATIONS):
            raise ValueError(f"--pairs takes FIRST/SECOND of {', '.join(FORMULATIONS)}, got {pair!r}")
    if out:
        if Path(out).is_dir():
            raise ValueError(f"{out} is a directory, where a file is wanted: give --out=FILE")
        storage.check_writable(Path(out).absolute().parent)
    runs = {name: [] for names in split.values() for name in names}
    for _ in range(rounds):
        for name, results in runs.items():
            if not results or MEMORY not in results[-1]:
                results.append(_run(name, settings))
    summary = summarize(runs, settings)
    results = {
        pair: compare(*(runs[name] for name in names))
        for pair, names in split.items()
        if not any(MEMORY in summary[name] for name in names)
    }
    told = [result for results in runs.values() for result in results]

    def used(key):
        return ", ".join(dict.fromkeys(result[key] for result in told if key in result))

    device = used("device")
    _show(summary, results, ", ".join(f"{name} {value}" for name, value in settings.items()))
    peak = f"{PEAKS[device] / 1e12:g} TFLOP/s" if device in PEAKS else "not known here, so no MFU"
    print(f"{device}: bfloat16 peak {peak}; attention {used('attention')}")
    if out:
        report = {"settings": settings, "platform": device, "summary": summary, "result": results, "runs": runs}
        storage.path(out).parent.mkdir(parents=True, exist_ok=True)
        storage.path(out).write_text(json.dumps(report, indent=2) + "\n")
