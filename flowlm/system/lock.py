"""One writer of a run: a second process that would train in its directory is refused while the first is alive.

On a disk the lock is the operating system's (flock), which lets it go when its process ends, however that is, so none is stale.
A bucket has no locks: there the lock is an object that its holder writes anew every BEAT_SECONDS. A process that finds one watches
it. If the object changes, its holder is alive; if it has not changed for PATIENCE_SECONDS, its holder is gone and the lock is taken
over. So the clocks of two hosts are never compared.
"""

import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from absl import logging
from etils import epath

from flowlm.system import processes, storage

BEAT_SECONDS, PATIENCE_SECONDS = 20.0, 70.0
POLL_SECONDS = 2.0  # other processes of the run wait no longer than this for the one that watches


class _Held(Exception):
    """Another process holds the lock; its text says which."""


def take(place: epath.Path, or_else: str = "give another --workdir") -> Callable[[], None]:
    """Takes the lock at `place` and gives what releases it. Of several processes of one run all must call; the first holds it.

    Args:
      or_else: how to do without it, for the error.

    Raises:
      ValueError: another process holds it; says which. OSError: nothing can be written there.
    """
    attempt = _in_bucket(place) if storage.in_bucket(place) else lambda: _on_disk(Path(place))
    release: Callable[[], None] | None = None
    while True:
        wrong: Exception | None = None
        if processes.is_first():
            try:
                release = attempt()
            except _Held as error:
                wrong = ValueError(
                    f"{place.parent} is being written by {error or 'another process'}: wait until it has ended, or "
                    f"{or_else}"
                )
            except OSError as error:
                wrong = error
        if not processes.all_agree(wrong is None):
            raise wrong or ValueError(f"{place.parent} cannot be locked by the first process")
        if processes.all_agree(release is not None or not processes.is_first()):
            return release or (lambda: None)
        time.sleep(POLL_SECONDS)


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _on_disk(place: Path) -> Callable[[], None]:
    place.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = place.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise _Held(file.read().strip()) from error
        except OSError as error:
            logging.warning(
                "files cannot be locked (%s): nothing keeps another process from writing to %s", error, place
            )
            return file.close
        if place.exists() and os.path.samestat(os.fstat(file.fileno()), place.stat()):
            break
        file.close()  # its holder removed it just before
    file.truncate(0)
    file.write(_me() + "\n")
    file.flush()

    def release() -> None:
        if not file.closed:
            place.unlink(missing_ok=True)
            file.close()

    return release


def _in_bucket(place: epath.Path) -> Callable[[], Callable[[], None] | None]:
    """A function that tries to take the lock; to be called again for as long as it returns None."""
    import gcsfs

    bucket, mine = gcsfs.GCSFileSystem(), f"{_me()} {uuid.uuid4()}"
    seen, since = "", 0.0

    def attempt() -> Callable[[], None] | None:
        nonlocal seen, since
        try:
            bucket.pipe_file(os.fspath(place), f"{mine} 0".encode(), mode="create")
            return _beating(place, mine)
        except FileExistsError:
            pass
        try:
            text = place.read_text()
        except FileNotFoundError:
            return None  # released just now
        holder = " ".join(text.split()[:-2])
        if seen and text != seen:
            raise _Held(holder)
        if not seen:
            logging.warning(
                "%s was being written by %s: watching for %g s whether it is alive",
                place.parent,
                holder,
                PATIENCE_SECONDS,
            )
            seen, since = text, time.monotonic()
        elif time.monotonic() - since > PATIENCE_SECONDS:
            place.unlink()
            seen = ""
        return None

    return attempt


def _beating(place: epath.Path, mine: str) -> Callable[[], None]:
    """Writes the lock anew until it is released, in a thread of its own."""
    ended = threading.Event()

    def ours() -> bool:
        return place.exists() and place.read_text().startswith(mine)

    def beat() -> None:
        count = 0
        while not ended.wait(BEAT_SECONDS):
            try:
                if not ours():
                    logging.error("another process has taken over %s: stop this one", place.parent)
                    return
                count += 1
                place.write_text(f"{mine} {count}")
            except Exception as error:  # a bucket that does not answer now may do so at the next beat
                logging.warning("%s could not be written (%s)", place, error)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()

    def release() -> None:
        if not ended.is_set():
            ended.set()
            thread.join()
            if ours():
                place.unlink()

    return release
