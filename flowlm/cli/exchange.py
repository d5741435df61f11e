"""`flowlm export`, `flowlm push`, `flowlm import` and `flowlm inspect`: what comes from elsewhere, and what goes there."""

from absl.flags import FlagValues

from flowlm.cli.command import Command, choice, experiment, output, switch, text, words
from flowlm.cli.sampler_flags import CHECKPOINT, OBJECTIVE, SAMPLER, changed_objective, step_counts

WEIGHTS = choice("weights", "which parameters of a .ckpt", "ema", ["ema", "live"])


def _export(values: FlagValues) -> None:
    steps, objective = step_counts(values, []), changed_objective(values)
    if len(steps) > 1:
        raise ValueError("export takes one number of --steps")

    from flowlm.engine.sharding import Layout, make_mesh
    from flowlm.exchange.export import export

    export(
        values.checkpoint,
        values.out,
        Layout(make_mesh(), fsdp=True),
        format=values.format,
        dtype=values.dtype,
        steps=steps[0] if steps else None,
        sampler=values.sampler,
        objective=objective,
    )
    print(f"{values.format} of {values.checkpoint} in {values.out}")


def _import(values: FlagValues) -> None:
    from flowlm.exchange.importing import import_run

    run = import_run(values.checkpoint, values.to, values.weights, values.config)
    print(f"{run.config.objective.family} of {values.checkpoint} at step {run.step} in {values.to}")
    if run.config.data.tokenizer == "none":
        print("its tokenizer is not known: tokens are written as numbers; name an experiment with --config to have its")


def _inspect(values: FlagValues) -> None:
    from flowlm.engine.sharding import Layout, make_mesh
    from flowlm.exchange.inspection import inspect, print_inspected

    print_inspected(inspect(values.checkpoint, Layout(make_mesh(), fsdp=True), values.weights))


def _push(values: FlagValues) -> None:
    from flowlm.engine.sharding import Layout, make_mesh
    from flowlm.exchange.push import push

    pushed = push(values.checkpoint, values.repo, Layout(make_mesh(), fsdp=True), values.private)
    print(f"{pushed.place}\n{pushed.address}")


EXPORT = Command(
    "export",
    "writes a trained run in a format that others read",
    [
        CHECKPOINT,
        output("out", "a new directory"),
        choice("format", "what is written", "params", ["params", "safetensors", "jax"]),
        choice("dtype", "of the parameters in the files", "float32", ["float32", "bfloat16"]),
        words("steps", "N", "network calls of the sampler that is written as a program"),
        SAMPLER,
        OBJECTIVE,
    ],
    _export,
    needs=("checkpoint", "out"),
    place="checkpoint",
)

PUSH = Command(
    "push",
    "sends a trained run to the Hugging Face Hub",
    [
        CHECKPOINT,
        text("repo", "NAME/MODEL", "the model on the Hub, which is made if it is not there"),
        switch("private", "only who is allowed to can read it"),
    ],
    _push,
    needs=("checkpoint", "repo"),
    place="checkpoint",
    notes="Whoever reads it writes hub:NAME/MODEL[@REVISION] for a run directory. `hf auth login` logs in.",
)

IMPORT = Command(
    "import",
    "makes a run directory of a checkpoint from elsewhere",
    [
        text("checkpoint", "PATH", "a .ckpt of the reference, or exported safetensors"),
        output("to", "a new run directory"),
        WEIGHTS,
        experiment("the experiment whose data and tokenizer it has"),
    ],
    _import,
    needs=("checkpoint", "to"),
    place="checkpoint",
)

INSPECT = Command(
    "inspect",
    "says what a run, an export or a checkpoint holds",
    [text("checkpoint", "PATH", "a run, what was exported of one, or what can be imported"), WEIGHTS],
    _inspect,
    needs=("checkpoint",),
    place="checkpoint",
)
