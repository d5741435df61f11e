"""How text is shown at a terminal: what users and models wrote appears as it stands, and what cannot be printed is replaced."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from rich.console import Console

WIDTH = 80  # columns where there is no terminal
# The exit status that a shell gives a process whose reader has gone, such as one in front of `| head`.
READER_GONE = 141


def console(width: int = WIDTH, least: int = 0) -> Console:
    """A console that reads no markup and no emoji codes in what it shows.

    Args:
      width: columns where there is no terminal.
      least: columns that it has in any case; a narrower terminal breaks the lines.
    """
    here = Console()
    columns = max(here.width if here.is_terminal else width, least)
    return Console(width=columns, markup=False, emoji=False, highlight=False)


def replace_what_cannot_be_printed() -> None:
    """Standard output and error write a question mark for a character that their encoding lacks, in place of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def end_without_reader() -> None:
    """Ends the process because nobody reads its standard output any more, without a word about it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes what is left when it ends
    sys.exit(READER_GONE)


def command() -> str:
    """`flowlm` as it is called here: its name where a shell finds it, otherwise its path in the environment that runs."""
    beside = Path(sys.executable).with_name("flowlm")
    return "flowlm" if shutil.which("flowlm") or not beside.exists() else os.path.relpath(beside)


def line() -> str | None:
    """The command line that this process carries out, as it is given anywhere; None where it is not one of flowlm's."""
    program, *words = sys.argv
    ours = Path(program).name == "flowlm" or Path(program).parts[-2:] in (
        ("flowlm", "main.py"),
        ("flowlm", "__main__.py"),
    )
    return shlex.join(["flowlm", *words]) if ours else None
