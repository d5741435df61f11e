"""Where a run's numbers are drawn while it trains, beside metrics.jsonl: TensorBoard and Weights & Biases, if asked for.

A board has write(step, {name: finite value}, {SAMPLER@STEPS: samples}) and close(). Whatever it is given is in metrics.jsonl first.
"""

import importlib
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Protocol

from ml_collections import ConfigDict

from flowlm.system import storage

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # {setting and extra: what draws}
TEXTS = 16  # samples of each sampler that are shown


class Board(Protocol):
    """What draws numbers and shows samples."""

    def write(self, step: int, values: Mapping[str, float], texts: Mapping[str, Sequence[str]]) -> None: ...

    def close(self) -> None: ...


def _package(setting: str) -> ModuleType:
    try:
        return importlib.import_module(PACKAGES[setting])
    except ImportError as error:
        raise ImportError(f"--config.{setting}=True needs {PACKAGES[setting]}: pip install -e .[{setting}]") from error


def check(config: ConfigDict) -> None:
    """Raises ImportError, which names the extra, where a board is asked for and what draws it is not installed."""
    for setting in PACKAGES:
        if config[setting]:
            _package(setting)


def boards_of(config: ConfigDict, directory: str | os.PathLike) -> Iterator[Board]:
    """The boards that a run's settings ask for, which begin or go on. Raises ImportError, ValueError: one cannot."""
    if config.tensorboard:
        yield TensorBoard(directory)
    if config.wandb:
        yield WeightsAndBiases(directory, config)


class TensorBoard:
    """Event files in `directory`/tensorboard."""

    def __init__(self, directory: str | os.PathLike) -> None:
        place = storage.path(directory) / "tensorboard"
        self._writer = _package("tensorboard").SummaryWriter(os.fspath(place))

    def write(self, step: int, values: Mapping[str, float], texts: Mapping[str, Sequence[str]]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        for name, some in texts.items():
            self._writer.add_text(name, "\n\n".join(some[:TEXTS]), step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases with all settings, called like the directory, in the project flowlm or WANDB_PROJECT.

    Its files are in `directory`/wandb, of a bucket in its mirror on this disk. Its id is kept in wandb.json, so that a run that is
    taken up again goes on there too; steps that it has already are not drawn twice. Who may write is settled by its own login.

    Raises:
      ValueError: it cannot begin.
    """

    def __init__(self, directory: str | os.PathLike, config: ConfigDict) -> None:
        self._wandb, directory = _package("wandb"), storage.path(directory)
        known = directory / "wandb.json"
        if not known.exists():
            storage.write_text(known, f'{{"id": "{secrets.token_hex(4)}"}}\n')
        place = storage.mirror(directory)
        place.mkdir(parents=True, exist_ok=True)
        try:
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", "flowlm"),
                name=directory.name,
                id=storage.read_json(known)["id"],
                resume="allow",
                dir=os.fspath(place),
                config=config.to_dict(),
                settings=self._wandb.Settings(console="off"),
            )
        except self._wandb.Error as error:
            told = str(error).split("\n")[0].rstrip(".")
            raise ValueError(
                f"Weights & Biases cannot begin ({told}): `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def write(self, step: int, values: Mapping[str, float], texts: Mapping[str, Sequence[str]]) -> None:
        rows = [[name, text] for name, some in texts.items() for text in some[:TEXTS]]
        table = {"texts": self._wandb.Table(columns=["sampler", "text"], data=rows)} if rows else {}
        self._run.log({**values, **table}, step=step)

    def close(self) -> None:
        # A run that an error ends is not shown as finished.
        self._run.finish(exit_code=int(sys.exc_info()[0] is not None))
