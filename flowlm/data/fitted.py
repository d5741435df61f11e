"""What is fitted on a prepared set, kept beside its rows: counts and tables that would take each start of a run a minute.

    SET/fitted/NAME/ARRAY.npy        plain arrays, mapped into memory when they are read
    SET/fitted/NAME/manifest.json    what they were fitted by, and the sha256 of each file

They lie within the set, so that whoever removes it and makes another has them fitted anew.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from flowlm.system import processes, storage

MANIFEST = "manifest.json"
_SMALL = 2**20  # bytes
Arrays = dict[str, np.ndarray]


def fitted(place: epath.Path, name: str, facts: Mapping[str, Any], fit: Callable[[], Arrays]) -> Arrays:
    """The arrays of `fit`: read where they lie beside the set, made by the same `facts`; otherwise fitted, and kept there.

    Args:
      place: the prepared set. Of one in a bucket the copy on this disk is read, and one process sends what it fitted there.
      name: of what is fitted.
      facts: all that it depends on beside the set, as JSON has it.
    """
    home = place / "fitted" / name
    if storage.in_bucket(home) and (home / MANIFEST).exists():
        storage.fetch(home)
    local = storage.mirror(home)
    facts = json.loads(json.dumps(facts))
    if (held := _read(local, facts)) is not None:
        return held
    arrays = fit()
    try:
        _keep(local, facts, arrays)
        if storage.in_bucket(home) and processes.is_first():
            storage.copy(local, home, last=MANIFEST)
    except OSError as error:
        # Others kept the same meanwhile, or the set is read-only. All is here, so the run goes on.
        if _read(local, facts) is None:
            logging.warning("%s is not kept, so the next start fits it again (%s)", home, error)
    return arrays


def _digest(file: epath.Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _read(local: epath.Path, facts: dict) -> Arrays | None:
    """The arrays that lie there; None where there are none, they were fitted by other facts, or a file is damaged."""
    if not (local / MANIFEST).exists():
        return None
    try:
        manifest = storage.read_json(local / MANIFEST)
        digests = manifest["sha256"]
        whole = all(_digest(local / f"{name}.npy") == digest for name, digest in digests.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logging.warning("%s cannot be read (%s): it is fitted again", local, error)
        return None
    if not whole:
        logging.warning("%s is damaged: it is fitted again", local)
    if not whole or manifest.get("facts") != facts:
        return None
    return {name: _load(local / f"{name}.npy") for name in digests}


def _load(file: epath.Path) -> np.ndarray:
    # An empty array cannot be mapped, and of a small one nothing is gained.
    return np.load(file, mmap_mode="r" if os.path.getsize(file) > _SMALL else None, allow_pickle=False)


def _keep(local: epath.Path, facts: dict, arrays: Arrays) -> None:
    """Writes all files, or none; what lay there before is replaced."""
    local.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=local.parent) as folder:
        new, old = epath.Path(folder) / "new", epath.Path(folder) / "old"
        new.mkdir()
        for name, array in arrays.items():
            np.save(new / f"{name}.npy", array, allow_pickle=False)
        digests = {name: _digest(new / f"{name}.npy") for name in arrays}
        storage.write_text(new / MANIFEST, json.dumps({"facts": facts, "sha256": digests}, indent=2) + "\n")
        if local.exists():
            os.replace(local, old)
        os.replace(new, local)
