"""What can be said of samples by counting: entropy, diversity, repetition, words.

None of these measures quality alone. They guard the metrics that do: a low perplexity with a falling entropy or a
long repeat is collapse.
"""

import string
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from flowlm.judges.base import mean_with_stderr

PUNCTUATION = string.punctuation + "“”‘’«»–—…"
# Rows compared at a time in `longest_repeats`: the working set then stays in the processor's cache.
BLOCK = 16


def words(text: str) -> list[str]:
    """Whitespace-separated words, lower-cased, without punctuation at their ends; empty ones dropped."""
    stripped = (word.strip(PUNCTUATION) for word in text.lower().split())
    return [word for word in stripped if word]


def entropies(ids: np.ndarray) -> np.ndarray:
    """Unigram entropy in nats of each row of ids [N, L]; negative ids are not counted. An empty row has 0."""
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
        if bound * base >= 2**63:  # number the distinct prefixes anew, so that the code fits
            codes = np.unique(np.where(whole, codes, 0), return_inverse=True)[1].reshape(codes.shape)
            bound = codes.size
        codes, bound = codes * base + windows[..., column], bound * base
    return np.where(whole, codes, -1)


def distinct_share(ids: np.ndarray, n: int) -> float:
    """Distinct n-grams over all rows of ids [N, L] / all n-grams; those with a negative id are not counted."""
    if ids.shape[1] < n:
        return float("nan")
    codes = ngram_codes(ids, n)
    codes = codes[codes >= 0]
    return len(np.unique(codes)) / len(codes) if len(codes) else float("nan")


def self_bleu(ids: np.ndarray, orders: Sequence[int] = (1, 2, 3, 4)) -> float:
    """BLEU of every row of ids [N, L] with all other rows as its references, pooled over rows (1802.01886, on token ids).

    The geometric mean over n of: n-grams counted in a row, at most as often as one other row has them / all n-grams. Rows
    are of one length, so there is no brevity penalty. High where samples repeat each other. NaN for fewer than two rows.
    """
    if len(ids) < 2 or ids.shape[1] < max(orders):
        return float("nan")
    precisions = []
    for n in orders:
        codes = ngram_codes(ids, n)
        row = np.broadcast_to(np.arange(len(ids))[:, None], codes.shape)[codes >= 0]
        number = np.unique(codes[codes >= 0], return_inverse=True)[1]
        pairs, counts = np.unique(number * len(ids) + row, return_counts=True)
        # By n-gram, and of one n-gram by count: the last is the row that has it most, the one before it its best reference.
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

    The two places may overlap, so L equal tokens score L - 1; a row without any token twice scores 0. O(L^2) a row:
    shared[j] is the length of the run that starts at both i and j, found from that of i + 1 and j + 1.
    """
    count, length = ids.shape
    result = np.zeros(count, np.int64)
    for start in range(0, count, BLOCK):
        # [L, rows]: all later positions are one block of memory.
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
      distinct_1, distinct_2, distinct_4: distinct n-grams of token ids over all samples / all n-grams, n-grams lying
        inside samples. It falls as samples are added: compare only at equal counts and lengths.
      self_bleu: BLEU of each sample against all others; it rises as samples are added: compare as distinct-n.
      longest_repeat: length in tokens of the longest run that occurs twice inside a sample (the two may overlap),
        mean over samples.
      distinct_rows: distinct samples / samples.
      words_in_corpus: share of the samples' words that occur in the corpus, over all words of all samples. The first
        and the last word of a text are left out, since rows are cut inside words. Not reported without a vocabulary.

    A start token in position 0 is the frame, not text, and neither are pads: they are left out of all but `distinct_rows`. A
    row that begins with any other token counts whole.
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
        """`vocabulary_words`: frozenset(words(train split)) or None. `start`, `pad`: ids of the start token and of pads."""
        self.vocabulary_words = vocabulary_words
        self.start, self.pad = start, pad

    def score(self, ids: np.ndarray, texts: Sequence[str]) -> dict[str, float]:
        """ids int [N, L] with N texts of those rows, without special tokens. See the class for the metrics."""
        tokens = np.array(ids, np.int32)
        # Negative ids are counted nowhere; each of a row is another, so that they belong to no repeat.
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
