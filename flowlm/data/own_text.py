"""A user's own text: which files it is, what a document is, and the manifest of a folder that was prepared from it.

    textfiles   a document a file, *.txt
    jsonl       a document a line, *.jsonl: {"text": "..."}

The split of a document is a function of its text alone: its key, the first 64 bits of the text's sha256, against two cuts that
leave a twentieth of the distinct documents to each held-out split. So equal documents are on one side, whatever the order of files.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

KINDS = {"textfiles": "*.txt", "jsonl": "*.jsonl"}
MANIFEST = "manifest.json"
HELD_OUT = 0.05  # of the distinct documents, in each of validation and test


def files(kind: str, path: Path) -> list[Path]:
    """The file, or the files of the kind in the folder and below it, sorted. Raises FileNotFoundError where there are none."""
    found = [path] if path.is_file() else sorted(file for file in path.rglob(KINDS[kind]) if file.is_file())
    if not found:
        raise FileNotFoundError(
            f"no {KINDS[kind]} under {path}: --path is a file, or a folder with {KINDS[kind]} in it"
        )
    return found


def documents(kind: str, path: Path) -> Iterator[tuple[str, str]]:
    """(id, text) of every document that is not empty, lazily. Raises ValueError naming the file, and the line, that is damaged."""
    for file in files(kind, path):
        with file.open("rb") as lines:
            for number, part in enumerate(lines if kind == "jsonl" else [lines.read()], 1):
                try:
                    text = json.loads(part)["text"] if kind == "jsonl" else part.decode("utf-8")
                    # What JSON can spell and UTF-8 cannot, halves of surrogate pairs, becomes "?".
                    text = text.encode("utf-8", "replace").decode("utf-8")
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    wanted = 'a JSON object with text under "text"' if kind == "jsonl" else "text in UTF-8"
                    raise ValueError(f"{file}, line {number} is not {wanted}: {error}") from error
                if text.strip():
                    yield f"{file.name}-{number}", text


def key(text: str) -> int:
    """What says on which side of the cuts a document is, in [0, 2^64)."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def describe(kind: str, path: Path) -> dict:
    """What a manifest says of the sources: every file with its sha256, counts of documents, and the cuts.

    Raises:
      ValueError: fewer than three distinct documents. FileNotFoundError: no files.
    """
    sources = []
    for file in files(kind, path):
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        name = file.name if path.is_file() else str(file.relative_to(path))
        sources.append({"file": name, "bytes": file.stat().st_size, "sha256": digest})
    keys = np.fromiter((key(text) for _, text in documents(kind, path)), np.uint64)
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
        "sources": sources,
        "distinct_documents": len(distinct),
        "documents": {split: int(count) for split, count in zip(("validation", "test", "train"), counts, strict=True)},
        "cuts": [int(cut) for cut in cuts],
    }


def load(folder: Path) -> dict:
    """The manifest of a prepared folder. Raises FileNotFoundError where there is none."""
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{folder / MANIFEST} is missing: make it with "
            f"`flowlm prepare --source=textfiles --path=... --tokenizer=... --length=... --out={folder}`"
        )
    return json.loads((folder / MANIFEST).read_text())


def check(sources: Path) -> None:
    """As a corpus: the folder was described."""
    load(sources.parent)


def read(split: str, sources: Path) -> Iterator[tuple[str, str]]:
    """As a corpus: the documents of a split, in the order of the files."""
    manifest = load(sources.parent)
    first, second = manifest["cuts"]
    for name, text in documents(manifest["kind"], Path(manifest["path"])):
        place = key(text)
        if split == ("validation" if place < first else "test" if place < second else "train"):
            yield name, text
