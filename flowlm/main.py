"""The one command: `flowlm COMMAND ...` is one of cli/commands.py. This finds it, and says in one line what goes wrong."""

import sys
import traceback
from collections.abc import Sequence
from logging import Formatter
from typing import NamedTuple, NoReturn

from absl import app, flags, logging

import flowlm
from flowlm.cli import help, mistakes
from flowlm.cli.command import Command, parse
from flowlm.cli.commands import COMMANDS
from flowlm.system import open_files, platforms, signals, terminal


class Call(NamedTuple):
    """A command, and the values of its flags."""

    command: Command
    values: flags.FlagValues


def _find(line: Sequence[str]) -> tuple[Command | None, list[str]]:
    """The command of a line, None where it names none, and the other words. Raises ValueError: there is no such command."""
    first = next((i for i, word in enumerate(line) if not word.startswith("-")), None)
    if first is None:
        return None, list(line)
    named = {command.name: command for command in COMMANDS}
    for length in (2, 1):  # the longer name first, because `prepare judge` is not `prepare`
        if command := named.get(" ".join(line[first : first + length])):
            return command, [*line[:first], *line[first + length :]]
    raise ValueError(mistakes.unknown_command(line[first], named))


def _read(argv: Sequence[str]) -> Call:
    """The command that a line names. Raises ValueError for what is wrong; ends the process where help is asked for."""
    line = list(argv[1:])
    asks = line[:1] == ["help"] or any(word in help.ASKED for word in line)
    command, others = _find(line[1:] if line[:1] == ["help"] else line)
    if asks:
        print(help.of_command(command) if command else help.overview(COMMANDS))
        sys.exit(0)
    if command is None:
        if "--version" in others:
            print(f"flowlm {flowlm.__version__}")
            sys.exit(0)
        raise ValueError("which command? `flowlm --help` lists them")
    if command.again:
        signals.resumable(command.again)
    return Call(command, parse(command, others, COMMANDS))


def read_call(argv: Sequence[str]) -> Call:
    """The command that a line names, first word the program's. Ends the process where help is asked for or the line is wrong."""
    try:
        return _read(argv)
    except (ValueError, OSError, ImportError) as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    """Ends the process with one line. Commands in it are written as they can be given here, with or without .venv being active."""
    sys.exit("flowlm: " + mistakes.told(error).replace("`flowlm ", f"`{terminal.command()} "))


def carry_out(call: Call) -> None:
    """Carries out a command. An error ends the process with one line; --verbosity=1 shows where it was raised."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # at INFO every save tells a long story
        logging.get_absl_handler().setFormatter(
            Formatter("%(message)s")
        )  # because a line of code means nothing to whoever reads a warning
    try:
        _check_outputs(call)
        call.command.run(call.values)
        sys.stdout.flush()
    except BrokenPipeError:
        terminal.end_without_reader()
    except (ValueError, OSError, FloatingPointError, ImportError, RuntimeError) as error:
        logging.debug("%s", traceback.format_exc())
        _fail(error)


def _check_outputs(call: Call) -> None:
    """Raises ValueError where results are to go to a place that cannot be written, before they are made."""
    from flowlm.system import storage

    for flag in call.command.flags:
        if flag.is_output and call.values[flag.name].value is not None:
            storage.check_writable(call.values[flag.name].value)


def run() -> None:
    """Carries out the command line of this process."""
    signals.listen()
    terminal.replace_what_cannot_be_printed()
    open_files.raise_limit()
    platforms.leave_out_absent_tpu()
    app.run(carry_out, flags_parser=read_call)


if __name__ == "__main__":
    run()
