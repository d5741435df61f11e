"""Starts an experiment on the machine one has. From the top of a checkout:

  python -m launch.run --backend=local|slurm|tpu_vm|gke
      --config=experiments/NAME.py --workdir=DIR [--dry_run] [RESOURCES]
      [--environment=NAME=VALUE ...] [--config.KEY=VALUE ...]
      [other flags of flowlm train]
  python -m launch.run --backend=... --sweep=experiments/ablations.py:NAME
      --workdir=DIR ...                          all its runs, below DIR
  python -m launch.run status|logs|stop --workdir=DIR
  python -m launch.run --backend=NAME --help     lists that backend's RESOURCES

Flags that are none of these go to `flowlm train` as they are. --dry_run prints
exactly what would be sent, and sends nothing.
"""

import argparse
import dataclasses
import importlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from etils import epath

from flowlm.cli.command import given
from flowlm.cli.mistakes import nearest, told
from flowlm.cli.train import TRAIN
from flowlm.studies import study
from flowlm.system import storage
from launch.job import Backend, Job, job_name, recall, remember, settings, training_job

BACKENDS = ("local", "slurm", "tpu_vm", "gke")
ACTIONS = ("start", "status", "logs", "stop")


def load_backend(name: str) -> Backend:
    """A backend's module. Raises ImportError naming the extra where its client is not installed."""
    return importlib.import_module(f"launch.{name}")


class _Parser(argparse.ArgumentParser):
    """One whose errors are told as all others are, in one line and without its usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parser(backend: Backend | None = None) -> argparse.ArgumentParser:
    """The flags of every job, or with a backend its resources' flags too."""
    parser = _Parser("python -m launch.run", usage=__doc__, allow_abbrev=False, add_help=False)
    parser.add_argument("action", nargs="?", default="start", choices=ACTIONS)
    parser.add_argument("--backend", default=None, choices=BACKENDS, help="what runs the job")
    parser.add_argument("--config", default=None, help="the experiment")
    parser.add_argument("--sweep", default=None, help="in place of --config: a study or a sweep, all of its runs")
    parser.add_argument("--workdir", default=None, help="the run directory; of a sweep, the folder of all of them")
    parser.add_argument("--environment", action="append", default=[], help="NAME=VALUE of its processes; no secrets")
    parser.add_argument("--dry_run", action="store_true", help="print what would be sent")
    for field in dataclasses.fields(backend.Resources) if backend else ():
        kind = {"action": "store_true"} if field.default is False else {"type": type(field.default)}
        text = f"{field.metadata['help']} (default: {'none' if field.default == '' else field.default})"
        parser.add_argument(f"--{field.name}", default=field.default, help=text, **kind)
    return parser


