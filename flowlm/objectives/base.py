"""What every generative family promises to the code that trains, judges and samples it."""

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax

from flowlm.models.network import Network, Params
from flowlm.system.settings import check_choices

Batch = dict[str, jax.Array]  # rows by name: `ids`, and the rows that `Family.draw` adds
Losses = tuple[dict[str, jax.Array], dict[str, jax.Array]]  # what `Family.loss` returns


class Teacher(NamedTuple):
    """Frozen parameters.

    Attributes:
      flow: those of a flow or of a discrete diffusion in the student's architecture, or of `net`.
      residual: those of a residual network that follows the flow (residual.py), which only the target `residual` needs.
      net: the teacher's own network, where it is another than the student's.
    """

    flow: Params
    residual: Params | None = None
    net: Network | None = None


class Auxiliary(NamedTuple):
    """What an objective may read beside the live parameters.

    Attributes:
      teacher: frozen parameters, or None without a teacher.
      ema: moving average of the student's parameters, or None.
      step: number of the training step, int32 [].
    """

    teacher: Teacher | None = None
    ema: Params | None = None
    step: jax.Array | None = None


class Walk(NamedTuple):
    """A sampler a network call at a time, of num rows; i numbers the calls, and may be traced.

    Attributes:
      start: the state before the first call, a tree of arrays [num, ...].
      move: of all calls but the last, (state, i) -> (state after call i, the likeliest ids [num, L] that it would have written as
        the last one).
      end: state -> ids [num, L], by the last call.
    """

    start: Any
    move: Callable[[Any, jax.Array], tuple[Any, jax.Array]]
    end: Callable[[Any], jax.Array]

    def finished(self, steps: int | jax.Array) -> jax.Array:
        """ids [num, L] of all `steps` calls."""
        return self.end(jax.lax.fori_loop(0, steps - 1, lambda i, state: self.move(state, i)[0], self.start))


class Update(NamedTuple):
    """How one of several networks that are trained together is updated.

    Attributes:
      rate: its learning rate, as a multiple of the optimizer's.
      every: the network moves in every `every`-th step only.
    """

    rate: float = 1.0
    every: int = 1


class Family(abc.ABC):
    """A generative family. A family is a frozen dataclass whose fields are its settings (settings.py) and its context, which are
    `prior` and `warp` if it uses them, and `teacher`, whether it has one.

    Attributes:
      continuous: whether states lie in embedding space and begin as a prior's noise; the network then needs the geometry of E.
      distils: whether the family may have a teacher.
      needs: the values of model settings that the family needs.
      may: for some of these settings, one more value that the family accepts.
      group: number of rows of a batch that must stay together in a microbatch.
      parts: names of the losses whose conflicting gradients are projected; ("loss",) means the sum of all losses.
      differentiates: whether the loss takes forward derivatives of the network.
      taught_by: the family of its teachers, if these keep a network of their own; None if they have the student's.
      continues: whether the student starts at the run `config.teacher` and follows that run's own teacher.
      any_steps: whether samplers take any number of steps, which may then be traced, so that one program serves all numbers; they
        then have walk(net, params, key, num, steps) -> Walk, whose `finished` is what `sample` writes.
      prompts: share of the rows of training that show a part of their text (prompts.py); 0 where a family cannot be trained so.
      prompt_guidance: how far its sampler goes from what it would write without a prompt (prompts.py); 1 where there is no such.
      conditions: what a prompt is to a network that was not trained with prompts: `shown` where it sees clean tokens among noised
        ones anyway, `prefix` in autoregression; otherwise `replacement`, an approximation.
      updates: how each of several networks that are trained together is updated, by their names; {} for a single network.
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
    any_steps: ClassVar[bool] = False
    prompts: float = 0.0
    prompt_guidance: float = 1.0
    conditions: ClassVar[str] = "replacement"

    @property
    def updates(self) -> Mapping[str, Update]:
        """{}: there is one network, and the optimizer's settings are its own."""
        return {}

    def __post_init__(self):
        check_choices(self, "objective")

    def check(self, family: str, model: Mapping[str, Any]) -> None:
        """Raises ValueError if the settings `model` of a network do not suit this family; `family` is its name in the message."""
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
        """The parameters at the first step: the teacher's flow if there is a teacher, otherwise the origin's if there is one.

        Args:
          params: the network's fresh parameters.
          teacher: frozen parameters, or None.
          origin: averaged parameters of another run, or None.
        """
        source = origin if teacher is None else teacher.flow
        return params if source is None else net.adopt(params, source)

    def student(self, params: Params) -> Params:
        """The parameters of the network that is averaged, judged, sampled and exported, out of all that are trained."""
        return params

    @abc.abstractmethod
    def draw(self, key: jax.Array, num: int) -> Batch:
        """The random part of a global batch of `num` rows, {name: [num, ...]}; the training step adds `ids` to it."""

    @abc.abstractmethod
    def loss(self, net: Network, params: Params, aux: Auxiliary, batch: Batch, keys: jax.Array | None) -> Losses:
        """({name: loss of each row}, {name: metric of each row}), nats per token unless a family says otherwise.

        The named losses share the batch's rows, and their sum over all rows / B is the loss. The training step takes the means, so
        a family knows nothing of meshes and microbatches.

        Args:
          aux: the frozen teacher, the moving average and the step (`Auxiliary`).
          batch: {ids [B, L]} | draw(...).
          keys: [B], which only dropout may use; None without dropout.
        """

    def samplers(self) -> dict[str, "Family"]:
        """The family's samplers by name; the last one follows the settings. {} if the family is only a stage and writes no text.

        Each sampler has sample(net, params, key, num, steps) -> ids [num, L]. A continuous one also has trajectory(...) ->
        [steps, num, L], the tokens that `sample` would write at each step. Names have no blanks, because `--sampler` takes them.
        """
        return {}

    def likelihoods(self) -> dict[str, Callable]:
        """Functions of held-out rows by name, each (net, params, {ids [B, L]}, key, ...) -> nats [B].

        `bound` estimates without bias an upper bound on -log p(ids). denoiser.py explains `denoising` and `context_free`.
        """
        return {}


def check_steps(steps: int) -> None:
    """Raises ValueError for fewer than 1 sampling step; of a traced number nothing is known."""
    if isinstance(steps, int) and steps < 1:
        raise ValueError(f"sampling takes at least 1 step, got {steps}")
