"""Makes the network, the family and the optimizer of a run from its settings."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
from ml_collections import ConfigDict

from flowlm.config import check_settings
from flowlm.engine import state as train_state
from flowlm.engine.optimizers import make_optimizer, make_schedule
from flowlm.engine.sharding import Layout
from flowlm.maths.time_warp import TimeWarp
from flowlm.models.network import Network, Transformer
from flowlm.objectives import Family, make_family
from flowlm.objectives.base import Teacher


class Experiment(NamedTuple):
    """What settings make: a network, a family (objectives/), an optimizer and its learning-rate schedule."""

    net: Network
    family: Family
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule


def build(config: ConfigDict, vocab_size: int, start: int | None = None, trained: bool = False) -> Experiment:
    """Makes everything of a run that needs settings alone. It is cheap, so that bad settings fail first.

    Args:
      vocab_size: the tokenizer's.
      start: the tokenizer's start token; an objective that is told one is checked against it.
      trained: for a run that is over, whose settings of training no longer matter.

    Raises:
      ValueError: a setting out of its range, a model for another vocabulary than the tokenizer's, or a student without a teacher.
    """
    check_settings(config, trained)
    if config.teacher == "" and not trained:
        raise ValueError(
            "this experiment distils a run: give --config.teacher=RUNDIR, or --config.teacher=None to train without one"
        )
    model = config.model.to_dict()
    if model["vocab_size"] != vocab_size:
        raise ValueError(
            f"model.vocab_size is {model['vocab_size']}, but the tokenizer {config.data.tokenizer!r} has {vocab_size} tokens: "
            f"set --config.model.vocab_size={vocab_size} or choose another tokenizer"
        )
    told = config.objective.to_dict().get("start")
    if start is not None and told not in (None, start):
        raise ValueError(
            f"objective.start is {told}, but the start token of {config.data.tokenizer!r} is {start}: "
            f"set --config.objective.start={start}"
        )
    warp = TimeWarp(config.prior, config.time_warp, vocab_size, config.model.width)
    net = Transformer(length=config.data.length, warp=warp, **model)
    family = make_family(warp=warp, teacher=bool(config.teacher), **config.objective.to_dict())
    net = dataclasses.replace(net, prompts=family.prompts > 0)
    family.check(config.objective.family, model)
    settings = config.optimizer.to_dict()
    schedule = make_schedule(
        settings.pop("learning_rate"), settings.pop("schedule"), settings.pop("warmup_steps"), config.steps
    )
    return Experiment(net, family, make_optimizer(schedule, family.updates, **settings), schedule)


def abstract_state(experiment: Experiment, layout: Layout) -> train_state.TrainState:
    """Shapes and shardings of the training state, without making it."""
    shapes = jax.eval_shape(lambda: train_state.init_state(experiment.net, experiment.family, experiment.optimizer, 0))
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, layout.places(shapes))


def abstract_teacher(config: ConfigDict, experiment: Experiment, layout: Layout | None = None) -> Teacher | None:
    """Shapes, and with a layout shardings, of a teacher of the student's size; what config.teacher names is not read."""
    if not config.teacher:
        return None
    net, kind = experiment.net, experiment.family.taught_by
    own = None if kind is None else dataclasses.replace(net, output="plain", preview=False, **kind.needs)
    flow = jax.eval_shape((own or net).init, jax.random.key(0))
    if layout is not None:
        flow = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), flow, layout.places(flow))
    two = config.objective.to_dict().get("target") == "residual"
    return Teacher(flow, flow if two else None, own)


def jit_step(config: ConfigDict, experiment: Experiment, layout: Layout, abstract: train_state.TrainState) -> Callable:
    """The training step as it is run, step(state, ids, teacher) -> (state, metrics). The state is donated and keeps its place."""
    step = train_state.make_step(
        experiment.net,
        experiment.family,
        experiment.optimizer,
        seed=config.seed,
        ema_decay=config.ema_decay,
        accumulation=config.accumulation,
        dropout=config.model.dropout > 0,
        layout=layout,
    )
    places = jax.tree.map(lambda a: a.sharding, abstract)
    return jax.jit(step, donate_argnums=0, out_shardings=(places, None))
