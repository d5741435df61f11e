"""QM9 (Ramakrishnan et al., 2014): small molecules, each a SMILES string, read from a package on PyPI.

    flowlm prepare qm9        fetches the package, 104 MB, and keeps a list of 2 MB

A molecule has up to nine atoms of C, N, O and F beside hydrogen. All 130,831 strings differ, but 87 of them
spell a molecule that another string spells too.
"""

import csv
import io
import pathlib
import zipfile
from collections.abc import Iterator

from flowlm.data import own_text
from flowlm.system import packages, storage

PACKAGE = "qm9pack==1.0.3"
WHEEL_SHA256 = "1d88c2988007c6778e717ee3224cf511bd60e10732ebe3b7ed500ea5af05c9f0"
TABLES = tuple(f"qm9pack/data/qm9_part{part}.csv" for part in (1, 2, 3))
# Digest of the list, which has one string a line in the order of the tables.
SHA256 = "c64f091ab8a2f9eaca39e97df40ab8640f7093421431f320c6e93eef61cce307"
CHARACTERS = "#()+-12345=CFHNO[]"


def path_in(sources: pathlib.Path) -> pathlib.Path:
    """The path of the list of molecules."""
    return sources / "qm9.smi"


def fetch_molecules(data_dir: str | pathlib.Path) -> pathlib.Path:
    """Fetches the list by pip unless it exists, and verifies it. Raises RuntimeError if that fails."""
    path = path_in(storage.path(data_dir) / "sources")
    packages.fetch(path, SHA256, PACKAGE, _read_wheel)
    return path


def _read_wheel(wheel: pathlib.Path) -> bytes:
    packages.check(packages.sha256(wheel), WHEEL_SHA256, f"{PACKAGE} is another file")
    with zipfile.ZipFile(wheel) as archive:
        return "".join(smiles + "\n" for table in TABLES for smiles in _column(archive, table)).encode("ascii")


def _column(archive: zipfile.ZipFile, table: str) -> Iterator[str]:
    with archive.open(table) as content:
        yield from (row["SMILES"] for row in csv.DictReader(io.TextIOWrapper(content, "utf-8")))


def split(smiles: str) -> str:
    """The split of a molecule, which depends on its string alone. Validation and test hold a twentieth each."""
    return {0: "validation", 1: "test"}.get(own_text.key(smiles) % 20, "train")


def check_sources(sources: pathlib.Path) -> None:
    """Raises FileNotFoundError where the list is missing."""
    if not path_in(sources).is_file():
        raise FileNotFoundError(f"corpus source {path_in(sources)} is missing: run `flowlm prepare qm9`")


def read_sources(sources: pathlib.Path) -> Iterator[tuple[str, str, str]]:
    """The (split, id, SMILES) of all molecules. Raises ValueError if the list is damaged."""
    path = path_in(sources)
    if packages.sha256(path) != SHA256:
        raise ValueError(f"{path} is damaged: delete it and run `flowlm prepare qm9`")
    # The tables go from small molecules to large ones. Sorting by key mixes them, so that a split's first rows are typical.
    for smiles in sorted(path.read_text("utf-8").splitlines(), key=own_text.key):
        yield split(smiles), str(own_text.key(smiles)), smiles
