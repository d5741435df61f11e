"""Every setting of a run. Networks and families own theirs; those of the loop are here, and here all are put together.

Experiments start from `defaults()` and say only what differs.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict, config_dict

from flowlm.models.network import SIZES, Transformer
from flowlm.objectives import FAMILIES
from flowlm.system.settings import Setting, setting, settings_of


@dataclasses.dataclass(frozen=True)
class Data:
    """What is read."""

    name: str = setting("sotu", "the corpus")
    tokenizer: str = setting("sotu_bpe_512", "a tokenizer that is shipped, or the path of a tokenizer.json")
    length: int = setting(32, "ids in a row", "[2, inf)")
    dir: str = setting("~/.cache/flowlm", "where prepared corpora lie")
    copy: bool = setting(True, "copy a set in a bucket to the disk; False: read each row from there when it is wanted")
    mixture: tuple[str, ...] = setting(
        (), "FOLDER:SHARE of other sets that `flowlm prepare` made, to train on their rows too"
    )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How parameters are updated."""

    learning_rate: float = setting(1e-3, "the largest", "(0, inf)")
    schedule: str = setting("cosine", "after the warm-up: constant or cosine")
    warmup_steps: int = setting(100, "of a linear warm-up; before a cosine at most half of all steps", "[0, inf)")
    b1: float = setting(0.9, "decay of the first moment", "[0, 1)")
    b2: float = setting(0.999, "decay of the second moment", "[0, 1)")
    weight_decay: float = setting(0.0, "of the parameters that decay", "[0, inf)")
    decay_pattern: str = setting("kernel$", "regular expression of their names")
    clip_norm: float = setting(1.0, "largest norm of the gradient", "[0, inf]", note="0: off")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How devices share the work."""

    replica: int = setting(
        1,
        "slices, or groups of devices far apart, that the batch is split over",
        "[1, inf)",
        note="-1: all that are left",
        also=-1,
    )
    data: int = setting(-1, "devices that the batch is split over", "[1, inf)", note="-1: all that are left", also=-1)
    model: int = setting(
        1,
        "devices that heads, hidden layers and the vocabulary are split over",
        "[1, inf)",
        note="-1: all that are left",
        also=-1,
    )
    fsdp: bool = setting(False, "split parameters, moving average and moments over data")
    grad_reduce_dtype: str = setting("float32", "or bfloat16, for half of the traffic")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is kept."""

    every: int = setting(500, "steps between checkpoints", "[1, inf)")
    keep_latest: int = setting(2, "newest checkpoints that are kept", "[1, inf)")
    keep_every: int = setting(0, "steps whose multiples are kept for ever", "[0, inf)", note="0: none is kept for ever")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is judged."""

    every: int = setting(1000, "steps between evaluations", "[0, inf)", note="0: only after the last step")
    held_out: int = setting(512, "held-out rows", "[1, inf)")
    held_out_batch: int = setting(256, "of them in one call, over all devices", "[1, inf)")
    taus: tuple[float, ...] = setting(
        (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95), "warped times of cross-entropy", "[0, 1]"
    )
    steps: tuple[int, ...] = setting((1, 8, 64), "numbers of sampling steps", "[1, inf)")
    loop_steps: int = setting(64, "largest of them before the last step; more are taken after it alone", "[1, inf)")
    samples: int = setting(256, "samples for each number of steps", "[1, inf)")
    final_samples: int = setting(1024, "the same after the last step", "[1, inf)")
    language_models: tuple[str, ...] = setting(
        (), "judges beside the usual ones: smollm2, hf:NAME, run:DIRECTORY, mauve:smollm2, mauve:hf:NAME, rdkit"
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """What belongs to no section."""

    seed: int = setting(0, "of everything random", "[0, 4294967295]")
    steps: int = setting(1000, "of training", "[1, inf)")
    batch_size: int = setting(128, "rows of the global batch", "[1, inf)")
    accumulation: int = setting(1, "microbatches it is cut into", "[1, inf)")
    ema_decay: float = setting(0.999, "of the moving average, which is what is judged and exported", "[0, 1]")
    prior: str = setting("gaussian", "the noise: gaussian or dirichlet")
    time_warp: str = setting("ambient", "warped time: ambient, embedded, between or identity")
    teacher: str | None = setting(
        None, "run directory that a student is distilled from; empty: one must be given", optional=str
    )
    init_from: str | None = setting(None, "run directory whose averaged weights a fresh run starts from", optional=str)
    log_every: int = setting(20, "steps between lines of metrics", "[1, inf)")
    tensorboard: bool = setting(False, "write for TensorBoard too")
    wandb: bool = setting(False, "write for Weights & Biases too")


SECTIONS = {
    "data": Data,
    "model": Transformer,
    "optimizer": Optimizer,
    "mesh": Mesh,
    "checkpoint": Checkpoint,
    "evaluation": Evaluation,
}
FAMILY = Setting("flow", "the generative family", choices=FAMILIES)


def declared(family: str) -> dict[str, Setting]:
    """{"section.key": Setting} of a run of a family, all that experiments can set.

    Raises ValueError for a family that is not there.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown objective.family {family!r}: choose one of {sorted(FAMILIES)}")
    out = dict(settings_of(Run))
    for name, section in (SECTIONS | {"objective": FAMILIES[family]}).items():
        out |= {f"{name}.{key}": each for key, each in settings_of(section).items()}
    return out | {"objective.family": FAMILY._replace(default=family)}


