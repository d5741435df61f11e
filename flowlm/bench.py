"""Memory and time of one training step, or one draw of samples, against another's.

    python -m flowlm.bench [--pairs=flow/dense,psd/flow] [--batch=8 --length=128 --vocab=30522 --width=256 --blocks=8] [--out=FILE]

    flow    noise drawn in embedding space (prior.py), logits one chunk at a time (vocab.py)
    dense   x0 [B, L, V] drawn, x_t = (1 - t) x0 + t one_hot, z = x_t @ E, all logits, log-softmax
    bare    forward and backward of the network alone on a state that is given: no vocabulary, the floor of a step
    input   a batch of token rows read as training reads them (the quickstart's speeches): time alone
    psd, lsd, esd, ...   a flow map distilled from a teacher of the same size (objectives/flow_map.py)
    sample  a batch of token rows by a flow map in one step, from key to ids
    forward the network and its output layer alone: ids of a state that is given
    dense_sample  the same rows, in law, from x0 [B, L, V] drawn, z = x0 @ E and all logits

`flow` and `dense` train one model: same parameters, same expected loss and gradient (tests/test_bench.py); each step is
loss, gradient, AdamW and moving average. Every measurement runs in a process of its own, for peak memory belongs to a
process, and they take turns, so that whatever else the machine does slows all. Three views of memory, in MiB:

    resident      peak resident memory of the process while it steps, less what was resident when the step was compiled
    step          XLA's own account of the step: temporaries (activations, gradients, noise, logits)
    state + step  the same and the training state, which is equal in both

Resident memory says nothing where arrays live on an accelerator; XLA's account does.
"""

import ctypes
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from absl import flags, logging
from rich.console import Console
from rich.table import Table

from flowlm import train_state
from flowlm import vocab as vocabulary
from flowlm.config import objective
from flowlm.data import open_dataset
from flowlm.models import make_network
from flowlm.objectives import make_family
from flowlm.objectives.dense_flow import DenseFlow, dense_sample
from flowlm.objectives.flow import Flow
from flowlm.objectives.flow_map import TARGETS
from flowlm.optimizers import make_optimizer
from flowlm.prior import Gaussian
from flowlm.time_warp import TimeWarp

FLAGS = flags.FlagValues()  # of its own: `flowlm` has some of these names too
SETTINGS = {"vocab": 30522, "width": 256, "blocks": 8, "batch": 8, "length": 128}
for _name, _default in SETTINGS.items():
    flags.DEFINE_integer(_name, _default, "of the model and its batch", 1, flag_values=FLAGS)
flags.DEFINE_enum("remat", "dots", ["none", "dots", "full"], "model.remat of both formulations", flag_values=FLAGS)
flags.DEFINE_integer("rounds", 3, "processes of each formulation", 1, flag_values=FLAGS)
flags.DEFINE_integer("repeats", 3, "timed steps of a process, after one that warms up", 1, flag_values=FLAGS)
flags.DEFINE_string("out", None, "write every measurement there, as JSON", flag_values=FLAGS)
SAMPLING = ["sample", "dense_sample", "forward"]
FORMULATIONS = ["flow", "dense", "bare", "input", *TARGETS, *SAMPLING]
flags.DEFINE_list(
    "pairs", ["flow/dense"], f"what to compare with what, of {', '.join(FORMULATIONS)}", flag_values=FLAGS
)
flags.DEFINE_enum("formulation", None, FORMULATIONS, "measure this one here and print JSON", flag_values=FLAGS)

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

    def loss(self, net, params, aux, batch, keys):
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
    """(compiled step, its state, its other arguments)."""
    schedule = optax.constant_schedule(3e-4)
    optimizer = make_optimizer(schedule, b1=0.9, b2=0.999, weight_decay=0.0, decay_pattern="kernel$", clip_norm=1.0)
    step = train_state.make_step(net, family, optimizer, seed=0, ema_decay=0.999, accumulation=1, dropout=False)
    ids = jax.random.randint(jax.random.key(1), (batch, net.length), 0, net.vocab, dtype=jnp.int32)
    state = jax.block_until_ready(jax.jit(lambda: train_state.init_state(net, family, optimizer, 0))())
    teacher = train_state.Teacher(jax.tree.map(jnp.copy, state.params)) if distils else None
    return jax.jit(step, donate_argnums=0).lower(state, ids, teacher).compile(), state, (ids, teacher)


def _sampling(formulation: str, net, family, batch: int):
    """(compiled draw, the parameters, its other argument)."""
    params = jax.jit(lambda key: net.prepared(net.init(key)))(jax.random.key(0))
    argument = jax.random.key(1)
    if formulation == "sample":
        draw = lambda params, key: family.sample(net, params, key, batch, 1)
    elif formulation == "dense_sample":
        draw = lambda params, key: dense_sample(net, params, key, batch)
    else:
        time = jnp.zeros((batch,))
        draw = lambda params, z: vocabulary.argmax(net.head(params), net.apply(params, z, time, time + 1))
        argument = jax.random.normal(jax.random.key(1), (batch, net.length, net.width))
    return jax.jit(draw).lower(params, argument).compile(), params, (argument,)


