"""Files in parquet, as those of Hugging Face's data sets are. One column holds the documents' texts, one document a row."""

import os
from collections.abc import Iterator

import pyarrow as pa
from pyarrow import parquet

from flowlm.system import storage

ENDING = ".parquet"
_AT_ONCE = 1024  # rows that are in memory together, beside what a group of rows is packed to


def texts(place: os.PathLike, key: str = "text") -> Iterator[tuple[int, str]]:
    """Yields (number of the row, from 1; text in the column `key`) of each row. Of other columns nothing is read.

    Raises:
      ValueError: there is no such column, what is in it is not text, or the file is damaged.
    """
    try:
        with storage.open_bytes(place) as content, storage.telling_damage(place):
            yield from _rows(place, key, parquet.ParquetFile(content))
    except pa.ArrowException as error:
        raise ValueError(f"{place} is cut, or not a parquet file ({str(error).rstrip('.')}): fetch it again") from error


def _rows(place: os.PathLike, key: str, file: parquet.ParquetFile) -> Iterator[tuple[int, str]]:
    _check(place, key, file.schema_arrow)
    before = 0
    for batch in file.iter_batches(_AT_ONCE, columns=[key]):
        for number, text in enumerate(_read(place, before, batch.column(0)), before + 1):
            if text is None:
                raise ValueError(f"{place}, row {number} has no text in column {key!r}: leave the row out")
            yield number, text
        before += len(batch)


def _check(place: os.PathLike, key: str, schema: pa.Schema) -> None:
    def is_text(kind: pa.DataType) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    found = [field.name for field in schema if is_text(field.type)]
    if key not in found:
        wrong = f"column {key!r} is {schema.field(key).type}, not text" if key in schema.names else f"no column {key!r}"
        raise ValueError(f"{place}: {wrong}; give --text_key=NAME, where columns of text are {found}")


def _read(place: os.PathLike, before: int, column: pa.Array) -> list[str | None]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError as error:
        rows = f"rows {before + 1} to {before + len(column)}"
        raise ValueError(f"{place}, {rows}: not all are text in UTF-8 ({error}): write the column anew") from error
