"""Turns text into token ids and back, by JSON files of the `tokenizers` library.

One class serves every kind, because byte-level BPE, WordPiece, single characters and whitespace-separated words
differ only in the file. Every tokenizer has a *start token*, which stands in front of each row and between documents;
it is the first of `START_TOKENS` found in the vocabulary.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np
import tokenizers

from flowlm.data import tokenizer_files, windows
from flowlm.data.tokenizer_files import START_TOKENS
from flowlm.system import storage

_SHIPPED = pathlib.Path(__file__).parent / "tokenizers"
_FETCHED = {"bert-base-uncased": "bert-base-uncased", "gpt2": "openai-community/gpt2"}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, given by `json`, the text of its file alone, so that equal files make equal tokenizers."""

    json: str = dataclasses.field(repr=False)

    def __reduce__(self) -> tuple:
        return Tokenizer, (self.json,)  # another process makes anew what is cached here

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "Tokenizer":
        """Reads a tokenizer file. Raises FileNotFoundError and ValueError as `tokenizer_files.read_tokenizer` does."""
        return cls(tokenizer_files.read_tokenizer(storage.path(path)))

    def with_pad(self) -> "Tokenizer":
        """This tokenizer with one more id, for a token [PAD] that no text is encoded as and that is not decoded."""
        model = tokenizers.Tokenizer.from_str(self.json)
        model.add_special_tokens([tokenizer_files.PAD])
        return Tokenizer(model.to_str())

    def save(self, path: str | pathlib.Path) -> None:
        """Writes the file that `load` reads back to an equal tokenizer."""
        storage.path(path).write_text(self.json, "utf-8")

    @functools.cached_property
    def _model(self) -> tokenizers.Tokenizer:
        return tokenizer_files.settled(self.json)

    @functools.cached_property
    def _noticing(self) -> tuple[tokenizers.Tokenizer, int]:
        return tokenizer_files.noticing(self.json)

    @functools.cached_property
    def _is_control(self) -> np.ndarray:
        """bool [vocab_size + 1]: whether each id is a special token's, as which no text may be encoded.

        The unknown token is not one, because text becomes it. The last id is the one that `_noticing` gives to dropped characters.
        """
        found = np.zeros(self.vocab_size + 1, bool)
        found[[i for i, token in self._model.get_added_tokens_decoder().items() if token.special]] = True
        unknown = self._noticing[1]
        found[unknown] = unknown == self.start
        return found

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of ids, the start token's included."""
        return self._model.get_vocab_size(with_added_tokens=True)

    @functools.cached_property
    def start(self) -> int:
        """Id of the start token."""
        return self._model.token_to_id(tokenizer_files.start_token(self._model))

    @property
    def pad(self) -> int | None:
        """Id of the token [PAD]; None if the vocabulary has no such token."""
        return self._model.token_to_id(tokenizer_files.PAD)

    @property
    def unknown(self) -> str | None:
        """The token that stands for what the vocabulary cannot spell; None if such characters are dropped or refused."""
        unknown = self._noticing[1]
        return self.pieces[unknown] if 0 <= unknown < self.vocab_size else None

    @functools.cached_property
    def pieces(self) -> tuple[str, ...]:
        """The token of each id, in the file's spelling."""
        return tuple(self._model.id_to_token(i) for i in range(self.vocab_size))

    @functools.cached_property
    def sha256(self) -> str:
        """Digest of the file, which tells tokenizers apart."""
        return hashlib.sha256(self.json.encode("utf-8")).hexdigest()

    def normalise(self, text: str) -> str:
        """The text after the tokenizer's normalisation; with a shipped tokenizer, decode(encode(text)) returns the same."""
        normalizer = self._model.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def encode(self, text: str) -> np.ndarray:
        """Ids int32 [number of tokens] of a text, without a start token.

        Raises:
          ValueError: the vocabulary cannot spell the text (whole-word vocabularies only).
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of many texts, in parallel over the cores."""
        return self.encode_counted(texts)[0]

    def encode_counted(self, texts: Sequence[str]) -> tuple[list[np.ndarray], list[int]]:
        """(ids of each text, as `encode_batch`; for each text, how often the vocabulary could not spell it).

        The count is of unknown tokens, or, if the file has no unknown token, of characters that are dropped.
        """
        model, unknown = self._noticing
        found = self._encode(model, texts)
        counts = [int(np.count_nonzero(ids == unknown)) for ids in found]
        if unknown == self.vocab_size:
            found = [self._encode(self._model, [text])[0] if n else ids for text, n, ids in zip(texts, counts, found)]
        return [self._as_text(ids) if self._is_control[ids].any() else ids for ids in found], counts

    def unspelled(self, text: str, num: int = 5) -> list[str]:
        """The first `num` different parts of a text that the vocabulary cannot spell."""
        model, unknown = self._noticing
        found = {}
        for begin in range(0, len(text), windows.WINDOW):
            part = text[begin : begin + windows.WINDOW]
            encoding = model.encode(part, add_special_tokens=False)
            found |= {part[slice(*at)]: None for i, at in zip(encoding.ids, encoding.offsets) if i == unknown}
            if len(found) >= num:
                break
        return [*found][:num]

    def _encode(self, model: tokenizers.Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            return windows.encode(model, texts)
        except Exception as error:  # The library raises bare Exception for a word outside the vocabulary.
            raise ValueError(f"{str(texts)[:80]} has words outside the vocabulary of the tokenizer") from error

    def _as_text(self, ids: np.ndarray) -> np.ndarray:
        """Replaces each control token that the model found in a text by the ids of the characters that spell it."""

        def characters(i: int) -> np.ndarray:
            spelled = np.concatenate(self._encode(self._model, [*self._model.id_to_token(i)]))
            if self._is_control[spelled].any():
                raise ValueError(f"the tokenizer reads text as its token {self._model.id_to_token(i)!r}: give another")
            return spelled

        return np.concatenate([characters(i) if self._is_control[i] else np.array([i], np.int32) for i in ids])

    @functools.cached_property
    def _word(self) -> tuple[int, str]:
        """(id, text) of the first token of letters alone, which may stand before any token; (start token, "") if there is none."""
        for i in range(self.vocab_size):
            if (text := self.decode([i])).isalpha() and text.isascii():
                return i, text
        return self.start, ""

    def decode_tokens(self, ids: Sequence[int]) -> list[str]:
        """The text of each id alone, as in the middle of a text, because some files write the first word with a capital."""
        before, text = self._word
        first, later = self.decode_batch([[i] for i in ids]), self.decode_batch([[before, i] for i in ids])
        out = []
        for alone, behind in zip(first, later):
            inside = behind.removeprefix(text) if behind.startswith(text) else alone
            # A blank belongs to the token only if the token alone has one; otherwise the file puts it between tokens.
            out.append(inside if alone.startswith(" ") else inside.removeprefix(" "))
        return out

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of a sequence of ids, without start, end and pad tokens."""
        return self.decode_batch(np.asarray(ids)[None])[0]

    def decode_batch(self, ids: Sequence[Sequence[int]] | np.ndarray) -> list[str]:
        """`decode` of many sequences of ids [num, length], or of sequences that differ in length."""
        return self._model.decode_batch([np.asarray(row).tolist() for row in ids], skip_special_tokens=True)


def numbers(size: int) -> Tokenizer:
    """A stand-in for an unknown tokenizer: `size` ids, which are written as numbers; 0 is the start token."""
    vocabulary = {START_TOKENS[0]: 0} | {str(i): i for i in range(1, size)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=START_TOKENS[0]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens([START_TOKENS[0]])
    return Tokenizer(model.to_str())


def shipped_names() -> list[str]:
    """Names of the tokenizers that come with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.json"))


def shipped(name: str, data_dir: str | pathlib.Path | None = None) -> Tokenizer:
    """Loads a tokenizer: a shipped one by name, a fetched one in `<data_dir>/tokenizers` by name, or a file by its path.

    Raises:
      FileNotFoundError: the tokenizer must be fetched first (the message holds the line that does it).
      ValueError: no tokenizer has this name, or a fetched one is named without `data_dir`.
    """
    if name in shipped_names():
        return Tokenizer.load(_SHIPPED / f"{name}.json")
    if name in _FETCHED:
        if data_dir is None:
            raise ValueError(f"tokenizer {name!r} is kept in <data_dir>/tokenizers: give data_dir")
        path = storage.path(data_dir) / "tokenizers" / f"{name}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            line = f"import tokenizers; tokenizers.Tokenizer.from_pretrained({_FETCHED[name]!r}).save({str(path)!r})"
            raise FileNotFoundError(
                f'tokenizer {name!r} is not in {path.parent}: fetch it once by `python -c "{line}"`'
            )
        return Tokenizer.load(path)
    if name.endswith(".json") or storage.path(name).is_file():
        return Tokenizer.load(name)
    known = ", ".join([*shipped_names(), *_FETCHED])
    raise ValueError(f"unknown tokenizer {name!r}; known are {known}, and any path that ends in .json")
