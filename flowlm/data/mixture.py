"""Training rows of several prepared sets, mixed in given shares.

Row i of the mixture is of one set, and which one is a function of i alone: with share p of the set in hand and 1 - p of all that
come after it, its number of rows among the first i is floor(i p + 1/2), and the sets behind it divide what is left in the same way.
So every batch has nearly its shares of each set, whatever the mesh, the number of processes or the step that a run goes on from.
Shares are fractions, not floating-point numbers, so that a row a billion steps away is still the same one.
"""

import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from flowlm.data import own_text
from flowlm.data.dataset import Dataset, Split, open_dataset
from flowlm.system import storage


class Part(NamedTuple):
    """A set that is mixed in: the folder that `flowlm prepare` made, its share of the rows, and the share as it was written."""

    folder: str
    share: Fraction
    told: str

    def __str__(self) -> str:
        return f"{self.folder}:{self.told}"


def parts(told: Sequence[str]) -> list[Part]:
    """The setting `data.mixture`, FOLDER:SHARE each, with absolute places.

    Raises:
      ValueError: a share is not in (0, 1), shares leave nothing to the set itself, or a folder is named twice.
    """
    found: list[Part] = []
    for each in told:
        folder, _, number = each.rpartition(":")
        try:
            share = Fraction(number)
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        if not folder or not 0 < share < 1:
            raise ValueError(f"data.mixture {each!r} is not FOLDER:SHARE with a share in (0, 1), such as DATA:0.25")
        found.append(Part(os.fspath(storage.path(folder)), share, number))
    if (total := sum(part.share for part in found)) >= 1:
        raise ValueError(f"the shares of data.mixture add up to {float(total):g}: leave some to the set of data.dir")
    folders = [part.folder for part in found]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise ValueError(f"data.mixture names {twice} twice: give it one share")
    return found


def content(told: Sequence[str]) -> str | None:
    """What a mixture is made of, wherever its folders lie: digests and shares. None without one, or without a manifest."""
    digests = [own_text.content(storage.path(part.folder)) for part in parts(told)]
    if not digests or None in digests:
        return None
    return " ".join(f"{digest}:{part.share}" for digest, part in zip(digests, parts(told), strict=True))


def check_folders(told: Sequence[str], tokenizer_sha256: str, length: int, padded: bool) -> None:
    """Checks that each folder is prepared, with this tokenizer, in rows of this length, and padded or not.

    Raises:
      FileNotFoundError, ValueError: one is not.
    """
    for folder, *_ in parts(told):
        manifest = own_text.whole_manifest(storage.path(folder))
        if manifest["tokenizer_sha256"] != tokenizer_sha256:
            raise ValueError(
                f"data.mixture: {folder} has another tokenizer than data.dir (sha256 {manifest['tokenizer_sha256'][:12]}, here "
                f"{tokenizer_sha256[:12]}): prepare it with --tokenizer=TOKENIZER.json, the file of data.tokenizer"
            )
        if manifest["length"] != length:
            raise ValueError(
                f"data.mixture: {folder} has rows of {manifest['length']}, data.length is {length}: prepare it anew"
            )
        packing = "documents" if padded else "concatenated"
        if manifest["packing"]["rows"] != packing:
            raise ValueError(
                f"data.mixture: {folder} has other rows than data.dir ({manifest['packing']['rows']}, here {packing}): "
                f"prepare it with --packing={packing}"
            )


def shuffled(dataset: Dataset, told: Sequence[str], seed: int, copy: bool = True) -> Callable[[int, int], np.ndarray]:
    """`Split.shuffled` of the train split, with the rows of `data.mixture` among its own; each set in its own epochs.

    The set's own rows come in the order that they have without a mixture.

    Args:
      told: the setting `data.mixture`.
      copy: as `open_dataset` takes it.

    Raises:
      ValueError, FileNotFoundError: as `parts` and `check_folders`.
    """
    mixed = parts(told)
    if not mixed:
        return dataset.train.shuffled(seed)
    check_folders(told, dataset.tokenizer.sha256, dataset.length, dataset.padded)
    splits = [dataset.train, *(_train(part.folder, dataset.length, copy) for part in mixed)]
    streams = [split.shuffled(seed) for split in splits]
    shares = [1 - sum(part.share for part in mixed), *(part.share for part in mixed)]

    def rows(start: int, stop: int) -> np.ndarray:
        sets, numbers = places(start, stop, shares)
        out = np.empty((stop - start, dataset.length), np.int32)
        for number, stream in enumerate(streams):
            # The rows of one set in a stretch of the mixture are neighbours in the set's own order.
            if (mine := numbers[sets == number]).size:
                out[sets == number] = stream(int(mine[0]), int(mine[-1]) + 1)
        return out

    return rows


def places(start: int, stop: int, shares: Sequence[Fraction]) -> tuple[np.ndarray, np.ndarray]:
    """(which set, number of its row), int [stop - start] each, of rows of the mixture; the shares of all sets add up to 1."""
    sets = np.full(stop - start, len(shares) - 1)
    numbers = np.arange(start, stop, dtype=object)  # Python's integers, because no product of theirs is too large
    left = np.arange(stop - start)
    for number, share in enumerate(_of_the_rest(shares)[:-1]):
        at = numbers[left]
        before, after = _rounded(at, share), _rounded(at + 1, share)
        taken = (after > before).astype(bool)
        sets[left[taken]] = number
        numbers[left] = np.where(taken, before, at - before)
        left = left[~taken]
    return sets, numbers.astype(np.int64)


def _of_the_rest(shares: Sequence[Fraction]) -> list[Fraction]:
    """Each share as a part of itself and of all behind it."""
    return [share / sum(shares[number:]) for number, share in enumerate(shares)]


def _rounded(numbers: np.ndarray, share: Fraction) -> np.ndarray:
    return (2 * numbers * share.numerator + share.denominator) // (2 * share.denominator)


def _train(folder: str, length: int, copy: bool) -> Split:
    tokenizer = os.fspath(storage.path(folder) / "tokenizer.json")
    name = own_text.data_name(own_text.load_manifest(storage.path(folder)))
    return open_dataset(name, tokenizer, length, folder, copy=copy).train
