"""How anything is shown at a terminal: what users and models wrote as it stands, and what cannot be printed replaced."""

import sys

from rich.console import Console


def console(width: int = 200) -> Console:
    """A console that reads no markup and no emoji codes in what it shows, `width` columns wide where there is no terminal."""
    return Console(width=None if Console().is_terminal else width, markup=False, emoji=False, highlight=False)


def replace_what_cannot_be_printed() -> None:
    """Standard output and error write a question mark for a character that their encoding lacks, in place of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
