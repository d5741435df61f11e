"""Data sets of Hugging Face (https://huggingface.co/datasets), by name or from a folder, streamed by the library `datasets`.

A set is read in the shards that the library knows, which are mostly its files. Nothing is kept on the disk, so the set is streamed
once for each time that it is read, three times in all.
"""

import functools
import importlib.util
import re
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

_FORM = r"(?P<name>.+?)(?:,(?P<config>[^,:]+))?(?::(?P<split>[A-Za-z_]\w*))?"


class Shard(NamedTuple):
    """One of the shards of a split; the first two attributes say of which set, as `datasets.load_dataset` takes it.

    Attributes:
      path: name or folder of the set.
      config: which of its configurations; None where it has one alone.
      split: name of the split.
      index: which shard, from 0.
      number: how many there are.
      length: about how many bytes of text are in it; 0 where nobody knows.
    """

    path: str
    config: str | None
    split: str
    index: int
    number: int
    length: int = 0

    @property
    def name(self) -> str:
        return f"{self.split}-{self.index:05d}-of-{self.number:05d}"


@functools.lru_cache
def files(place: str) -> tuple[str, list[Shard], list[Shard]]:
    """(the set as it is written behind `--source=hf:`, but for its split; its shards; no others).

    Args:
      place: NAME[,CONFIG][:SPLIT]; all splits where none is named.

    Raises:
      ImportError: `datasets` is not installed. FileNotFoundError: there is no such set. ValueError: there is no such split.
    """
    datasets = _library()
    name, config, split = re.fullmatch(_FORM, place).groups()
    try:
        builder = datasets.load_dataset_builder(name, config)
        known = sorted(datasets.get_dataset_split_names(name, builder.config.name))
        if split and split not in known:
            raise _NoSplit(f"--source=hf:{place}: there is no split {split!r}, but {known}")
        shards = [shard for each in known if split in (None, each) for shard in _shards(name, config, each, builder)]
    except _NoSplit as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # the library and those below it raise their own, for a name, a network or a file
        told = " ".join(str(error).split()).rstrip(".")
        raise FileNotFoundError(f"--source=hf:{place} cannot be opened: {told}") from error
    return f"{name},{config}" if config else name, shards, []


def at(path: str, name: str) -> Shard:
    """The shard that a manifest names, of the set that it names."""
    (found,) = (shard for shard in files(f"{path}:{name.rsplit('-', 3)[0]}")[1] if shard.name == name)
    return found


def size(shard: Shard) -> int:
    """About how many bytes of text are in a shard."""
    return shard.length


def texts(shard: Shard, key: str = "text") -> Iterator[tuple[int, str]]:
    """Yields (number of the row, from 1; text in the column `key`) of each row of a shard.

    Raises:
      ValueError: there is no such column, or what is in it is not text.
    """
    rows = _opened(shard.path, shard.config, shard.split).shard(num_shards=shard.number, index=shard.index)
    for number, row in enumerate(rows, 1):
        if key not in row:
            raise ValueError(
                f"{shard.path} {shard.split}: no column {key!r}; give --text_key=NAME, one of {sorted(row)}"
            )
        if not isinstance(row[key], str):
            found = type(row[key]).__name__
            raise ValueError(
                f"{shard.path} {shard.name}, row {number}: column {key!r} is {found}, not text: give another --text_key"
            )
        yield number, row[key].encode("utf-8", "replace").decode("utf-8")


class _NoSplit(Exception):
    pass


def _library() -> ModuleType:
    if importlib.util.find_spec("datasets") is None:
        raise ImportError("--source=hf needs datasets: `pip install -e .[hf]` in the checkout")
    import datasets

    datasets.disable_progress_bars()
    return datasets


def _opened(name: str, config: str | None, split: str):
    return _library().load_dataset(name, config, split=split, streaming=True)


def _shards(name: str, config: str | None, split: str, builder) -> Iterator[Shard]:
    number = max(1, _opened(name, config, split).num_shards)
    told = (builder.info.splits or {}).get(split)
    length = told.num_bytes // number if told is not None and told.num_bytes else 0
    return (Shard(name, config, split, index, number, length) for index in range(number))
