"""Trains tokenizers on text. `python -m flowlm.data.train_tokenizers [DIRECTORY]` rewrites every shipped file.

Shipped tokenizers are trained on the train split of the speeches or of the everyday sentences alone, so that they have not seen
held-out text. The same text makes the same file to the byte. `flowlm prepare` trains those of RECIPES on a user's own text.
"""

import pathlib
import sys
from collections.abc import Callable, Iterable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from flowlm.data import corpora, qm9, windows, word_tokens
from flowlm.data.grammar import Grammar, shipped_names
from flowlm.data.tokenizer_files import PAD
from flowlm.data.tokenizers import Tokenizer
from flowlm.data.word_tokens import UNKNOWN

START = "<|start|>"
BPE_SIZES = (512, 1024, 4096)
LETTERS_SIZE = 112
WORD_SIZES = (1000, 2000)

# A word with its inner marks (don't), a number or a single mark, each with the blank before it; other blanks as in GPT-2.
_WORDS = r" ?[\p{L}\p{M}]+(?:['’-][\p{L}\p{M}]+)*| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]|\s+(?!\S)|\s+"
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def byte_level_bpe(texts: Iterable[str], size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE of `size` ids: the start token (id 0), the 256 bytes and the most frequent merges."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[START],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def characters() -> tokenizers.Tokenizer:
    """The 27 symbols of text8, a-z and space, and the start token (id 27).

    Its normaliser follows the rule of text8: lower case, digits spelled out, all else a space, spaces collapsed.
    """
    # BPE without merges is a character model, and three times as fast as a vocabulary of one-letter words.
    tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz ")}, []))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase()]
        + [normalizers.Replace(str(digit), f" {word} ") for digit, word in enumerate(_DIGITS)]
        + [normalizers.Replace(tokenizers.Regex("[^a-z]+"), " "), normalizers.Strip()]
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([START])
    return tokenizer


def molecules() -> tokenizers.Tokenizer:
    """The characters of the SMILES strings of QM9, the start token and the pad."""
    tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(qm9.CHARACTERS)}, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([START, PAD])
    return tokenizer


def letter_bpe(texts: Iterable[str], size: int) -> tokenizers.Tokenizer:
    """BPE over the symbols of `characters`, merged within words; its vocabulary can be smaller than a small network's width."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = characters().normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    tokenizer.decoder = decoders.Fuse()
    alphabet = list("abcdefghijklmnopqrstuvwxyz ")
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[START], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def words(grammar: Grammar) -> tokenizers.Tokenizer:
    """The words of a grammar under the grammar's own ids, then the start token. The grammar's pad is a control token."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(grammar.words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([grammar.words[grammar.pad], START])
    return tokenizer


def frequent_words(texts: Iterable[str], size: int) -> tokenizers.Tokenizer:
    """The `size - 2` most frequent words, numbers and marks, each with the blank before it; all others become UNKNOWN (id 1).

    Blanks and line breaks are tokens too, so a text whose words are all in the vocabulary is decoded unchanged. UNKNOWN is decoded
    to its own name.
    """
    words = pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated")
    counting = tokenizers.Tokenizer(models.WordLevel({}, unk_token=UNKNOWN))
    counting.pre_tokenizer = words
    trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=[START, UNKNOWN], show_progress=False)
    counting.train_from_iterator(texts, trainer)
    tokenizer = tokenizers.Tokenizer(counting.model)  # a new one, because the trainer makes UNKNOWN a control token
    tokenizer.pre_tokenizer, tokenizer.decoder = words, decoders.Fuse()
    tokenizer.add_special_tokens([START])
    return tokenizer


# {name: (function that trains a tokenizer on texts, fewest ids that it can use)}
RECIPES = {"bpe": (byte_level_bpe, 257), "words": (frequent_words, 3)}


def recipe(name: str, padded: bool = False) -> Callable[[Iterable[str]], Tokenizer] | None:
    """The function that trains `bpe:SIZE` or `words:SIZE` on texts, in one pass; None if `name` has no such form.

    With `padded` one of the ids is a pad.

    Raises:
      ValueError: SIZE is no number, or is less than the kind of tokenizer needs.
    """
    kind, colon, size = name.partition(":")
    if not colon or kind not in RECIPES:
        return None
    make, least = RECIPES[kind]
    if not size.isdecimal() or int(size) < least + padded:
        raise ValueError(
            f"--tokenizer={name}: {kind} takes a number of ids from {least + padded} on, such as {kind}:4096"
        )

    def train(texts: Iterable[str]) -> Tokenizer:
        pieces = (piece for text in texts for piece in windows.pieces(text))
        made = Tokenizer(make(pieces, int(size) - padded).to_str())
        return made.with_pad() if padded else made

    return train


def of_grammars() -> dict[str, tokenizers.Tokenizer]:
    """The words of each grammar that comes with the package, under its name."""
    return {name: words(Grammar.load(name)) for name in shipped_names()}


def main(directory: pathlib.Path) -> None:
    made = {"chars": characters(), "qm9": molecules()} | of_grammars()
    speeches = [text for _, text in corpora.documents("sotu", "train", "")]
    made[f"sotu_letters_{LETTERS_SIZE}"] = letter_bpe(speeches, LETTERS_SIZE)
    for size in BPE_SIZES:
        made[f"sotu_bpe_{size}"] = byte_level_bpe(speeches, size)
    sentences = [text for _, text in corpora.documents("everyday", "train", "")]
    for size in WORD_SIZES:
        made[f"everyday_{size}"] = word_tokens.tokenizer(sentences, size, START)
    for name, tokenizer in made.items():
        tokenizer.save(str(directory / f"{name}.json"))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if sys.argv[1:] else pathlib.Path(__file__).parent / "tokenizers")
