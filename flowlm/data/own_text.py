"""A user's own text: its documents, and the manifest of a folder that was prepared from it. sources.py reads the files.

The split of a document depends on its text alone: its key, the first 64 bits of a sha256, is compared with two cuts, which leave
a twentieth of the distinct documents to each held-out split. So copies of a document share a split, whatever the order of files,
and even if the copies differ in line breaks, in blanks at the ends or in the spelling of accents.
"""

import base64
import functools
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from etils import epath

from flowlm.data.sources import SOURCES, Files, Place
from flowlm.system import parallel, storage
from flowlm.system.hosts import ALONE, Hosts

MANIFEST = "manifest.json"
# How rows are made of documents: `data.name` of a folder that was prepared so.
NAMES = {"concatenated": "own_text", "documents": "own_documents"}
HELD_OUT = 0.05  # share of the distinct documents that validation and test get each
_FEW_BYTES = 1 << 24  # of so little text, starting processes would take longer than reading it
_NAMED = 5  # how many of the files that are left out a manifest names


def key(text: str) -> int:
    """A document's number in [0, 2^64), which the cuts compare; copies in which no word differs share it."""
    text = unicodedata.normalize("NFC", text.removeprefix("\ufeff"))
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def describe(kind: str, files: Files, text_key: str = "text", workers: int = 1, hosts: Hosts = ALONE) -> dict:
    """The manifest's part about the sources: every file with its sha256, the counts of documents, and the cuts.

    Args:
      kind: one of sources.SOURCES.
      files: what its `files` found.
      workers: processes that read, a file at a time.
      hosts: each of them reads its part of the files.

    Raises:
      ValueError: there are fewer than three distinct documents, or one is damaged.
    """
    path, taken, left_out = files
    sizes = [*map(SOURCES[kind].size, taken)]
    mine = hosts.part(sizes)
    if sum(sizes[mine]) < _FEW_BYTES:
        workers = 1
    digests, counted = [], [np.empty((0, 2), np.uint64)]
    for digest, documents in parallel.ordered(functools.partial(_read_through, kind, text_key), taken[mine], workers):
        digests.append(digest)
        counted.append(documents)
    told = hosts.all("read", {"sha256": digests, "documents": _packed(np.concatenate(counted))})
    digests = [digest for each in told for digest in each["sha256"]]
    keys, characters = np.concatenate([_unpacked(each["documents"]) for each in told]).T
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
        "duplicates": len(keys) - len(distinct),
        "characters": int(characters.sum()),
        "documents": {split: int(count) for split, count in zip(("validation", "test", "train"), counts, strict=True)},
        "cuts": [int(cut) for cut in cuts],
    }


def _packed(documents: np.ndarray) -> str:
    return base64.b64encode(documents.tobytes()).decode("ascii")


def _unpacked(told: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(told), np.uint64).reshape(-1, 2)


def _name(file: Place, path: epath.Path | str) -> str:
    inside = isinstance(file, epath.Path) and file != path
    return os.fspath(file.relative_to(path)) if inside else file.name


def _read_through(kind: str, text_key: str, file: Place) -> tuple[str, np.ndarray]:
    """(sha256 of a file; uint64 [documents, 2], the key and the number of characters of each document in it)."""
    digest, source = hashlib.sha256(), SOURCES[kind]

    def read() -> Iterator[tuple[int, int]]:
        for _, text in _documents(kind, text_key, file):
            if source.sha256 is None:
                digest.update(text.encode("utf-8") + b"\0")
            yield key(text), len(text)

    whole = source.sha256 and source.sha256(file)
    documents = np.fromiter(read(), np.dtype((np.uint64, 2))).reshape(-1, 2)
    return whole or digest.hexdigest(), documents


def _documents(kind: str, text_key: str, file: Place) -> Iterator[tuple[str, str]]:
    """Yields (id, text) of every document of a file that is not empty."""
    for number, text in SOURCES[kind].texts(file, text_key):
        if text.strip():
            yield f"{file.name}-{number}", text


def load_manifest(folder: Path) -> dict:
    """The manifest of a prepared folder. Raises FileNotFoundError if the folder has none."""
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}: make it with `flowlm prepare --source=... --out={folder}`"
        )
    found = json.loads((folder / MANIFEST).read_text())
    # The oldest ones do not say these. They come last, because a manifest that is written again keeps its order.
    unsaid = {"text_key": "text", "packing": {"rows": "concatenated"}}
    return found | {name: value for name, value in unsaid.items() if name not in found}


def data_name(manifest: dict) -> str:
    """`data.name` of the folder that a manifest describes."""
    return NAMES[manifest["packing"]["rows"]]


def whole_manifest(folder: Path) -> dict:
    """The manifest of a folder whose preparation has ended.

    Raises:
      FileNotFoundError: the folder has none. ValueError: its preparation was cut.
    """
    manifest = load_manifest(folder)
    if manifest["rows"] is None:
        raise ValueError(
            f"the preparation of {folder} was cut: run the same `flowlm prepare` again, it goes on where it was"
        )
    return manifest


def content(folder: Path) -> str | None:
    """Digest of what a folder was prepared from and how, but for where its sources were; None if it has no manifest."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = json.loads((folder / MANIFEST).read_text()) | {"path": ""}
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def settings(folder: str) -> dict:
    """The section `data` of an experiment on a prepared folder, or on its copy in a bucket.

    Raises:
      FileNotFoundError, ValueError: as `whole_manifest`.
    """
    place = storage.path(folder)
    manifest = whole_manifest(place)
    tokenizer = os.fspath(place / "tokenizer.json")
    return dict(name=data_name(manifest), tokenizer=tokenizer, length=manifest["length"], dir=os.fspath(place))


def argument(told: str) -> tuple[str, str]:
    """(folder, "flow_map" or "") of an experiment's argument FOLDER[:flow_map], of which either part may be missing."""
    folder, _, family = told.rpartition(":")
    return (folder, family) if family == "flow_map" else (told, "")


def check_sources(sources: Path) -> None:
    """`Corpus.check` of own text: raises FileNotFoundError where the folder has no manifest, or its text is gone.

    It is asked only for rows that the folder does not have, because those that it has need no text.
    """
    folder, manifest = sources.parent, load_manifest(sources.parent)
    source = SOURCES[manifest["kind"]]
    if source.sha256 and not source.at(manifest["path"], manifest["sources"][0]["file"]).exists():
        name, length = data_name(manifest), manifest["length"]
        raise FileNotFoundError(
            f"{folder} has {name} in rows of {length} by its tokenizer.json alone, and its text {manifest['path']} is gone: "
            "leave data.name, data.length and data.tokenizer as my_text.py:DATA sets them"
        )


def read_sources(sources: Path) -> Iterator[tuple[str, str, str]]:
    """`Corpus.read` of own text: (split, id, text) of the documents, in the order of the files."""
    return described(load_manifest(sources.parent))


def described(manifest: dict, part: slice = slice(None)) -> Iterator[tuple[str, str, str]]:
    """Yields (split, id, text) of the documents that a manifest describes, in the order of the files; `part`: of these files."""
    first, second = manifest["cuts"]
    kind = manifest["kind"]
    for source in manifest["sources"][part]:
        file = SOURCES[kind].at(manifest["path"], source["file"])
        for name, text in _documents(kind, manifest["text_key"], file):
            place = key(text)
            yield "validation" if place < first else "test" if place < second else "train", name, text
