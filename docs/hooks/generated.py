"""What pages say by a comment and never by hand: `<!-- name: arguments -->`, alone on its line, becomes what MAKERS[name] returns.

Arguments are separated by commas that a blank follows; paths are from the top of the checkout. On GitHub the comment is not seen.
"""

import re
from collections.abc import Callable
from pathlib import Path

import commands_table
import metrics_table
import settings_table
import tables

ROOT = Path(__file__).parents[2]
COMMENT = re.compile(r"^<!-- ([a-z_]+): (.*?) -->$", re.MULTILINE)


def include(path: str, below: str = "0") -> str:
    """A file of the checkout as it is, its headings `below` levels lower; links to files that are not pages become their names."""
    text = re.sub(r"^#", "#" * (int(below) + 1), (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)[^)]+\)", r"\1", text)


MAKERS: dict[str, Callable[..., str]] = {
    "include": include,
    "block": tables.block,
    "samples": tables.samples,
    "held_out": tables.held_out,
    "seeds": tables.seeds,
    "best": tables.best,
    "bench": tables.bench,
    "plans": tables.plans,
    "evaluations": tables.evaluations,
    "kills": tables.kills,
    "metrics": metrics_table.table,
    "settings": settings_table.table,
    "commands": commands_table.table,
}


def expanded(markdown: str) -> str:
    """The text with every comment made.

    Raises:
      KeyError: a comment asks for what nobody makes. OSError, ValueError: a file that it names is missing, or has not what it asks.
    """

    def made(match: re.Match) -> str:
        name, arguments = match.groups()
        return MAKERS[name](*arguments.split(", "))

    return COMMENT.sub(made, markdown)


def on_page_markdown(markdown: str, **_) -> str:
    """Called for every page before it is rendered."""
    return expanded(markdown)
