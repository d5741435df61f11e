"""How anything is shown at a terminal: what users and models wrote as it stands, and what cannot be printed replaced."""

import os
import shutil
import sys
from pathlib import Path

from rich.console import Console


def console(width: int = 200) -> Console:
    """A console that reads no markup and no emoji codes in what it shows, `width` columns wide where there is no terminal."""
    return Console(width=None if Console().is_terminal else width, markup=False, emoji=False, highlight=False)


def replace_what_cannot_be_printed() -> None:
    """Standard output and error write a question mark for a character that their encoding lacks, in place of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def command() -> str:
    """`flowlm` as it is called here: its name where a shell finds it, otherwise its path in the environment that runs."""
    beside = Path(sys.executable).with_name("flowlm")
    return "flowlm" if shutil.which("flowlm") or not beside.exists() else os.path.relpath(beside)
