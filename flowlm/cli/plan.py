"""`flowlm plan`."""

from absl.flags import FlagValues

from flowlm.cli.command import Command, experiment, output, switch, whole, words


def _plan(values: FlagValues) -> None:
    if bool(values.topology) == values.device:
        raise ValueError("plan needs either --topology=v5e:4x4,... or --device")

    from flowlm.evaluation import work
    from flowlm.scale.plan import plan, plan_device

    if values.device:
        plan_device(values.config)
    else:
        asked = values.topology, values.results, values.per_chip, values.largest, values.dense
        plan(values.config, *asked, lambda rows: work.every(values.config, rows))


PLAN = Command(
    "plan",
    "what an experiment needs of a TPU slice or a device",
    [
        experiment("the experiment"),
        words("topology", "CHIP:SHAPE,...", "TPU slices such as v5e:4x4; CHIP:SHAPE:N is N of them"),
        switch("device", "the largest batch that fits on the devices at hand"),
        whole("per_chip", "sequences on each chip, in place of config.batch_size over all", None, 1),
        switch("largest", "also searches the largest batch that fits", True),
        switch("dense", "compiles also the step written over the whole vocabulary"),
        output("results", "where plan.json, plan.md and plan.png go"),
    ],
    _plan,
    needs=("config",),
)
