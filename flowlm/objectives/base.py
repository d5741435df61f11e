"""What every generative family promises: the contract between an objective and all that trains, judges and samples it."""

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax

from flowlm.models.network import Network, Params
from flowlm.system.settings import check_choices

Batch = dict[str, jax.Array]  # rows by name: `ids`, and what `Family.draw` adds to them
Losses = tuple[dict[str, jax.Array], dict[str, jax.Array]]  # what `Family.loss` returns


class Teacher(NamedTuple):
    """Frozen parameters.

    Attributes:
      flow: of a flow (or discrete diffusion) in the student's architecture, or of `net`.
      residual: of the flow's residual, for one target.
      net: the teacher's own network, where it is another than the student's.
    """

    flow: Params
    residual: Params | None = None
    net: Network | None = None


class Auxiliary(NamedTuple):
    """What an objective may look at beside the live parameters; absent parts are None. step: the step that is made, int32 []."""

    teacher: Teacher | None = None
    ema: Params | None = None
    step: jax.Array | None = None


class Update(NamedTuple):
    """How one of several networks that are trained together is updated.

    Attributes:
      rate: its learning rate, as a multiple of the optimizer's.
      every: it moves in the last of every so many steps.
    """

    rate: float = 1.0
    every: int = 1


class Family(abc.ABC):
    """A generative family. Its subclasses are frozen dataclasses whose fields are its settings (settings.py) and its context:
    `prior` and `warp` where it has them, and `teacher`, whether there is one.

    Attributes:
      continuous: its states lie in embedding space and begin as a prior's noise; the network is asked with the geometry of E.
      distils: it may have a teacher.
      needs: settings of the model section that it cannot do without.
      may: other values of them that it puts up with.
      group: rows of a batch that stay together in a microbatch.
      parts: names of the losses whose conflicting gradients are projected; ("loss",) is their sum.
      differentiates: whether its loss takes forward derivatives of the network.
      taught_by: the family of its teachers, which keep their own network; None: they have the student's.
      continues: its teacher is where the student starts; whom it follows is the flow behind that.
      updates: how the parts of what is trained are updated, by their names, where these are several networks; otherwise {}.
    """

    continuous: ClassVar[bool] = False
    distils: ClassVar[bool] = True
    needs: ClassVar[Mapping[str, Any]] = {"mask_token": False}
    may: ClassVar[Mapping[str, Any]] = {}
    group: int = 1
    parts: tuple[str, ...] = ("loss",)
    differentiates: bool = False
    taught_by: ClassVar["type[Family] | None"] = None
    continues: ClassVar[bool] = False

    @property
    def updates(self) -> Mapping[str, Update]:
        """One network is updated as the optimizer says."""
        return {}

    def __post_init__(self):
        check_choices(self, "objective")

    def check(self, family: str, model: Mapping[str, Any]) -> None:
        """Raises ValueError where the settings of a network do not suit the family, which experiments call `family`."""
        if model["attention"] != "xla" and self.differentiates:
            raise ValueError(
                f"the {family} objective takes forward derivatives through attention, which {model['attention']} has not: "
                "set --config.model.attention=xla"
            )
        for key, value in self.needs.items():
            if model[key] not in (value, self.may.get(key, value)):
                raise ValueError(
                    f"the family {family} needs model.{key}={value!r}, but it is {model[key]!r}: "
                    f"set --config.model.{key}={value}"
                )

    def start(self, net: Network, params: Params, teacher: Teacher | None, origin: Params | None) -> Params:
        """What is trained, at first: a student begins as its teacher, another run as its origin, if it has one.

        Args:
          params: fresh ones of the network.
          teacher: frozen parameters.
          origin: averaged parameters of another run.
        """
        source = origin if teacher is None else teacher.flow
        return params if source is None else net.adopt(params, source)

    def student(self, params: Params) -> Params:
        """Of what is trained, the network that is averaged, judged, sampled and exported."""
        return params

    @abc.abstractmethod
    def draw(self, key: jax.Array, num: int) -> Batch:
        """The random part of a global batch of `num` rows, {name: [num, ...]}, which is added to batch["ids"]."""

    @abc.abstractmethod
    def loss(self, net: Network, params: Params, aux: Auxiliary, batch: Batch, keys: jax.Array | None) -> Losses:
        """({name: loss of each row}, {name: metric of each row}), nats per token unless it says otherwise.

        The named losses share the batch's rows, and their sum over all rows / B is the loss. Means, meshes and microbatches are
        the training step's affair.

        Args:
          aux: the frozen teacher, the moving average and the step (`Auxiliary`).
          batch: {ids [B, L]} | draw(...).
          keys: [B], for dropout alone, or None.
        """

    def samplers(self) -> dict[str, "Family"]:
        """Its samplers by name, the one that is set last. {}: it writes no text, and is a stage on the way to what does.

        Each has sample(net, params, key, num, steps) -> ids [num, L]; a continuous one also trajectory(...) -> [steps, num, L],
        what `sample` would write at each of its steps. A name has no blanks, so that `--sampler` takes it as it stands.
        """
        return {}

    def likelihoods(self) -> dict[str, Callable]:
        """What is computed of held-out rows, by name, each (net, params, {ids [B, L]}, key, ...) -> nats [B].

        `bound`: an unbiased estimate of an upper bound on -log p(ids). `denoising`, `context_free`: as in denoiser.py.
        """
        return {}
