"""Samples whose rows were asked for one by one: each has a seed, a prompt and a temperature of its own, and all share a program.

Row k of a seed is what `Sampler` of one row draws in its call k with that seed, whatever else is computed beside it, but for the
last digits of logits that are computed in batches of other sizes. A row of a family that takes any number of steps is written a
network call at a time, so that its state can be read between two of them, and other rows can be served.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from flowlm.engine.sharding import Layout
from flowlm.maths import vocab
from flowlm.models.network import Network, Params
from flowlm.objectives import Family, prompts
from flowlm.system.processes import gathered

# What is asked of each row, by name: `seed` uint32 [R]; `number` int32 [R], its number among the rows of that seed; `given` int32
# [R, L], its prompt (objectives/prompts.py), all UNKNOWN of a row without one; and maybe `temperature` float32 [R].
Asked = dict[str, np.ndarray]


class Rows:
    """Programs of one model. jax keeps one for each size of a batch, and for rows with and without temperatures.

    Args:
      family: a sampler of it.
      steps: network calls of a family that takes no other number of them; otherwise None.
    """

    def __init__(self, net: Network, family: Family, layout: Layout, params: Params, steps: int | None = None) -> None:
        self._net, self._family, self._layout, self._steps = net, family, layout, steps
        self._params = jax.jit(net.prepared)(params) if family.continuous else params
        self._begin = self._over_rows(lambda walk, state, i: walk.start)
        self._move = self._over_rows(lambda walk, state, i: walk.move(state, i))
        self._end = self._over_rows(lambda walk, state, i: walk.end(state))
        self._whole = layout.jit(jax.vmap(self._sampled, (None, 0), axis_name=vocab.MAPPED), out_shardings=layout.rows)

    def size(self, num: int) -> int:
        """How many rows are computed for `num`: a power of two, so that few programs serve all, and a multiple of the devices."""
        devices = self._layout.devices
        return devices * (1 << (-(-num // devices) - 1).bit_length())

    def sizes(self, most: int) -> list[int]:
        """Every `size` of up to `most` rows."""
        return sorted({self.size(num) for num in range(1, most + 1)})

    @property
    def at_once(self) -> bool:
        """Whether its rows are written by `whole`, and otherwise by `begin`, `move` and `end`."""
        return self._steps is not None

    def compile(self, asked: Asked) -> None:
        """Compiles, and runs once, the programs that rows such as these need."""
        if self.at_once:
            jax.block_until_ready(self.whole(asked))
            return
        state, _ = self.move(asked, self.begin(asked, 2), 0, 2)
        jax.block_until_ready(self.end(asked, state, 2))

    def begin(self, asked: Asked, steps: int) -> Any:
        """The state before the first of `steps` calls."""
        return self._begin(self._params, self._padded(asked), None, 0, steps)

    def move(self, asked: Asked, state: Any, i: int, steps: int) -> tuple[Any, jax.Array]:
        """(state, ids) after call i < steps - 1; ids, to be read by `read`, are what it would have written as the last."""
        return self._move(self._params, self._padded(asked), state, i, steps)

    def end(self, asked: Asked, state: Any, steps: int) -> jax.Array:
        """ids, to be read by `read`, of the last call."""
        return self._end(self._params, self._padded(asked), state, steps - 1, steps)

    def whole(self, asked: Asked) -> jax.Array:
        """ids, to be read by `read`, of all calls of a family that takes one number of steps alone."""
        return self._whole(self._params, self._padded(asked))

    def read(self, ids: jax.Array, asked: Asked) -> np.ndarray:
        """int32 [R, L], the rows that were asked for."""
        found = gathered(ids)[: len(asked["seed"]), 0]
        return np.where(asked["given"] == prompts.UNKNOWN, found, asked["given"])

    def _padded(self, asked):
        more = self.size(len(asked["seed"])) - len(asked["seed"])
        return {name: np.pad(rows, ((0, more), *((0, 0),) * (rows.ndim - 1)), "edge") for name, rows in asked.items()}

    def _of_row(self, row):
        """(family, network, key) of one row."""
        family = self._family
        if "temperature" in row:
            family = dataclasses.replace(family, temperature=row["temperature"])
        net = prompts.knowing(family, self._net, row["given"][None])
        return family, net, jax.random.fold_in(jax.random.key(row["seed"]), row["number"])

    def _over_rows(self, part):
        def of_row(params, row, state, i, steps):
            family, net, key = self._of_row(row)
            return part(family.walk(net, params, key, 1, steps), state, i)

        mapped = jax.vmap(of_row, (None, 0, 0, None, None), axis_name=vocab.MAPPED)
        return self._layout.jit(mapped, out_shardings=self._layout.rows)

    def _sampled(self, params, row):
        family, net, key = self._of_row(row)
        return family.sample(net, params, key, 1, self._steps)
