"""Statistics of samples by counting: entropy, diversity, repetition, words.

None of these measures quality alone. They guard the metrics that measure quality: a low perplexity with a falling entropy
or a long repeat means collapse.
"""

import string
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from flowlm.judges.base import mean_with_stderr

PUNCTUATION = string.punctuation + "“”‘’«»–—…"
# Rows compared at a time in `longest_repeats`; so few, because their working set then stays in the processor's cache.
BLOCK = 16


def words(text: str) -> list[str]:
    """The whitespace-separated words of a text, in lower case, without punctuation at their ends; empty words are dropped."""
    stripped = (word.strip(PUNCTUATION) for word in text.lower().split())
    return [word for word in stripped if word]


def entropies(ids: np.ndarray) -> np.ndarray:
    """Unigram entropy in nats of each row of ids [N, L]. Negative ids are not counted; a row without other ids has entropy 0."""
    result = np.zeros(len(ids))
    for row, tokens in enumerate(ids):
        counts = np.unique(tokens[tokens >= 0], return_counts=True)[1]
        shares = counts / max(counts.sum(), 1)
        result[row] = -(shares * np.log(shares)).sum()
    return result


def ngram_codes(ids: np.ndarray, n: int) -> np.ndarray:
    """A number for each n-gram of the rows of ids [N, L]: int [N, L - n + 1], -1 where one of its ids is negative."""
    windows = np.lib.stride_tricks.sliding_window_view(ids, n, axis=1)
    whole, codes = (windows >= 0).all(-1), windows[..., 0].astype(np.int64)
    base = bound = int(ids.max()) + 1
    for column in range(1, n):
        if bound * base >= 2**63:  # number the distinct prefixes anew, so that the code fits in 63 bits
            codes = np.unique(np.where(whole, codes, 0), return_inverse=True)[1].reshape(codes.shape)
            bound = codes.size
        codes, bound = codes * base + windows[..., column], bound * base
    return np.where(whole, codes, -1)


def distinct_share(ids: np.ndarray, n: int) -> float:
    """Distinct n-grams over all rows of ids [N, L] / number of n-grams; an n-gram with a negative id is not counted."""
    if ids.shape[1] < n:
        return float("nan")
    codes = ngram_codes(ids, n)
    codes = codes[codes >= 0]
    return len(np.unique(codes)) / len(codes) if len(codes) else float("nan")


