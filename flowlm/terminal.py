"""How anything is shown at a terminal: what users and models wrote as it stands, and what cannot be printed replaced."""

import sys

from rich.console import Console

WIDTH = 80  # columns where there is no terminal


def console(width: int = WIDTH, least: int = 0) -> Console:
    """A console that reads no markup and no emoji codes in what it shows.

    Args:
      width: columns where there is no terminal. least: columns that it has in any case; a narrower terminal breaks the lines.
    """
    here = Console()
    columns = max(here.width if here.is_terminal else width, least)
    return Console(width=columns, markup=False, emoji=False, highlight=False)


def replace_what_cannot_be_printed() -> None:
    """Standard output and error write a question mark for a character that their encoding lacks, in place of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
