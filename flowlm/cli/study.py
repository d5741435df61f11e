"""`flowlm study` and `flowlm report`: many runs."""

from pathlib import Path

from absl.flags import FlagValues

from flowlm.cli.command import Command, flags_of_another, output, parse, switch, text, whole, words
from flowlm.cli.train import TRAIN


def _study(values: FlagValues) -> None:
    from flowlm.studies.carry_out import carry_out
    from flowlm.studies.study import commands, load_study, unfinished
    from flowlm.system import storage

    study, workdir, extra = load_study(values.study), storage.path(values.workdir), values.extra or []
    for run in unfinished(study, workdir, extra, Path(values.results)):
        parse(TRAIN, run.command[4:], [TRAIN])  # so that no run fails for its line when others are done
    if values.dry_run:
        for line in commands(study, workdir, extra, Path(values.results)):
            print(line)
    else:
        carry_out(study, workdir, Path(values.results), extra, values.parallel)


def _report(values: FlagValues) -> None:
    from flowlm.studies.report import write_report

    write_report(values.runs, values.out)


STUDY = Command(
    "study",
    "carries out a study or a sweep: many runs, one table",
    [
        text("study", "experiments/NAME.py[:ARG]", "the file that lists its runs"),
        output("workdir", "the folder of all run directories"),
        output("results", "where evaluations, tables and pictures go"),
        flags_of_another("extra", "flags of flowlm train for every run, such as --config.steps=10"),
        whole("parallel", "runs at a time, each on its own share of the cores", 1, 1),
        switch("dry_run", "prints the command lines of what is left, and does nothing"),
    ],
    _study,
    needs=("study", "workdir", "results"),
    again="the same command goes on with the study",
)

REPORT = Command(
    "report",
    "one page of all runs below some folders",
    [
        words("runs", "DIR,DIR,...", "folders with runs in them, finished or not"),
        output("out", "the folder to make: index.html, runs.md and runs.csv"),
    ],
    _report,
    needs=("runs", "out"),
    place="runs",
)
