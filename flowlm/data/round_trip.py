"""How much of a text a tokenizer loses: the share of characters that change when the text is encoded and decoded.

A piece of text is encoded and decoded. The characters of a longest common subsequence of the two texts are unchanged. A replaced,
a dropped and an added character each count as one change. So the share counts capitals that become small, blanks that are joined,
letters that are not in the vocabulary, and every letter of an unknown word.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from flowlm.data import windows
from flowlm.data.tokenizers import Tokenizer

PIECE = 2048  # characters that are compared at once; the time of a comparison grows with their square
_AT_ONCE = 100_000  # characters that are handed to the tokenizer together
_SHOWN = 24  # characters of an example
_NOT_A_CHARACTER = "\ufdd0"


@dataclass(frozen=True)
class RoundTrip:
    """What a tokenizer does to the characters of a text.

    Attributes:
      characters: number of characters that were compared.
      changed: number of characters that changed.
      such_as: one example, [before, after]; empty if nothing changed.
    """

    characters: int = 0
    changed: int = 0
    such_as: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The part of the characters that changed, from 0 to 1."""
        return self.changed / max(1, self.characters)


def common(text: str, back: str) -> int:
    """The length of a longest common subsequence, by bit-parallel dynamic programming (Hyyrö, 2004)."""
    places: dict[str, int] = {}
    for i, character in enumerate(text):
        places[character] = places.get(character, 0) | 1 << i
    everywhere = (1 << len(text)) - 1
    row = everywhere
    for character in back:
        matched = row & places.get(character, 0)
        row = ((row + matched) | (row - matched)) & everywhere
    return len(text) - row.bit_count()


def changed(text: str, back: str) -> int:
    """Characters that were replaced, dropped or added on the way from a text to what came back."""
    return 0 if text == back else max(len(text), len(back)) - common(text, back)


def measure(tokenizer: Tokenizer, texts: Iterable[str], every: int = 1) -> RoundTrip:
    """The round trip of one in `every` pieces of the texts. The texts are read once, in bounded memory.

    The blank between two pieces belongs to neither piece, because some tokenizers strip the ends of a text.

    Raises:
      ValueError: the tokenizer refuses a text.
    """
    found = RoundTrip()
    pieces = itertools.islice(_pieces(texts), 0, None, every)
    while batch := [*itertools.islice(pieces, _AT_ONCE // PIECE)]:
        unknown = tokenizer.unknown
        for piece, back in zip(batch, tokenizer.decode_batch(tokenizer.encode_batch(batch)), strict=True):
            # The unknown token's own letters would match letters of the text. One character that no text has counts as one change.
            wrong = changed(piece, back.replace(unknown, _NOT_A_CHARACTER) if unknown else back)
            such_as = found.such_as or (_difference(piece, back) if wrong else [])
            found = RoundTrip(found.characters + len(piece), found.changed + wrong, such_as)
    return found


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for begin, end in itertools.pairwise([0, *windows.cuts(text, PIECE), len(text)]):
            yield text[begin + (begin > 0 and text[begin] in windows.BLANKS) : end]


def _difference(text: str, back: str) -> list[str]:
    """[from text, from back]: the first place where the two differ, with a few characters before it."""
    same = next((i for i, (a, b) in enumerate(zip(text, back)) if a != b), min(len(text), len(back)))
    begin = max(0, same - _SHOWN // 2)
    return [text[begin : begin + _SHOWN], back[begin : begin + _SHOWN]]
