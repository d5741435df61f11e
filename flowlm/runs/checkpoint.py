"""Checkpoints of the training state: asynchronous, whole or absent, never fewer than there were. And parameters alone.

Orbax writes a checkpoint under a temporary name and renames it when it is complete, so a process killed in the middle of a
save leaves the earlier ones as they were; in a bucket, which cannot rename, a file commit_success.txt makes it complete. Its v1
API lives under `experimental` in the releases supported here.

A training state is saved with the sums of its arrays (integrity.py) and trusted only if they are the same when it is read. The
first save of a run is read back at once, because a place that cannot give back what it was given is better known early.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.typing import DTypeLike
from orbax.checkpoint.experimental import v1 as ocp

from flowlm.engine.sharding import path_of
from flowlm.runs import integrity
from flowlm.system import lock, processes, storage

# A save is read back in so many parts, because beside the state there is room for one of them only: about one copy of the
# parameters, which is as large as the gradients of a step.
_PARTS = 4


def _shapes(tree) -> dict[str, tuple]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_of(path): tuple(leaf.shape) for path, leaf in flat}


def _differences(saved: dict[str, tuple], asked: dict[str, tuple]) -> str:
    """What differs between the shapes of two trees, or nothing."""
    wrong = sorted(k for k in saved.keys() | asked.keys() if saved.get(k) != asked.get(k))
    shown = ", ".join(f"{k}: saved {saved.get(k)}, wanted {asked.get(k)}" for k in wrong[:4])
    return f"({len(wrong)} arrays differ: {shown})" if wrong else ""


def has_params(directory: str | os.PathLike) -> bool:
    """Whether `directory` holds parameters alone (save_params), not a training state."""
    return (storage.path(directory) / "params").is_dir()


def save_params(directory: str | os.PathLike, params: Any, step: int, dtype: DTypeLike) -> None:
    """Writes the parameters alone, in `dtype`, and the step they are of, to `directory`/params."""
    # As arrays of jax: those of numpy would each have a file of their own.
    storage.check_literal(storage.path(directory))
    tree = {"params": jax.tree.map(lambda a: jnp.asarray(a, dtype), params), "step": jnp.int32(step)}
    ocp.save(storage.path(directory) / "params", tree)


def load_params(
    directory: str | os.PathLike, abstract_params: Any, abstract_step: jax.ShapeDtypeStruct
) -> tuple[Any, int]:
    """(params, step) of `save_params`, in the types and places that the two say.

    Raises:
      ValueError: they are of another architecture. RuntimeError: they cannot be read.
    """
    path = storage.path(directory) / "params"
    asked = {"params": abstract_params, "step": abstract_step}
    try:
        differ = _differences(_shapes(ocp.metadata(path).metadata), _shapes(asked))
        tree = None if differ else ocp.load(path, asked)
    except Exception as error:  # orbax, tensorstore and json each raise their own
        raise RuntimeError(
            f"the parameters in {path} cannot be read ({str(error).split(chr(10))[0][:200]}): restore them from a copy"
        ) from error
    if differ:
        raise ValueError(f"the parameters in {path} are of another architecture {differ}")
    return tree["params"], int(tree["step"])


class _OtherArchitecture(ValueError):
    """A checkpoint that can be read, but not into this state."""


def _read(load: Callable[[], tuple[Any, np.ndarray | None]]) -> tuple[Any, str | None]:
    """(tree, None) where `load` gives a tree with the sums that it was saved with, else (None, what is wrong).

    Where one process cannot read it, it counts as unreadable in all of them; all must call.
    """
    tree = sums = wrong = None
    try:
        tree, sums = load()
    except _OtherArchitecture:
        raise
    except Exception as error:  # orbax, tensorstore and json each raise their own
        wrong = str(error).split("\n")[0][:200]
    # Summing takes all processes, so none begins before all have read.
    if processes.all_agree(wrong is None) and sums is not None and (names := integrity.changed(tree, sums)):
        wrong = f"{', '.join(names[:4])} changed since it was saved"
    return (tree, None) if processes.all_agree(wrong is None) else (None, wrong or "by another process")


class Checkpoints:
    """The checkpoints of one run, under `directory`/<step>.

    Args:
      directory: created if missing (unless read_only).
      every: steps between saves.
      keep_latest: how many of the newest stay.
      keep_every: multiples of this many steps stay for ever (0: none).
      read_only: nothing on disk is touched, because whoever samples and evaluates only reads.

    Raises:
      FileNotFoundError: there is nothing to read. ValueError: another process writes there (lock.take), or nothing can be saved
        under a path like this (storage.check_literal).
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        every: int = 1,
        keep_latest: int = 1,
        keep_every: int = 0,
        read_only: bool = False,
    ) -> None:
        self.directory = storage.path(directory)
        self._read_only = read_only
        self._unproven: tuple | None = None  # the first save of the run, until it has been read back
        if read_only and not self.directory.is_dir():
            raise FileNotFoundError(
                f"no checkpoints under {self.directory}: is this the directory of a run that was trained?"
            )
        if not read_only:
            storage.check_literal(self.directory)
        # The lock is taken before Orbax removes what looks left over, because another process may be writing just that.
        self._release = (
            (lambda: None) if read_only else lock.take(self.directory.parent / f"{self.directory.name}.lock")
        )
        policies = ocp.training.save_decision_policies
        keep = ocp.training.preservation_policies
        kept = [keep.LatestN(keep_latest)] + ([keep.EveryNSteps(keep_every)] if keep_every else [])
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=policies.AnySavePolicy(
                [policies.FixedIntervalPolicy(every), policies.PreemptionCheckpointingPolicy()]
            ),
            preservation_policy=keep.PreserveAll() if read_only else keep.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=not read_only,
        )

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return [c.step for c in self._checkpointer.checkpoints]

    def should_save(self, step: int) -> bool:
        """Whether the policies ask for a checkpoint of this step, which is not there yet. Raises RuntimeError as `save` does."""
        self._prove()
        return step not in self.steps and self._checkpointer.should_save(step)

    def save(self, step: int, state: Any) -> None:
        """Starts writing the state; returns once it has been copied off the devices. A step already saved is left alone.

        Raises:
          RuntimeError: the first save of the run cannot be read, or is not what was saved. It is read back at the call after it.
        """
        self._prove()
        steps = self.steps
        if step in steps:
            return
        sums = integrity.sums(state)
        things = {"state": state, "sums": {"values": sums}}
        saving = self._checkpointer.save_checkpointables_async(step, things, force=True)
        if not steps:
            abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
            self._unproven = saving, step, abstract, sums

    def _prove(self) -> None:
        """Waits for the first save of a run, and reads it back in parts."""
        if self._unproven is None:
            return
        saving, step, abstract, sums = self._unproven
        self._unproven = None
        saving.result()
        leaves, tree = jax.tree.flatten(abstract)
        for part in np.array_split(np.arange(len(leaves)), min(_PARTS, len(leaves))):
            asked = tree.unflatten([a if i in part else ocp.PLACEHOLDER for i, a in enumerate(leaves)])

            def load(asked=asked, part=part):
                held = self._checkpointer.load(step, asked)
                return jax.tree.map(lambda leaf: None if leaf is ocp.PLACEHOLDER else leaf, held), sums[part]

            _, wrong = _read(load)
            if wrong:
                raise RuntimeError(
                    f"the first checkpoint of this run, step {step} in {self.directory}, cannot be read back ({wrong}): "
                    "give a --workdir on another disk"
                )

    def _load(self, step: int, abstract_state) -> tuple[Any, np.ndarray | None]:
        """The state of a step and its sums; None of a checkpoint of a release that saved none."""
        saved = self._checkpointer.checkpointables_metadata(step).metadata
        if not _shapes(saved["state"]):  # Orbax gives no shapes, and only logs why, where it cannot parse the metadata
            raise OSError("its metadata are damaged")
        if differ := _differences(_shapes(saved["state"]), _shapes(abstract_state)):
            raise _OtherArchitecture(
                f"the checkpoint at step {step} in {self.directory} is of another architecture {differ}: "
                "use the settings it was trained with, or another workdir"
            )
        asked = {"state": abstract_state} | ({"sums": None} if "sums" in saved else {})
        held = self._checkpointer.load_checkpointables(step, asked)
        return held["state"], np.asarray(held["sums"]["values"]) if "sums" in held else None

    def restore(self, abstract_state: Any, step: int | None = None) -> Any:
        """The newest readable state, placed as `abstract_state` says; None if there is no checkpoint at all.

        A truncated, changed or otherwise unreadable checkpoint is set aside (renamed, never deleted) and the one before is taken.
        With `step` that of this step is read and no other; None if it is not there.

        Raises:
          ValueError: the checkpoint is of another architecture.
          RuntimeError: checkpoints are there, but none can be read. None is set aside then, so that the next attempt does not start
            a new run in their place.
        Where it raises, the lock is released.
        """
        try:
            return self._restore(abstract_state, self.steps if step is None else [s for s in self.steps if s == step])
        except Exception:
            self.close()
            raise

    def _restore(self, abstract_state: Any, steps: list[int]) -> Any:
        unreadable = []
        for step in reversed(steps):
            state, wrong = _read(lambda step=step: self._load(step, abstract_state))
            if wrong:
                logging.warning(
                    "the checkpoint at step %d in %s cannot be read (%s): falling back to the one before it",
                    step, self.directory, wrong,
                )  # fmt: skip
                unreadable.append(step)
                continue
            self._set_aside(unreadable)
            return state
        if unreadable:
            raise RuntimeError(
                f"none of the checkpoints {unreadable[::-1]} in {self.directory} can be read: restore them from a copy"
            )
        return None

    def _set_aside(self, steps: list[int]) -> None:
        if self._read_only or not steps:
            return
        if processes.is_first():
            self._move_away(steps)
        processes.all_agree(True)  # so that no process lists the checkpoints before the first has moved them
        self._checkpointer.reload()

    def _move_away(self, steps: list[int]) -> None:
        broken = self.directory.parent / "unreadable_checkpoints"
        broken.mkdir(parents=True, exist_ok=True)
        for step in steps:
            name = str(step)
            while (broken / name).exists():
                name += "_"
            storage.move(self.directory / str(step), broken / name)

    def close(self) -> None:
        """Waits for the save in progress. Raises RuntimeError as `save` does, but not in place of an error on its way out."""
        try:
            if sys.exc_info()[0] is None:
                self._prove()
        finally:
            self._checkpointer.close()
            self._release()
