"""What Ctrl-C, SIGTERM and SIGHUP (a closed terminal) do to a command.

Where nothing would be lost they end it: `Stopped` is raised where it is, so that it cleans up, and one line is written. The exit
status is 0 where the same command goes on from there or begins anew what it did (`resumable`), else 128 and the signal's number,
as shells expect. Where something would be lost (`held`) the signal is remembered, and who has to save asks `told`. A second Ctrl-C
ends the process at once with 130.

Python calls its handlers only when a compiled program returns, maybe in minutes. So a thread hears the signals, and ends what
has not ended by itself in GRACE seconds.
"""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator

HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 3.0  # seconds in which a command cleans up
# What a shell says of a process that was ended by Ctrl-C.
INTERRUPTED = 128 + signal.SIGINT


class Stopped(BaseException):
    """A command was told to stop where it loses nothing. It is no Exception, so nothing takes it for an error and goes on."""


class _Listener:
    """What a process knows of the signals that it was sent.

    Attributes:
      goes_on: what the same command does when it is given again; None where it has to do everything anew.
      ends: whether a signal ends the command at once, in which case it has said so.
      holders: functions to call when a signal comes, one of each part of the program that has something to save.
    """

    def __init__(self):
        self.told, self.answered, self.status = threading.Event(), threading.Event(), 0
        self.goes_on: str | None = None
        self.ends = False
        self.holders: list[Callable[[], None]] = []
        self._interrupted = False

    def hear(self, signals: int) -> None:
        """Reads the numbers of signals from a pipe for as long as the process lives."""
        while True:
            (number,) = os.read(signals, 1)
            if number in HEARD:
                self._answer(number)

    def _answer(self, number: int) -> None:
        if number == signal.SIGINT and self._interrupted:
            os._exit(INTERRUPTED)
        self._interrupted |= number == signal.SIGINT
        if number == signal.SIGHUP:
            _leave_terminal()
        first, holders = not self.told.is_set(), [*self.holders]
        self.ends |= first and not holders
        self.told.set()
        if first and not holders:
            self.status = 128 + number if self.goes_on is None else 0
            _say("told to stop" if self.goes_on is None else f"told to stop: {self.goes_on}")
            self.answered.set()
            _later(GRACE, self._end)
        elif number == signal.SIGINT:
            _say("interrupted, so it saves and stops; Ctrl-C again ends it at once, unsaved")
        for tell_others in holders if first else ():
            tell_others()

    def _end(self) -> None:
        if not self.holders:
            os._exit(self.status)


_listener = _Listener()


def listen() -> None:
    """Takes over the signals for this process. To be called first of all, from the main thread."""
    global _listener
    if signal.getsignal(signal.SIGINT) is _handle:
        return
    _listener = _Listener()
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in HEARD:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _handle)
    threading.Thread(target=_listener.hear, args=(read,), daemon=True).start()
    sys.unraisablehook, sys.excepthook = _unraisable, _uncaught


def _handle(number, frame) -> None:
    if not _listener.holders:
        _listener.ends = True
        raise Stopped


def _unraisable(failed) -> None:
    """Where Python drops an exception, as in what it calls when it frees an object, Stopped is raised again a little later."""
    if failed.exc_type is Stopped:
        _later(0.02, lambda: os.kill(os.getpid(), signal.SIGTERM))
    else:
        sys.__unraisablehook__(failed)


def _uncaught(kind, error, trace) -> None:
    """Ends a process that Stopped has unwound; not as Python would, because compiled programs that still run crash then."""
    if kind is not Stopped:
        sys.__excepthook__(kind, error, trace)
        return
    _listener.answered.wait(GRACE)
    for file in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            file.flush()
    os._exit(_listener.status)


def resumable(what: str) -> None:
    """From now on a stop costs nothing and the exit status is 0; `what` says what the same command does then."""
    _listener.goes_on = what


def hold(tell_others: Callable[[], None] = lambda: None) -> None:
    """From now on a signal ends nothing: who has something to save asks `told`. `tell_others` is called at once, by a thread."""
    _listener.holders.append(tell_others)


@contextlib.contextmanager
def held(tell_others: Callable[[], None] = lambda: None) -> Iterator[None]:
    """`hold` while in it."""
    hold(tell_others)
    try:
        yield
    finally:
        _listener.holders.remove(tell_others)


def told() -> bool:
    """Whether the process was told to stop."""
    return _listener.told.is_set()


def say_stopped(text: str) -> None:
    """Says in a line where the command has stopped, unless that was said when the signal came."""
    if not _listener.ends:
        print(f"told to stop: {text}", file=sys.stderr)


def _later(seconds: float, what: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, what)
    timer.daemon = True
    timer.start()


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"\nflowlm: {text}\n".encode())


def _leave_terminal() -> None:
    """Lets what is still printed go nowhere if its terminal is gone, because an error of printing would end what saves."""
    for output in (1, 2):
        poll = select.poll()
        poll.register(output, 0)  # asks for nothing but what has gone wrong
        if poll.poll(0):
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)
