"""From settings to things: the network, the family and the optimizer of a run, and a trained run from its directory."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax
from etils import epath
from ml_collections import ConfigDict

from flowlm import run_directory, sharding, train_state
from flowlm.checkpoint import Checkpoints, has_params, load_params
from flowlm.models import Network, make_network
from flowlm.objectives import MAY, NEEDS, make_family
from flowlm.optimizers import make_optimizer, make_schedule
from flowlm.time_warp import TimeWarp
from flowlm.tokenizers import Tokenizer
from flowlm.train_state import Teacher


class Experiment(NamedTuple):
    """net, family (objectives/), optimizer and its learning-rate schedule."""

    net: Network
    family: Any
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule


def build(config: ConfigDict, vocab_size: int, start: int | None = None) -> Experiment:
    """Everything of a run that is made from settings alone; cheap, so that bad settings fail first.

    Args:
      vocab_size, start: the tokenizer's; an objective that is told its start token is checked against it.

    Raises:
      ValueError: a setting out of its range, or a model for another vocabulary than the tokenizer's.
    """
    counts = {
        "steps": config.steps,
        "log_every": config.log_every,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep_latest": config.checkpoint.keep_latest,
        "evaluation.every": config.evaluation.every,
        "evaluation.steps": min(config.evaluation.steps, default=1),
    }
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
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
    net = make_network(length=config.data.length, warp=warp, **model)
    family = make_family(warp=warp, teacher=bool(config.teacher), **config.objective.to_dict())
    if config.objective.family in ("flow_map", "residual"):
        if config.model.time_embeddings != 2:
            raise ValueError("a flow map reads two times: set model.time_embeddings to 2")
        if config.model.input == "posterior":
            raise ValueError(
                "a flow map is a function of the noise, and model.input posterior does not show it at s = 0: use both or white"
            )
    for key, value in NEEDS.get(config.objective.family, {"mask_token": False}).items():
        if model[key] not in (value, MAY.get(config.objective.family, {}).get(key, value)):
            raise ValueError(
                f"the family {config.objective.family} needs model.{key}={value!r}, but it is {model[key]!r}: "
                f"set --config.model.{key}={value}"
            )
    settings = config.optimizer.to_dict()
    schedule = make_schedule(
        settings.pop("learning_rate"), settings.pop("schedule"), settings.pop("warmup_steps"), config.steps
    )
    return Experiment(net, family, make_optimizer(schedule, **settings), schedule)


class Trained(NamedTuple):
    """A run from its directory: settings, tokenizer, things, averaged parameters and the step they are of."""

    config: ConfigDict
    tokenizer: Tokenizer
    experiment: Experiment
    params: Any
    step: int


# Settings of a teacher that its student may change; all others of the same network, path and data must agree.
STUDENTS_OWN = ("dropout", "preview", "time_embeddings", "end_time_scale", "remat", "dtype", "loss_weight")


def load_teacher(config: ConfigDict, tokenizer: Tokenizer, experiment: Experiment, mesh: jax.sharding.Mesh):
    """aux.teacher of a run: parameters in the student's architecture that compute the teacher's function.

    Raises:
      FileNotFoundError: config.teacher is not a trained run.
      ValueError: it has another tokenizer, network, prior or time warp; names what differs.
    """
    run = load_trained(config.teacher, mesh)
    theirs = run.config
    ours, taught = config.objective.family, theirs.objective.family
    if ours != taught and {ours, taught} & set(NEEDS):
        raise ValueError(f"the teacher {config.teacher} is of the family {taught!r}: it cannot teach {ours!r}")
    if run.tokenizer.sha256 != tokenizer.sha256:
        raise ValueError(
            f"the teacher {config.teacher} has the tokenizer {theirs.data.tokenizer!r}, not {config.data.tokenizer!r}"
        )
    pairs = {name: (theirs[name], config[name]) for name in ("prior", "time_warp")}
    pairs["data.length"] = (theirs.data.length, config.data.length)
    pairs |= {f"model.{k}": (theirs.model[k], v) for k, v in config.model.items() if k not in STUDENTS_OWN}
    differ = {k: v for k, v in pairs.items() if v[0] != v[1]}
    if differ:
        shown = ", ".join(f"{k} is {a!r} there, {b!r} here" for k, (a, b) in differ.items())
        raise ValueError(f"the teacher {config.teacher} is another network: {shown}")
    wanted = "residual" if config.objective.to_dict().get("target") == "residual" else "flow"
    if (theirs.objective.family == "residual") != (wanted == "residual"):
        raise ValueError(
            f"the teacher {config.teacher} is of the family {theirs.objective.family!r}; here a {wanted} is wanted: the family "
            "residual teaches objective.target residual, and that alone"
        )
    adopt = lambda theirs: experiment.net.adopt(experiment.net.init(jax.random.key(0)), theirs)
    places = sharding.state_shardings(jax.eval_shape(adopt, run.params), mesh)
    params = jax.jit(adopt, out_shardings=places)(run.params)
    if wanted == "flow":
        return Teacher(params)
    return Teacher(jax.jit(adopt, out_shardings=places)(load_trained(theirs.teacher, mesh).params), params)


def abstract_state(experiment: Experiment, mesh: jax.sharding.Mesh):
    """Shapes and shardings of the training state, without making it."""
    shapes = jax.eval_shape(lambda: train_state.init_state(experiment.net, experiment.family, experiment.optimizer, 0))
    places = sharding.state_shardings(shapes, mesh)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, places)


def load_trained(directory, mesh: jax.sharding.Mesh, objective: Mapping[str, Any] | None = None) -> Trained:
    """The newest checkpoint of a run, or the parameters of an exported or imported one; read only.

    Args:
      objective: settings of the run's `objective` section to replace, such as those of its sampler.

    Raises:
      FileNotFoundError: not a run directory, or nothing was saved yet.
      ValueError: a setting that its objective has not, or not so.
    """
    config, tokenizer = run_directory.load(directory)
    for key, value in (objective or {}).items():
        if key not in config.objective:
            raise ValueError(
                f"the objective of {directory} has no {key!r}: it has {', '.join(sorted(config.objective))}"
            )
        try:
            config.objective[key] = value
        except TypeError as error:
            raise ValueError(f"objective.{key} cannot be {value!r}: {error}") from error
    experiment = build(config, tokenizer.vocab_size, tokenizer.start)
    if has_params(directory):
        abstract = abstract_state(experiment, mesh)
        params, step = load_params(directory, abstract.params, abstract.step)
        return Trained(config, tokenizer, experiment, params, step)
    checkpoints = Checkpoints(epath.Path(directory) / "checkpoints", read_only=True)
    state = checkpoints.restore(abstract_state(experiment, mesh))
    checkpoints.close()
    if state is None:
        raise FileNotFoundError(f"{directory} has no complete checkpoint yet: let the run reach its first save")
    return Trained(config, tokenizer, experiment, state.ema, int(state.step))
