"""Generative perplexity: how surprised a pretrained language model is by the samples (the protocol of 2602.16813 and its peers).

A sample is decoded, tokenised anew by the judge, cut to L tokens (the length of the sampler's own rows) and read after an
<|endoftext|>. Ends of documents within a sample are kept, as the judge's own <|endoftext|>. Targets are all tokens other than
<|endoftext|>, and a sample's first <|endoftext|>. Over all samples

    nats_per_token = total nats / total targets,   perplexity = exp(nats_per_token)

Never read these metrics without entropy and repetition beside them, because a text in a loop scores better than real text.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from flowlm.judges.base import mean_with_stderr
from flowlm.system import processes

ROWS = 32  # texts read at once
# The end of a document inside a text. No decoder of UTF-8 writes a lone surrogate, so no sample can spell it.
BREAK = "\ud800"
Encode = Callable[[Sequence[str]], list[list[int]]]  # N texts -> N lists of ids
States = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (ids, last) -> hidden states, as `mauve.last_states` says


class Decoder(Protocol):
    """The part of a tokenizer that `with_breaks` uses.

    Attributes:
      start: the start token's id.
    """

    start: int

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of ids."""


def with_breaks(tokenizer: Decoder, ids: Sequence[Sequence[int]] | np.ndarray) -> list[str]:
    """Texts of N rows of ids for pretrained judges: a BREAK replaces every start token, but one in front is dropped."""
    texts = []
    for row in map(np.asarray, ids):
        row = row[1:] if row[0] == tokenizer.start else row
        documents = np.split(row, np.flatnonzero(row == tokenizer.start))
        texts.append(BREAK.join(tokenizer.decode_batch(documents)))
    return texts


def encode_documents(encode: Encode, texts: Sequence[str], end: int) -> list[list[int]]:
    """The ids of each text, with `end` in place of every BREAK. `encode` (texts -> lists of ids) reads each document alone."""
    documents = [text.split(BREAK) for text in texts]
    tokens = iter(encode([document for text in documents for document in text]))
    rows = []
    for text in documents:
        row = list(next(tokens))
        for _ in text[1:]:
            row += [end, *next(tokens)]
        rows.append(row)
    return rows


class LanguageModel:
    """A judge with the metrics NAME_nats_per_token, its _stderr, and NAME_perplexity.

    Attributes:
      name: the judge's name in the metrics.
      length: number of tokens that are read of a text; the rest is cut.
    """

    def __init__(self, name: str, encode: Encode, nats: Callable, end: int, length: int, together: bool = False):
        """Makes a judge of a pretrained model.

        Args:
          name: the judge's name in the metrics.
          encode: texts -> lists of ids.
          nats: ids int [B, T], whose first column is `end` -> -log p(ids[:, 1:]) [B, T - 1].
          end: the model's id of end-of-text.
          length: number of tokens that are read of a text.
          together: whether `nats` is a program of all processes, each of which must call it; otherwise they divide the texts.
        """
        self.together = together
        self.name, self.length = name, length
        self.main = (f"{name}_nats_per_token",)
        self.meanings = {
            f"{name}_nats_per_token": "that model's surprise; less is better, but see entropy",
            f"{name}_perplexity": "the same as exp(nats / token)",
        }
        self._encode, self._nats, self._end = encode, nats, end

    def read(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(nats, targets) of each text, float64 [N]. A BREAK in a text ends a document (`with_breaks`).

        Of several processes all must call. Raises processes.Stopped between two batches.
        """
        totals, counts = np.zeros(len(texts)), np.zeros(len(texts))
        every = [tokens[: self.length] for tokens in encode_documents(self._encode, texts, self._end)]
        # All batches share one shape, so that `nats` compiles once; padded positions are not counted.
        length = min(max(8, -(-max(map(len, every)) // 8) * 8), self.length)
        batches = range(0, len(texts), ROWS)
        for first in batches if self.together else processes.turns(batches):
            processes.check_stopped()
            if first is None:
                continue
            rows = every[first : first + ROWS]
            batch = np.full((ROWS, length + 1), self._end, np.int32)
            counted = np.zeros((ROWS, length), bool)
            for row, tokens in enumerate(rows):
                batch[row, 1 : len(tokens) + 1] = tokens
                ends = np.asarray(tokens) == self._end
                counted[row, : len(tokens)] = ~ends | (np.cumsum(ends) == 1)
            nats = np.where(counted, np.asarray(self._nats(batch), np.float64), 0)
            size = len(rows)
            totals[first : first + size], counts[first : first + size] = nats.sum(1)[:size], counted.sum(1)[:size]
        return (totals, counts) if self.together else (processes.total(totals), processes.total(counts))

    def score(self, ids: np.ndarray, texts: Sequence[str]) -> dict[str, float]:
        """The class's metrics of texts as in `read`. The ids are not read."""
        scores = mean_with_stderr(f"{self.name}_nats_per_token", *self.read(texts))
        mean = scores[f"{self.name}_nats_per_token"]
        return scores | {f"{self.name}_perplexity": float(np.exp(mean))}
