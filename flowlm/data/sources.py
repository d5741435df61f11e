"""Where a user's own text comes from: for each kind of `flowlm prepare --source` one record, which finds files and reads them.

Files may be packed (storage.py), have endings in capitals, lie in folders behind links, or in a bucket.
"""

import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from etils import epath

from flowlm.data import hf_sets, json_lines, parquet, records, tfds_sets
from flowlm.system import storage

Place = epath.Path | hf_sets.Shard
Files = tuple[epath.Path | str, list[Place], list[Place]]


def file_at(path: str, name: str) -> epath.Path:
    """The file of a name in a folder, or the file itself that has this name."""
    found = storage.path(path)
    return found if found.name == name and found.is_file() else found / name


def file_size(file: epath.Path) -> int:
    """Bytes of a file."""
    return file.stat().length


def file_sha256(file: epath.Path) -> str:
    """Digest of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


class Source(NamedTuple):
    """A kind of text.

    Attributes:
      what: what a document is, for the help.
      files: (where the text is) -> (what was found there, a file or a folder; the files to read, in order; other files in it).
        It raises FileNotFoundError where there is nothing to read.
      texts: (file, name) -> (number, text) of every document in a file, lazily; it raises ValueError that names what is damaged.
      keyed: whether a document has several named parts, of which `--text_key` names the text.
      place: how the place is written behind `--source=KIND:`; "" if `--path` says it.
      at: (what was found, a file's name in it) -> the file, both as a manifest has them.
      size: (file) -> its bytes, or about how many there are.
      sha256: (file) -> its digest; None if a file is known by its texts alone.
    """

    what: str
    files: Callable[[str], Files]
    texts: Callable[[Place, str], Iterator[tuple[int, str]]]
    keyed: bool = True
    place: str = ""
    at: Callable[[str, str], Place] = file_at
    size: Callable[[Place], int] = file_size
    sha256: Callable[[Place], str] | None = file_sha256


def ending(wanted: str) -> Callable[[str], Files]:
    """`Source.files` of a file, or of a folder that is searched, with all below it, for one ending; both lists are sorted."""
    return functools.partial(_files, wanted)


def _files(wanted: str, place: str) -> Files:
    path = storage.path(place)
    if path.is_file():
        # Not what a link leads to, because its name may not tell how it is packed (as in the cache of Hugging Face's hub).
        path = path if storage.in_bucket(path) else epath.Path(os.path.abspath(os.path.expanduser(place)))
        return path, [path], []
    everything = sorted(_below(path)) if path.is_dir() else []
    found = [file for file in everything if _ends(file.name, wanted) and (storage.in_bucket(file) or file.is_file())]
    if not found:
        raise FileNotFoundError(f"no *{wanted} under {path}: --path is a file, or a folder with *{wanted} in it")
    return path, [*map(epath.Path, found)], [*map(epath.Path, sorted({*everything} - {*found}))]


def _ends(name: str, wanted: str) -> bool:
    # tfds numbers its files behind their ending.
    return re.sub(r"-\d+-of-\d+$", "", storage.kind_of_file(name)).endswith(wanted)


def _below(folder: epath.Path) -> Iterator[os.PathLike]:
    """All files in a folder and below it, also behind links. Links wait, so that a folder reached twice keeps its own name."""
    if storage.in_bucket(folder):
        yield from storage.objects_below(folder)
        return
    waiting, links, seen = [Path(folder)], [], set()
    while waiting or links:
        at = (waiting or links).pop()
        if at.resolve() in seen:
            continue
        seen.add(at.resolve())
        for inside in sorted(at.iterdir(), reverse=True):
            if inside.is_dir():
                (links if inside.is_symlink() else waiting).append(inside)
            else:
                yield inside


def _whole(file: epath.Path, key: str) -> Iterator[tuple[int, str]]:
    del key
    with storage.open_bytes(file) as content:
        text = content.read()
    try:
        yield 1, text.decode("utf-8-sig")  # utf-8-sig, because a byte-order mark is no text
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from error


SOURCES = {
    "textfiles": Source("a document a file, *.txt", ending(".txt"), _whole, keyed=False),
    "jsonl": Source("a document a line, *.jsonl", ending(json_lines.ENDING), json_lines.texts),
    "parquet": Source("a document a row, *.parquet", ending(parquet.ENDING), parquet.texts),
    "array_record": Source("a document a tf.train.Example, *.array_record", ending(records.ENDING), records.texts),
    "tfds": Source("a set that tfds prepared", tfds_sets.files, records.texts, place="SET"),
    "hf": Source(
        "a data set of Hugging Face",
        hf_sets.files,
        hf_sets.texts,
        place="SET",
        at=hf_sets.at,
        size=hf_sets.size,
        sha256=None,
    ),
}


def forms() -> list[str]:
    """How each kind is written behind `--source=`."""
    return [f"{kind}:{source.place}" if source.place else kind for kind, source in SOURCES.items()]
