"""A prompt as it is typed, read as a row of which some tokens are given.

    ___         one token to be written: a word of a tokenizer of words, a letter of one of letters
    ___:3       three of them
    ...         at the end: the rest of the row is to be written, and the text ends where the model ends it

Without `...` the text ends with the prompt where every text is a row of its own. Where texts are laid end to end, every row is
full, and what lies behind the prompt is written too.
"""

import re
from collections.abc import Sequence

import numpy as np

from flowlm.data.tokenizers import Tokenizer
from flowlm.objectives.prompts import UNKNOWN

_GAP = re.compile(r"_{3,}(?::(\d+))?")
_OPEN = "..."
_SHOWN = 60  # characters of a prompt that an error shows


def given_rows(prompts: Sequence[str], tokenizer: Tokenizer, length: int, pad: int | None) -> np.ndarray:
    """Rows of ids int32 [number of prompts, length], with UNKNOWN where a token is to be written.

    Args:
      length: of a row, the start token in front of it included.
      pad: the token behind a text that is a row of its own; None where texts are laid end to end.

    Raises:
      ValueError: a prompt is no text, has words that the tokenizer does not know, is longer than a row, has a gap of no token or
        `...` before its end, or leaves nothing to write.
    """
    if not prompts:
        raise ValueError("there is no prompt: give at least one")
    return np.stack([_row(prompt, tokenizer, length - 1, pad) for prompt in prompts])


def _row(prompt: str, tokenizer: Tokenizer, room: int, pad: int | None) -> np.ndarray:
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt is a text, got {prompt!r}")
    shown = repr(prompt if len(prompt) <= _SHOWN else f"{prompt[:_SHOWN]}...")
    text, is_open = prompt, prompt.rstrip().endswith(_OPEN)
    if is_open:
        text = prompt.rstrip().removesuffix(_OPEN)
    if _OPEN in text:
        raise ValueError(
            f"the prompt {shown} has `...` before its end, where it leaves open how many tokens there are: write `___:N` for N"
        )
    ids = _ids(text, is_open, tokenizer, shown)
    if len(ids) > room:
        gaps = ids.count(UNKNOWN)
        raise ValueError(
            f"the prompt {shown} has {len(ids)} tokens, {gaps} of them to be written: a row of this run has {room}, give a shorter "
            "prompt"
        )
    rest = UNKNOWN if is_open or pad is None else pad
    row = [*ids, *[rest] * (room - len(ids))]
    if UNKNOWN not in row:
        raise ValueError(
            f"the prompt {shown} leaves nothing to write: put `___` where a token is wanted, or `...` at the end"
        )
    return np.array([tokenizer.start, *row], np.int32)


def _ids(text: str, is_open: bool, tokenizer: Tokenizer, shown: str) -> list[int]:
    """The ids of a prompt up to its end, with UNKNOWN in its gaps."""
    *gapped, last = _pieces(text)
    own_blank = _blank_is_a_token(tokenizer)
    ids = []
    for piece, count in gapped:
        if count < 1:
            raise ValueError(f"the prompt {shown} has a gap of no token: write `___:N` with N of at least 1")
        ids += [*_encoded(piece if own_blank else piece.rstrip(), tokenizer, shown), *[UNKNOWN] * count]
    text = last[0]
    return ids + _encoded(text.rstrip() if is_open and not own_blank else text, tokenizer, shown)


def _pieces(text: str) -> list[tuple[str, int]]:
    """(text, number of tokens in the gap behind it) for each piece of a prompt; behind the last one there is none."""
    parts = _GAP.split(text)
    return [(piece, 1 if count is None else int(count)) for piece, count in zip(parts[::2], [*parts[1::2], "0"])]


def _blank_is_a_token(tokenizer: Tokenizer) -> bool:
    """Whether a blank is a token of its own, as where tokens are letters, or belongs to the word behind it."""
    try:
        blank, word, both = (ids.tolist() for ids in tokenizer.encode_batch([" ", "a", " a"]))
    except ValueError:  # tokens are words, and the blanks between them no tokens
        return False
    return bool(blank) and both == blank + word


def _encoded(piece: str, tokenizer: Tokenizer, shown: str) -> list[int]:
    try:
        (ids,), (count,) = tokenizer.encode_counted([piece])
    except ValueError as error:
        raise ValueError(f"the prompt {shown}: {error}") from error
    if count:
        unknown = ", ".join(map(repr, tokenizer.unspelled(piece)))
        raise ValueError(
            f"the prompt {shown} has what the run's tokenizer does not know, such as {unknown}: spell it otherwise"
        )
    return ids.tolist()
