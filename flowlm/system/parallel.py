"""A function over many items on all cores: in processes, in bounded memory, with its results in the order of the items."""

import collections
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")
_AHEAD = 2  # items for each process that are handed out before the first result is taken


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    here: Callable[[Item], bool] = lambda item: False,
) -> Iterator[Result]:
    """`map(function, items)`, computed by so many processes; of one process, this one does all.

    Function, items and results must be such that they can be pickled. Each process gets the function once. No more than three
    items for each process are in memory, with their results.

    Args:
      here: whether this process does an item itself, because the function uses all cores for it.

    Raises:
      RuntimeError: a process was killed. What the function raises is raised here, in the order of the items.
    """
    if workers == 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context(
        "forkserver"
    )  # because a fork of this process would have its locks, and no threads
    context.set_forkserver_preload([function_module(function)])
    pool = ProcessPoolExecutor(workers, context, _begin, (function,))
    waiting: collections.deque[Future] = collections.deque()
    try:
        for item in items:
            waiting.append(_done(function(item)) if here(item) else pool.submit(_call, item))
            if len(waiting) > _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"one of {workers} worker processes was killed, as where memory is short: give fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def function_module(function: Callable) -> str:
    """The module that a process needs for a function."""
    return (function.func if isinstance(function, functools.partial) else function).__module__


def _done(result: Any) -> Future:
    future: Future = Future()
    future.set_result(result)
    return future


_function: Callable[[Any], Any]


def _begin(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's own threads would be as many again in each process
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # whoever started this process hears them, and ends it
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when its parent is gone, killed perhaps, because no pipe of a pool would tell it."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(item: Any) -> Any:
    return _function(item)
