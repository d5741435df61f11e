"""tfds builders for packed text, for sentences and for rows of a grammar; none of the builders needs TensorFlow.

All store rows in order as `ids`, int32 [length], in array_record shards of at most `SHARD_ROWS` rows, because reading
one row at random costs time in proportion to its shard. Shards are written here, several at a time, because the builders of tfds
write one after another and take three times as long for each, more than half as long as one core takes to tokenise the text.
"""

import abc
import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from flowlm.data import corpora, packing
from flowlm.data.grammar import Grammar
from flowlm.data.tokenizers import Tokenizer
from flowlm.system import parallel, storage

SHARD_ROWS = 8192
_MANY_IDS = 4_000_000  # ids of a split that several processes write; of fewer, starting these would take as long
GRAMMAR_ROWS = {"train": 131_072, "validation": 4_096, "test": 4_096}


@dataclasses.dataclass(eq=False)
class RowsConfig(tfds.core.BuilderConfig):
    """What a prepared set depends on. Its name holds the tokenizer's digest, so that another vocabulary makes another set.

    Attributes:
      source: name of a corpus or of a grammar.
      tokenizer: what turns the source's text into ids.
      length: ids in a row, the start token included.
      data_dir: folder that holds the files of the corpora; a grammar does not read it.
      workers: processes that tokenise; any number makes the same set.
    """

    source: str = ""
    tokenizer: Tokenizer | None = None
    length: int = 0
    data_dir: str = ""
    workers: int = 1

    @classmethod
    def of(
        cls, source: str, tokenizer: Tokenizer, length: int, data_dir: str | pathlib.Path, workers: int = 1
    ) -> "RowsConfig":
        name = f"{source}-{tokenizer.sha256[:12]}-{length}"
        return cls(
            name=name, source=source, tokenizer=tokenizer, length=length, data_dir=str(data_dir), workers=workers
        )


class _Shard(NamedTuple):
    """The rows begin..end of a split, in a file of their own."""

    split: str
    path: str
    begin: int
    end: int


class _Rows(tfds.core.dataset_builder.FileReaderBuilder, skip_registration=True):
    """Rows of ids, by split: a class says which, and this writes them."""

    VERSION = tfds.core.Version("1.0.0")
    builder_config: RowsConfig

    def _info(self) -> tfds.core.DatasetInfo:
        ids = tfds.features.Tensor(shape=(self.builder_config.length,), dtype=np.int32)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict({"ids": ids}),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    @abc.abstractmethod
    def _rows(self) -> Mapping[str, np.ndarray]:
        """The rows int32 [num, length - 1] of each split, without their start tokens."""

    def _download_and_prepare(self, dl_manager, download_config=None) -> None:
        del dl_manager, download_config
        config, rows = self.builder_config, self._rows()
        shards = {split: self._shards(split, len(rows[split])) for split in rows}
        write = functools.partial(
            _write_shard, {split: _reopening(rows[split]) for split in rows}, config.tokenizer.start
        )
        workers = config.workers if sum(each.size for each in rows.values()) >= _MANY_IDS else 1
        for _ in parallel.ordered(write, itertools.chain(*shards.values()), workers):
            pass
        self.info.set_splits(tfds.core.SplitDict([self._written(split, shards[split]) for split in shards]))

    def _shards(self, split: str, num_rows: int) -> list[_Shard]:
        if num_rows == 0:
            config = self.builder_config
            raise ValueError(f"{split} split of {config.source!r} is shorter than one row of {config.length} ids")
        template, num = self._get_filename_template(split_name=split), -(-num_rows // SHARD_ROWS)
        bounds = itertools.pairwise(np.linspace(0, num_rows, num + 1).astype(int).tolist())
        paths = (template.sharded_filepath(shard_index=shard, num_shards=num) for shard in range(num))
        return [_Shard(split, os.fspath(path), *part) for path, part in zip(paths, bounds, strict=True)]

    def _written(self, split: str, shards: list[_Shard]) -> tfds.core.SplitInfo:
        return tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard.end - shard.begin for shard in shards],
            num_bytes=sum(os.path.getsize(shard.path) for shard in shards),
            filename_template=self._get_filename_template(split_name=split),
        )


