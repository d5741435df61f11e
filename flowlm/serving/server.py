"""A server as a process: its socket, its two threads, and how it stops.

The thread that calls `run` writes texts (worker.py), because it owns the devices; another one speaks HTTP. To stop is to close the
socket, and to answer what was accepted.
"""

import asyncio
import errno
import socket
import threading

import uvicorn

from flowlm.serving.app import make_app
from flowlm.serving.metrics import Metrics
from flowlm.serving.models import Served
from flowlm.serving.worker import Worker

BACKLOG = 1024  # connections that may wait to be accepted
SETTLE = 1.0  # seconds between the order to stop and the end of the socket


class _Http(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Closes the socket a little later, because a client that was connected before the order would be cut off unheard."""
        await asyncio.sleep(SETTLE)
        await super().shutdown(sockets)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any that is free. Raises OSError: it cannot, such as where another program has the port."""
    try:
        found = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=BACKLOG
        )
    except socket.gaierror as error:
        raise OSError(f"there is no address {host}: give one of this machine, such as --address=127.0.0.1") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(
                f"port {port} of {host} is taken by another program: give another, or --port=0 for any"
            ) from error
        raise OSError(f"port {port} of {host} cannot be opened: {error.strerror}") from error
    return found


def address(opened: socket.socket) -> str:
    """Where a browser finds what listens there."""
    host, port, *_ = opened.getsockname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server:
    """Models behind an open socket.

    Args:
      most_rows: of a batch.
      most_waiting: rows that may wait.
      timeout: seconds that an answer may take.
    """

    def __init__(
        self, models: list[Served], opened: socket.socket, most_rows: int, most_waiting: int, timeout: float
    ) -> None:
        metrics = Metrics()
        self.worker, self._opened = Worker(most_rows, most_waiting, metrics), opened
        app = make_app(models, self.worker, metrics, timeout)
        settings = {"log_level": "warning", "access_log": False, "lifespan": "off", "ws": "none"}
        # A request has `timeout` seconds to come and as many to be answered.
        self._http = _Http(uvicorn.Config(app, timeout_graceful_shutdown=int(2 * timeout) + 1, **settings))

    def stop(self) -> None:
        """Takes no more connections; `run` ends when those that are there are answered. Any thread may call it."""
        self._http.should_exit = True

    def run(self) -> None:
        """Serves until `stop`. Raises RuntimeError: HTTP is no longer spoken, though nobody has stopped it."""
        talk = threading.Thread(target=self._talk)
        talk.start()
        self.worker.run()
        talk.join()
        if not self._http.should_exit:
            raise RuntimeError("the HTTP server has ended by itself: see its error above")

    def _talk(self) -> None:
        try:
            self._http.run(sockets=[self._opened])
        finally:
            self.worker.close()
