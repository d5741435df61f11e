"""Datasets as the rest of the code sees them: rows of ids, read by number.

A row of the training stream is a function of (seed, index) alone, so neither processes nor meshes change the order,
and the state of a run's data is its step.
"""

import contextlib
import dataclasses
import io
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from flowlm.data import builders, corpora, grammar, marginals, tokenizers
from flowlm.data.grammar import Grammar
from flowlm.data.shards import Shards
from flowlm.data.tokenizers import Tokenizer
from flowlm.system import storage

# Rows read at once where a whole split is scanned.
_BLOCK = 4096
# Rows that suffice to count tokens by position.
_MARGINAL_ROWS = 262_144
# This file is copied to a bucket last, so a prepared set there is whole once the file exists.
WHOLE = "dataset_info.json"


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows of one split.

    Attributes:
      source: random access to records {"ids": int32 [length]}.
      tokenizer: what decodes the rows.
      length: ids in a row, the start token included.
      sentences: whether each row is a text of its own, padded.
    """

    source: Shards
    tokenizer: Tokenizer
    length: int
    sentences: bool = False

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

        Of a split with more than 262,144 rows, at most so many are counted, evenly spaced.

        Raises:
          ValueError: the vocabulary is smaller than the tokenizer's.
        """
        if vocab_size < self.tokenizer.vocab_size:
            raise ValueError(f"vocab_size {vocab_size} is less than the tokenizer's {self.tokenizer.vocab_size}")
        counts = np.zeros((self.length, vocab_size), np.int64)
        positions = np.arange(self.length)
        numbers = range(0, len(self), -(-len(self) // _MARGINAL_ROWS))
        for begin in range(0, len(numbers), _BLOCK):
            np.add.at(counts, (positions, self._read(list(numbers[begin : begin + _BLOCK]))), 1)
        return marginals.log_marginals(counts)

    def text(self, num_chars: int | None = None) -> str:
        """The split's first characters (all if None), as its tokenizer decodes them, a space between documents.

        The whole text and its tokens are held in memory.
        """
        num_rows = len(self) if num_chars is None else min(len(self), -(-num_chars // (self.length - 1)))
        # A packed row has start tokens between its documents. Sentences have none inside, so the one in front of each row is kept.
        stream = self.rows(0, num_rows)[:, 0 if self.sentences else 1 :].reshape(-1)
        documents = np.split(stream, np.flatnonzero(stream == self.tokenizer.start))
        return " ".join(filter(None, self.tokenizer.decode_batch(documents)))[:num_chars]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared dataset.

    Attributes:
      tokenizer: what made the rows of text, and decodes them.
      length: ids in a row, the start token included.
      grammar: the exact law of the rows (without their start token); None for a corpus.
      unspelled: empty if the tokenizer could spell all of the text. Otherwise "count" is how often it could not, by split
        (`Tokenizer.encode_counted`), and "such_as" lists some of what it could not spell.
      sentences: whether each row is a text of its own, padded.
    """

    tokenizer: Tokenizer
    length: int
    grammar: Grammar | None
    train: Split
    validation: Split
    test: Split
    unspelled: dict = dataclasses.field(default_factory=dict)
    sentences: bool = False


def open_dataset(name: str, tokenizer: str, length: int, data_dir: str | pathlib.Path, workers: int = 1) -> Dataset:
    """Opens a corpus or a grammar under a tokenizer, in rows of `length` ids; prepares it on first use.

    Prepared sets lie in `<data_dir>/tfds`; delete one there to have it made again. A set appears whole or not at all, so an
    interrupted preparation leaves nothing that looks like a set. If several processes prepare the same one, the first to end wins.

    Args:
      name: a corpus (`corpora.CORPORA`) or a shipped grammar.
      tokenizer: its name or the path of its file, as in `tokenizers.shipped`.
      length: ids in a row, the start token in front included.
      data_dir: folder (`~` is expanded) or bucket that holds all data; a set in a bucket is copied to the local disk on first use.
      workers: processes that prepare a large set. More than one import the program that calls this, which must be safe to import.

    Raises:
      FileNotFoundError: files of the corpus or the tokenizer are missing.
      ValueError: the name or tokenizer does not exist, or name, tokenizer and length do not fit together.
    """
    data_dir = storage.path(data_dir)
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
    sentences = fitting is not None
    if sentences and vocabulary.pad is None:
        raise ValueError(
            f"a text of {name!r} is a row, and tokenizer {tokenizer!r} has no [PAD] to fill it up: "
            f"set --config.data.tokenizer={fitting}"
        )
    builder_class = builders.Sentences if sentences else builders.PackedText if law is None else builders.GrammarRows

    def make() -> tfds.core.DatasetBuilder:
        with _less_said():  # because tfds warns that each set has a configuration of its own
            return builder_class(
                data_dir=storage.mirror(data_dir) / "tfds",
                config=builders.RowsConfig.of(name, vocabulary, length, data_dir, workers),
                file_format="array_record",
            )

    builder = make()
    if not builder.data_path.exists():
        # Rows are read from the local disk because array_record cannot read a bucket. The bucket shares what one host prepared.
        shared = data_dir / os.fspath(builder.data_path.relative_to(storage.mirror(data_dir)))
        if (shared / WHOLE).exists():
            storage.fetch(shared)
        else:
            if law is None:
                corpora.check_corpus(name, data_dir)
            _prepare(builder)
            if storage.in_bucket(shared):
                storage.copy(builder.data_path, shared, last=WHOLE)
        builder = make()
    splits = {split: Split(_shards(builder, split), vocabulary, length, sentences) for split in corpora.SPLITS}
    return Dataset(vocabulary, length, law, **splits, unspelled=dict(builder.info.metadata or {}), sentences=sentences)


def is_prepared(name: str, tokenizer: str, length: int, data_dir: str | pathlib.Path) -> bool:
    """Whether the set lies whole where `open_dataset` would find it. Raises FileNotFoundError: the tokenizer is missing."""
    data_dir = storage.path(data_dir)
    config = builders.RowsConfig.of(name, tokenizers.shipped(tokenizer, data_dir), length, data_dir)
    kinds = (data_dir / "tfds").iterdir() if (data_dir / "tfds").exists() else ()
    sets = (kind / config.name for kind in kinds)
    return any((version / WHOLE).exists() for found in sets if found.exists() for version in found.iterdir())


def _shards(builder: tfds.core.DatasetBuilder, split: str) -> Shards:
    return Shards(builder.as_data_source(split), np.cumsum(builder.info.splits[split].shard_lengths))


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


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
    config = builder.builder_config
    print(f"preparing {config.source} in rows of {config.length}, once:", file=sys.stderr)
    print(f"  {builder.data_path}", file=sys.stderr)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # hides what tfds prints about sizes that it does not know
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except OSError:
        # tfds fails at its final rename if another process was faster. The other process's set is the same, so it is used.
        if not builder.data_path.exists():
            raise
