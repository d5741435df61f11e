"""Calls that wait most of the time, several at once."""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

Result = TypeVar("Result")
# A signal's handler runs when the thread that waits looks up, because another thread may have been told of it.
LOOK_SECONDS = 0.2


def at_once(calls: Sequence[Callable[[], Result]], most: int) -> list[Result | BaseException]:
    """What each call returned or raised, in their order.

    Calls run in threads, so none of them may set the handler of a signal. The threads end with the process and not with this
    function: what interrupts the thread that waits here is raised at once, while they are in the middle of their calls.

    Args:
      most: how many run at a time; 0: all.
    """
    answers: list[Result | BaseException] = [RuntimeError("not called")] * len(calls)
    todo: queue.SimpleQueue = queue.SimpleQueue()
    for numbered in enumerate(calls):
        todo.put(numbered)

    def work() -> None:
        while True:
            try:
                number, call = todo.get_nowait()
            except queue.Empty:
                return
            try:
                answers[number] = call()
            except BaseException as error:  # it is the caller's to judge, whatever it is
                answers[number] = error

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(most or len(calls), len(calls)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        while worker.is_alive():
            worker.join(LOOK_SECONDS)
    return answers
