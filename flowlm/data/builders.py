"""tfds builders for packed text, for sentences and for rows of a grammar; none of the builders needs TensorFlow.

All store rows in order as `ids`, int32 [length], in array_record shards of at most `SHARD_ROWS` rows, because reading
one row at random costs time in proportion to its shard. Shards are written here, several at a time, because the builders of tfds
write one after another and take three times as long for each, more than half as long as one core takes to tokenise the text.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from flowlm.data import corpora, packing
from flowlm.data.grammar import Grammar
from flowlm.data.tokenizers import Tokenizer
from flowlm.system import parallel, storage
from flowlm.system.hosts import ALONE, Hosts

SHARD_ROWS = 8192
# This file is written last, so a prepared set is whole once the file exists.
WHOLE = "dataset_info.json"
_SUFFIX = ".array_record"
_MANY_IDS = 4_000_000  # ids of a split that several processes write; of fewer, starting these would take as long
# Under this name the metadata of a set say how many pads its rows have, and how many documents have several rows, by split.
PADDED = "padded"
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
      hosts: which of several hosts this is.
      documents: gives this host's (split, id, text) in place of all of the corpus's.
    """

    source: str = ""
    tokenizer: Tokenizer | None = None
    length: int = 0
    data_dir: str = ""
    workers: int = 1
    hosts: Hosts = ALONE
    documents: Callable[[], Iterator[corpora.Document]] | None = None

    @classmethod
    def of(
        cls, source: str, tokenizer: Tokenizer, length: int, data_dir: str | pathlib.Path, **more: Any
    ) -> "RowsConfig":
        name = f"{source}-{tokenizer.sha256[:12]}-{length}"
        return cls(name=name, source=source, tokenizer=tokenizer, length=length, data_dir=str(data_dir), **more)

    @property
    def local(self) -> pathlib.Path:
        """`data_dir`, or where its files lie on the disk if it is in a bucket."""
        return pathlib.Path(storage.mirror(storage.path(self.data_dir)))


class _Shard(NamedTuple):
    """The rows begin..end of a host's part of a split, in a file of their own."""

    split: str
    name: str
    begin: int
    end: int


class _Content(NamedTuple):
    """What is to be written.

    Attributes:
      rows: this host's rows int32 [num, length - 1] of each split, without their start tokens.
      counts: for each host its number of rows by split.
      digest: another one where the rows are others; "" if nobody knows.
    """

    rows: Mapping[str, np.ndarray]
    counts: list[dict[str, int]]
    digest: str = ""


class Rows(tfds.core.dataset_builder.FileReaderBuilder, skip_registration=True):
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

    def _download_and_prepare(self, dl_manager, download_config=None) -> None:
        raise NotImplementedError("`write` does it")

    def _rows(self) -> Mapping[str, np.ndarray]:
        """The rows int32 [num, length - 1] of each split, without their start tokens."""
        raise NotImplementedError

    def _content(self, workspace: pathlib.Path) -> _Content:
        """What is to be written; `workspace` is a local folder for what is needed until then."""
        del workspace
        rows = self._rows()
        return _Content(rows, [{split: len(each) for split, each in rows.items()}])

    @property
    def _workspace(self) -> pathlib.Path:
        return self.builder_config.local / "tokens" / self.builder_config.hosts.named(self.builder_config.name)

    def tidy(self) -> None:
        """Removes what a call left that was killed when the set was whole already."""
        if self._workspace.exists():
            with packing.workspace(self._workspace):
                pass

    def write(self) -> None:
        """Writes the set: each shard appears whole, and a call that was interrupted is gone on with; the file WHOLE comes last.

        Of several hosts each writes its own shards, and the first writes WHOLE when all are there.
        """
        config, target = self.builder_config, self.data_path
        with packing.workspace(self._workspace) as workspace:
            content = self._content(workspace)
            shards = {split: self._shards(split, [each[split] for each in content.counts]) for split in content.rows}
            target.mkdir(parents=True, exist_ok=True)
            self._write_shards(
                content, [each for parts in shards.values() for each in parts[config.hosts.index]], workspace
            )
            told = {split: [shard for part in parts for shard in part] for split, parts in shards.items()}
            if config.hosts.first:
                config.hosts.all("written", None)
                self._finish(target, told, workspace)
            else:
                config.hosts.leave("written", None)

    def _write_shards(self, content: _Content, shards: list[_Shard], workspace: pathlib.Path) -> None:
        config, target = self.builder_config, self.data_path
        begun = workspace / "shards"  # what the shards that are there already were made of
        known = bool(content.digest) and begun.exists() and begun.read_text() == content.digest
        there = {path.name for path in target.iterdir()} if known else set()
        begun.write_text(content.digest)
        write = functools.partial(
            _write_shard,
            {split: _reopening(rows) for split, rows in content.rows.items()},
            config.tokenizer.start,
            workspace,
            os.fspath(target),
        )
        workers = config.workers if sum(each.size for each in content.rows.values()) >= _MANY_IDS else 1
        for _ in parallel.ordered(write, (shard for shard in shards if shard.name not in there), workers):
            pass

    def _shards(self, split: str, counts: list[int]) -> list[list[_Shard]]:
        """The shards of each host, given its number of rows."""
        if sum(counts) == 0:
            config = self.builder_config
            raise ValueError(f"{split} split of {config.source!r} is shorter than one row of {config.length} ids")
        template, nums = self._get_filename_template(split_name=split), [-(-count // SHARD_ROWS) for count in counts]
        names = (
            os.path.basename(template.sharded_filepath(shard_index=shard, num_shards=sum(nums)))
            for shard in range(sum(nums))
        )
        bounds = [itertools.pairwise(np.linspace(0, c, num + 1).astype(int).tolist()) for c, num in zip(counts, nums)]
        return [[_Shard(split, next(names), *part) for part in parts] for parts in bounds]

    def _finish(self, target: epath.Path, shards: dict[str, list[_Shard]], workspace: pathlib.Path) -> None:
        """Says that the set is whole, and removes what else is in its folder, left by a call for other rows."""
        found = {path.name: path for path in target.iterdir()}
        for name in found.keys() - {shard.name for each in shards.values() for shard in each}:
            if _SUFFIX in name:
                found[name].unlink()
        self.info.set_splits(tfds.core.SplitDict([self._written(split, found, shards[split]) for split in shards]))
        self.info.download_size = 0
        told = workspace / "info"
        told.mkdir(exist_ok=True)
        self.info.write_to_directory(told)
        for file in sorted(told.iterdir(), key=lambda file: file.name == WHOLE):
            storage.put(file, target / file.name)

    def _written(self, split: str, found: Mapping[str, epath.Path], shards: list[_Shard]) -> tfds.core.SplitInfo:
        return tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard.end - shard.begin for shard in shards],
            num_bytes=sum(found[shard.name].stat().length for shard in shards),
            filename_template=self._get_filename_template(split_name=split),
        )


