"""Programs over rows of a mesh: samplers, and likelihoods of given rows."""

import difflib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flowlm.engine.sharding import Layout
from flowlm.models.network import Network, Params
from flowlm.objectives import Family, prompts
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
    """Draws samples of one (family, number of steps), `rows` in a call, sharded over the mesh.

    A row is made of noise that depends on the key, the call and the row's number in it alone. So the first rows are the same
    whatever `rows` is, but for the last digits of logits that are computed in batches of other sizes.

    Args:
      rows: samples of one call; rounded up to a multiple of the mesh's devices.
      prompted: whether rows go on from prompts, which are then an argument of the program.

    Attributes:
      rows: what one call draws.
      trace: (prepared params, key, and given [rows, L] where there are prompts) -> its program.
      compile_seconds: what the last draw took to compile.
      draw_seconds: what it took beside that.
      seconds: what 100 samples took in it, compilation apart.
    """

    def __init__(
        self, net: Network, family: Family, steps: int, layout: Layout, rows: int = ROWS, prompted: bool = False
    ):
        self.rows = rows = -(-rows // layout.devices) * layout.devices

        self._given = (jax.ShapeDtypeStruct((rows, net.length), jnp.int32),) if prompted else ()

        def sample(params, key, *given):
            if not given:
                return family.sample(net, params, key, rows, steps)
            given = jax.lax.with_sharding_constraint(given[0], layout.rows)
            return prompts.sample(family, net, params, key, given, steps)

        self._sample = layout.jit(sample, out_shardings=layout.rows)
        self.trace = self._sample.trace
        self._prepare = jax.jit(net.prepared) if family.continuous else lambda params: params
        self._compiled = None

    def check(self, params: Params, key: jax.Array) -> None:
        """Raises ValueError where the family cannot sample so. Of the parameters only shapes are read, and nothing is compiled."""
        jax.eval_shape(self._sample, jax.eval_shape(self._prepare, params), key, *self._given)

    def calls(self, num: int) -> int:
        """How many calls draw `num` samples."""
        return -(-num // self.rows)

    def __call__(
        self,
        params: Params,
        key: jax.Array,
        num: int,
        begin: Callable[[str], None] = lambda what: None,
        given: np.ndarray | None = None,
    ) -> np.ndarray:
        """ids int32 [num, L]; the first rows do not depend on num. Raises processes.Stopped between two calls.

        Args:
          begin: is told before each call what comes next.
          given: ids [num, L] of prompts, with prompts.UNKNOWN where a token is to be written; for a sampler that is `prompted`.
        """
        begin("sampling")  # compiling is part of the first call
        asked = time.perf_counter()
        params = jax.block_until_ready(self._prepare(params))
        if self._compiled is None:
            self._compiled = self.trace(params, key, *self._given).lower().compile()
        calls = self.calls(num)
        if given is not None:
            given = np.pad(given, ((0, calls * self.rows - num), (0, 0)), mode="edge").reshape(calls, self.rows, -1)
        start = time.perf_counter()
        parts = []
        for i in range(calls):
            check_stopped()
            if i:
                begin("sampling")
            told = () if given is None else (given[i],)
            parts.append(gathered(self._compiled(params, jax.random.fold_in(key, i), *told)))
        self.compile_seconds, self.draw_seconds = start - asked, time.perf_counter() - start
        self.seconds = 100 * self.draw_seconds / (calls * self.rows)
        return np.concatenate(parts)[:num]


def on_rows(layout: Layout, net: Network, fn: Callable) -> Callable:
    """jit of fn(net, params, {"ids": [B, L]}, key, ...) -> [B] as run(params, ids, key, ...): each device computes its own rows.

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

    Raises processes.Stopped before the first call.
    """
    check_stopped()
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    return np.concatenate([gathered(fn(params, ids, jax.random.fold_in(key, i), *args)) for i, ids in enumerate(parts)])
