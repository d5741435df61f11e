"""Models as they are served: under which name, in which numbers of steps, and what is told of each."""

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from flowlm.engine.rows import Rows
from flowlm.engine.sampling import named_sampler
from flowlm.exchange.card import judged
from flowlm.objectives.prompts import UNKNOWN
from flowlm.runs.model import Model, load_model
from flowlm.system import hub, progress, storage

MOST_STEPS = 1024
SHOWN_STEPS = (1, 2, 4, 8, 64)  # that the page sets side by side


class Served:
    """A model that requests are answered with.

    Attributes:
      name: by which a request names it.
      model: as `flowlm.load` makes it.
      rows: programs of its sampler.
      steps: numbers of network calls that a request may ask for.
      usual_steps: of a request that asks for none.
      takes_temperature: whether its sampler draws tokens.
      judged: what its evaluation.json says (exchange/card.py), or None.
      made: when it was loaded, in seconds since 1970.
    """

    def __init__(self, name: str, model: Model, directory: str | os.PathLike | None = None) -> None:
        self.name, self.model, self.made = name, model, int(time.time())
        experiment, config = model.run.experiment, model.config
        self.sampler, family = named_sampler(experiment.family)
        only = config.data.length - 1 if config.model.causal else 1
        self.steps = range(1, MOST_STEPS + 1) if family.any_steps else range(only, only + 1)
        self.usual_steps = 64 if family.any_steps and config.model.time_embeddings < 2 else only
        self.takes_temperature = _takes_temperature(family)
        self.rows = Rows(experiment.net, family, model.layout, model.run.params, None if family.any_steps else only)
        self.judged = None if directory is None else judged(directory, os.fspath(directory))

    def facts(self) -> dict[str, Any]:
        """What /v1/models says of it."""
        config = self.model.config
        shown = [steps for steps in SHOWN_STEPS if steps in self.steps] or [self.usual_steps]
        told = {"family": config.objective.family, "data": config.data.name, "sampler": self.sampler}
        told |= {"training_step": self.model.run.step, "tokens": config.data.length - 1}
        told |= {"steps": {"least": self.steps[0], "most": self.steps[-1], "usual": self.usual_steps, "shown": shown}}
        told |= {"temperature": self.takes_temperature, "follows_prompts": self.model.follows_prompts}
        return (
            {"id": self.name, "object": "model", "created": self.made, "owned_by": "flowlm"}
            | told
            | {"judged": self.judged}
        )

    def warm(self, rows: int) -> None:
        """Compiles the programs of a batch of so many rows, so that no request need wait for that."""
        length = self.model.config.data.length
        asked = {"seed": np.zeros(rows, np.uint32), "number": np.arange(rows, dtype=np.int32)}
        self.rows.compile(asked | {"given": np.full((rows, length), UNKNOWN, np.int32)})


def _takes_temperature(family) -> bool:
    if "temperature" not in {field.name for field in dataclasses.fields(family)}:
        return False
    try:
        dataclasses.replace(family, temperature=1.0)
    except ValueError:  # because another setting of the run excludes it
        return False
    return True


def warm(models: Sequence[Served], most_rows: int) -> None:
    """Compiles the programs of every size of a batch up to `most_rows`, of all of the models."""
    sizes = [(model, size) for model in models for size in model.rows.sizes(most_rows)]
    with progress.parts(len(sizes)) as begin:
        for model, size in sizes:
            begin(f"compiling {model.name}")
            model.warm(size)


def load_served(directories: Sequence[str], **objective: Any) -> list[Served]:
    """The models of these directories. Raises ValueError for two of the same directory; others as `flowlm.load`."""
    names = names_of(directories)
    return [Served(name, load_model(place, **objective), place) for name, place in zip(names, directories)]


def names_of(directories: Sequence[str]) -> list[str]:
    """The name of each: NAME/MODEL on the Hub, otherwise its last folders, as many as tell it from the others.

    Raises ValueError: two are the same.
    """
    parts = [_parts(place) for place in directories]
    for i, mine in enumerate(parts):
        if mine in parts[:i]:
            raise ValueError(f"{directories[i]} is named twice: name each checkpoint once")

    def name(mine: tuple[str, ...]) -> str:
        for length in range(1, len(mine)):
            if sum(other[-length:] == mine[-length:] for other in parts) == 1:
                return "/".join(mine[-length:])
        return "/".join(mine).replace("//", "/")

    return [name(mine) for mine in parts]


def _parts(place: str) -> tuple[str, ...]:
    if hub.is_named(place):
        return ("hub:", hub.parts(place)[0])
    return storage.path(place).parts
