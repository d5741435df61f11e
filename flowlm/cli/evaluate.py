"""`flowlm evaluate` and `flowlm compare`: numbers of trained runs."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl.flags import FlagValues

from flowlm.cli.command import Command, output, switch, text, whole, words
from flowlm.cli.sampler_flags import CHECKPOINT, OBJECTIVE, changed_objective, step_counts

if TYPE_CHECKING:
    from flowlm.engine.sharding import Layout
    from flowlm.evaluation.evaluator import Evaluator
    from flowlm.runs.trained import Trained

WIDE = switch("wide", "all metrics with standard errors, in a table that may be wider than the terminal")
# The repository's own checkpoints, which are read and never written.
SHIPPED = Path(__file__).parents[2] / "checkpoints"


def _evaluate(values: FlagValues) -> None:
    objective, asked = changed_objective(values), step_counts(values, [])
    if (objective or values.samples_only or values.prompted) and not values.results:
        raise ValueError(
            "--objective, --samples_only and --prompted change what is evaluated: give --results=DIR, so that the run keeps its "
            "own results"
        )
    if values.follow and _is_read_only(values.checkpoint):
        raise ValueError(f"{values.checkpoint} is only read, and nobody trains it: leave out --follow")

    from flowlm.runs.model import check_drawing

    if asked:
        check_drawing(values.checkpoint, asked, **objective)
    (_follow if values.follow else _judge)(values, objective, asked)


def _judge(values: FlagValues, objective: dict[str, object], asked: list[int]) -> None:
    import flowlm
    from flowlm.system import signals, storage

    run, layout = (model := flowlm.load(values.checkpoint, **objective)).run, model.layout
    place = values.results or (None if _is_read_only(values.checkpoint) else values.checkpoint)
    if place is None:
        print(
            f"{values.checkpoint} is only read: nothing is written there, --results=DIR keeps it",
            file=sys.stderr,
        )
    else:
        storage.check_writable(storage.path(place))
    evaluator = _evaluator(values, run, layout, asked)
    result = evaluator(run.params, run.step, values.num or run.config.evaluation.final_samples, final=True)
    if place is not None:
        with signals.held():  # all of its files or none
            result.save(place, values.checkpoint)
    result.show(values.wide)


def _follow(values: FlagValues, objective: dict[str, object], asked: list[int]) -> None:
    from flowlm.engine.sharding import Layout, make_mesh
    from flowlm.evaluation import following
    from flowlm.runs.trained import load_trained
    from flowlm.system import storage

    layout, evaluators = Layout(make_mesh(), fsdp=True), []

    def judge(run):
        if not evaluators:  # its programs serve all checkpoints
            evaluators.append(_evaluator(values, run, layout, asked))
        return evaluators[0](run.params, run.step, values.num or run.config.evaluation.samples)

    place = values.results or storage.path(values.checkpoint) / following.FOLDER
    storage.check_writable(place)
    following.follow(
        values.checkpoint,
        place,
        lambda step: load_trained(values.checkpoint, layout, objective, step),
        judge,
        lambda result: result.show(values.wide),
    )


def _evaluator(values: FlagValues, run: "Trained", layout: "Layout", asked: list[int]) -> "Evaluator":
    from flowlm.data import open_dataset
    from flowlm.evaluation.evaluator import Evaluator
    from flowlm.runs import directory as run_directory
    from flowlm.system import storage

    data, settings = run.config.data, run.config.evaluation
    before = run_directory.known_content(values.checkpoint, run.config, "data.dir")
    if values.data_dir is not None:
        data.dir = values.data_dir
    if before not in (None, run_directory.content_of_data(run.config)):
        print(f"the data in {data.dir} is not what {values.checkpoint} was trained on", file=sys.stderr)
    # The run's own tokenizer, since the one that its settings name may have moved with the data.
    own = str(storage.path(values.checkpoint) / "tokenizer.json")
    dataset = open_dataset(data.name, own, data.length, data.dir, copy=data.copy)
    return Evaluator(
        run.experiment,
        dataset,
        layout,
        run.config.seed,
        settings,
        data.dir,
        asked or None,
        values.samples_only,
        values.prompted,
    )


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
        switch("follow", "every checkpoint of a run in training, as it comes, into DIR/evaluations/STEP"),
        switch("samples_only", "the sampler as it is set alone: no plain one beside it, no likelihood, no reference"),
        switch("prompted", "the same of texts that go on from parts of held-out rows, instead"),
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
