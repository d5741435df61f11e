"""Datasets as the rest of the code sees them: rows of ids, read by number.

A row of the training stream is a function of (seed, index) alone, so neither processes nor meshes change the order,
and the state of a run's data is its step.
"""

import contextlib
import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from flowlm.data import builders, corpora, grammar, marginals, tokenizers
from flowlm.data.fitted import Arrays, fitted
from flowlm.data.grammar import Grammar
from flowlm.data.ranges import RemoteRows
from flowlm.data.shards import Shards
from flowlm.data.tokenizers import Tokenizer
from flowlm.system import storage

# Rows read at once where a whole split is scanned.
_BLOCK = 4096
# Rows, and tokens in them, that suffice to count tokens by position: of long rows fewer are read.
_MARGINAL_ROWS, _MARGINAL_TOKENS = 262_144, 2**26
# Characters at the end of a text that more of its tokens might change.
_MARGIN = 1000


def marginal_rows(length: int) -> int:
    """The most rows of `length` ids that tokens are counted in by position."""
    return max(2, min(_MARGINAL_ROWS, _MARGINAL_TOKENS // length))


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows of one split.

    Attributes:
      source: random access to records {"ids": int32 [length]}.
      tokenizer: what decodes the rows.
      length: ids in a row, the start token included.
      padded: whether each row is a text of its own, with pads behind it.
    """

    source: Shards | RemoteRows
    tokenizer: Tokenizer
    length: int
    padded: bool = False

    def __len__(self) -> int:
        return len(self.source)

    def _read(self, numbers: list[int]) -> np.ndarray:
        if not numbers:
            return np.empty((0, self.length), np.int32)
        return np.stack([record["ids"] for record in self.source.__getitems__(numbers)])

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop in stored order, int32 [stop - start, length].

        Raises:
          IndexError: there are no such rows.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows {start}..{stop} of a split of {len(self)} rows")
        return self._read(list(range(start, stop)))

    def shuffled(self, seed: int) -> Callable[[int, int], np.ndarray]:
        """An endless stream, as a function (start, stop) to its rows start..stop, int32 [stop - start, length].

        Each epoch of len(self) rows is another permutation of the split.
        """
        # grain shuffles the rows' numbers, and the rows are read in one batch: twice as fast as if grain read them one by one.
        order = grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat()
        return lambda start, stop: self._read([int(order[index]) for index in range(start, stop)])

    def log_marginals(self, vocab_size: int) -> np.ndarray:
        """Logs float32 [length, vocab_size] of the law of tokens by position, in nats (see marginals.py).

        Of a split with more than `marginal_rows(length)` rows, at most so many are counted, evenly spaced.

        Raises:
          ValueError: the vocabulary is smaller than the tokenizer's.
        """
        if vocab_size < self.tokenizer.vocab_size:
            raise ValueError(f"vocab_size {vocab_size} is less than the tokenizer's {self.tokenizer.vocab_size}")
        counts = np.zeros(self.length * vocab_size, np.int32)
        before = vocab_size * np.arange(self.length)
        numbers = range(0, len(self), -(-len(self) // marginal_rows(self.length)))
        for begin in range(0, len(numbers), _BLOCK):
            np.add.at(counts, before + self._read(list(numbers[begin : begin + _BLOCK])), 1)
        return marginals.log_marginals(counts.reshape(self.length, vocab_size))

    def text(self, num_chars: int | None = None) -> str:
        """The split's first characters (all if None), as its tokenizer decodes them, a space between documents.

        The whole text and its tokens are held in memory.
        """
        if num_chars is None:
            return self._text(len(self))
        # A token has some letters, as many as in the first rows, so that far fewer rows are read than there are characters.
        num_rows = min(len(self), _BLOCK // 16)
        while True:
            text = self._text(num_rows)
            if num_rows == len(self) or len(text) >= num_chars + _MARGIN:
                return text[:num_chars]
            num_rows = min(len(self), int(1.05 * num_rows * (num_chars + _MARGIN) / max(len(text), 1)) + 1)

    def _text(self, num_rows: int) -> str:
        """The first rows as one text."""
        # A packed row has start tokens between its documents. Padded ones have none inside, so the one in front of each is kept.
        stream = self.rows(0, num_rows)[:, 0 if self.padded else 1 :].reshape(-1)
        documents = np.split(stream, np.flatnonzero(stream == self.tokenizer.start))
        return " ".join(filter(None, self.tokenizer.decode_batch(documents)))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared dataset.

    Attributes:
      tokenizer: what made the rows of text, and decodes them.
      length: ids in a row, the start token included.
      grammar: the exact law of the rows (without their start token); None for a corpus.
      unspelled: empty if the tokenizer could spell all of the text. Otherwise "count" is how often it could not, by split
        (`Tokenizer.encode_counted`), and "such_as" lists some of what it could not spell.
      sentences: whether each row is a sentence, as a whole.
      padded: whether each row is a text of its own, with pads behind it.
      place: where the prepared set lies, maybe in a bucket; None of one that is in memory only.
    """

    tokenizer: Tokenizer
    length: int
    grammar: Grammar | None
    train: Split
    validation: Split
    test: Split
    unspelled: dict = dataclasses.field(default_factory=dict)
    sentences: bool = False
    padded: bool = False
    place: epath.Path | None = None

    @property
    def pad(self) -> int | None:
        """Id of the token behind a text that is a row of its own; None where rows are full."""
        return self.tokenizer.pad if self.padded else None

    def fitted(self, name: str, facts: Mapping[str, Any], fit: Callable[[], Arrays]) -> Arrays:
        """What `fit` makes of this data, kept beside it (fitted.py). facts: all that it depends on beside the data."""
        return fit() if self.place is None else fitted(self.place, name, facts, fit)


class _Found(NamedTuple):
    """What a set is, wherever it lies."""

    vocabulary: Tokenizer
    law: Grammar | None
    builder: Callable[[epath.Path], builders.Rows]


def open_dataset(
    name: str, tokenizer: str, length: int, data_dir: str | pathlib.Path, workers: int = 1, copy: bool = True
) -> Dataset:
    """Opens a corpus or a grammar under a tokenizer, in rows of `length` ids; prepares it on first use.

    Prepared sets lie in `<data_dir>/tfds`; delete one there to have it made again. A set is whole once its file WHOLE is
    there, which comes last, so an interrupted preparation leaves nothing that looks like a set. Several processes may prepare one.

    Args:
      name: a corpus (`corpora.CORPORA`) or a shipped grammar.
      tokenizer: its name or the path of its file, as in `tokenizers.shipped`.
      length: ids in a row, the start token in front included.
      data_dir: folder (`~` is expanded) or bucket that holds all data; a set in a bucket is copied to the local disk on first use.
      workers: processes that prepare a large set. More than one import the program that calls this, which must be safe to import.
      copy: of a set in a bucket, whether it is copied; otherwise each row is read from there when it is wanted.

    Raises:
      FileNotFoundError: files of the corpus or the tokenizer are missing.
      ValueError: the name or tokenizer does not exist, or name, tokenizer and length do not fit together.
    """
    data_dir = storage.path(data_dir)
    vocabulary, law, make = _find(name, tokenizer, length, data_dir, workers=workers)
    here = storage.mirror(data_dir) if copy else data_dir
    builder = make(here)
    if not _is_whole(builder):
        # array_record reads the local disk alone. The bucket shares what one host prepared.
        shared = make(data_dir)
        if not _is_whole(shared):
            _check_source(shared)
            _prepare(shared)
        if copy:
            storage.fetch(shared.data_path)
        builder = make(here)
    padded = corpora.is_padded(name)
    kind = dict(sentences=law is None and corpora.CORPORA[name].rows is not None, padded=padded)
    splits = {split: Split(_shards(builder, split), vocabulary, length, padded) for split in corpora.SPLITS}
    unspelled = {key: told for key, told in (builder.info.metadata or {}).items() if key != builders.PADDED}
    place = data_dir / os.fspath(builder.data_path.relative_to(here))
    return Dataset(vocabulary, length, law, **splits, unspelled=unspelled, **kind, place=place)


def prepare_dataset(
    name: str, tokenizer: str, length: int, data_dir: str | pathlib.Path, **how: Any
) -> tfds.core.DatasetInfo | None:
    """Prepares what `open_dataset` opens, unless it is there; into a bucket shard by shard, without a copy on the disk.

    Args:
      how: `workers`, `hosts` and `documents` of `builders.RowsConfig`.

    Returns:
      What is known of the set; None on a host that is not the first of several, because others may still be writing.

    Raises:
      FileNotFoundError, ValueError: as `open_dataset`.
    """
    data_dir = storage.path(data_dir)
    make = _find(name, tokenizer, length, data_dir, **how).builder
    builder = make(data_dir)
    if _is_whole(builder):
        builder.tidy()
    else:
        _check_source(builder)
        _prepare(builder)
    return make(data_dir).info if builder.builder_config.hosts.first else None


def _find(name: str, tokenizer: str, length: int, data_dir: epath.Path, **how: Any) -> _Found:
    known = [*corpora.CORPORA, *grammar.shipped_names()]
    if name not in known:
        raise ValueError(f"unknown dataset {name!r}; known are {', '.join(known)}")
    if length < 2:
        raise ValueError(f"length {length}: a row is a start token and at least one more")
    vocabulary = tokenizers.shipped(tokenizer, data_dir)
    law = None if name in corpora.CORPORA else Grammar.load(name)
    if law is not None:
        _check_grammar(name, law, vocabulary, length)
    fitting = None if law is not None else corpora.CORPORA[name].rows
    if corpora.is_padded(name) and vocabulary.pad is None:
        raise ValueError(
            f"a text of {name!r} is a row, and tokenizer {tokenizer!r} has no [PAD] to fill it up: "
            f"set --config.data.tokenizer={fitting or 'DIR/tokenizer.json, of the folder data.dir'}"
        )
    builder_class = builders.Sentences if fitting else builders.PackedText if law is None else builders.GrammarRows

    def make(place: epath.Path) -> builders.Rows:
        with _less_said():  # because tfds warns that each set has a configuration of its own
            return builder_class(
                data_dir=place / "tfds",
                config=builders.RowsConfig.of(name, vocabulary, length, data_dir, **how),
                file_format="array_record",
            )

    return _Found(vocabulary, law, make)


def is_prepared(name: str, tokenizer: str, length: int, data_dir: str | pathlib.Path) -> bool:
    """Whether the set lies whole where `open_dataset` would find it. Raises as that does."""
    place = storage.path(data_dir)
    return _is_whole(_find(name, tokenizer, length, place).builder(place))


def _shards(builder: tfds.core.DatasetBuilder, split: str) -> Shards | RemoteRows:
    told = builder.info.splits[split]
    ends = np.cumsum(told.shard_lengths)
    if storage.in_bucket(builder.data_path):
        return RemoteRows([*map(epath.Path, told.filepaths)], ends)
    return Shards(builder.as_data_source(split), ends)


def _check_grammar(name: str, law: Grammar, vocabulary: Tokenizer, length: int) -> None:
    if vocabulary.pieces[: len(law.words)] != law.words:
        raise ValueError(f"dataset {name!r} has its own words for tokens; its tokenizer is {name!r}")
    if length != law.length + 1:
        raise ValueError(f"length {length}: rows of {name!r} have {law.length + 1} ids, one start token included")


@contextlib.contextmanager
def _less_said() -> Iterator[None]:
    """Silences the warnings of tfds, because nobody can act on them."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(min(verbosity, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _is_whole(builder: builders.Rows) -> bool:
    return (builder.data_path / builders.WHOLE).exists()


def _check_source(builder: builders.Rows) -> None:
    config = builder.builder_config
    if config.documents is None and config.source in corpora.CORPORA:
        corpora.check_corpus(config.source, config.data_dir)


def _prepare(builder: builders.Rows) -> None:
    config = builder.builder_config
    print(f"preparing {config.source} in rows of {config.length}, once:", file=sys.stderr)
    print(f"  {builder.data_path}", file=sys.stderr)
    builder.write()
