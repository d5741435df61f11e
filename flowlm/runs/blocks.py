"""Texts of a chosen length: each is cut where it ends, and one longer than a row is written block by block.

A row has L - 1 tokens behind its start token. A further block is a row too, whose prompt is the last `tail` tokens of the text so
far, so L - 1 - tail of its tokens are new:

    first block     start | L - 1 tokens
    each further    start | the text's last tail tokens, given | L - 1 - tail new tokens

How well a block goes on is how well the run follows a prompt (objectives/prompts.py). A text ends at its first token that stands
behind texts in the run's data, a pad or a start token; tokens of its prompt are before that, whatever is written between them.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np

from flowlm.objectives.prompts import UNKNOWN

_SHOWN = 60  # characters of a prompt that an error shows


def prompted_tokens(given: np.ndarray, ends: Collection[int]) -> np.ndarray:
    """How many tokens [num] a text has at least so that all of its prompt is in it, for rows given [num, L]."""
    known = (given != UNKNOWN) & ~np.isin(given, list(ends))
    return (np.arange(given.shape[1]) * known).max(1)


def check_prompts(prompts: Sequence[str], given: np.ndarray, max_tokens: int, ends: Collection[int]) -> None:
    """Raises ValueError if one of the prompts, rows given [number of prompts, L], does not fit into `max_tokens` tokens."""
    for prompt, least in zip(prompts, prompted_tokens(given, ends)):
        if least > max_tokens:
            shown = repr(prompt if len(prompt) <= _SHOWN else f"{prompt[:_SHOWN]}...")
            raise ValueError(
                f"the prompt {shown} takes {least} tokens, and max_tokens is {max_tokens}: set it to {least} or more"
            )


def texts(
    draw: Callable[[int, np.ndarray | None], np.ndarray],
    given: np.ndarray | None,
    most: np.ndarray,
    tail: int,
    start: int,
    ends: Collection[int],
) -> list[np.ndarray]:
    """The ids of each text, without a start token and without what is behind its end.

    Args:
      draw: (number of the block, prompts [num, L] or None) -> rows [num, L]. All rows of a block are drawn, even of texts that have
        ended, so that what a row is does not depend on the others.
      given: prompts [num, L] of the first block, or None.
      most: how many tokens each text has at most, int [num].
    """
    rows = draw(0, given)
    ids, width = rows[:, 1:], rows.shape[1]
    least = np.zeros(len(ids), int) if given is None else prompted_tokens(given, ends)
    block = 0
    while ((_lengths(ids, least, ends) == ids.shape[1]) & (ids.shape[1] < most)).any():
        block += 1
        prompt = np.full((len(ids), width), UNKNOWN, np.int32)
        prompt[:, 0], prompt[:, 1 : 1 + tail] = start, ids[:, -tail:]
        ids = np.concatenate([ids, draw(block, prompt)[:, 1 + tail :]], 1)
    return [row[:length] for row, length in zip(ids, np.minimum(_lengths(ids, least, ends), most))]


def _lengths(ids: np.ndarray, least: np.ndarray, ends: Collection[int]) -> np.ndarray:
    """How many tokens [num] of ids [num, T] come before each text's end, at least `least` [num]; all where there is no end."""
    is_end = np.isin(ids, list(ends)) & (np.arange(ids.shape[1]) >= least[:, None])
    return np.where(is_end.any(1), is_end.argmax(1), ids.shape[1])
