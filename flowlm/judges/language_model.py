"""Generative perplexity: how surprised a pretrained language model is by the samples (the protocol of 2602.16813 and its peers).

A sample is decoded with the ends of its documents, tokenised anew by the judge, cut to the L tokens that the model's own rows have,
and read from <|endoftext|> on. An end between two documents is the judge's own <|endoftext|>. Targets are all tokens that are not
end-of-text, and the first that is one. Over all samples

    nats_per_token = total nats / total targets,   perplexity = exp(nats_per_token)

A loop scores better than real text: never read it without entropy and repetition beside it.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from flowlm.judges.base import mean_with_stderr

ROWS = 32  # texts read at once
# The end of a document inside a text. No decoder of UTF-8 writes a lone surrogate, so no sample can spell it.
BREAK = "\ud800"
Encode = Callable[[Sequence[str]], list[list[int]]]  # texts -> their ids
States = Callable[[np.ndarray, np.ndarray], np.ndarray]  # as in `mauve.last_states`


class Decoder(Protocol):
    """What is asked of a tokenizer here.

    Attributes:
      start: the start token's id.
    """

    start: int

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Rows of ids as texts."""


def with_breaks(tokenizer: Decoder, ids: Sequence[Sequence[int]] | np.ndarray) -> list[str]:
    """Texts of N rows of ids, as pretrained judges read them: a BREAK in place of every start token but one in front."""
    texts = []
    for row in map(np.asarray, ids):
        row = row[1:] if row[0] == tokenizer.start else row
        documents = np.split(row, np.flatnonzero(row == tokenizer.start))
        texts.append(BREAK.join(tokenizer.decode_batch(documents)))
    return texts


def encode_documents(encode: Encode, texts: Sequence[str], end: int) -> list[list[int]]:
    """The ids of each text with `end` in place of every BREAK; each document is tokenised alone.

    encode: texts -> lists of ids.
    """
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
    """Metrics: NAME_nats_per_token, its _stderr, and NAME_perplexity.

    Attributes:
      name: of the judge in the metrics.
      length: tokens of a text that are read.
    """

    def __init__(self, name: str, encode: Encode, nats: Callable, end: int, length: int):
        """A judge of that name.

        Args:
          encode: texts -> lists of ids.
          nats: ids int [B, T], the first of them `end` -> -log p(ids[:, 1:]) [B, T - 1].
        """
        self.name, self.length = name, length
        self.main = (f"{name}_nats_per_token",)
        self.meanings = {
            f"{name}_nats_per_token": "that model's surprise; less is better, but see entropy",
            f"{name}_perplexity": "the same as exp(nats / token)",
        }
        self._encode, self._nats, self._end = encode, nats, end

    def read(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(nats, targets) of each text, float64 [N]. The texts have a BREAK wherever a document ends (`with_breaks`)."""
        totals, counts = np.zeros(len(texts)), np.zeros(len(texts))
        every = [tokens[: self.length] for tokens in encode_documents(self._encode, texts, self._end)]
        # One shape for all, so that it compiles once; what is padded is not counted.
        length = min(max(8, -(-max(map(len, every)) // 8) * 8), self.length)
        for first in range(0, len(texts), ROWS):
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
        return totals, counts

    def score(self, ids: np.ndarray, texts: Sequence[str]) -> dict[str, float]:
        """The ids are not read; texts as in `read`."""
        scores = mean_with_stderr(f"{self.name}_nats_per_token", *self.read(texts))
        mean = scores[f"{self.name}_nats_per_token"]
        return scores | {f"{self.name}_perplexity": float(np.exp(mean))}
