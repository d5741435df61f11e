"""Rows in many files. No more files are open at once than the process may open."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from flowlm.system import open_files


@dataclasses.dataclass(frozen=True)
class Shards:
    """Random access to the records of a split.

    Attributes:
      source: a tfds data source, which opens a shard when it is first read and keeps it open.
      ends: int [number of shards], for each shard the number of records in it and in all shards before it.
    """

    source: Sequence
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, numbers: Sequence[int]) -> list[dict]:
        """The records with these numbers, in the order of the numbers."""
        most = open_files.share()
        if len(self.ends) <= most:
            return self.source.__getitems__(numbers)
        shards = np.searchsorted(self.ends, numbers, side="right")
        opened, records = np.unique(shards), [None] * len(numbers)
        for begin in range(0, len(opened), most):
            part = np.flatnonzero(np.isin(shards, opened[begin : begin + most]))
            with self.source.data_source:  # closes on exit the shards that it opened
                found = self.source.__getitems__([numbers[i] for i in part])
            for i, record in zip(part, found, strict=True):
                records[i] = record
        return records
