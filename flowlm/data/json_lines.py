"""Files with one JSON object a line, which may be packed (storage.py). Each object holds a document's text under one key."""

import json
import os
from collections.abc import Iterator

from flowlm.system import storage

ENDING = ".jsonl"


def texts(place: os.PathLike, key: str = "text") -> Iterator[tuple[int, str]]:
    """Yields (number of the line, from 1; text) for each line that is not blank. Raises ValueError that names a damaged line."""
    for number, line in storage.lines(place):
        try:
            found = json.loads(line)
            # JSON can spell half of a surrogate pair, which UTF-8 cannot; such a half becomes "?".
            text = found[key].encode("utf-8", "replace").decode("utf-8")
        except KeyError as error:
            raise ValueError(_wrong(place, number, key, f"its keys are {sorted(found)}")) from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(_wrong(place, number, key, error)) from error
        yield number, text


def _wrong(place: os.PathLike, number: int, key: str, error: object) -> str:
    return f'{place}, line {number} is not a JSON object with text under "{key}": {error}'
