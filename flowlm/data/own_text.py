"""A user's own text: its documents, and the manifest of a folder that was prepared from it. sources.py reads the files.

The split of a document depends on its text alone: its key, the first 64 bits of a sha256, is compared with two cuts, which leave
a twentieth of the distinct documents to each held-out split. So copies of a document share a split, whatever the order of files,
and even if the copies differ in line breaks, in blanks at the ends or in the spelling of accents.
"""

import functools
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from etils import epath

from flowlm.data.sources import SOURCES
from flowlm.system import parallel, storage

MANIFEST = "manifest.json"
HELD_OUT = 0.05  # share of the distinct documents that validation and test get each
_FEW_BYTES = 1 << 24  # of so little text, starting processes would take longer than reading it
_NAMED = 5  # how many of the files that are left out a manifest names


def key(text: str) -> int:
    """A document's number in [0, 2^64), which the cuts compare; copies in which no word differs share it."""
    text = unicodedata.normalize("NFC", text.removeprefix("\ufeff"))
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def describe(kind: str, place: str, text_key: str = "text", workers: int = 1) -> dict:
    """The manifest's part about the sources: every file with its sha256, the counts of documents, and the cuts.

    Args:
      kind: one of sources.SOURCES.
      place: where its `files` look.
      workers: processes that read, a file at a time.

    Raises:
      ValueError: there are fewer than three distinct documents, or one is damaged.
      FileNotFoundError: there are no files.
    """
    path, taken, left_out = SOURCES[kind].files(place)
    sizes = [file.stat().length for file in taken]
    if sum(sizes) < _FEW_BYTES:
        workers = 1
    digests, counted = [], [np.empty((0, 2), np.uint64)]
    for digest, documents in parallel.ordered(functools.partial(_read_through, kind, text_key), taken, workers):
        digests.append(digest)
        counted.append(documents)
    keys, characters = np.concatenate(counted).T
    distinct = np.unique(keys)
    if len(distinct) < 3:
        mend = "cut it into more files, or make it a document a line and give --source=jsonl"
        raise ValueError(f"{path} has {len(distinct)} distinct documents, and each split needs one: {mend}")
    held_out = max(1, round(HELD_OUT * len(distinct)))
    cuts = distinct[[held_out, 2 * held_out]]
    counts = np.bincount(np.searchsorted(cuts, keys, side="right"), minlength=3)
    names = [_name(file, path) for file in taken]
    return {
        "kind": kind,
        "path": os.fspath(path),
        "text_key": text_key,
        "sources": [{"file": n, "bytes": b, "sha256": s} for n, b, s in zip(names, sizes, digests, strict=True)],
        "left_out": {"files": len(left_out), "such_as": [_name(file, path) for file in left_out[:_NAMED]]},
        "distinct_documents": len(distinct),
        "characters": int(characters.sum()),
        "documents": {split: int(count) for split, count in zip(("validation", "test", "train"), counts, strict=True)},
        "cuts": [int(cut) for cut in cuts],
    }


def _name(file: epath.Path, path: epath.Path) -> str:
    return file.name if file == path else os.fspath(file.relative_to(path))


def _read_through(kind: str, text_key: str, file: epath.Path) -> tuple[str, np.ndarray]:
    """(sha256 of a file; uint64 [documents, 2], the key and the number of characters of each document in it)."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    read = ((key(text), len(text)) for _, text in _documents(kind, text_key, file))
    return digest, np.fromiter(read, np.dtype((np.uint64, 2))).reshape(-1, 2)


def _documents(kind: str, text_key: str, file: epath.Path) -> Iterator[tuple[str, str]]:
    """Yields (id, text) of every document of a file that is not empty."""
    for number, text in SOURCES[kind].texts(file, text_key):
        if text.strip():
            yield f"{file.name}-{number}", text


def load_manifest(folder: Path) -> dict:
    """The manifest of a prepared folder. Raises FileNotFoundError if the folder has none."""
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{folder / MANIFEST} is missing: make it with "
            f"`flowlm prepare --source=textfiles --path=... --tokenizer=... --length=... --out={folder}`"
        )
    return {"text_key": "text"} | json.loads((folder / MANIFEST).read_text())


def check_sources(sources: Path) -> None:
    """`Corpus.check` of own text: raises FileNotFoundError unless the folder has a manifest."""
    load_manifest(sources.parent)


def read_sources(sources: Path) -> Iterator[tuple[str, str, str]]:
    """`Corpus.read` of own text: (split, id, text) of the documents, in the order of the files."""
    return described(load_manifest(sources.parent))


def described(manifest: dict) -> Iterator[tuple[str, str, str]]:
    """Yields (split, id, text) of the documents that a manifest describes, in the order of the files."""
    first, second = manifest["cuts"]
    path = storage.path(manifest["path"])
    for source in manifest["sources"]:
        file = path if path.name == source["file"] and path.is_file() else path / source["file"]
        for name, text in _documents(manifest["kind"], manifest["text_key"], file):
            place = key(text)
            yield "validation" if place < first else "test" if place < second else "train", name, text
