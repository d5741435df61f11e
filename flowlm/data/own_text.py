"""A user's own text: which files it is, what a document is, and the manifest of a folder that was prepared from it.

    textfiles   a document a file, *.txt
    jsonl       a document a line, *.jsonl: {"text": "..."}

Either may be packed by gzip (*.txt.gz), in any spelling (*.TXT), in folders behind links; what else is there is counted and named.

The split of a document is a function of its text alone: its key, the first 64 bits of a sha256, against two cuts that leave a
twentieth of the distinct documents to each held-out split. So copies are on one side, whatever the order of files, and whatever
their line breaks, blanks at the ends or spelling of accents, in which copies differ.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flowlm.data import json_lines
from flowlm.system import storage

KINDS = {"textfiles": (".txt", ".txt.gz"), "jsonl": json_lines.SUFFIXES}
MANIFEST = "manifest.json"
HELD_OUT = 0.05  # of the distinct documents, in each of validation and test
_NAMED = 5  # of the files that are left out


def files(kind: str, path: Path) -> tuple[list[Path], list[Path]]:
    """The file, or the files of the kind in the folder and below it, and those that are not of it; both sorted.

    Raises:
      FileNotFoundError: there are none of the kind.
    """
    if path.is_file():
        return [path], []
    everything = sorted(_below(path)) if path.is_dir() else []
    found = [file for file in everything if file.name.lower().endswith(KINDS[kind]) and file.is_file()]
    if not found:
        wanted = f"*{KINDS[kind][0]}"
        raise FileNotFoundError(f"no {wanted} under {path}: --path is a file, or a folder with {wanted} in it")
    return found, sorted({*everything} - {*found})


def _below(folder: Path) -> Iterator[Path]:
    """All files in a folder and below it, also behind links; of a folder that is reached twice, those under its own name."""
    waiting, links, seen = [folder], [], set()
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


def documents(kind: str, path: Path, text_key: str = "text") -> Iterator[tuple[str, str]]:
    """(id, text) of every document that is not empty, lazily. Raises ValueError naming the file, and the line, that is damaged."""
    for file in files(kind, path)[0]:
        for number, text in json_lines.texts(file, text_key) if kind == "jsonl" else [(1, _text(file))]:
            if text.strip():
                yield f"{file.name}-{number}", text


def _text(file: Path) -> str:
    try:
        with storage.open_bytes(file) as content:
            return content.read().decode("utf-8-sig")  # a byte-order mark is no text
    except ValueError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from error


def key(text: str) -> int:
    """What says on which side of the cuts a document is, in [0, 2^64); the same for copies in which no word differs."""
    text = unicodedata.normalize("NFC", text.removeprefix("\ufeff"))
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def describe(kind: str, path: Path, text_key: str = "text") -> dict:
    """What a manifest says of the sources: every file with its sha256, counts of documents, and the cuts.

    Raises:
      ValueError: fewer than three distinct documents. FileNotFoundError: no files.
    """
    sources = []
    taken, left_out = files(kind, path)
    for file in taken:
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        name = file.name if path.is_file() else str(file.relative_to(path))
        sources.append({"file": name, "bytes": file.stat().st_size, "sha256": digest})
    read = ((key(text), len(text)) for _, text in documents(kind, path, text_key))
    keys, characters = np.fromiter(read, np.dtype((np.uint64, 2))).T
    distinct = np.unique(keys)
    if len(distinct) < 3:
        mend = "cut it into more files, or make it a document a line and give --source=jsonl"
        raise ValueError(f"{path} has {len(distinct)} distinct documents, and each split needs one: {mend}")
    held_out = max(1, round(HELD_OUT * len(distinct)))
    cuts = distinct[[held_out, 2 * held_out]]
    counts = np.bincount(np.searchsorted(cuts, keys, side="right"), minlength=3)
    return {
        "kind": kind,
        "path": str(path.resolve()),
        "text_key": text_key,
        "sources": sources,
        "left_out": {"files": len(left_out), "such_as": [str(file.relative_to(path)) for file in left_out[:_NAMED]]},
        "distinct_documents": len(distinct),
        "characters": int(characters.sum()),
        "documents": {split: int(count) for split, count in zip(("validation", "test", "train"), counts, strict=True)},
        "cuts": [int(cut) for cut in cuts],
    }


def load_manifest(folder: Path) -> dict:
    """The manifest of a prepared folder. Raises FileNotFoundError where there is none."""
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{folder / MANIFEST} is missing: make it with "
            f"`flowlm prepare --source=textfiles --path=... --tokenizer=... --length=... --out={folder}`"
        )
    return {"text_key": "text"} | json.loads((folder / MANIFEST).read_text())


def check_sources(sources: Path) -> None:
    """As a corpus: the folder was described."""
    load_manifest(sources.parent)


def read_sources(sources: Path) -> Iterator[tuple[str, str, str]]:
    """As a corpus: (split, id, text) of the documents, in the order of the files."""
    return described(load_manifest(sources.parent))


def described(manifest: dict) -> Iterator[tuple[str, str, str]]:
    """(split, id, text) of the documents that a manifest describes, lazily, in the order of the files."""
    first, second = manifest["cuts"]
    for name, text in documents(manifest["kind"], Path(manifest["path"]), manifest["text_key"]):
        place = key(text)
        yield "validation" if place < first else "test" if place < second else "train", name, text
