"""Trained runs from their directories, to sample, to judge, to go on from and to learn from."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from flowlm.config import flat
from flowlm.data.tokenizers import Tokenizer
from flowlm.engine.build import Experiment, abstract_state, build
from flowlm.engine.sharding import Layout
from flowlm.models.attention import runs_on
from flowlm.objectives import FAMILIES
from flowlm.objectives.base import Teacher
from flowlm.runs import directory as run_directory
from flowlm.runs import integrity
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


def _differences(theirs: ConfigDict, ours: ConfigDict, others: tuple[str, ...] = ()) -> str:
    """Settings of the network, and the others named, that must agree and do not, as text."""
    names = [f"model.{key}" for key in ours.model if key not in STUDENTS_OWN]
    settings = [flat(config.to_dict()) for config in (theirs, ours)]
    pairs = {name: [each.get(name) for each in settings] for name in (*others, *names)}
    return ", ".join(f"{name} is {a!r} there, {b!r} here" for name, (a, b) in pairs.items() if a != b)


def load_origin(config: ConfigDict, tokenizer: Tokenizer, experiment: Experiment, layout: Layout) -> Any:
    """The averaged parameters of the run `config.init_from`, or of a teacher that the family continues.

    Raises:
      FileNotFoundError: it is not a trained run.
      ValueError: it has another tokenizer or network, and what differs; or there is a teacher, from which a student starts.
    """
    if config.teacher and not experiment.family.continues:
        raise ValueError("a student starts from its teacher: give config.teacher or config.init_from, not both")
    name = "init_from" if config.init_from else "teacher"
    run = load_trained(config[name], layout)
    if run.tokenizer.sha256 != tokenizer.sha256:
        raise ValueError(
            f"{name} {config[name]} has the tokenizer {run.config.data.tokenizer!r}, not {config.data.tokenizer!r}"
        )
    if differ := _differences(run.config, config):
        raise ValueError(f"{name} {config[name]} is another network: {differ}")
    try:
        jax.eval_shape(lambda theirs: experiment.net.adopt(experiment.net.init(jax.random.key(0)), theirs), run.params)
    except ValueError as error:
        raise ValueError(f"{name} {config[name]} is another network: {error}") from error
    return run.params


def load_teacher(config: ConfigDict, tokenizer: Tokenizer, experiment: Experiment, layout: Layout) -> Teacher:
    """aux.teacher of a run: parameters in the student's architecture that compute the teacher's function.

    Raises:
      FileNotFoundError: config.teacher is not a trained run.
      ValueError: it has another tokenizer, network, prior or time warp; names what differs.
    """
    run = load_trained(config.teacher, layout)
    if experiment.family.continues and config.objective.flow == "named":
        run = _flow_behind(run, config.teacher, layout)
    theirs = run.config
    ours, taught = config.objective.family, theirs.objective.family
    both_flow = FAMILIES[ours].continuous and FAMILIES[taught].continuous
    if not (issubclass(FAMILIES[ours], FAMILIES[taught]) or both_flow):
        raise ValueError(f"the teacher {config.teacher} is of the family {taught!r}: it cannot teach {ours!r}")
    if run.tokenizer.sha256 != tokenizer.sha256:
        raise ValueError(
            f"the teacher {config.teacher} has the tokenizer {theirs.data.tokenizer!r}, not {config.data.tokenizer!r}"
        )
    if differ := _differences(theirs, config, ("prior", "time_warp", "data.length")):
        raise ValueError(f"the teacher {config.teacher} is another network: {differ}")
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


def load_settings(
    directory: str | os.PathLike, layout: Layout, objective: Mapping[str, Any] | None = None
) -> tuple[ConfigDict, Tokenizer, Experiment]:
    """What `load_trained` makes of a run's settings alone; no parameter is read. Arguments and errors are the same."""
    run_directory.check_is_run(directory)
    config, tokenizer = run_directory.load_workdir(directory)
    for key, value in (objective or {}).items():
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


def load_trained(directory: str | os.PathLike, layout: Layout, objective: Mapping[str, Any] | None = None) -> Trained:
    """The newest checkpoint of a run, or the parameters of an exported or imported one; read only.

    Args:
      objective: settings of the run's `objective` section to replace, such as those of its sampler.

    Raises:
      FileNotFoundError: not a run directory, or nothing was saved yet.
      ValueError: a setting that its objective has not, or not so; a file that is not what a manifest says
        (integrity.check_files); or what is exported in a format that other commands read.
    """
    run_directory.check_is_run(directory)
    integrity.check_files(directory)
    config, tokenizer, experiment = load_settings(directory, layout, objective)
    if has_params(directory):
        abstract = abstract_state(experiment, layout)
        params, step = load_params(directory, abstract.ema, abstract.step)
        return Trained(config, tokenizer, experiment, params, step)
    checkpoints = Checkpoints(storage.path(directory) / "checkpoints", read_only=True)
    state = checkpoints.restore(abstract_state(experiment, layout))
    checkpoints.close()
    if state is None:
        raise FileNotFoundError(f"{directory} has no complete checkpoint yet: let the run reach its first save")
    return Trained(config, tokenizer, experiment, state.ema, int(state.step))
