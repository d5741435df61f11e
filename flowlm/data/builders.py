"""tfds builders for packed text, for sentences and for rows of a grammar; none of the builders needs TensorFlow.

All store rows in order as `ids`, int32 [length], in array_record shards of at most `SHARD_ROWS` rows, because reading
one row at random costs time in proportion to its shard. They are `ShardBasedBuilder`s because a `GeneratorBasedBuilder`
takes no size of shard and needs TensorFlow for more than 1 GB.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from flowlm.data import corpora, packing
from flowlm.data.grammar import Grammar
from flowlm.data.tokenizers import Tokenizer
from flowlm.system import storage

SHARD_ROWS = 8192
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


class _Rows(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Rows of ids, by split."""

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

    def _shards(self, split: str, rows: np.ndarray) -> list:
        """One generator of framed examples for each shard of the rows [num, length - 1]."""
        if len(rows) == 0:
            config = self.builder_config
            raise ValueError(f"{split} split of {config.source!r} is shorter than one row of {config.length} ids")
        bounds = np.linspace(0, len(rows), -(-len(rows) // SHARD_ROWS) + 1).astype(int)
        return [functools.partial(self._examples, rows, *part) for part in itertools.pairwise(bounds)]

    def _examples(self, rows: np.ndarray, begin: int, end: int) -> Iterator[tuple[int, dict]]:
        for key, ids in enumerate(packing.framed(rows[begin:end], self.builder_config.tokenizer.start), begin):
            yield key, {"ids": ids}


class PackedText(_Rows, skip_registration=True):
    """Documents of a corpus, tokenised, laid end to end and cut to rows of one length."""

    def _download_and_prepare(self, dl_manager, download_config=None) -> None:
        config = self.builder_config
        local = pathlib.Path(storage.mirror(storage.path(config.data_dir)))
        with packing.workspace(local / "tokens" / config.name) as self._tokens:
            super()._download_and_prepare(dl_manager, download_config)

    def _shard_iterators_per_split(self, dl_manager) -> Mapping[str, list]:
        del dl_manager
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
        return {split: self._shards(split, rows[split]) for split in corpora.SPLITS}


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

    def _shard_iterators_per_split(self, dl_manager) -> Mapping[str, list]:
        del dl_manager
        config = self.builder_config
        documents = list(corpora.read_corpus(config.source, config.data_dir))
        every, unspelled = config.tokenizer.encode_counted([text for _, _, text in documents])
        rows = {split: [] for split in corpora.SPLITS}
        for (split, _, _), ids, count in zip(documents, every, unspelled, strict=True):
            if not count and len(ids) < config.length:
                rows[split].append(np.pad(ids, (0, config.length - 1 - len(ids)), constant_values=config.tokenizer.pad))
        empty = np.empty((0, config.length - 1), np.int32)
        return {split: self._shards(split, np.stack(found) if found else empty) for split, found in rows.items()}


class GrammarRows(_Rows, skip_registration=True):
    """Rows drawn from a grammar, one seed for each split."""

    def _shard_iterators_per_split(self, dl_manager) -> Mapping[str, list]:
        del dl_manager
        grammar = Grammar.load(self.builder_config.source)
        return {
            split: self._shards(split, grammar.sample(np.random.default_rng(seed), num))
            for seed, (split, num) in enumerate(GRAMMAR_ROWS.items())
        }
