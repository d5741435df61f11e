"""Several processes that train one model, and how all of them stop at one place when any of them is told to.

Every host runs the same command, and cluster.py finds the others. On CPUs the processes talk over gloo.
"""

import json
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from flowlm.system import cluster, signals
from flowlm.system.signals import Stopped

Item = TypeVar("Item")
# Under this key JAX tells all processes that one of them was sent SIGTERM.
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"


def start(distributed: bool) -> None:
    """Joins the other processes where there are any, and listens to signals (signals.py). To be called once, first.

    From then on several processes stop only where all of them ask: JAX hears SIGTERM and tells the others, and every other signal
    is sent on to this process as SIGTERM, so that JAX hears it too.

    Args:
      distributed: there must be others: an error, not a single process, where nothing says so.

    Raises:
      ValueError: the variables that say who is who are no whole numbers, too few, or contradict `distributed`.
      RuntimeError: the cluster that seems to be here cannot be joined.
    """
    signals.listen()
    cluster.join(distributed)
    if jax.distributed.is_initialized():
        signals.hold(lambda: os.kill(os.getpid(), signal.SIGTERM))


def preempted(step: int) -> bool:
    """Whether to save and stop before this step: the same answer in all processes. To be asked by all at every step."""
    if jax.distributed.is_initialized():
        return multihost_utils.reached_preemption_sync_point(step)
    return signals.told()


def check_stopped() -> None:
    """Raises Stopped, in all processes alike, if any was told to stop. All must ask; unlike `preempted`, anywhere in a step."""
    told = signals.told()
    if jax.distributed.is_initialized():
        client = multihost_utils.distributed.global_state.client
        try:
            client.key_value_try_get(_NOTICE)
            told = True
        except jax.errors.JaxRuntimeError:  # the key is not there, because nobody was told
            told = False
    if not all_agree(not told):
        raise Stopped


def is_first() -> bool:
    """Whether this is the process that writes and prints what all of them know."""
    return jax.process_index() == 0


def all_agree(holds: bool) -> bool:
    """Whether `holds` is true in every process; all must ask, and none goes on before the others have asked."""
    return holds if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(holds)).all())


def total(values: np.ndarray) -> np.ndarray:
    """The sum of every process's values [n, ...], in their own type, in every process; all must call."""
    if jax.process_count() == 1:
        return values
    # Halves of 8 bytes are sent, because jax would round them to 4.
    halves = np.ascontiguousarray(values).view(np.uint32) if values.dtype.itemsize == 8 else values
    return multihost_utils.process_allgather(halves).view(values.dtype).sum(0, dtype=values.dtype)


def turns(items: Sequence[Item]) -> Iterator[Item | None]:
    """This process's share of the items, which all processes divide: one in each round, or None in a last round that has too few.

    All processes go through as many rounds, so that they may ask each other something in each.
    """
    for first in range(0, len(items), jax.process_count()):
        mine = first + jax.process_index()
        yield items[mine] if mine < len(items) else None


def shared(mine: Any) -> list[Any]:
    """What each process gives, by process, as JSON has it (floats to the last digit); all must call."""
    if jax.process_count() == 1:
        return [mine]
    said = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(said), np.int32))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(said)] = said
    every = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(text[:size])) for text, size in zip(every, sizes, strict=True)]


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
