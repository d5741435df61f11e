"""Sees a run on Cloud TPU to its end: makes the slice, starts the run again after failures and preemptions, deletes the slice.

What bills must not be forgotten. So an error that may pass is told and the question is asked again for as long as it takes, and
whatever else ends a supervisor, its last words are what still bills and how to delete it. Several work at once, each in a thread of
its own: signals are for the thread that waits for them (`listening`), which tells them so (`Supervisor.cut`).
"""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flowlm.studies.study import finished
from flowlm.system import storage
from launch import tpu_workers
from launch.cloud_tpu import CloudTpu, Failed, passing, refusals
from launch.job import Job, error_in

POLL_SECONDS = 15
# When workers have ended well before the last step, as they do when told to, a preemption may follow: looks to wait for it.
SETTLING = 8
# A run that has failed so often without a new checkpoint between is not started again: it would fail for ever, and cost.
FRUITLESS = 3


class End(NamedTuple):
    """How a turn has ended: by itself ("ended"), by `stop` ("stopped"), or for a reason to begin another."""

    how: str
    why: str = ""


class Supervisor:
    """Carries a job out on its queued resource.

    Args:
      request: of the resource's creation, as `create` of the cloud takes it.
      delete: the command that deletes it, to be shown.
    """

    def __init__(self, job: Job, cloud: CloudTpu, request: Mapping[str, Any] | Sequence[str], delete: str):
        self._job, self._cloud, self._request, self._delete = job, cloud, request, delete
        self._bills, self._left, self._lock = False, False, threading.Lock()
        self._fruitless, self._newest = 0, -1

    def run(self, record: Callable[[], None]) -> str:
        """ "ended" or "stopped", when the resource is deleted. record: called once there is something to be found again.

        Raises:
          Failed: the service could not make it, or it has failed or was preempted too often; it is deleted.
        """
        try:
            if self._cloud.look() is None:
                self._make()
            else:
                self._bills = True
                self._say("is there already: taken up")
            self._ask(record)
            try:
                how = self._carried_out()
            except Failed:
                self._gone()
                raise
            self._gone()
            return how
        finally:
            self.cut()

    def _carried_out(self) -> str:
        self._newest = self._ask(tpu_workers.newest_checkpoint, self._job.workdir)
        restarts = 0
        while (end := self._end()).how in ("preempted", "failed"):
            if restarts == self._job.resources.max_restarts:
                raise Failed(f"{end.why}, after {restarts} restarts: run the same command again to go on")
            if end.how == "failed" and self._in_vain():
                raise Failed(f"{end.why}, {FRUITLESS} times without a new checkpoint")
            restarts += 1
            self._say(f"{end.why}: started again ({restarts})")
            if end.how == "preempted":
                self._gone()
                self._make()
            else:
                self._ask(tpu_workers.next_turn, self._job.workdir)
        return end.how

    def _in_vain(self) -> bool:
        before, self._newest = self._newest, self._ask(tpu_workers.newest_checkpoint, self._job.workdir)
        self._fruitless = 0 if self._newest > before else self._fruitless + 1
        return self._fruitless == FRUITLESS

    def _make(self) -> None:
        self._ask(tpu_workers.next_turn, self._job.workdir)
        with self._lock:
            if self._left:
                raise SystemExit
            self._bills = True  # from the moment of asking, since an answer can be lost
        try:
            self._ask(self._cloud.create, self._request)
        except (*refusals(), Failed):
            self._bills = False
            raise

    def _gone(self) -> None:
        self._ask(self._cloud.delete)
        self._bills = False

    def _end(self) -> End:
        """Waits for the end of a turn. Raises Failed if the service gives up."""
        seen, settled = None, 0
        while True:
            found = self._ask(self._cloud.look)
            if found is None:
                return End("stopped")
            state, why = found
            if state != seen:
                self._say(state)
            seen = state
            if state == "FAILED":
                raise Failed(f"Cloud TPU could not make it: {why or 'no reason given'}")
            if state in ("SUSPENDING", "SUSPENDED"):
                return End("preempted", "preempted")
            if state == "ACTIVE" and (exits := self._ask(tpu_workers.exits, self._job.workdir)):
                if self._ask(finished, storage.path(self._job.workdir)):
                    return End("ended")
                if wrong := [worker for worker, status in exits.items() if status != "0"]:
                    return End("failed", self._failure(wrong[0], exits[wrong[0]]))
                settled += 1
                if settled > SETTLING:
                    return End("failed", "the workers have ended before the last step")
            time.sleep(POLL_SECONDS)

    def _failure(self, worker: str, status: str) -> str:
        said = error_in(self._ask(tpu_workers.said, self._job.workdir, worker))
        return f"worker {worker} ended with {status}: {said}"

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """The answer, however long service, bucket or credentials are out of reach."""
        silent = False
        while True:
            if self._left:
                raise SystemExit
            try:
                answer = question(*arguments)
            except passing() as error:
                if not silent:
                    self._say(f"is out of sight and may bill, and is looked for again: {_line(error)}")
                silent = True
                time.sleep(POLL_SECONDS)
                with contextlib.suppress(*passing(), RuntimeError):
                    storage.renew()
                    self._cloud.renew()
            else:
                if silent:
                    self._say("is in sight again")
                return answer

    def cut(self) -> None:
        """Says, once, what still bills; after it nothing is made, and nothing more is said."""
        with self._lock:
            left, self._left = self._left, True
        if self._bills and not left:
            print(
                f"{self._job.name} IS NOT DELETED AND BILLS. Delete it by `{self._delete}` or `python -m launch.run stop "
                f"--workdir={self._job.workdir}`; the same command as before takes it up",
                file=sys.stderr,
                flush=True,
            )

    def _say(self, text: str) -> None:
        if not self._left:
            print(f"{self._job.name} {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """A hang-up and SIGTERM end the process as Ctrl-C does, by an exception in its first thread."""

    def leave(number, frame):
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _line(error: Exception) -> str:
    said = " ".join((str(getattr(error, "message", "")) or str(error)).split())
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
