"""Compares short sentences with those that people wrote: how many a sampler copies, and how many it finds.

A row that is a real sentence, but not one of the training split, shows what the sampler has learnt of the language. Such rows are
rare, so mind the standard error. Of two samplers with the same entropy, the one that finds more is better.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from flowlm.judges.base import mean_with_stderr


class Sentences:
    """Metrics, in this order, each over rows of ids as a whole:

    found: share of rows that are in `unseen` (held-out sentences) and not in `read` (the training split).
    copied: share of rows that are in `read`.
    vocabulary_entropy: entropy in nats of the tokens of all rows together, without pads. It is low if a sampler uses few words.
    """

    main = ("found", "copied")
    meanings: ClassVar[dict[str, str]] = {
        "found": "share of real sentences that were not in training; more is better",
        "copied": "share of sentences that were in training",
        "vocabulary_entropy": "of all words, nats; near held-out text's is best",
    }

    def __init__(self, read: np.ndarray, unseen: np.ndarray, start: int, pad: int):
        """Makes a judge.

        Args:
          read: rows of the training split, ids int [N, L].
          unseen: rows of the held-out splits, likewise.
          start: id of the start token, which is no text.
          pad: id of pads, which are no text.
        """
        self._read = {row.tobytes() for row in np.asarray(read, np.int32)}
        self._unseen = {row.tobytes() for row in np.asarray(unseen, np.int32)} - self._read
        self._no_text = (start, pad)

    def score(self, ids: np.ndarray, texts: Sequence[str]) -> dict[str, float]:
        """The class lists the metrics. The texts are not read."""
        rows = [row.tobytes() for row in np.asarray(ids, np.int32)]
        found = mean_with_stderr("found", np.array([row in self._unseen for row in rows]))
        copied = mean_with_stderr("copied", np.array([row in self._read for row in rows]))
        counts = np.unique(np.asarray(ids)[~np.isin(ids, self._no_text)], return_counts=True)[1]
        shares = counts / max(counts.sum(), 1)
        return found | copied | {"vocabulary_entropy": float(-(shares * np.log(shares)).sum())}
