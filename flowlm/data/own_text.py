"""A user's own text: its files, its documents, and the manifest of a folder that was prepared from it.

    textfiles   one document a file, *.txt
    jsonl       one document a line, *.jsonl: {"text": "..."}

Files of both kinds may be packed by gzip (*.txt.gz), have endings in capitals (*.TXT) and lie in folders behind links. The
manifest counts and names the files of no such kind.

The split of a document depends on its text alone: its key, the first 64 bits of a sha256, is compared with two cuts, which leave
a twentieth of the distinct documents to each held-out split. So copies of a document share a split, whatever the order of files,
and even if the copies differ in line breaks, in blanks at the ends or in the spelling of accents.
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
HELD_OUT = 0.05  # share of the distinct documents that validation and test get each
_NAMED = 5  # how many of the files that are left out a manifest names


def files(kind: str, path: Path) -> tuple[list[Path], list[Path]]:
    """(files of the kind, other files) at `path`, a file or a folder that is searched with all below it; both sorted.

    Raises:
      FileNotFoundError: there is no file of the kind.
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
    """All files in a folder and below it, also behind links. Links wait, so that a folder reached twice keeps its own name."""
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
    """Yields (id, text) of every document that is not empty. Raises ValueError that names a damaged file, or its damaged line."""
    for file in files(kind, path)[0]:
        for number, text in json_lines.texts(file, text_key) if kind == "jsonl" else [(1, _text(file))]:
            if text.strip():
                yield f"{file.name}-{number}", text


def _text(file: Path) -> str:
    try:
        with storage.open_bytes(file) as content:
            return content.read().decode("utf-8-sig")  # utf-8-sig, because a byte-order mark is no text
    except ValueError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from error


def key(text: str) -> int:
    """A document's number in [0, 2^64), which the cuts compare; copies in which no word differs share it."""
    text = unicodedata.normalize("NFC", text.removeprefix("\ufeff"))
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def describe(kind: str, path: Path, text_key: str = "text") -> dict:
    """The manifest's part about the sources: every file with its sha256, the counts of documents, and the cuts.

    Raises:
      ValueError: there are fewer than three distinct documents.
      FileNotFoundError: there are no files.
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
    for name, text in documents(manifest["kind"], Path(manifest["path"]), manifest["text_key"]):
        place = key(text)
        yield "validation" if place < first else "test" if place < second else "train", name, text
