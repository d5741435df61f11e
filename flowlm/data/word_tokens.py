"""Splits sentences into words and punctuation, and joins them again.

A token is a word with its inner marks (don't, o'clock, 7:30, Mr.) or a mark of punctuation. The tokenizer gives a sentence's
first word a small first letter, as it has elsewhere, unless the word is always capitalised (I, Tom, Sunday). Decoding restores the
capital, and puts a blank before every word and none before a mark.
"""

import collections
import re
from collections.abc import Iterable, Sequence
from string import ascii_uppercase

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from flowlm.data.tokenizer_files import PAD

STOPS = (".", "?", "!")
PUNCTUATION = (*STOPS, ",", ";", ":")
# The pattern must be one that both `re` and the `tokenizers` library read.
TOKEN = r"(?:Mr|Mrs|Ms|Dr|St)\.|[ap]\.m\.|[A-Za-z0-9]+(?:['.,:-][A-Za-z0-9]+)*'?|[.?!,;:]"
UNKNOWN = "[UNK]"


def split(text: str) -> list[str]:
    """The tokens of a text, unchanged; characters that are neither word nor punctuation are skipped."""
    return re.findall(TOKEN, text)


def join(tokens: Sequence[str]) -> str:
    """The text that tokens spell: a blank before each token, except before punctuation."""
    return "".join(token if token in PUNCTUATION else f" {token}" for token in tokens).lstrip()


def capitalised(sentences: Iterable[str]) -> frozenset[str]:
    """The words that are capitalised more often than not where they are not a sentence's first word."""
    behind = collections.Counter(token for text in sentences for token in split(text)[1:])
    return frozenset(word for word, count in behind.items() if word != small(word) and count > behind[small(word)])


def small(word: str) -> str:
    """The word with its first letter in lower case."""
    return word[0].lower() + word[1:]


def tokenizer(sentences: Sequence[str], num_words: int, start: str) -> tokenizers.Tokenizer:
    """A tokenizer of the `num_words` most frequent words of the sentences and of their punctuation; other words become UNKNOWN."""
    kept, count = capitalised(sentences), collections.Counter()
    for text in sentences:
        first, *rest = split(text)
        count.update([first if first in kept else small(first), *rest])
    words = [word for word, _ in sorted(count.items(), key=lambda item: (-item[1], item[0])) if word not in PUNCTUATION]
    pieces = [start, PAD, UNKNOWN, *(mark for mark in PUNCTUATION if mark in count), *words[:num_words]]
    model = tokenizers.Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=UNKNOWN))
    model.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(_first_letter(letter, kept.intersection(pieces)), letter.lower())
            for letter in ascii_uppercase
        ]
    )
    model.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), "removed", invert=True)
    model.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),  # a blank before every token but the first
            decoders.Replace(Regex(f"^ (?=[{''.join(PUNCTUATION)}]$)"), ""),
            decoders.Fuse(),
            *(decoders.Replace(Regex(f"^{letter.lower()}"), letter) for letter in ascii_uppercase),
        ]
    )
    model.add_special_tokens([start, PAD])
    return model


def _first_letter(letter: str, kept: Iterable[str]) -> Regex:
    """A pattern for the capital `letter` at a text's beginning, unless the first word is one of `kept`."""
    words = "|".join(re.escape(word) for word in sorted(kept) if word[0] == letter)
    other = rf"(?!(?:{words})(?!['.,:-]?[A-Za-z0-9]|'))" if words else ""
    return Regex(f"^{other}{letter}")