def self_bleu(ids: np.ndarray, orders: Sequence[int] = (1, 2, 3, 4)) -> float:
    """BLEU of every row of ids [N, L] with all other rows as its references, pooled over rows (1802.01886, on token ids).

    It is the geometric mean over n of the clipped precision: the number of a row's n-grams, each counted at most as often as some
    other row has it / the number of all n-grams. It needs no brevity penalty, because all rows have one length. It is high if
    samples repeat each other, and NaN for fewer than two rows.
    """
    if len(ids) < 2 or ids.shape[1] < max(orders):
        return float("nan")
    precisions = []
    for n in orders:
        codes = ngram_codes(ids, n)
        row = np.broadcast_to(np.arange(len(ids))[:, None], codes.shape)[codes >= 0]
        number = np.unique(codes[codes >= 0], return_inverse=True)[1]
        pairs, counts = np.unique(number * len(ids) + row, return_counts=True)
        # Pairs are sorted by n-gram, then by count. An n-gram's last pair is the row that has it most, the best
        # reference of all other rows; the pair before it is the best reference of that row.
        order = np.lexsort((counts, pairs // len(ids)))
        code, counts = pairs[order] // len(ids), counts[order]
        same = code[1:] == code[:-1]
        last = np.append(~same, True)
        best_other = np.append(0, np.where(same, counts[:-1], 0))
        clipped = np.where(last, np.minimum(counts, best_other), counts)
        precisions.append(clipped.sum() / max(counts.sum(), 1))
    return float(np.prod(precisions) ** (1 / len(orders)))


def longest_repeats(ids: np.ndarray) -> np.ndarray:
    """Tokens in the longest run that occurs at two places of a row, for each row of ids [N, L].

    The two places may overlap, so L equal tokens score L - 1; a row in which no token occurs twice scores 0. A row takes O(L^2):
    shared[j] is the length of the run that starts at both i and j, which follows from the run that starts at i + 1 and j + 1.
    """
    count, length = ids.shape
    result = np.zeros(count, np.int64)
    for start in range(0, count, BLOCK):
        # The layout is [L, rows], because all later positions are then one block of memory.
        rows = ids[start : start + BLOCK].T.copy()
        longest = np.zeros_like(rows)
        shared = np.zeros((length + 1, rows.shape[1]), rows.dtype)
        for i in range(length - 2, -1, -1):
            equal = rows[i + 1 :] == rows[i]
            np.multiply(shared[i + 2 :] + 1, equal, out=shared[i + 1 : length])
            np.maximum(longest[i + 1 :], shared[i + 1 : length], out=longest[i + 1 :])
        result[start : start + BLOCK] = longest.max(0)
    return result


class Statistics:
    """Counts over samples.

    Metrics, in this order:
      entropy: unigram entropy of the token ids inside a sample, nats, mean over samples.
      distinct_1, distinct_2, distinct_4: number of distinct n-grams of token ids / number of n-grams, over all samples. It falls
        as samples are added, so compare it only at equal counts and lengths.
      self_bleu: BLEU of each sample against all others. It rises as samples are added, so compare it likewise.
      longest_repeat: length in tokens of the longest run that occurs twice inside a sample (the two may overlap),
        mean over samples.
      distinct_rows: number of distinct samples / number of samples.
      words_in_corpus: share of the samples' words that occur in the corpus, over all words of all samples. The first
        and the last word of a text are left out because rows are cut inside words. Without a vocabulary it is not reported.

    A start token in position 0 and pads are not text, so all metrics but `distinct_rows` ignore them. A row that begins with
    another token counts whole.
    """

    main = ("entropy", "distinct_rows", "distinct_2")
    meanings: ClassVar[dict[str, str]] = {
        "entropy": "of the tokens inside a sample, nats; near held-out text's is best",
        "distinct_rows": "share of different samples; near held-out text's is best",
        "words_in_corpus": "share of words that the corpus has; more is better",
        "self_bleu": "how alike samples are; near held-out text's is best",
        "longest_repeat": "tokens of the longest run that comes twice in a sample",
    } | {f"distinct_{n}": f"share of different {n}-grams; near held-out text's is best" for n in (1, 2, 4)}

    def __init__(self, vocabulary_words: frozenset[str] | None, start: int, pad: int | None = None):
        """Makes a judge.

        Args:
          vocabulary_words: frozenset(words(train split)) or None.
          start: id of the start token.
          pad: id of pads, None if rows have none.
        """
        self.vocabulary_words = vocabulary_words
        self.start, self.pad = start, pad

    def score(self, ids: np.ndarray, texts: Sequence[str]) -> dict[str, float]:
        """The class lists the metrics. ids: int [N, L]; texts: the N rows, without special tokens."""
        tokens = np.array(ids, np.int32)
        # Negative ids are not counted. The negative ids of a row all differ, so that they belong to no repeat.
        tokens[tokens[:, 0] == self.start, 0] = -1
        if self.pad is not None:
            tokens = np.where(tokens == self.pad, -2 - np.arange(tokens.shape[1], dtype=np.int32), tokens)
        scores = mean_with_stderr("entropy", entropies(tokens))
        for n in (1, 2, 4):
            scores[f"distinct_{n}"] = distinct_share(tokens, n)
        scores["self_bleu"] = self_bleu(tokens)
        scores |= mean_with_stderr("longest_repeat", longest_repeats(tokens))
        scores["distinct_rows"] = len(np.unique(ids, axis=0)) / len(ids)
        if self.vocabulary_words is not None:
            inner = [words(" ".join(text.split()[1:-1])) for text in texts]
            known = [sum(word in self.vocabulary_words for word in sample) for sample in inner]
            scores |= mean_with_stderr("words_in_corpus", known, [len(sample) for sample in inner])
        return scores
