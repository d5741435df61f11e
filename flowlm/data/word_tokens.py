"""Sentences as words and punctuation, and back.

A token is a word with what is inside of it (don't, o'clock, 7:30, Mr.) or a mark of punctuation. The first word is written as it
is elsewhere in a sentence: small, unless it is always capitalised (I, Tom, Sunday). Both are undone when a sentence is written:
its first letter is a capital, and there is a blank before every word and none before a mark.
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
# Also a pattern of the `tokenizers` library.
TOKEN = r"(?:Mr|Mrs|Ms|Dr|St)\.|[ap]\.m\.|[A-Za-z0-9]+(?:['.,:-][A-Za-z0-9]+)*'?|[.?!,;:]"
UNKNOWN = "[UNK]"


def split(text: str) -> list[str]:
    """The tokens of a text as they stand there; what is neither word nor punctuation is passed over."""
    return re.findall(TOKEN, text)


def join(tokens: Sequence[str]) -> str:
    """The text of tokens."""
    return "".join(token if token in PUNCTUATION else f" {token}" for token in tokens).lstrip()


def capitalised(sentences: Iterable[str]) -> frozenset[str]:
    """The words that are written with a capital wherever they stand: behind the first place more often so than small."""
    behind = collections.Counter(token for text in sentences for token in split(text)[1:])
    return frozenset(word for word, count in behind.items() if word != small(word) and count > behind[small(word)])


def small(word: str) -> str:
    """The word with a small first letter."""
    return word[0].lower() + word[1:]


def tokenizer(sentences: Sequence[str], num_words: int, start: str) -> tokenizers.Tokenizer:
    """A tokenizer of the `num_words` most frequent words of sentences, and of their punctuation; other words are UNKNOWN."""
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
    """A capital in front of a text, unless it begins one of the words that keep theirs."""
    words = "|".join(re.escape(word) for word in sorted(kept) if word[0] == letter)
    other = rf"(?!(?:{words})(?!['.,:-]?[A-Za-z0-9]|'))" if words else ""
    return Regex(f"^{other}{letter}")
