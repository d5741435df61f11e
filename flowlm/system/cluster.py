"""How a process finds the others that train with it.

JAX itself finds SLURM, Open MPI, Kubernetes job sets and TPU slices. Elsewhere three variables say who is who:
JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID; where all are set, no cluster is looked for.
JAX_NUM_PROCESSES=1 alone says that there is no other process, whatever the machine looks like.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

import jax
from jax._src import distributed as joined  # nothing else says which processes are awaited

ADDRESS, NUMBER, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Variables that the number of processes may come from.
NUMBERS = (NUMBER, "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
# A process that has not been heard of for so long is taken for dead, and the others end with an error.
TIMEOUT_SECONDS = 60
# How long a process waits for the others at the start; and after how long it says so, since they seldom start as one.
START_SECONDS = 300
NOTICE_SECONDS = 20


def join(distributed: bool) -> None:
    """Joins the other processes where there are any.

    Args:
      distributed: there must be others: an error, not a single process, where nothing says so.

    Raises:
      ValueError: the variables are not whole numbers, contradict `distributed`, or say too little.
      RuntimeError: what JAX has found cannot be joined.
    """
    told = {name: os.environ.get(name) for name in (NUMBER, INDEX)}
    for name, value in told.items():
        if value is not None and not value.isdigit():
            raise ValueError(f"the environment variable {name} is {value!r}: it must be a whole number")
    number, index = (None if value is None else int(value) for value in told.values())
    if number == 1 and ADDRESS not in os.environ:
        if distributed:
            raise ValueError(
                f"--distributed says that there are other processes, and {NUMBER}=1 that there are none: drop one"
            )
        return
    complete = ADDRESS in os.environ and None not in (number, index)
    try:
        with _patience():
            jax.distributed.initialize(
                num_processes=number,
                process_id=index,
                heartbeat_timeout_seconds=TIMEOUT_SECONDS,
                # Longer than we wait ourselves, because JAX ends the process without saying which others are missing.
                initialization_timeout=START_SECONDS + 60,
                cluster_detection_method="deactivate" if complete else None,
            )
    except ValueError as error:
        # Where JAX finds no cluster it asks for the coordinator; with nothing said at all this is the only process.
        said = any(name in os.environ for name in (ADDRESS, NUMBER, INDEX))
        if distributed or said or "coordinator_address" not in str(error):
            raise ValueError(
                f"no cluster was found here ({error}): set {ADDRESS}=HOST:PORT, {NUMBER} and {INDEX} for every process"
            ) from error
    except Exception as error:  # the client of each cluster manager raises its own
        raise RuntimeError(
            f"the cluster that seems to be here cannot be joined ({' '.join(f'{type(error).__name__}: {error}'.split())}): "
            f"set {NUMBER}=1 if this is the only process, else {ADDRESS}=HOST:PORT, {NUMBER} and {INDEX} for every process"
        ) from error


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Says for whom this process waits, if it must, and ends it when they do not come."""
    there = threading.Event()

    def watch() -> None:
        if there.wait(NOTICE_SECONDS):
            return
        if joined.global_state.coordinator_address is not None:
            _say(f"{_awaited()}, for up to {START_SECONDS} s")
        if there.wait(START_SECONDS - NOTICE_SECONDS) or joined.global_state.coordinator_address is None:
            return
        _say(
            f"{_awaited()}, and has waited for {START_SECONDS} s: start them, or set {NUMBER}=1 if this is the only process"
        )
        os._exit(1)  # no exception reaches a thread that waits inside JAX

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        there.set()


def _awaited() -> str:
    state = joined.global_state
    number, index = state.num_processes, state.process_id
    source = next((f" ({name}={number})" for name in NUMBERS if os.environ.get(name) == str(number)), "")
    others = (
        ", ".join(str(other) for other in range(number) if other != index) if number <= 8 else f"the other {number - 1}"
    )
    return f"process {index} of {number}{source} waits at {state.coordinator_address} for {others}"


def _say(text: str) -> None:
    print(f"flowlm: {text}", file=sys.stderr, flush=True)
