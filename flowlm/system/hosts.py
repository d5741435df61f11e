"""Several hosts that share one piece of work, and see one folder: each leaves word of its part there, and reads what others left.

A word is a JSON file, which appears whole. What a host says depends on the work alone, so one that was killed and begins anew says
the same again, and no host has to be there at any one time; those that need a word wait for it.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from flowlm.system import storage

CLUSTER = "cluster"  # what is given in place of I/N where the environment says who is who
# Variables in which a cluster says (which process this is, how many there are).
VARIABLES = (
    ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)
POLL_SECONDS, NOTICE_SECONDS = 1.0, 20.0


def which(told: str | None, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(number of this host from 0, number of hosts) of `I/N`, of "cluster", or of None for one host alone.

    Raises:
      ValueError: it has another form, or no variable says who is who.
    """
    if told is None:
        return 0, 1
    if told == CLUSTER:
        pairs = [pair for pair in VARIABLES if all(name in environment for name in pair)]
        if not pairs:
            names = " or ".join(" and ".join(pair) for pair in VARIABLES)
            raise ValueError(f"--host={CLUSTER}: neither {names} is set: give --host=I/N")
        told = "/".join(environment[name] for name in pairs[0])
    index, _, number = told.partition("/")
    if not (index.isdecimal() and number.isdecimal() and int(index) < int(number)):
        raise ValueError(
            f"--host={told} is not I/N, host I of N, the first of which is 0: give 0/2 and 1/2 for two hosts"
        )
    return int(index), int(number)


@dataclasses.dataclass(frozen=True)
class Hosts:
    """One of several hosts.

    Attributes:
      index: which, from 0.
      number: how many there are.
      place: the folder for their words; a single host leaves none.
    """

    index: int = 0
    number: int = 1
    place: epath.Path | None = None

    @property
    def first(self) -> bool:
        """Whether this host does what only one must do."""
        return self.index == 0

    def part(self, sizes: Sequence[int]) -> slice:
        """Which of the items are this host's: neighbours, whose sizes are together near those of each other host's."""
        sizes = np.maximum(np.asarray(sizes, np.int64), 1)
        owners = (np.cumsum(sizes) - sizes) * self.number // sizes.sum()
        return slice(*np.searchsorted(owners, [self.index, self.index + 1]).tolist())

    def named(self, name: str) -> str:
        """A name for what only this host writes."""
        return name if self.number == 1 else f"{name}-{self.index}-of-{self.number}"

    def all(self, word: str, mine: Any) -> list[Any]:
        """What each host says, in their order; leaves what this one says, and waits for the others.

        Raises:
          RuntimeError: another host has failed.
        """
        self.leave(word, mine)
        return [mine if index == self.index else self._awaited(word, index) for index in range(self.number)]

    def of_first(self, word: str, make: Callable[[], Any]) -> Any:
        """What the first host makes; the others wait for it. Raises RuntimeError as `all`."""
        if not self.first:
            return self._awaited(word, 0)
        made = make()
        self.leave(word, made)
        return made

    def leave(self, word: str, mine: Any) -> None:
        """Leaves word for the others, and does not wait for them."""
        if self.number > 1:
            self._file(word, self.index).parent.mkdir(parents=True, exist_ok=True)
            storage.write_text(self._file(word, self.index), json.dumps(mine))

    def begin(self) -> None:
        """Takes back that this host has failed."""
        if self.number > 1 and self._file("failed", self.index).exists():
            self._file("failed", self.index).unlink()

    def _file(self, word: str, index: int) -> epath.Path:
        return self.place / f"{word}-{index}-of-{self.number}.json"

    def _awaited(self, word: str, index: int) -> Any:
        since, said = time.monotonic(), False
        while not (file := self._file(word, index)).exists():
            late = time.monotonic() - since > NOTICE_SECONDS  # what it said of an earlier call is taken back by then
            if late and (failed := self._file("failed", index)).exists():
                raise RuntimeError(f"host {index} of {self.number} has failed: {json.loads(failed.read_text())}")
            if late and not said:
                said = True
                print(
                    f"host {self.index} of {self.number} waits for host {index} ({word}), which leaves word in {self.place}",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(POLL_SECONDS)
        return json.loads(file.read_text())


ALONE = Hosts()