def joined(argv: Sequence[str]) -> list[str]:
    """`--flag value` as the one word `--flag=value`, because argparse takes a word after a flag it does not know for an action."""
    words: list[str] = []
    for word in argv:
        last = words[-1] if words else ""
        if re.match(r"--[^=]+$", last) and not re.match("-+[A-Za-z]", word) and word not in ACTIONS:
            words[-1] = f"{last}={word}"
        else:
            words.append(word)
    return words


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of a parser, and the others as they are: argparse would take one with a blank in its value for an action."""
    ours = {f"--{name}" for name in vars(parser.parse_args([]))}
    extra = [word for word in argv if word.startswith("-") and word.partition("=")[0] not in ours]
    return parser.parse_args([word for word in argv if word not in extra]), extra


def jobs(asked: argparse.Namespace, extra: list[str], resources: Any) -> list[Job]:
    """What is to be run: one job of the experiment, or one of every run of a sweep that is left to do and can begin.

    Raises:
      ValueError: nothing of the sweep is left, or all that is left waits for teachers.
    """
    environment = dict(pair.split("=", 1) for pair in asked.environment)
    if asked.sweep is None:
        return [training_job(asked.config, extra, asked.workdir, resources, environment)]
    left = _left(asked, extra)
    ready = [run for run in left if run.ready]
    if not ready:
        raise ValueError(
            f"nothing of {asked.sweep} can be started in {asked.workdir}: "
            + (f"{len(left)} runs wait for their teachers" if left else "all of it is finished")
        )
    if len(left) > len(ready):
        waiting = ", ".join(run.name for run in left if not run.ready)
        print(f"when their teachers are finished, give the same command again for {waiting}", file=sys.stderr)

    return [Job(job_name(run.name), run.config, run.flags, str(run.directory), resources, environment) for run in ready]


def _left(asked: argparse.Namespace, extra: list[str]) -> list[study.Unfinished]:
    """The runs of a sweep that are left. A dry run does not look into a bucket, because it needs neither client nor credential."""
    wanted = study.load_study(asked.sweep)
    if not (asked.dry_run and storage.in_bucket(asked.workdir)):
        return study.unfinished(wanted, storage.path(asked.workdir), extra)
    print(f"what is finished in {asked.workdir} is not looked at by a dry run", file=sys.stderr)
    return study.unfinished(wanted, epath.Path(asked.workdir), extra, done=lambda run: False)


def check_jobs(command_line: list[Job], ours: Sequence[str]) -> None:
    """Raises ValueError for what is wrong with the jobs wherever they run, before any of them is sent.

    Args:
      ours: names of the flags of this command and its backend, one of which may be meant by a flag that neither knows.
    """
    for job in command_line:
        for name, value in given(job.arguments):
            known = TRAIN.flag(name) or re.match(r"(no)?config\.", name)
            if not known and (close := nearest(name, ours, 0.75)):
                meant = f"--{close}" + ("" if value is None else f"={value}")
                raise ValueError(f"--{name} is no flag of this backend, nor of flowlm train: {meant}")
        settings(job)


def start(argv: list[str]) -> None:
    name = _parsed(_parser(), argv)[0].backend
    if name is None:
        raise ValueError(f"give --backend=NAME, one of {', '.join(BACKENDS)}, with --config and --workdir")
    backend = load_backend(name)
    asked, extra = _parsed(_parser(backend), argv)
    if (asked.config is None) == (asked.sweep is None) or asked.workdir is None:
        raise ValueError(
            "give --config=experiments/NAME.py or --sweep=experiments/ablations.py:NAME, and --workdir=DIR"
        )
    if wrong := [pair for pair in asked.environment if not pair.partition("=")[1]]:
        raise ValueError(f"--environment takes NAME=VALUE, got {wrong[0]!r}")
    if not storage.in_bucket(asked.workdir):
        storage.check_writable(asked.workdir)
    resources = {field.name: getattr(asked, field.name) for field in dataclasses.fields(backend.Resources)}
    wanted = jobs(asked, extra, backend.Resources(**resources))
    check_jobs(wanted, [*vars(asked)])
    if asked.dry_run:
        print(backend.describe(wanted))
        return
    backend.check(wanted)
    backend.submit(wanted, lambda job, handle: remember(name, job, handle))


def main(argv: Sequence[str]) -> None:
    """The command; ends the process with one line where something is wrong."""
    argv = joined(argv)
    try:
        asked, extra = _parsed(_parser(), argv)
        if {"-h", "--help"} & set(extra):
            _parser(load_backend(asked.backend) if asked.backend else None).print_help()
            return
        if asked.action == "start":
            start(argv)
            return
        if asked.workdir is None:
            raise ValueError(f"{asked.action} needs --workdir=DIR, that of a job that was started")
        found = recall(asked.workdir)
        for workdir, name, handle in found:
            answer = getattr(load_backend(name), asked.action)(handle) or load_backend(name).status(handle)
            print(answer if len(found) == 1 else f"{workdir}: {answer}")
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"launch: {told(error)}")


if __name__ == "__main__":
    main(sys.argv[1:])
