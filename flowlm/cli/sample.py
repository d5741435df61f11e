"""`flowlm sample`."""

from absl.flags import FlagValues

from flowlm.cli.command import Command, whole, words
from flowlm.cli.sampler_flags import CHECKPOINT, OBJECTIVE, SAMPLER, SEED, changed_objective, step_counts


def _sample(values: FlagValues) -> None:
    counts, objective = step_counts(values, [64]), changed_objective(values)

    import jax

    from flowlm.assembly import load_trained
    from flowlm.evaluation import Sampler, samplers
    from flowlm.sharding import Layout, make_mesh

    layout = Layout(make_mesh(), fsdp=True)
    run = load_trained(values.checkpoint, layout, objective)
    choices = samplers(run.experiment.family)
    name = values.sampler or list(choices)[-1]
    if name not in choices:
        raise ValueError(f"unknown --sampler {name!r}: choose one of {list(choices)}")
    for steps in counts:
        draw = Sampler(run.experiment.net, choices[name], steps, layout)
        print(f"== {name}@{steps}")
        for row in draw(run.params, jax.random.key(values.seed), values.num):
            print(run.tokenizer.decode(row))


SAMPLE = Command(
    "sample",
    "writes text with a trained run",
    [
        CHECKPOINT,
        words("steps", "N,N,...", "network calls, or several numbers of them (default: 64)"),
        whole("num", "how many samples", 8, 1),
        SAMPLER,
        SEED,
        OBJECTIVE,
    ],
    _sample,
    needs=("checkpoint",),
    place="checkpoint",
)