def _reopening(rows: np.ndarray) -> Callable[[], np.ndarray]:
    """What gives the rows to another process: of rows on the disk only their place is sent there."""
    if isinstance(rows, np.memmap):
        return functools.partial(np.memmap, rows.filename, rows.dtype, "r", rows.offset, rows.shape)
    return functools.partial(np.asarray, rows)


def _write_shard(rows: Mapping[str, Callable[[], np.ndarray]], start: int, shard: _Shard) -> None:
    """Writes rows, each behind a start token, as tfds would write them."""
    with contextlib.closing(ArrayRecordWriter(shard.path, "group_size:1")) as writer:
        for ids in packing.framed(rows[shard.split]()[shard.begin : shard.end], start):
            writer.write(_example(ids))


def _example(ids: np.ndarray) -> bytes:
    feature = tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=ids.tolist()))
    return tf_example_pb2.Example(features=tf_feature_pb2.Features(feature={"ids": feature})).SerializeToString()


class PackedText(_Rows, skip_registration=True):
    """Documents of a corpus, tokenised, laid end to end and cut to rows of one length."""

    def _download_and_prepare(self, dl_manager, download_config=None) -> None:
        config = self.builder_config
        local = pathlib.Path(storage.mirror(storage.path(config.data_dir)))
        with packing.workspace(local / "tokens" / config.name) as self._tokens:
            super()._download_and_prepare(dl_manager, download_config)

    def _rows(self) -> Mapping[str, np.ndarray]:
        config = self.builder_config

        def documents():
            return ((split, text) for split, _, text in corpora.read_corpus(config.source, config.data_dir))

        # A shard's file name holds the number of shards, so all tokens are written and counted before the first shard.
        separated = corpora.CORPORA[config.source].separated
        rows, record = packing.write_streams(
            documents, config.tokenizer, separated, self._tokens, config.length - 1, config.workers
        )
        if any(record.unspelled.values()):
            self.info.metadata.update(count=record.unspelled, such_as=record.such_as)
            logging.warning("%s", _report(config, record))
        return {split: rows[split] for split in corpora.SPLITS}


def _report(config: RowsConfig, record: packing.Record) -> str:
    """One line that says what the vocabulary could not spell."""
    lost, tokens = sum(record.unspelled.values()), sum(record.tokens.values())
    unknown = config.tokenizer.unknown
    became = (
        f"characters were dropped, beside {tokens} tokens" if unknown is None else f"of {tokens} tokens are {unknown}"
    )
    named = ", ".join(map(repr, record.such_as))
    return f"{config.source}: {lost} {became}, because the tokenizer cannot spell all of the text, such as {named}"


class Sentences(_Rows, skip_registration=True):
    """Documents of a corpus, each a row of its own with pads behind it; those that cannot be spelled or are longer are left out."""

    def _rows(self) -> Mapping[str, np.ndarray]:
        config = self.builder_config
        documents = list(corpora.read_corpus(config.source, config.data_dir))
        every, unspelled = config.tokenizer.encode_counted([text for _, _, text in documents])
        rows = {split: [] for split in corpora.SPLITS}
        for (split, _, _), ids, count in zip(documents, every, unspelled, strict=True):
            if not count and len(ids) < config.length:
                rows[split].append(np.pad(ids, (0, config.length - 1 - len(ids)), constant_values=config.tokenizer.pad))
        empty = np.empty((0, config.length - 1), np.int32)
        return {split: np.stack(found) if found else empty for split, found in rows.items()}


class GrammarRows(_Rows, skip_registration=True):
    """Rows drawn from a grammar, one seed for each split."""

    def _rows(self) -> Mapping[str, np.ndarray]:
        grammar = Grammar.load(self.builder_config.source)
        return {
            split: grammar.sample(np.random.default_rng(seed), num)
            for seed, (split, num) in enumerate(GRAMMAR_ROWS.items())
        }
