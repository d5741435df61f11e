"""Trained runs from their directories, to sample, to judge, to go on from and to learn from."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from flowlm.config import flat
from flowlm.data.tokenizers import Tokenizer
from flowlm.engine.build import Experiment, abstract_state, build
from flowlm.engine.sharding import Layout
from flowlm.models.attention import runs_on
from flowlm.objectives import FAMILIES, Family
from flowlm.objectives.base import Teacher
from flowlm.runs import directory as run_directory
from flowlm.runs import integrity, tensors
from flowlm.runs.checkpoint import Checkpoints, has_params, load_params
from flowlm.system import storage


class Trained(NamedTuple):
    """A run from its directory: settings, tokenizer, things, averaged parameters and the step they are of."""

    config: ConfigDict
    tokenizer: Tokenizer
    experiment: Experiment
    params: Any
    step: int


# Settings of a teacher that its student may change; all others of the same network, path and data must agree.
STUDENTS_OWN = (
    "blocks",
    "dropout",
    "weak_dropout",
    "preview",
    "preview_time",
    "time_embeddings",
    "end_time_scale",
    "remat",
    "attention",
    "dtype",
    "loss_weight",
)


def _network(config: ConfigDict) -> tuple[str, ...]:
    """Settings of a network that must agree."""
    return tuple(f"model.{key}" for key in config.model if key not in STUDENTS_OWN)


def _differences(theirs: ConfigDict, ours: ConfigDict, names: tuple[str, ...]) -> str:
    """Settings of these names, which must agree, that do not, as text."""
    settings = [flat(config.to_dict()) for config in (theirs, ours)]
    pairs = {name: [each.get(name) for each in settings] for name in names}
    return ", ".join(f"{name} is {a!r} there, {b!r} here" for name, (a, b) in pairs.items() if a != b)


def load_origin(config: ConfigDict, tokenizer: Tokenizer, experiment: Experiment, layout: Layout) -> Any:
    """The averaged parameters of the run `config.init_from`, or of a teacher that the family continues.

    Raises:
      FileNotFoundError: it is not a trained run.
      ValueError: it has another tokenizer or network, and what differs; or there is a teacher, from which a student starts.
    """
    if config.teacher and not (experiment.family.continues or experiment.family.taught_by):
        raise ValueError("a student starts from its teacher: give config.teacher or config.init_from, not both")
    name = "init_from" if config.init_from else "teacher"
    run = load_trained(config[name], layout)
    if run.tokenizer.sha256 != tokenizer.sha256:
        raise ValueError(
            f"{name} {config[name]} has the tokenizer {run.config.data.tokenizer!r}, not {config.data.tokenizer!r}"
        )
    if differ := _differences(run.config, config, _network(config)):
        raise ValueError(f"{name} {config[name]} is another network: {differ}")
    try:
        jax.eval_shape(lambda theirs: experiment.net.adopt(experiment.net.init(jax.random.key(0)), theirs), run.params)
    except ValueError as error:
        raise ValueError(f"{name} {config[name]} is another network: {error}") from error
    return run.params


def load_teacher(config: ConfigDict, tokenizer: Tokenizer, experiment: Experiment, layout: Layout) -> Teacher:
    """aux.teacher of a run: parameters that compute its function in the student's architecture, or with its own network.

    Raises:
      FileNotFoundError: config.teacher is not a trained run.
      ValueError: it has another tokenizer, network, prior or time warp; names what differs.
    """
    run = load_trained(config.teacher, layout)
    mine, taught = type(experiment.family), run.config.objective.family
    if not _teaches(FAMILIES[taught], mine):
        others = ", ".join(name for name, kind in FAMILIES.items() if _teaches(kind, mine))
        raise ValueError(
            f"the teacher {config.teacher} is of the family {taught!r}: it cannot teach {config.objective.family!r}, "
            f"but a run of one of these can: {others}"
        )
    if experiment.family.continues and config.objective.flow == "named":
        run = _flow_behind(run, config.teacher, layout)
    theirs = run.config
    if run.tokenizer.sha256 != tokenizer.sha256:
        raise ValueError(
            f"the teacher {config.teacher} has the tokenizer {theirs.data.tokenizer!r}, not {config.data.tokenizer!r}"
        )
    if experiment.family.taught_by:
        if differ := _differences(theirs, config, ("data.length",)):
            raise ValueError(f"the teacher {config.teacher} has other rows: {differ}")
        return Teacher(run.params, net=run.experiment.net)
    if differ := _differences(theirs, config, ("prior", "time_warp", "data.length", *_network(config))):
        raise ValueError(f"the teacher {config.teacher} is another network: {differ}")
    if (
        experiment.family.prompts > 0
        and run.experiment.family.prompts == 0
        and run.experiment.family.conditions != "shown"
    ):
        raise ValueError(
            f"the teacher {config.teacher} was trained without prompts, so it cannot teach them: give one that was trained with "
            "objective.prompts, or set --config.objective.prompts=0"
        )
    wanted = "residual" if config.objective.to_dict().get("target") == "residual" else "flow"
    if (theirs.objective.family == "residual") != (wanted == "residual"):
        raise ValueError(
            f"the teacher {config.teacher} is of the family {theirs.objective.family!r}; here a {wanted} is wanted: the family "
            "residual teaches objective.target residual, and that alone"
        )

    def adopt(theirs):
        return experiment.net.adopt(experiment.net.init(jax.random.key(0)), theirs)

    places = layout.places(jax.eval_shape(adopt, run.params))
    params = jax.jit(adopt, out_shardings=places)(run.params)
    if wanted == "flow":
        return Teacher(params)
    return Teacher(jax.jit(adopt, out_shardings=places)(load_trained(theirs.teacher, layout).params), params)


def _teaches(theirs: type[Family], mine: type[Family]) -> bool:
    if mine.taught_by:
        return issubclass(theirs, mine.taught_by)
    return issubclass(mine, theirs) or (mine.continuous and theirs.continuous and not theirs.taught_by)


def check_one_embedding(config: ConfigDict, teacher: Teacher, origin: Any) -> None:
    """Raises ValueError where a run that a student begins as sees other states than the flow that it follows.

    Moving averages of one embedding differ by their rounding.
    """
    far = jax.jit(lambda a, b: jnp.abs(a - b).max() > 1e-3 * jnp.std(b))
    if far(origin["embedding"], teacher.flow["embedding"]):
        raise ValueError(
            f"init_from {config.init_from} has another embedding than the flow of the teacher {config.teacher}: begin that run "
            "with --config.init_from=FLOW --config.objective.train_embedding=False, which keeps the flow's"
        )


def _flow_behind(run: Trained, directory: str, layout: Layout) -> Trained:
    """The flow that a map, or what was made of one, names as its teacher, or as its teacher's."""
    mend = "give --config.objective.flow=diagonal to follow the denoiser of the teacher itself, which a map is at s = t"
    while run.config.objective.family != "flow":
        if not run.config.teacher:
            raise ValueError(f"the teacher {directory} was trained without a flow: {mend}")
        if run.config.objective.to_dict().get("train_embedding"):
            raise ValueError(
                f"the teacher {directory} has another embedding than its flow, objective.train_embedding: {mend}"
            )
        directory = run.config.teacher
        try:
            run = load_trained(directory, layout)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"the flow behind the teacher, {directory}, is not here: {mend}") from error
    return run


