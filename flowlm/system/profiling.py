"""Where the time of a step goes: a trace of named steps for XProf, and a word when a step had to be compiled anew."""

from typing import Any

import jax
from absl import logging


def parse_steps(text: str) -> range:
    """`a:b` as the steps a, a + 1, ..., b - 1; none for the empty string. Raises ValueError for anything else."""
    if not text:
        return range(0)
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise ValueError(f"--profile_steps takes the first step and the one after the last, as 100:110, got {text!r}")
    return range(int(first), int(last))


class Profiler:
    """Traces some steps of a run into `directory`: before(step) and after(step, metrics) are called around every step.

    A run that is taken up within the steps traces what is left of them.
    """

    def __init__(self, steps: range, directory):
        self._steps, self._directory, self._tracing = steps, directory, False

    def before(self, step: int) -> None:
        if step in self._steps and not self._tracing:
            jax.profiler.start_trace(self._directory)
            self._tracing = True

    def after(self, step: int, metrics: Any) -> None:
        """metrics: arrays of the step; the trace ends when they are there."""
        if self._tracing and step + 1 not in self._steps:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Writes what was traced so far."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False


class Recompilations:
    """Warns when a jitted function is compiled again: its time is then that of the compiler."""

    def __init__(self, jitted):
        self._jitted, self._seen = jitted, None

    def check(self, step: int) -> None:
        """To be called after every step."""
        size = self._jitted._cache_size()  # the number of compiled programs, for which JAX has no public name
        if self._seen is not None and size > self._seen:
            logging.warning(
                "step %d was compiled anew: the shape, type or place of its batch or state is not that of earlier steps",
                step,
            )
        self._seen = size
