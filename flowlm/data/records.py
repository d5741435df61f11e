"""Files in array_record whose records are examples of TensorFlow (tf.train.Example), written by tfds or by others.

One feature of an example holds a document's text. Neither writing nor reading such files takes TensorFlow.
"""

import contextlib
import os
from collections.abc import Iterator

from array_record.python.array_record_module import ArrayRecordReader
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from flowlm.system import storage

ENDING = ".array_record"
_AT_ONCE = 256  # records that are read together


def texts(place: os.PathLike, key: str = "text") -> Iterator[tuple[int, str]]:
    """Yields (number of the record, from 1; text in the feature `key`) of each record. A file in a bucket is copied first.

    Raises:
      ValueError: the file is damaged, or a record is no example, or has no text of such a name.
    """
    for number, record in enumerate(_records(place), 1):
        yield number, _text(place, number, record, key)


def _records(place: os.PathLike) -> Iterator[bytes]:
    try:
        with contextlib.closing(ArrayRecordReader(os.fspath(storage.fetch(place)))) as reader:
            if not reader.ok():
                raise RuntimeError("its end is missing")
            for begin in range(0, reader.num_records(), _AT_ONCE):
                yield from reader.read(begin, min(begin + _AT_ONCE, reader.num_records()))
    except RuntimeError as error:
        raise ValueError(f"{place} is cut or damaged, or not an array_record file ({error}): fetch it again") from error


def _text(place: os.PathLike, number: int, record: bytes, key: str) -> str:
    wrong = f"{place}, record {number}"
    try:
        features = tf_example_pb2.Example.FromString(record).features.feature
    except DecodeError as error:
        raise ValueError(f"{wrong} is no tf.train.Example, which records of --source=array_record are") from error
    found = features[key].bytes_list.value if key in features else None
    try:
        (text,) = found
        return text.decode("utf-8")
    except TypeError:
        raise ValueError(f"{wrong} has no {key!r}: give --text_key=NAME, one of {sorted(features)}") from None
    except ValueError as error:
        raise ValueError(f"{wrong}: {key!r} is not one text in UTF-8 ({error}): give another --text_key") from error
