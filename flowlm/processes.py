"""Several processes that train one model, and how all of them stop at one place when any of them is told to.

Every host runs the same command, and cluster.py finds the others. On CPUs the processes talk over gloo.
"""

import os
import signal
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

from flowlm import cluster

# What a shell says of a process that was ended by Ctrl-C.
INTERRUPTED = 130
# Under this key JAX tells all processes that one of them was sent SIGTERM.
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"

_told_to_stop = threading.Event()  # a single process has been sent SIGTERM or SIGINT


class Stopped(Exception):
    """The run was told to stop in the middle of something that is done again from its beginning."""


def start(distributed: bool) -> None:
    """Joins the other processes where there are any, and listens to SIGTERM and Ctrl-C. To be called once, first.

    Args:
      distributed: there must be others: an error, not a single process, where nothing says so.

    Raises:
      ValueError: the variables that say who is who are no whole numbers, too few, or contradict `distributed`.
      RuntimeError: the cluster that seems to be here cannot be joined.
    """
    cluster.join(distributed)
    _listen()


def _listen() -> None:
    """SIGTERM, and the first SIGINT like it, ask the run to save and stop; the second SIGINT ends the process."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    # Python calls its handlers only when a compiled program returns, maybe in minutes; a thread hears the signal at once.
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, lambda signum, frame: None)
    if not jax.distributed.is_initialized():  # else JAX listens for SIGTERM itself, and tells the other processes
        signal.signal(signal.SIGTERM, lambda signum, frame: None)
    threading.Thread(target=_hear, args=(read,), daemon=True).start()


def _hear(signals: int) -> None:
    """Reads the numbers of signals from a pipe for as long as the process lives."""
    interrupted = False
    while True:
        (signum,) = os.read(signals, 1)
        if signum == signal.SIGINT and interrupted:
            os._exit(INTERRUPTED)
        if signum == signal.SIGINT:
            interrupted = True
            os.write(2, b"\nflowlm: interrupted, so it saves and stops; Ctrl-C again ends it at once, unsaved\n")
            if jax.distributed.is_initialized():
                os.kill(os.getpid(), signal.SIGTERM)
        if signum in (signal.SIGINT, signal.SIGTERM):
            _told_to_stop.set()


def preempted(step: int) -> bool:
    """Whether to save and stop before this step: the same answer in all processes. To be asked by all at every step."""
    if jax.distributed.is_initialized():
        return multihost_utils.reached_preemption_sync_point(step)
    return _told_to_stop.is_set()


def check_stopped() -> None:
    """Raises Stopped, in all processes alike, if any was told to stop. All must ask; for places inside a step."""
    told = _told_to_stop.is_set()
    if jax.distributed.is_initialized():
        client = multihost_utils.distributed.global_state.client
        try:
            client.key_value_try_get(_NOTICE)
            told = True
        except jax.errors.JaxRuntimeError:  # it is not there
            told = False
    if not all_agree(not told):
        raise Stopped


def is_first() -> bool:
    """Whether this is the process that writes and prints what all of them know."""
    return jax.process_index() == 0


def all_agree(holds: bool) -> bool:
    """Whether it holds in every process; all must ask, and none goes on before the others have."""
    return holds if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(holds)).all())


def total(values: np.ndarray) -> np.ndarray:
    """The sum of every process's values, in their own type, in every process; all must call."""
    if jax.process_count() == 1:
        return values
    return multihost_utils.process_allgather(values).sum(0, dtype=values.dtype)


def gathered(array: jax.Array) -> np.ndarray:
    """The whole of an array that may be spread over the devices of several processes, on every host; all must call."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def check_mesh(mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError unless every process has a device in the mesh."""
    idle = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
    if idle:
        raise ValueError(
            f"the mesh of {mesh.size} devices leaves processes {sorted(idle)} without one: let it take all "
            f"{jax.device_count()} devices, or start fewer processes"
        )