def _default(each: Setting) -> Any:
    return config_dict.placeholder(each.optional) if each.default is None else each.default


def model(size: str) -> ConfigDict:
    """The `model` section at a named size: test, tiny, small. Other fields are the reference's."""
    return ConfigDict({key: _default(each) for key, each in settings_of(Transformer).items()} | SIZES[size])


def objective(family: str) -> ConfigDict:
    """The `objective` section of a family: flow, flow_map, matched, gumbel, residual, autoregressive, masked, uniform."""
    return defaults(family).objective


def defaults(family: str = "flow") -> ConfigDict:
    """Every setting of a run of a family. Locked: a key that is not here is an error."""
    config = ConfigDict()
    for name, each in declared(family).items():
        section, _, key = name.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        (config[section] if section else config)[key] = _default(each)
    config.model.update(FAMILIES[family].needs)
    return config.lock()


def complete(config: ConfigDict) -> ConfigDict:
    """Saved settings, with the defaults of those that were not there yet when they were saved. Locked."""
    out = defaults(config.objective.family).unlock()
    if config.objective.family == "masked":
        out.objective.divergence = "forward"  # the only one while there was no such setting
    out.update(config)
    return out.lock()


def flat(tree: dict, prefix: str = "") -> dict:
    """{"section.key": value} of nested settings."""
    out = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def check_settings(config: ConfigDict, trained: bool = False) -> None:
    """Raises ValueError for the first setting that is out of its range; says what it may be and how to mend it.

    Args:
      trained: of a run that is over, where only the objective still matters, and `--objective` sets it.
    """
    family, held = config.objective.family, flat(config.to_dict())
    wanted = declared(family)
    if others := {key for key in held.keys() ^ wanted.keys() if key.startswith("objective.")}:
        names = ", ".join(sorted(key.removeprefix("objective.") for key in others))
        raise ValueError(
            f"the family {family} does not go with this experiment's objective ({names}): "
            "choose an experiment of that family"
        )
    for name, each in wanted.items():
        if trained and not name.startswith("objective."):
            continue
        flag = f"--objective={name.removeprefix('objective.')}" if trained else f"--config.{name}"
        value = held[name]
        if not each.holds(value):
            if not each.range:
                raise ValueError(f"{name} cannot be None: leave out {flag}")
            raise ValueError(f"{name} must be {each}, got {value}: set {flag}={each.shown()}")
