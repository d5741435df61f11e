"""MAUVE: how near the law of samples is to that of held-out text, as a pretrained language model sees both (2102.01454).

Each text is represented by the model's last hidden state at the text's last token; as in the paper, no start token is added.
N samples and N held-out texts are clustered together in N / 10 clusters, which gives the histograms q and p. With the mixtures
r = w p + (1 - w) q, MAUVE is the area under the curve of exp(-5 KL(q | r)), exp(-5 KL(p | r)) over w. It is 1 for equal
histograms and near 0 for disjoint ones. The library `mauve-text` computes it with its defaults and one fixed seed.

Compare MAUVE only at the same N, length of texts and model, because it depends on all three. The held-out row of every table
shows what real text reaches: as many rows of another split. MAUVE has no standard error, and a few hundred texts say little: the
paper uses 5,000.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from absl import logging

from flowlm.judges import hugging_face, smollm2
from flowlm.judges.language_model import ROWS, Encode, States, encode_documents
from flowlm.system import processes


def last_states(states: States, encode: Encode, texts: Sequence[str], end: int, length: int) -> np.ndarray:
    """The hidden state at the last id of each of N texts, cut to `length` ids, float32 [N, D]. An empty text is read as `end`.

    Args:
      states: (ids int [B, T], last int [B]) -> hidden states [B, D] at position `last` of each row. The model must be causal,
        because rows are padded at their ends. Several processes divide the texts, so all must call `last_states`.
      encode: texts -> lists of ids.
      texts: a BREAK in a text (language_model.py) becomes `end`.
    """
    tokens = [row[:length] or [end] for row in encode_documents(encode, texts, end)]
    length = min(-(-max(map(len, tokens)) // 8) * 8, length)  # a multiple of 8, because each shape compiles anew
    found: np.ndarray | None = None
    for mine in processes.turns(range(0, len(tokens), ROWS)):
        processes.check_stopped()
        first = mine or 0  # who has no share of the last round reads another's, if only to know how wide states are
        rows = tokens[first : first + ROWS]
        ids, last = np.full((ROWS, length), end, np.int32), np.zeros(ROWS, np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)], last[i] = row, len(row) - 1
        read = np.asarray(states(ids, last), np.float32)[: len(rows)]
        found = np.zeros((len(tokens), read.shape[1]), np.float32) if found is None else found
        if mine is not None:
            found[first : first + len(rows)] = read
    return processes.total(found)


class Mauve:
    """A judge with the metric mauve_NAME, in (0, 1].

    Attributes:
      name: the name in the metric.
      read: texts -> float [N, D], the model's hidden state for each text.
    """

    def __init__(self, name: str, features: Callable, reference: Callable):
        """Makes a judge of a model's hidden states.

        Args:
          name: the name in the metric.
          features: texts -> float [N, D], one hidden state for each text.
          reference: num -> that many held-out texts, or all held-out texts if there are fewer.

        Raises:
          ImportError: mauve-text is not installed.
        """
        try:
            from mauve import compute_mauve
        except ImportError as error:
            raise ImportError("the judge mauve needs the package mauve-text: pip install -e .[mauve]") from error
        self.name, self.read, self._compute = name, features, compute_mauve
        self.main = (f"mauve_{name}",)
        self.meanings = {f"mauve_{name}": "nearness to held-out text as that model sees both, 0 to 1"}
        # Cached, because all samplers that draw the same number are compared with the same texts.
        self._reference = functools.cache(lambda num: features(reference(num)))

    def score(self, ids: np.ndarray, texts: Sequence[str]) -> dict[str, float]:
        """{mauve_NAME}. If there are fewer held-out texts than samples, only as many samples are read. The ids are not read."""
        reference = self._reference(len(texts))
        if len(reference) < len(texts):
            logging.warning("mauve reads %d samples of %d: no more held-out rows", len(reference), len(texts))
        samples = self.read(texts[: len(reference)])
        return {f"mauve_{self.name}": float(self._compute(p_features=reference, q_features=samples).mauve)}


def make_judge(model: str, length: int, data_dir: str, reference: Callable) -> Mauve:
    """The judge mauve:MODEL, where MODEL is `smollm2` or `hf:NAME`. It reads the first `length` tokens of every text.

    Raises:
      ImportError: a package is not installed.
      FileNotFoundError: the model is not on this machine.
      ValueError: see `hugging_face.load_language_model`.
    """
    kind, _, rest = model.partition(":")
    name, encode, states, end = hugging_face.reader(rest, length) if kind == "hf" else smollm2.reader(data_dir)
    return Mauve(name, lambda texts: last_states(states, encode, texts, end, length), reference)
