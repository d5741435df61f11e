"""Rows of array_record files that lie in a bucket, read from there by byte range: nothing is copied to the disk.

Neighbouring rows are one request, others one each. Where a file's rows lie is read from its end, once. The format is Riegeli's
(https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md), as array_record writes it with a record a chunk:
- every 64 KiB of a file begin with a block header of 24 bytes, in the middle of a chunk too;
- a chunk is a header of 40 bytes, with the size of the data (byte 8), its kind (24) and its number of records (25), then the data:
  how they are compressed, the size of the sizes, the sizes of the records, the records;
- the last 64 KiB hold a chunk whose record says where the footer is, a chunk whose records say where each chunk begins.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

BLOCK, BLOCK_HEADER, CHUNK_HEADER = 1 << 16, 24, 40
# Bytes read from a file's end: of 8,192 rows the footer lies within them.
_END = 1 << 17
_SIMPLE = ord("r")  # a chunk whose records lie one behind the other
_CODECS = {ord("z"): "zstd", ord("b"): "brotli", ord("s"): "snappy"}


@dataclasses.dataclass(frozen=True)
class RemoteRows:
    """Random access to the rows of a split.

    Attributes:
      files: the shards, in order.
      ends: int [number of shards], for each shard the number of rows in it and in all shards before it.
    """

    files: Sequence[epath.Path]
    ends: np.ndarray

    def __len__(self) -> int:
        return int(self.ends[-1])

    @functools.cached_property
    def _begins(self) -> dict[int, np.ndarray]:
        """For each shard that was read from, where its rows begin, and where the last one ends."""
        return {}

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        """Bytes of each file by its name: one request for all, where asking each would take long."""
        listed = _bucket().ls(os.fspath(self.files[0].parent), detail=True)
        return {os.path.basename(each["name"]): int(each["size"]) for each in listed}

    def __getitems__(self, numbers: Sequence[int]) -> list[dict]:
        """The records {"ids": int32 [length]} with these numbers, in the order of the numbers."""
        wanted = np.unique(numbers)
        shards = np.searchsorted(self.ends, wanted, side="right")
        self._find([shard for shard in np.unique(shards).tolist() if shard not in self._begins])
        parts = []  # (shard, number of its first row, where each row begins and the last one ends)
        for shard, begin, end in _runs(wanted, shards):
            first = int(self.ends[shard - 1]) if shard else 0
            parts.append((shard, begin, self._begins[shard][begin - first : end - first + 1].tolist()))
        contents = self._read([(shard, at[0], at[-1]) for shard, _, at in parts])
        found = {}
        for (_, begin, at), content in zip(parts, contents, strict=True):
            for number, (start, stop) in enumerate(itertools.pairwise(at), begin):
                (record,) = records(unblocked(content[start - at[0] : stop - at[0]], start))
                found[number] = {"ids": _ids(record)}
        return [found[int(number)] for number in numbers]

    def _find(self, shards: list[int]) -> None:
        """Learns where the rows of these shards lie."""
        if not shards:
            return
        sizes = [self._sizes[self.files[shard].name] for shard in shards]
        ends = self._read([(shard, max(0, size - _END), size) for shard, size in zip(shards, sizes, strict=True)])
        for shard, size, content in zip(shards, sizes, ends, strict=True):
            footer = footer_at(content[-BLOCK:])
            missing = self._read([(shard, footer, size - len(content))]) if footer < size - len(content) else [b""]
            begins = chunks(records(unblocked((missing[0] + content)[-(size - footer) : -BLOCK], footer)))
            self._begins[shard] = np.asarray([*begins, footer], np.int64)

    def _read(self, parts: list[tuple[int, int, int]]) -> list[bytes]:
        """The bytes begin .. end of each (shard, begin, end), all asked for at once."""
        shards, begins, ends = zip(*parts, strict=True)
        names = [os.fspath(self.files[shard]) for shard in shards]
        return _bucket().cat_ranges(names, list(begins), list(ends), on_error="raise")


def _bucket():
    import gcsfs  # here, because sets on a disk do without it

    return gcsfs.GCSFileSystem()


def _runs(numbers: np.ndarray, shards: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(shard, first number, behind the last) of neighbouring numbers in one shard."""
    cuts = np.flatnonzero((np.diff(numbers) != 1) | (np.diff(shards) != 0)) + 1
    for begin, end in itertools.pairwise([0, *cuts.tolist(), len(numbers)]):
        if begin < end:
            yield int(shards[begin]), int(numbers[begin]), int(numbers[end - 1]) + 1


def unblocked(content: bytes, offset: int) -> bytes:
    """Bytes of a file from `offset` on, without the block headers among them."""
    parts, at, end = [], offset, offset + len(content)
    while at < end:
        at += max(0, BLOCK_HEADER - at % BLOCK)
        stop = min(end, (at // BLOCK + 1) * BLOCK)
        parts.append(content[at - offset : stop - offset])
        at = stop
    return b"".join(parts)


def records(chunk: bytes) -> list[bytes]:
    """The records of a chunk. Raises ValueError: it is not one of those that array_record writes here."""
    size, kind, num = int.from_bytes(chunk[8:16], "little"), chunk[24], int.from_bytes(chunk[25:32], "little")
    data = chunk[CHUNK_HEADER : CHUNK_HEADER + size]
    if kind != _SIMPLE or len(data) < size or (data[0] and data[0] not in _CODECS):
        raise ValueError("no chunk of array_record, or one that is cut: prepare the data anew")
    length, at = _varint(data, 1)
    sizes, values = (_unpacked(data[0], part) for part in (data[at : at + length], data[at + length :]))
    out, at, begin = [], 0, 0
    for _ in range(num):
        length, at = _varint(sizes, at)
        out.append(values[begin : begin + length])
        begin += length
    return out


def footer_at(block: bytes) -> int:
    """Where the footer of a file begins, by its last block."""
    return _fields(records(block[BLOCK_HEADER:])[0])[1]


def chunks(footer: Sequence[bytes]) -> list[int]:
    """Where each chunk with records begins, by the records of the footer."""
    return [fields[1] for record in footer if (fields := _fields(record)).get(3)]


def _ids(record: bytes) -> np.ndarray:
    return np.asarray(tf_example_pb2.Example.FromString(record).features.feature["ids"].int64_list.value, np.int32)


def _unpacked(kind: int, content: bytes) -> bytes:
    if not kind or not content:
        return content
    size, at = _varint(content, 0)
    return pa.Codec(_CODECS[kind]).decompress(content[at:], size, asbytes=True)


def _fields(message: bytes) -> dict[int, int]:
    """{number: value} of a message of protocol buffers whose fields are whole numbers."""
    out, at = {}, 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7:
            return {}
        out[tag >> 3], at = _varint(message, at)
    return out


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """(a whole number as protocol buffers write it, the place behind it)."""
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
