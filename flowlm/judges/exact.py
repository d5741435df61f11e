"""The judge of samples from a known grammar. Its probabilities are exact, so only the mean over samples is an estimate."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from flowlm.judges.base import mean_with_stderr


class GrammarJudge:
    """Exact log-probability of each row under the grammar that made the data.

    Metrics, in this order:
      grammatical: share of rows that the grammar can produce; its standard error is the binomial one.
      nll_minus_entropy: mean of -log p over the grammatical rows, minus the grammar's entropy, nats a row. It is about 0 for
        rows of the grammar itself, negative if samples keep to its likely sentences and positive if they keep to unlikely ones.
        NaN if no row is grammatical.
    """

    main = ("grammatical", "nll_minus_entropy")
    meanings: ClassVar[dict[str, str]] = {
        "grammatical": "share of rows that the grammar can make; more is better",
        "nll_minus_entropy": "nats a row; near 0 is best, below it rows are too alike",
    }

    def __init__(self, grammar, start: int):
        """A judge of rows from a grammar.

        Args:
          grammar: has `log_prob(ids [N, L]) -> float64 [N]` (nats, -inf if ungrammatical) and `entropy` (nats a row).
          start: id of the start token; a row that does not begin with it is ungrammatical.
        """
        self.grammar = grammar
        self.start = start

    def score(self, ids: np.ndarray, texts: Sequence[str]) -> dict[str, float]:
        """The class lists the metrics. ids: int [N, 1 + L], start token included. The texts are not read."""
        ids = np.asarray(ids)
        log_prob = np.where(ids[:, 0] == self.start, self.grammar.log_prob(ids[:, 1:]), -np.inf)
        grammatical = np.isfinite(log_prob)
        excess = -log_prob[grammatical] - self.grammar.entropy
        return mean_with_stderr("grammatical", grammatical) | mean_with_stderr("nll_minus_entropy", excess)
