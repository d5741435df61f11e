"""Compares molecules with real ones by RDKit. Molecules need distant order, as rings must close and bonds must fit an atom.

A row is a molecule if its text is a SMILES string of at least one atom, RDKit accepts its valences, and pads stand only behind the
string. Rows are compared in RDKit's canonical spelling, because a molecule has many spellings.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from scipy import stats

from flowlm.judges.base import mean_with_stderr


class Molecules:
    """Metrics, in this order:

    valid: share of rows that are molecules.
    unique: number of different molecules / number of molecules.
    molecules_found: share of rows that are molecules of a held-out split and not of the training split.
    molecules_copied: share of rows that are molecules of the training split.
    length_distance: total variation between the laws of the number of characters in the molecules and in the reference.
    rings_distance: total variation between the laws of their numbers of rings.
    logp_distance: Wasserstein-1 between the laws of their Crippen logP.

    `unique` and the distances are NaN if no row is a molecule. Real rows too are at some distance from the reference: the held-out
    row of a table shows it, from as many rows.
    """

    name = "rdkit"
    main = ("valid", "unique", "molecules_found", "molecules_copied", "logp_distance")
    meanings: ClassVar[dict[str, str]] = {
        "valid": "share of rows that are molecules; more is better",
        "unique": "different ones among the molecules; near held-out's is best",
        "molecules_found": "share of real ones not in training; more is better",
        "molecules_copied": "share of molecules that were in training",
        "length_distance": "total variation to real lengths; less is better",
        "rings_distance": "total variation to real counts of rings; less is better",
        "logp_distance": "Wasserstein-1 to real logP; less is better",
    }

    def __init__(self, rows: Callable[[str], Sequence[str]], start: int, pad: int):
        """A judge of SMILES strings.

        Args:
          rows: "train", "validation" or "test" -> the strings of that split; validation is the reference of the distances.
          start: id of the start token.
          pad: id of pads.

        Raises:
          ImportError: RDKit is not installed.
          ValueError: the rows of the validation split are no molecules.
        """
        try:
            from rdkit import Chem, rdBase
            from rdkit.Chem import Crippen, rdMolDescriptors
        except ImportError as error:
            raise ImportError("the judge rdkit needs the package rdkit: pip install -e .[molecules]") from error
        self._parse, self._spell, self._quiet = Chem.MolFromSmiles, Chem.MolToSmiles, rdBase.BlockLogs
        self._rings, self._logp = rdMolDescriptors.CalcNumRings, Crippen.MolLogP
        self._rows, self._start, self._pad = functools.cache(rows), start, pad
        if not any(self.read(rows("validation")[:8])):
            raise ValueError(
                f"the judge rdkit reads molecules, and rows here are none, such as {rows('validation')[0]!r}"
            )

    def read(self, texts: Sequence[str]) -> list[Any]:
        """RDKit's molecule for each text; None if the text is no molecule."""
        with self._quiet():
            # RDKit would read what follows a blank as a name, and an empty text as a molecule without atoms.
            found = [self._parse(text) if text.isascii() and text and " " not in text else None for text in texts]
        return [molecule if molecule is not None and molecule.GetNumAtoms() else None for molecule in found]

    def _spelled(self, split: str) -> set[str]:
        return {self._spell(molecule) for molecule in self.read(self._rows(split)) if molecule is not None}

    @functools.cached_property
    def _known(self) -> tuple[set[str], set[str]]:
        """(molecules of the training split, molecules of the held-out splits that are not among these)."""
        trained = self._spelled("train")
        return trained, (self._spelled("validation") | self._spelled("test")) - trained

    @functools.cached_property
    def _reference(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        texts = self._rows("validation")
        return self._laws(texts, self.read(texts))

    def _laws(self, texts: Sequence[str], molecules: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(lengths, numbers of rings, logP) of those texts that are molecules."""
        pairs = [(text, molecule) for text, molecule in zip(texts, molecules, strict=True) if molecule is not None]
        numbers = [(len(text), self._rings(molecule), self._logp(molecule)) for text, molecule in pairs]
        lengths, rings, logp = np.array(numbers, np.float64).reshape(-1, 3).T
        return lengths.astype(int), rings.astype(int), logp

    def score(self, ids: np.ndarray, texts: Sequence[str]) -> dict[str, float]:
        """The class lists the metrics. ids: int [N, L], start token included; texts: the N rows, without special tokens."""
        ids = np.asarray(ids)
        is_pad = ids == self._pad
        framed = (ids[:, 0] == self._start) & (ids[:, 1:] != self._start).all(1)
        whole = framed & (is_pad[:, 1:] >= is_pad[:, :-1]).all(1)
        molecules = self.read([text if row else "" for text, row in zip(texts, whole, strict=True)])
        spelled = [None if molecule is None else self._spell(molecule) for molecule in molecules]
        valid = np.array([name is not None for name in spelled])
        trained, unseen = self._known
        scores = mean_with_stderr("valid", valid)
        scores["unique"] = len({*spelled} - {None}) / valid.sum() if valid.any() else float("nan")
        scores |= mean_with_stderr("molecules_found", np.array([name in unseen for name in spelled]))
        scores |= mean_with_stderr("molecules_copied", np.array([name in trained for name in spelled]))
        lengths, rings, logp = self._laws(texts, molecules)
        real_lengths, real_rings, real_logp = self._reference
        scores["length_distance"] = total_variation(lengths, real_lengths)
        scores["rings_distance"] = total_variation(rings, real_rings)
        scores["logp_distance"] = float(stats.wasserstein_distance(logp, real_logp)) if len(logp) else float("nan")
        return scores


def total_variation(a: np.ndarray, b: np.ndarray) -> float:
    """1/2 sum_n |p(n) - q(n)|, p and q being the laws of two samples of counts, int [N] and [M]; NaN if one is empty."""
    if not len(a) or not len(b):
        return float("nan")
    size = max(a.max(), b.max()) + 1
    return float(np.abs(np.bincount(a, minlength=size) / len(a) - np.bincount(b, minlength=size) / len(b)).sum() / 2)