def has_parameters_alone(directory: str | os.PathLike) -> bool:
    """Whether a directory holds the parameters of a run and not the state of its training."""
    return has_params(directory) or tensors.has_run(directory)


def load_settings(
    directory: str | os.PathLike, layout: Layout, objective: Mapping[str, Any] | None = None
) -> tuple[ConfigDict, Tokenizer, Experiment]:
    """What `load_trained` makes of a run's settings alone; no parameter is read. Arguments and errors are the same."""
    run_directory.check_is_run(directory)
    config, tokenizer = run_directory.load_workdir(directory)
    for key, value in (objective or {}).items():
        if key == "prompts":
            raise ValueError(f"objective.prompts is of the training of {directory} alone: leave it out")
        if key not in config.objective:
            raise ValueError(
                f"the objective of {directory} has no {key!r}: it has {', '.join(sorted(config.objective))}"
            )
        try:
            config.objective[key] = value
        except TypeError as error:
            held = config.objective[key]
            told = f"it is a {type(held).__name__}, {held!r} there" if held is not None else "it is a number"
            raise ValueError(f"objective.{key} cannot be {value!r}: {told}") from error
    if not runs_on(config.model.attention, layout.platform):
        config.model.attention = "xla"  # it was trained elsewhere
    return config, tokenizer, build(config, tokenizer.vocab_size, tokenizer.start, trained=True)


def load_trained(
    directory: str | os.PathLike, layout: Layout, objective: Mapping[str, Any] | None = None, step: int | None = None
) -> Trained:
    """The newest checkpoint of a run, or the parameters of an exported or imported one; read only.

    Args:
      step: of a run, the checkpoint of this step instead.
      objective: settings of the run's `objective` section to replace, such as those of its sampler.

    Raises:
      FileNotFoundError: not a run directory, or nothing was saved yet.
      ValueError: a setting that its objective has not, or not so; a file that is not what a manifest says
        (integrity.check_files); or what is exported in a format that other commands read.
    """
    run_directory.check_is_run(directory)
    integrity.check_files(directory)
    config, tokenizer, experiment = load_settings(directory, layout, objective)
    abstract = abstract_state(experiment, layout)
    if has_params(directory):
        params, step = load_params(directory, abstract.ema, abstract.step)
        return Trained(config, tokenizer, experiment, params, step)
    if tensors.has_run(directory):
        return Trained(config, tokenizer, experiment, *tensors.load(directory, experiment.net, abstract.ema))
    checkpoints = Checkpoints(storage.path(directory) / "checkpoints", read_only=True)
    state = checkpoints.restore(abstract, step)
    checkpoints.close()
    if state is None and step is not None:
        raise FileNotFoundError(
            f"{directory} has no checkpoint of step {step}: it has been removed, or was never saved"
        )
    if state is None:
        raise FileNotFoundError(f"{directory} has no complete checkpoint yet: let the run reach its first save")
    return Trained(config, tokenizer, experiment, state.ema, int(state.step))
