"""Programs over rows of a mesh: samplers, and likelihoods of given rows."""

import difflib
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flowlm.engine.sharding import Layout
from flowlm.models.network import Network, Params
from flowlm.objectives import Family
from flowlm.objectives.base import check_steps
from flowlm.system.processes import check_stopped, gathered

ROWS = 256  # samples of one call


def named_sampler(family: Family, name: str | None = None) -> tuple[str, Family]:
    """(name, sampler) of the family; without a name its last, which is set as the run says.

    Raises ValueError: the family has no sampler of that name, or none at all.
    """
    choices = family.samplers()
    if not choices:
        raise ValueError(f"a run of the family {type(family).__name__} writes no samples: name another run")
    name = name or next(reversed(choices))
    if name not in choices:
        (near,) = difflib.get_close_matches(name, choices, 1, cutoff=0)
        raise ValueError(f"no sampler {name!r}: there are {', '.join(choices)}; did you mean {near}?")
    return name, choices[name]


class Sampler:
    """Draws samples of a family, `rows` in a call, sharded over the mesh.

    A row is made of noise that depends on the key, the call and the row's number in it alone. So the first rows are the same
    whatever `rows` is, but for the last digits of logits that are computed in batches of other sizes.

    One program serves all numbers of steps where the family takes any; otherwise each number has its own.

    Args:
      rows: samples of one call; rounded up to a multiple of the mesh's devices.

    Attributes:
      rows: what one call draws.
      compile_seconds: what the last draw took to compile.
      draw_seconds: what it took beside that.
      seconds: what 100 samples took in it, compilation apart.
    """

    def __init__(self, net: Network, family: Family, layout: Layout, rows: int = ROWS):
        self.rows = -(-rows // layout.devices) * layout.devices
        self._net, self._family, self._layout = net, family, layout
        self._prepare = jax.jit(net.prepared) if family.continuous else lambda params: params
        self._compiled: dict[int | None, Callable] = {}

    def _program(self, steps: int | None) -> Callable:
        """jit of the program for `steps`, or for a number of them that comes as a third argument where that is None."""

        def sample(params, key, *traced):
            taken = traced[0] if steps is None else steps
            return self._family.sample(self._net, params, key, self.rows, taken)

        return self._layout.jit(sample, out_shardings=self._layout.rows)

    def trace(self, params: Params, key: jax.Array, steps: int) -> jax.stages.Traced:
        """The program for this number of steps alone, of prepared parameters, which may be shapes."""
        return self._program(steps).trace(params, key)

    def check(self, params: Params, key: jax.Array, steps: int) -> None:
        """Raises ValueError where the family cannot sample so. Of the parameters only shapes are read, and nothing is compiled."""
        jax.eval_shape(self._program(steps), jax.eval_shape(self._prepare, params), key)

    def calls(self, num: int) -> int:
        """How many calls draw `num` samples."""
        return -(-num // self.rows)

    def __call__(
        self,
        params: Params,
        key: jax.Array,
        num: int,
        steps: int,
        begin: Callable[[str], None] = lambda what: None,
    ) -> np.ndarray:
        """ids int32 [num, L]; the first rows do not depend on num. Raises processes.Stopped between two calls.

        Args:
          begin: is told before each call what comes next.
        """
        begin("sampling")  # compiling is part of the first call
        asked = time.perf_counter()
        params = jax.block_until_ready(self._prepare(params))
        check_steps(steps)  # of a traced number nothing is known
        which, traced = (None, (np.int32(steps),)) if self._family.any_steps else (steps, ())
        if which not in self._compiled:
            self._compiled[which] = self._program(which).lower(params, key, *traced).compile()
        draw, calls = self._compiled[which], self.calls(num)
        start = time.perf_counter()
        parts = []
        for i in range(calls):
            check_stopped()
            if i:
                begin("sampling")
            parts.append(gathered(draw(params, jax.random.fold_in(key, i), *traced)))
        self.compile_seconds, self.draw_seconds = start - asked, time.perf_counter() - start
        self.seconds = 100 * self.draw_seconds / (calls * self.rows)
        return np.concatenate(parts)[:num]


def on_rows(layout: Layout, net: Network, fn: Callable) -> Callable:
    """jit of fn(net, params, {"ids": [B, L]}, key, ...) -> [B, ...] as run(params, ids, key, ...): each device has its own rows.

    The result is on every device, so B may be any number.
    """

    def run(params, ids, key, *args):
        batch = {"ids": jax.lax.with_sharding_constraint(ids, layout.rows)}
        values = jax.lax.with_sharding_constraint(fn(net, params, batch, key, *args), layout.rows)
        return jax.lax.with_sharding_constraint(values, NamedSharding(layout.mesh, P()))

    return layout.jit(run)


def in_parts(
    fn: Callable, params: Params, rows: np.ndarray, size: int, key: jax.Array, *args: jax.Array | float
) -> np.ndarray:
    """`on_rows` over rows [N, L], `size` of them in a call, with a key of its own for each call: [N].

    Raises processes.Stopped between two calls.
    """
    parts = []
    for call, first in enumerate(range(0, len(rows), size)):
        check_stopped()
        parts.append(gathered(fn(params, rows[first : first + size], jax.random.fold_in(key, call), *args)))
    return np.concatenate(parts)