def measure(formulation: str, vocab, width, blocks, batch, length, remat: str, repeats: int) -> dict:
    """Compiles and runs the step or draw here: {seconds: [repeats], and bytes for each view of memory}."""
    if formulation == "input":
        return {"seconds": _reading(batch, length, repeats)}
    warp = TimeWarp("gaussian", "ambient", vocab, width)
    distils = formulation in TARGETS
    if distils or formulation in SAMPLING:
        fields = objective("flow_map").to_dict() | {"target": formulation if distils else "psd", "tau_max": 0.99}
        family = make_family(warp=warp, teacher=True, **fields)
    else:
        family = {"flow": Flow, "dense": DenseFlow, "bare": Bare}[formulation](Gaussian(), warp)
    net = make_network(
        vocab_size=vocab,
        length=length,
        warp=warp,
        width=width,
        blocks=blocks,
        heads=4,
        cond=128,
        dropout=0.0,
        input="raw",
        preview=False,
        output="plain",
        time_embeddings=1 if formulation in ("flow", "dense", "bare") else 2,
        time_scale=1.0,
        end_time_scale=1.0,
        gate_init=0.0,
        attention_cap=50.0,
        attention="xla",
        logit_cap=30.0,
        learned_positions=False,
        mask_token=False,
        causal=False,
        remat=remat,
        dtype="float32",
        loss_weight=False,
    )
    compiled, state, more = (
        _sampling(formulation, net, family, batch)
        if formulation in SAMPLING
        else _training(net, family, batch, distils)
    )
    _reset_peak()
    before, seconds = _resident("VmRSS"), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        out = jax.block_until_ready(compiled(state, *more))
        seconds.append(time.perf_counter() - start)
        state = state if formulation in SAMPLING else out[0]
    account = compiled.memory_analysis()
    held = account.argument_size_in_bytes + account.output_size_in_bytes - account.alias_size_in_bytes
    return {
        "seconds": seconds[1:],
        "resident": _resident("VmHWM") - before,
        "step": account.temp_size_in_bytes,
        "state + step": held + account.temp_size_in_bytes,
    }


def compare(ours: list[dict], theirs: list[dict]) -> dict:
    """{quantity: {ours, theirs, ratio, low, high}}: medians, their ratio, and its range over rounds (ours / theirs)."""

    def line(key, number):
        pairs = [(number(a[key]), number(b[key])) for a, b in zip(ours, theirs, strict=True)]
        ratios = [a / b for a, b in pairs]
        a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
        return {"ours": a, "theirs": b, "ratio": a / b, "low": min(ratios), "high": max(ratios)}

    return {key: line(key, statistics.median if key == "seconds" else float) for key in ours[0]}


def _show(results: dict, title: str) -> None:
    table = Table(title=title)
    for column in ("one step or draw", "first", "second", "first / second", "over rounds"):
        table.add_column(column, justify="right")
    for pair, result in results.items():
        for name, line in result.items():
            scale = 1 if name == "seconds" else MIB
            label = "time, s" if name == "seconds" else f"memory, {name}, MiB"
            values = [f"{line[side] / scale:.{2 if name == 'seconds' else 0}f}" for side in ("ours", "theirs")]
            spread = f"{line['low']:.2f} .. {line['high']:.2f}"
            table.add_row(f"{pair}: {label}", *values, f"{line['ratio']:.2f}", spread)
    Console().print(table)


def _main() -> None:
    logging.set_verbosity(logging.WARNING)
    settings = {name: FLAGS[name].value for name in (*SETTINGS, "remat", "repeats")}
    if FLAGS.formulation:
        print(json.dumps(measure(FLAGS.formulation, **settings)))
        return
    command = [sys.executable, "-m", "flowlm.bench", *(f"--{name}={value}" for name, value in settings.items())]
    pairs = {pair: pair.split("/") for pair in FLAGS.pairs}
    for pair, names in pairs.items():
        if len(names) != 2 or not set(names) <= set(FORMULATIONS):
            sys.exit(f"flowlm.bench: --pairs takes FIRST/SECOND of {', '.join(FORMULATIONS)}, got {pair!r}")
    runs = {name: [] for names in pairs.values() for name in names}
    for _ in range(FLAGS.rounds):
        for name, results in runs.items():
            child = subprocess.run([*command, f"--formulation={name}"], stdout=subprocess.PIPE, text=True)
            if child.returncode:
                sys.exit(f"flowlm.bench: {name} failed, see above; was it out of memory?")
            results.append(json.loads(child.stdout.splitlines()[-1]))
    results = {pair: compare(*(runs[name] for name in names)) for pair, names in pairs.items()}
    _show(results, ", ".join(f"{name} {settings[name]}" for name in (*SETTINGS, "remat")))
    if FLAGS.out:
        report = {"settings": settings, "devices": jax.device_count(), "result": results, "runs": runs}
        report["platform"] = jax.devices()[0].device_kind
        Path(FLAGS.out).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if "--help" in sys.argv:
        sys.exit(f"{__doc__}\n{FLAGS.get_help()}")
    try:
        FLAGS(sys.argv)
    except flags.Error as error:
        sys.exit(f"flowlm.bench: {error}")
    _main()
