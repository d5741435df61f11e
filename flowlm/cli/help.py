"""What `flowlm --help` and `flowlm COMMAND --help` print, in 80 columns."""

import textwrap
from collections.abc import Sequence

from flowlm.cli.command import Command, Flag

WIDTH = 80
ASKED = ("-h", "-help", "--help", "-?", "--helpshort", "--helpfull")
INDENT = 26  # columns before the description of a flag


def overview(commands: Sequence[Command]) -> str:
    """All commands, a line each."""
    lines = [
        "Flow map language models: from noise to text in one forward pass.",
        "",
        "usage: flowlm COMMAND [DIR ...] [--flag=value ...]",
        "",
    ]
    lines += [f"  {command.name:15}{command.summary}" for command in commands]
    lines += [
        "",
        "flowlm COMMAND --help    the flags of a command",
        "flowlm --version         the version",
        "--verbosity=1            of any command: the whole story of an error",
    ]
    return "\n".join(lines)


def of_command(command: Command) -> str:
    """The usage of a command and the flags that it takes."""
    parts = [f"flowlm {command.name}: {command.summary}", "", _usage(command), ""]
    parts += [_described(flag, command.place) for flag in command.flags]
    if command.flag("config"):
        parts.append(_entry("--config.KEY=VALUE", "a setting of the experiment; flowlm/config.py lists them"))
    if command.notes:
        lines = command.notes.strip().splitlines()
        parts += ["", *(textwrap.fill(line, WIDTH) if len(line) > WIDTH else line for line in lines)]
    return "\n".join(parts)


def _usage(command: Command) -> str:
    """The usage line: first the flags that a command needs, then those that may be left out, in brackets."""
    needed = [flag for flag in command.flags if flag.name in command.needs]
    others = [f"[{flag.written}]" for flag in command.flags if flag.name not in command.needs]
    words = [flag.alone if flag.name == command.place else flag.written for flag in needed]
    if command.flag("config"):
        words.append("[--config.KEY=VALUE ...]")
    # A blank inside of brackets must not break the line.
    joined = " ".join(word.replace(" ", "\0") for word in [f"usage: flowlm {command.name}", *words, *others])
    wrapped = textwrap.fill(joined, WIDTH, subsequent_indent=" " * 7, break_long_words=False, break_on_hyphens=False)
    return wrapped.replace("\0", " ")


def _described(flag: Flag, place: str) -> str:
    return _entry(flag.written, flag.help + (f"; or {flag.alone} alone" if flag.name == place else ""))


def _entry(written: str, told: str) -> str:
    """A flag with its description beside it, or below it where the flag is long."""
    wrapped = textwrap.wrap(told, WIDTH - INDENT, break_long_words=False, break_on_hyphens=False)
    lines = [" " * INDENT + line for line in wrapped]
    start = f"  {written}  "
    if len(start) <= INDENT:
        lines[0] = start.ljust(INDENT) + lines[0][INDENT:]
    else:
        lines.insert(0, start.rstrip())
    return "\n".join(lines)
