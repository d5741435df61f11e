"""MAUVE: how near the law of samples is to that of held-out text, as a pretrained language model sees both (2102.01454).

A text becomes the model's last hidden state at its last token, as in the paper without a start token. N samples and N held-out
texts are clustered together, N / 10 clusters, into the histograms q and p. With the mixtures r = w p + (1 - w) q, MAUVE is the
area under the curve of exp(-5 KL(q | r)), exp(-5 KL(p | r)) over w: 1 where the histograms are the same, near 0 where they are
disjoint. The library `mauve-text` computes it, at its defaults and with one seed.

It depends on N, on the length of the texts and on the model, so compare it at the same of each. What real text reaches is the
held-out row of every table (as many rows of another split). There is no standard error, and a few hundred texts say little:
the paper has 5,000.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from absl import logging

from flowlm.judges import hugging_face, smollm2
from flowlm.judges.language_model import ROWS, Encode, States, encode_documents


def last_states(states: States, encode: Encode, texts: Sequence[str], end: int, length: int) -> np.ndarray:
    """The hidden state at the last id of each of N texts, cut to `length` ids, float32 [N, D]. An empty text is read as `end`.

    encode: texts -> lists of ids; a BREAK in a text (language_model.py) is `end`. states: ids int [B, T], last int [B] -> the
    hidden states at position `last` of each row [B, D], of a causal model: what is padded behind changes nothing.
    """
    tokens = [row[:length] or [end] for row in encode_documents(encode, texts, end)]
    length = min(-(-max(map(len, tokens)) // 8) * 8, length)  # few shapes, as each compiles
    parts = []
    for first in range(0, len(tokens), ROWS):
        rows = tokens[first : first + ROWS]
        ids, last = np.full((ROWS, length), end, np.int32), np.zeros(ROWS, np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)], last[i] = row, len(row) - 1
        parts.append(np.asarray(states(ids, last), np.float32)[: len(rows)])
    return np.concatenate(parts)


class Mauve:
    """Metric: mauve_NAME, in (0, 1].

    Attributes:
      read: texts -> float [N, D], what the model sees in them.
    """

    def __init__(self, name: str, features: Callable, reference: Callable):
        """A judge of that name.

        Args:
          features: texts -> float [N, D].
          reference: num -> that many held-out texts, or all where there are fewer.
        """
        try:
            from mauve import compute_mauve
        except ImportError as error:
            raise ImportError("the judge mauve needs the package mauve-text: pip install -e .[mauve]") from error
        self.name, self.read, self._compute = name, features, compute_mauve
        self.main = (f"mauve_{name}",)
        self.meanings = {f"mauve_{name}": "nearness to held-out text as that model sees both, 0 to 1"}
        # Read once for all samplers that draw the same number.
        self._reference = functools.cache(lambda num: features(reference(num)))

    def score(self, ids: np.ndarray, texts: Sequence[str]) -> dict[str, float]:
        """The ids are not read. Where there are fewer held-out texts than samples, only as many samples are."""
        reference = self._reference(len(texts))
        if len(reference) < len(texts):
            logging.warning("mauve reads %d samples of %d: no more held-out rows", len(reference), len(texts))
        samples = self.read(texts[: len(reference)])
        return {f"mauve_{self.name}": float(self._compute(p_features=reference, q_features=samples).mauve)}


def make_judge(model: str, length: int, data_dir: str, reference: Callable) -> Mauve:
    """The judge mauve:MODEL, which reads `length` of its tokens of every text. MODEL: `smollm2` or `hf:NAME`.

    Raises:
      ImportError, FileNotFoundError: what it needs is not here, and how to get it.
      ValueError: see `hugging_face.load_language_model`.
    """
    kind, _, rest = model.partition(":")
    name, encode, states, end = hugging_face.reader(rest, length) if kind == "hf" else smollm2.reader(data_dir)
    return Mauve(name, lambda texts: last_states(states, encode, texts, end, length), reference)
