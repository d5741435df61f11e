"""The manifest.json of a directory that is written once, such as an export: what it is, and the sha256 of every file in it."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from etils import epath

MANIFEST = "manifest.json"
UNFINISHED = "unfinished"  # what it says until all files are there
CARD = "README.md"  # words for people, which they may change: it is in no manifest


def files(directory: epath.Path, prefix: str = "") -> Iterator[tuple[str, epath.Path]]:
    """(name, file) of all that is in the directory and below it, in order, but for its manifest and its card."""
    for inside in sorted(directory.iterdir(), key=lambda inside: inside.name):
        if inside.is_dir():
            yield from files(inside, f"{prefix}{inside.name}/")
        elif prefix + inside.name not in (MANIFEST, CARD):
            yield prefix + inside.name, inside


def digest(file: epath.Path) -> str:
    """The sha256 of a file as it lies there, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def own(facts: Mapping[str, Any]) -> str:
    """Digest of what a manifest says, this digest left out."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read(directory: str | os.PathLike) -> dict[str, Any] | None:
    """What the manifest of a directory says; None where it is one of something else, such as prepared text.

    Raises:
      ValueError: it is not what was written, or names files outside of its directory.
    """
    try:
        facts = json.loads((epath.Path(directory) / MANIFEST).read_text())
        if not {"sha256", "manifest"} & facts.keys():
            return None
        told, digests = facts.pop("manifest", None), facts["sha256"]
        outside = any(
            PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name, _ in digests.items()
        )
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{directory}/{MANIFEST} is damaged: {error}") from error
    # Manifests of releases that sealed programs alone said neither their format nor their own digest.
    if outside or (told != own(facts) and (told or "format" in facts)):
        raise ValueError(f"{directory}/{MANIFEST} is not the manifest that was written")
    return facts


def wrong(directory: str | os.PathLike, facts: Mapping[str, Any]) -> Iterator[str]:
    """Names of the files of a manifest that are missing or have another sha256 than it says."""
    for name, told in facts["sha256"].items():
        file = epath.Path(directory) / name
        if not (file.is_file() and digest(file) == told):
            yield name
