"""`flowlm bench`."""

from absl.flags import FlagValues

from flowlm.cli.command import Command, choice, number, switch, text, whole, words

MEASURED = [
    whole("vocab", "tokens of the vocabulary", 30522, 1),
    whole("width", "model.width", 256, 1),
    whole("blocks", "model.blocks", 8, 1),
    whole("batch", "rows", 8, 1),
    whole("length", "tokens of a row", 128, 1),
    choice("remat", "model.remat", "dots", ["none", "dots", "full"]),
    choice("dtype", "model.dtype", "float32", ["float32", "bfloat16"]),
    number("attention_cap", "model.attention_cap", 50.0, 0.0),
    choice("attention", "model.attention; native: the device's, or xla", "xla", ["native", "xla", "splash", "cudnn"]),
    whole("repeats", "timed steps of a process, after one that warms up", 3, 1),
]
NOTES = """
What can be measured:

  flow           noise drawn in embedding space, logits one chunk at a time
  dense          x0 [B, L, V] drawn, x_t = (1 - t) x0 + t one_hot, z = x_t @ E,
                 all logits, log-softmax
  bare           forward and backward of the network alone on a state that is
                 given: no vocabulary, the floor of a step
  input          a batch of token rows read as training reads them: time alone
  psd, lsd, ...  a flow map distilled from a teacher of the same size
  sample         a batch of token rows by a flow map in one step, key to ids
  forward        the network and its output layer: ids of a state that is given
  dense_sample   the rows of `sample`, in law, from x0 [B, L, V] drawn,
                 z = x0 @ E and all logits
  masked_sample  a batch of token rows by masked diffusion in eight steps, as a
                 distilled one takes

`flow` and `dense` train one model: same parameters, same expected loss and
gradient. --device is what a run of experiments/openwebtext.py would do on the
device at hand: the small network on 1,024 tokens in bfloat16, all of it
recomputed, but no dropout; what is given beside it overrides that. A GPU's own
attention has no soft-cap: --attention_cap=0.

Every measurement runs in a process of its own, and they take turns, so that
whatever else the machine does slows all. Memory, in MiB:

  resident      the process's peak while it steps, less what it had when the
                step was compiled (CPU)
  peak          the most that the process had in use on the device
  step          XLA's own account of the step: activations, gradients, noise,
                logits
  state + step  the same and the training state, which is equal in both

MFU is the network's own FLOPs, in closed form, over the device's published
bfloat16 peak."""


def _bench(values: FlagValues) -> None:
    from flowlm.scale import bench

    names = [flag.name for flag in MEASURED]
    settings, pairs = {name: values[name].value for name in names}, values.pairs
    if values.device:
        settings |= {name: value for name, value in bench.DEVICE.items() if not values[name].present}
        pairs = values.pairs if values["pairs"].present else bench.DEVICE_PAIRS
    if values.formulation:
        bench.measure_here(values.formulation, settings)
    else:
        bench.bench(pairs, settings, values.rounds, values.out)


BENCH = Command(
    "bench",
    "memory and time of one step, or one draw, against another's",
    [
        words("pairs", "FIRST/SECOND,...", "what to compare with what, of those below", ["flow/dense"]),
        switch("device", "settings and pairs of a real run on the device at hand"),
        *MEASURED,
        whole("rounds", "processes of each", 3, 1),
        text("out", "FILE", "where every measurement is written, as JSON"),
        text("formulation", "NAME", "measures this one here and prints JSON"),
    ],
    _bench,
    notes=NOTES,
)