def _reopening(rows: np.ndarray) -> Callable[[], np.ndarray]:
    """What gives the rows to another process: of rows on the disk only their place is sent there."""
    if isinstance(rows, np.memmap):
        return functools.partial(np.memmap, rows.filename, rows.dtype, "r", rows.offset, rows.shape)
    return functools.partial(np.asarray, rows)


def _write_shard(
    rows: Mapping[str, Callable[[], np.ndarray]], start: int, workspace: pathlib.Path, target: str, shard: _Shard
) -> None:
    """Writes rows, each behind a start token, as tfds would write them."""
    part = workspace / f"{shard.name}-{os.getpid()}"  # a worker of a call that was killed may still write its own
    with storage.writing(part), contextlib.closing(ArrayRecordWriter(str(part), "group_size:1")) as writer:
        for ids in packing.framed(rows[shard.split]()[shard.begin : shard.end], start):
            writer.write(_example(ids))
    storage.put(part, epath.Path(target) / shard.name)


def _example(ids: np.ndarray) -> bytes:
    feature = tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=ids.tolist()))
    return tf_example_pb2.Example(features=tf_feature_pb2.Features(feature={"ids": feature})).SerializeToString()


class PackedText(Rows, skip_registration=True):
    """Documents of a corpus, tokenised, laid end to end or each filled up with pads, and cut to rows of one length."""

    def _content(self, workspace: pathlib.Path) -> _Content:
        config, corpus = self.builder_config, corpora.CORPORA[self.builder_config.source]

        def documents():
            every = config.documents() if config.documents else corpora.read_corpus(config.source, config.data_dir)
            return ((split, text) for split, _, text in every)

        # A shard's file name holds the number of shards, so all tokens are written and counted before the first shard.
        rows, counts, record = packing.write_streams(
            documents,
            config.tokenizer,
            corpus.separated,
            workspace,
            config.length - 1,
            config.workers,
            config.hosts,
            corpus.padded,
        )
        if corpus.padded:
            self.info.metadata.update({PADDED: {"pads": record.pads, "cut_documents": record.cut}})
        if any(record.unspelled.values()):
            self.info.metadata.update(count=record.unspelled, such_as=record.such_as)
            if config.hosts.first:
                logging.warning("%s", _report(config, record))
        return _Content({split: rows[split] for split in corpora.SPLITS}, counts, record.sha256)


def _report(config: RowsConfig, record: packing.Record) -> str:
    """One line that says what the vocabulary could not spell."""
    lost, tokens = sum(record.unspelled.values()), sum(record.tokens.values())
    unknown = config.tokenizer.unknown
    became = (
        f"characters were dropped, beside {tokens} tokens" if unknown is None else f"of {tokens} tokens are {unknown}"
    )
    named = ", ".join(map(repr, record.such_as))
    return f"{config.source}: {lost} {became}, because the tokenizer cannot spell all of the text, such as {named}"


class Sentences(Rows, skip_registration=True):
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


class GrammarRows(Rows, skip_registration=True):
    """Rows drawn from a grammar, one seed for each split."""

    def _rows(self) -> Mapping[str, np.ndarray]:
        grammar = Grammar.load(self.builder_config.source)
        return {
            split: grammar.sample(np.random.default_rng(seed), num)
            for seed, (split, num) in enumerate(GRAMMAR_ROWS.items())
        }
