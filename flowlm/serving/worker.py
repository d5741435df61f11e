"""The one thread that owns the devices, and the rows that wait for it.

Rows of different requests share a batch where the same programs write them: one model, one number of steps, with or without
temperatures. Of each such kind one batch is being written at a time, and up to MOST_BATCHES kinds beside one another, a network
call of each in turn: so a request of one step does not wait for those of many, and rows that come meanwhile gather for the next
batch. What a row becomes depends on its own seed alone (engine/rows.py).
"""

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from flowlm.engine.rows import Asked
from flowlm.serving.metrics import Metrics
from flowlm.serving.models import Served

MOST_BATCHES = 8


class Full(Exception):
    """More rows would wait than may."""


class Closed(Exception):
    """Nothing more is taken, because the server stops."""


class Seen(NamedTuple):
    """What rows of a job would be if `call` were the last; ids [k, L] of the rows `numbers` of the job."""

    numbers: list[int]
    ids: np.ndarray
    call: int
    seconds: float


class Written(NamedTuple):
    """Rows of a job, with the seconds that the devices took for the batch that they were in, without compilation."""

    numbers: list[int]
    ids: np.ndarray
    seconds: float


class Failed(NamedTuple):
    """Some row of a job cannot be written."""

    told: str


@dataclasses.dataclass(eq=False)
class Job:
    """The rows that one request asks for.

    Attributes:
      asked: of all of its rows.
      watched: whether it is told what is seen at every call.
      tell: is called by the worker's thread with Seen, Written, Failed.
      cancelled: set by whoever no longer waits for it.
    """

    model: Served
    steps: int
    asked: Asked
    watched: bool
    tell: Callable[[Seen | Written | Failed], None]
    cancelled: bool = False

    @property
    def size(self) -> int:
        """How many rows it has."""
        return len(self.asked["seed"])

    @property
    def kind(self) -> tuple:
        """What rows of one batch have in common."""
        return self.model.name, self.steps, "temperature" in self.asked


class _Row(NamedTuple):
    job: Job
    number: int


class _Batch:
    """Rows of one kind while they are written."""

    def __init__(self, rows: list[_Row]) -> None:
        self.rows, self.job, self.call, self.seconds = rows, rows[0].job, 0, 0.0
        names = self.job.asked
        self.asked = {name: np.stack([row.job.asked[name][row.number] for row in rows]) for name in names}
        self._state: Any = None

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for any of it."""
        return all(row.job.cancelled for row in self.rows)

    def advance(self) -> bool:
        """Makes one network call, and tells what there is to tell; whether it was the last."""
        programs, steps, start = self.job.model.rows, self.job.steps, time.perf_counter()
        ids, last = None, True
        if programs.at_once:
            ids = programs.whole(self.asked)
        else:
            if self._state is None:
                self._state = programs.begin(self.asked, steps)
            last = self.call == steps - 1
            if last:
                ids = programs.end(self.asked, self._state, steps)
            else:
                self._state, ids = programs.move(self.asked, self._state, self.call, steps)
        jax.block_until_ready((self._state, ids))
        self.seconds += time.perf_counter() - start
        self.call += 1
        if last or any(row.job.watched for row in self.rows):
            self._tell(programs.read(ids, self.asked), last)
        return last

    def _tell(self, ids: np.ndarray, last: bool) -> None:
        for job in dict.fromkeys(row.job for row in self.rows):
            if job.cancelled or not (last or job.watched):
                continue
            mine = [i for i, row in enumerate(self.rows) if row.job is job]
            numbers = [self.rows[i].number for i in mine]
            written = Written(numbers, ids[mine], self.seconds)
            job.tell(written if last else Seen(numbers, ids[mine], self.call, self.seconds))

    def fail(self, told: str) -> None:
        """Tells every job that it cannot be written."""
        for job in dict.fromkeys(row.job for row in self.rows):
            job.cancelled = True
            job.tell(Failed(told))


class Worker:
    """What waits, and `run`, which writes it in the thread that calls it.

    Args:
      most_rows: of a batch.
      most_waiting: rows that may wait; one request that finds none waiting is taken however many rows it has.
    """

    def __init__(self, most_rows: int, most_waiting: int, metrics: Metrics) -> None:
        self._most_rows, self._most_waiting, self._metrics = most_rows, most_waiting, metrics
        self._waiting: deque[_Row] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._compiled: set[tuple] = set()
        metrics.waiting.set_function(lambda: len(self._waiting))

    def submit(self, job: Job) -> None:
        """Lets a job wait for its turn. Raises Full or Closed."""
        with self._changed:
            if self._closed:
                raise Closed
            if self._waiting and len(self._waiting) + job.size > self._most_waiting:
                raise Full
            self._waiting.extend(_Row(job, number) for number in range(job.size))
            self._changed.notify()

    def close(self) -> None:
        """Takes nothing more; `run` returns when all that was taken is written."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def run(self) -> None:
        """Writes what is submitted until `close`."""
        active: dict[tuple, _Batch] = {}
        while self._admit(active):
            for kind, batch in [*active.items()]:
                try:
                    done = batch.abandoned or self._advance(batch)
                except Exception as error:  # because the others must be answered, whatever went wrong with these
                    logging.getLogger(__name__).exception("a batch of %s cannot be written", kind)
                    batch.fail(f"the model cannot write this: {type(error).__name__}")
                    done = True
                if done:
                    del active[kind]

    def _admit(self, active: dict[tuple, _Batch]) -> bool:
        """Makes batches of what waits; waits where there is nothing to do. False when it is over."""
        with self._changed:
            while not (active or self._waiting or self._closed):
                self._changed.wait()
            taken: dict[tuple, list[_Row]] = {}
            left: deque[_Row] = deque()
            for row in self._waiting:
                kind = row.job.kind
                room = kind in taken or (kind not in active and len(active) + len(taken) < MOST_BATCHES)
                if row.job.cancelled:
                    continue
                if room and len(taken.setdefault(kind, [])) < self._most_rows:
                    taken[kind].append(row)
                else:
                    left.append(row)
            self._waiting = left
        active |= {kind: _Batch(rows) for kind, rows in taken.items()}
        return bool(active) or not self._closed

    def _advance(self, batch: _Batch) -> bool:
        name, *_ = batch.job.kind
        programs = batch.job.model.rows
        program = name, programs.size(len(batch.rows)), "temperature" in batch.asked
        if program not in self._compiled:
            start = time.perf_counter()
            programs.compile(batch.asked)
            self._metrics.compiling.labels(name).inc(time.perf_counter() - start)
            self._compiled.add(program)
        done = batch.advance()
        if done:
            self._metrics.batch.labels(name).observe(len(batch.rows))
            self._metrics.devices.labels(name).inc(batch.seconds)
            self._metrics.rows.labels(name).inc(len(batch.rows))
        return done
