"""Docstrings as pages need them: columns keep their places, and attributes that begin a docstring are a section of it."""

import re
from typing import Any

from griffe import Extension, Object

_COLUMNS = re.compile(r"\S {2,}\S")


def readable(text: str) -> str:
    """A cleaned docstring in which paragraphs with columns are code, and what follows a first `Attributes:` is indented."""
    if re.match(r"Attributes:\n\S", text):
        head, blank, rest = text.partition("\n\n")
        text = head.replace("\n", "\n    ") + blank + rest
    paragraphs = text.split("\n\n")
    return "\n\n".join(
        "\n".join(f"    {line}" for line in part.split("\n")) if _is_table(part) else part for part in paragraphs
    )


def _is_table(paragraph: str) -> bool:
    lines = paragraph.split("\n")
    return (
        not lines[0].startswith(" ")
        and len(lines) > 1
        and bool(_COLUMNS.search(lines[0]))
        and not lines[0].endswith(":")
    )


class Readable(Extension):
    """Called for every object of the package."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Changes its docstring in memory."""
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)
