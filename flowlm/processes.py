"""Several processes that train one model, and how all of them stop at one step when any of them is told to.

Every host runs the same command. SLURM, Open MPI, Kubernetes job sets and TPU slices are found by JAX itself; elsewhere three
variables say who is who: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. On CPUs the
processes talk over gloo.
"""

import os
import signal

import jax
import numpy as np
from jax.experimental import multihost_utils

# A process that has not been heard of for so long is taken for dead, and the others end with an error.
TIMEOUT_SECONDS = 60

_terminated = False  # a single process has been sent SIGTERM


def _note_termination(signum, frame) -> None:
    global _terminated
    _terminated = True


def start(distributed: bool) -> None:
    """Joins the other processes where there are any, and arranges that SIGTERM asks for a checkpoint. To be called once, first.

    Args:
      distributed: there must be others: an error, not a single process, where nothing says so.

    Raises:
      ValueError: the variables are not whole numbers, or are missing while `distributed`.
    """
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    told = {name: os.environ.get(name) for name in names}
    for name, value in told.items():
        if value is not None and not value.isdigit():
            raise ValueError(f"the environment variable {name} is {value!r}: it must be a whole number")
    number, index = (None if value is None else int(value) for value in told.values())
    try:
        jax.distributed.initialize(
            num_processes=number,
            process_id=index,
            heartbeat_timeout_seconds=TIMEOUT_SECONDS,
        )
    except ValueError as error:
        # Where JAX finds no cluster it asks for the coordinator; with nothing said at all this is the only process.
        said = any(name in os.environ for name in ("JAX_COORDINATOR_ADDRESS", *names))
        if distributed or said or "coordinator_address" not in str(error):
            raise ValueError(
                f"no cluster was found here ({error}): set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and "
                "JAX_PROCESS_ID for every process"
            ) from error
    if jax.distributed.is_initialized():
        return  # JAX listens for SIGTERM itself
    signal.signal(signal.SIGTERM, _note_termination)


def preempted(step: int) -> bool:
    """Whether to save and stop before this step: the same answer in all processes. To be asked by all at every step."""
    if jax.distributed.is_initialized():
        return multihost_utils.reached_preemption_sync_point(step)
    return _terminated


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
