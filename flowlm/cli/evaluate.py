"""`flowlm evaluate` and `flowlm compare`: numbers of trained runs."""

import sys
from pathlib import Path

from absl.flags import FlagValues

from flowlm.cli.command import Command, output, switch, text, whole, words
from flowlm.cli.sampler_flags import CHECKPOINT, OBJECTIVE, changed_objective, step_counts

WIDE = switch("wide", "all metrics with standard errors, in a table that may be wider than the terminal")
# The repository's own checkpoints, which are read and never written.
SHIPPED = Path(__file__).parents[2] / "checkpoints"


def _evaluate(values: FlagValues) -> None:
    objective, asked = changed_objective(values), step_counts(values, [])
    if (objective or values.samples_only) and not values.results:
        raise ValueError(
            "--objective and --samples_only change what is evaluated: give --results=DIR, so that the run keeps its own results"
        )

    import flowlm
    from flowlm.data import open_dataset
    from flowlm.evaluation.evaluator import Evaluator
    from flowlm.runs import directory as run_directory
    from flowlm.runs.model import check_drawing
    from flowlm.system import signals, storage

    if asked:
        check_drawing(values.checkpoint, asked, **objective)
    model = flowlm.load(values.checkpoint, **objective)
    run = model.run
    place = values.results or (None if _is_read_only(values.checkpoint) else values.checkpoint)
    if place is None:
        print(
            f"{values.checkpoint} is only read: nothing is written there, --results=DIR keeps it",
            file=sys.stderr,
        )
    else:
        storage.check_writable(storage.path(place))
    data, settings = run.config.data, run.config.evaluation
    before = run_directory.known_content(values.checkpoint, run.config, "data.dir")
    if values.data_dir is not None:
        data.dir = values.data_dir
    if before not in (None, run_directory.content_of_data(run.config)):
        print(f"the data in {data.dir} is not what {values.checkpoint} was trained on", file=sys.stderr)
    # The run's own tokenizer, since the one that its settings name may have moved with the data.
    own = str(storage.path(values.checkpoint) / "tokenizer.json")
    dataset = open_dataset(data.name, own, data.length, data.dir)
    counts = asked or list(settings.steps)
    evaluator = Evaluator(
        run.experiment, dataset, model.layout, run.config.seed, settings, data.dir, counts, values.samples_only
    )
    result = evaluator(run.params, run.step, values.num or settings.final_samples)
    if place is not None:
        with signals.held():  # all of its files or none
            result.save(place, values.checkpoint)
    result.show(values.wide)


def _is_read_only(checkpoint: str) -> bool:
    from flowlm.system import hub

    return hub.is_named(checkpoint) or SHIPPED in Path(checkpoint).expanduser().resolve().parents


def _compare(values: FlagValues) -> None:
    from flowlm.evaluation.results import compare

    compare(values.runs, values.wide, values.samples)


EVALUATE = Command(
    "evaluate",
    "judges a trained run: samples and likelihood",
    [
        CHECKPOINT,
        words("steps", "N,N,...", "numbers of network calls; the experiment's if none are given"),
        whole("num", "samples for each number of steps; the experiment's number if none is given", None, 1),
        OBJECTIVE,
        switch("samples_only", "the sampler as it is set alone: no plain one beside it, no likelihood, no reference"),
        output(
            "results",
            "where the results go, in place of the run's directory (never written: checkpoints/, hub:)",
        ),
        text("data_dir", "DIR", "where the data lies now, if it has moved"),
        WIDE,
    ],
    _evaluate,
    needs=("checkpoint",),
    again="nothing is written, and the same command evaluates anew",
    place="checkpoint",
)

COMPARE = Command(
    "compare",
    "one table of several evaluated runs",
    [
        words("runs", "DIR,DIR,...", "directories of evaluated runs"),
        whole("samples", "lines of text of each sampler as it is set, up to 16; one of every sampler if none", None, 1),
        WIDE,
    ],
    _compare,
    needs=("runs",),
    place="runs",
)
