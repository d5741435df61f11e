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
_MOST = 10**6  # tokens to be written, of which a list is made; no row has as many


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


def is_open(prompt: str) -> bool:
    """Whether a prompt leaves it to the model where the text ends."""
    return prompt.rstrip().endswith(_OPEN)


def _row(prompt: str, tokenizer: Tokenizer, room: int, pad: int | None) -> np.ndarray:
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt is a text, got {prompt!r}")
    shown = repr(prompt if len(prompt) <= _SHOWN else f"{prompt[:_SHOWN]}...")
    text, goes_on = prompt, is_open(prompt)
    if goes_on:
        text = prompt.rstrip().removesuffix(_OPEN)
    if _OPEN in text:
        raise ValueError(
            f"the prompt {shown} has `...` before its end, where it leaves open how many tokens there are: write `___:N` for N"
        )
    gaps = sum(count for _, count in _pieces(text))
    ids = [] if gaps > _MOST else _ids(text, goes_on, tokenizer, shown)
    if max(gaps, len(ids)) > room:
        raise ValueError(
            f"the prompt {shown} has {max(gaps, len(ids))} tokens, {gaps} of them to be written: a row of this run has {room}, "
            "give a shorter prompt"
        )
    rest = UNKNOWN if goes_on or pad is None else pad
    row = [*ids, *[rest] * (room - len(ids))]
    if UNKNOWN not in row:
        raise ValueError(
            f"the prompt {shown} leaves nothing to write: put `___` where a token is wanted, or `...` at the end"
        )
    return np.array([tokenizer.start, *row], np.int32)


def _ids(text: str, goes_on: bool, tokenizer: Tokenizer, shown: str) -> list[int]:
    """The ids of a prompt up to its end, with UNKNOWN in its gaps."""
    pieces, blank, ids = _pieces(text), _blank(tokenizer), []
    for number, (piece, count) in enumerate(pieces):
        is_last = number == len(pieces) - 1
        if count < 1 and not is_last:
            raise ValueError(f"the prompt {shown} has a gap of no token: write `___:N` with N of at least 1")
        ends_in_gap = goes_on or not is_last
        if blank is None:
            ids += _encoded(piece.rstrip() if ends_in_gap else piece, tokenizer, shown)
        else:
            before = number > 0 and piece[:1].isspace()
            behind = ends_in_gap and piece[-1:].isspace() and piece.strip() != ""
            ids += [blank] * before + _encoded(piece.strip(), tokenizer, shown) + [blank] * behind
        ids += [UNKNOWN] * count
    return ids


def _pieces(text: str) -> list[tuple[str, int]]:
    """(text, number of tokens in the gap behind it) for each piece of a prompt; behind the last one there is none."""
    parts = _GAP.split(text)
    return [(piece, 1 if count is None else int(count[:12])) for piece, count in zip(parts[::2], [*parts[1::2], "0"])]


def _blank(tokenizer: Tokenizer) -> int | None:
    """The id of a blank that is a token of its own, as where tokens are letters; None where it goes with a word, or is no token."""
    try:
        word, words = (ids.tolist() for ids in tokenizer.encode_batch(["a", "a a"]))
    except ValueError:  # there is no such word
        return None
    return words[len(word)] if len(words) == 2 * len(word) + 1 else None


def _encoded(piece: str, tokenizer: Tokenizer, shown: str) -> list[int]:
    try:
        (ids,), (count,) = tokenizer.encode_counted([piece])
        unknown = tokenizer.unspelled(piece) if count else []
    except ValueError:
        unknown = [word for word in piece.split() if not _is_known(word, tokenizer)]
    if unknown:
        parts = ", ".join(map(repr, unknown))
        raise ValueError(f"the prompt {shown} has what the run's tokenizer does not know: {parts}; write other words")
    return ids.tolist()


def _is_known(word: str, tokenizer: Tokenizer) -> bool:
    try:
        tokenizer.encode(word)
    except ValueError:
        return False
    return True
