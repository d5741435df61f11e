"""The one place where settings have defaults and ranges. Experiments start from `defaults()` and say only what differs."""

from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference, config_dict

from flowlm.models import SIZES
from flowlm.objectives import NEEDS


class Number(NamedTuple):
    """A setting that is a number, or a tuple of numbers.

    Attributes:
      default: what it is where an experiment does not say; a placeholder may stay None.
      range: the interval that it lies in, such as "[0, 1)"; of a tuple each element.
      note: what one value of it means, for the error.
      also: a value outside of the interval that has a meaning too.
    """

    default: Any
    range: str
    note: str = ""
    also: float | None = None

    def holds(self, value) -> bool:
        """Whether it may be `value`."""
        if value is None:
            return isinstance(self.default, FieldReference)
        if isinstance(self.default, tuple):
            return isinstance(value, tuple | list) and all(Number(self.default[0], self.range).holds(x) for x in value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low, high = map(float, self.range[1:-1].split(","))
        above = low < value or (value == low and self.range[0] == "[")
        below = value < high or (value == high and self.range[-1] == "]")
        whole = not isinstance(self.default, int) or value % 1 == 0
        return value == self.also or (above and below and whole)

    def __str__(self) -> str:
        """What it must be, as words."""
        low, high = self.range[1:-1].split(", ")
        bound = f"{'at least' if self.range[0] == '[' else 'above'} {low}"
        words = bound if high == "inf" else f"in {self.range}"
        words = f"whole and {words}" if isinstance(self.default, tuple) and isinstance(self.default[0], int) else words
        return words + (f" or {self.also}" if self.also is not None else "") + (f" ({self.note})" if self.note else "")

    def shown(self) -> str:
        """The default as a flag takes it."""
        value = self.default.get() if isinstance(self.default, FieldReference) else self.default
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _plain(section: dict) -> dict:
    """A section's defaults alone."""
    plain = lambda value: value.default if isinstance(value, Number) else value
    return {key: _plain(value) if isinstance(value, dict) else plain(value) for key, value in section.items()}


def _model(size: str) -> dict:
    return dict(
        **{key: Number(value, "[1, inf)") for key, value in SIZES[size].items()},
        # Must equal the tokenizer's: a check that both sides are what you think they are.
        vocab_size=Number(0, "[0, inf)"),
        dropout=Number(0.0, "[0, 1)"),
        input="raw",  # raw | scaled | posterior | both | white
        preview=False,  # for flow maps: also what the posterior will be a little later
        output="plain",  # plain | likelihood_skip | early_skip
        # 2 for a flow map, 0 for what knows no time
        time_embeddings=Number(1, "[0, 2]", "0: no time, 1: a flow's, 2: a flow map's two"),
        time_scale=Number(1.0, "(0, inf)"),  # multiplies tau_s in the sinusoids
        # and tau_t; what is differentiated with respect to t should be smooth in it
        end_time_scale=Number(1.0, "(0, inf)"),
        gate_init=Number(0.0, "[0, inf)"),  # residual branches start at this weight
        attention_cap=Number(50.0, "[0, inf)", "0: none"),  # soft-cap of attention scores
        attention="xla",  # xla | splash (TPU) | cudnn (GPU): how it is computed
        logit_cap=Number(30.0, "[0, inf)", "0: none"),  # and of the output
        learned_positions=False,
        mask_token=False,  # for masked diffusion
        causal=False,
        remat="none",  # none | dots | full: what the backward pass recomputes, for memory
        dtype="float32",  # or bfloat16: products only; parameters, norms and losses stay float32
        loss_weight=False,  # learn exp(-w) loss + w with w a function of the times
    )


def model(size: str) -> ConfigDict:
    """The `model` section at a named size: test, tiny, small. Other fields are the reference's."""
    return ConfigDict(_plain(_model(size)))


def _objective(family: str) -> dict:
    sampler = dict(
        # of drawn tokens in place of the posterior mean (flow), argmax (map)
        temperature=Number(config_dict.placeholder(float), "[0, inf)", "0: the likeliest token, None: no draw"),
        noise_scale=Number(1.0, "(0, 1]"),  # of every draw of noise; below 1: less diverse and more coherent
        guidance=Number(1.0, "[0, inf)", "1: none"),  # more: away from the same network with dropout
    )
    draws = dict(temperature=Number(1.0, "[0, inf)", "0: the likeliest token"), top_p=Number(1.0, "(0, 1]"))  # sampler
    student = dict(
        jump=Number(1 / 32, "(0, 1]"),  # the step in time that it learns to take at once
        divergence="reverse",  # reverse, KL(student || teacher) | forward
    )
    boundary = Number(1 / 32, "[0, 1]")
    sections = dict(
        flow=dict(
            loss="cross_entropy",  # cross_entropy | squared_error | velocity
            eta=Number(1.0, "[0, 1]"),  # sampler: 0 Euler .. 1 ancestral
            **sampler,
        ),
        flow_map=dict(
            target="psd",  # psd | psd_squared | teacher_steps | residual | lsd | lsd_logit | csd | ecld | esd | esd_logit
            targets_from="student",  # student | ema
            diagonal=Number(0.5, "[0, 1)"),  # share of rows with s = t
            boundary=boundary,  # share of the others with (s, t) = (0, 1)
            pairs="uniform_diff",  # uniform_diff | uniform_pair
            tau_max=Number(1.0, "(0, 1]"),  # upper end of the others' tau_t
            cut="midpoint",  # midpoint | uniform
            teacher_steps=Number(4, "[1, inf)"),  # of the target of that name
            # below 1: the flow of softmax(logits / temperature), less diverse and more coherent
            teacher_temperature=Number(1.0, "(0, inf)"),
            adaptive=Number(0.0, "[0, inf)", "0: none"),  # exponent of the adaptive weight
            surgery=False,  # project conflicting gradients
            train_embedding=False,
            gamma=Number(0.0, "[0, 1]"),  # sampler: re-noising between steps, 0 none .. 1 all
            top_p=Number(1.0, "(0, 1]"),  # of drawn tokens
            **sampler,
        ),
        residual=dict(boundary=boundary, pairs="uniform_diff"),
        # start: the tokenizer's start token: a check, as model.vocab_size is
        autoregressive=dict(start=Number(0, "[0, inf)"), **draws),
        masked=dict(greedy=False, **student, **draws),  # greedy: the sampler's last step takes the likeliest tokens
        uniform=dict(
            curriculum_steps=Number(0, "[0, inf)", "0: none"),  # steps that show soft latents in place of tokens
            curriculum_temperature=Number(0.05, "(0, inf)"),
            greedy=False,
            **student,
            **draws,
        ),
    )
    if family not in sections:
        raise ValueError(f"unknown objective.family {family!r}: choose one of {sorted(sections)}")
    return dict(family=family, **sections[family])


def objective(family: str) -> ConfigDict:
    """The `objective` section of a family: flow, flow_map, residual, autoregressive, masked, uniform."""
    return ConfigDict(_plain(_objective(family)))


def _settings(family: str) -> dict:
    return dict(
        seed=Number(0, "[0, 4294967295]"),
        steps=Number(1000, "[1, inf)"),
        batch_size=Number(128, "[1, inf)"),  # rows of the global batch
        accumulation=Number(1, "[1, inf)"),  # microbatches it is cut into
        ema_decay=Number(0.999, "[0, 1]"),
        prior="gaussian",  # gaussian | dirichlet
        time_warp="ambient",  # ambient | embedded | between | identity
        data=dict(name="sotu", tokenizer="sotu_bpe_512", length=Number(32, "[2, inf)"), dir="~/.cache/flowlm"),
        model=_model("tiny"),
        objective=_objective(family),
        # run directory of the flow that a flow map is distilled from; "": one must be given, None: the student teaches itself
        teacher=config_dict.placeholder(str),
        init_from=config_dict.placeholder(str),  # run directory whose averaged weights a fresh run starts from
        optimizer=dict(
            learning_rate=Number(1e-3, "(0, inf)"),
            schedule="cosine",  # constant | cosine
            warmup_steps=Number(100, "[0, inf)"),  # before a cosine at most half of all steps
            b1=Number(0.9, "[0, 1)"),
            b2=Number(0.999, "[0, 1)"),
            weight_decay=Number(0.0, "[0, inf)"),
            decay_pattern="kernel$",  # parameters that decay
            clip_norm=Number(1.0, "[0, inf]", "0: off"),
        ),
        mesh=dict(
            replica=Number(1, "[1, inf)", "-1: all that are left", -1),  # over slices, or groups of devices far apart
            data=Number(-1, "[1, inf)", "-1: all that are left", -1),  # devices that the batch is split over
            # devices that heads, hidden layers and the vocabulary are split over
            model=Number(1, "[1, inf)", "-1: all that are left", -1),
            fsdp=False,  # split parameters, moving average and moments over `data`
            grad_reduce_dtype="float32",  # or bfloat16: half of the traffic
        ),
        checkpoint=dict(
            every=Number(500, "[1, inf)"),
            keep_latest=Number(2, "[1, inf)"),
            keep_every=Number(0, "[0, inf)", "0: none is kept for ever"),
        ),
        evaluation=dict(
            every=Number(1000, "[1, inf)"),
            held_out=Number(512, "[1, inf)"),  # rows
            held_out_batch=Number(256, "[1, inf)"),  # of them in one call, over all devices
            taus=Number((0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95), "[0, 1]"),
            steps=Number((1, 8, 64), "[1, inf)"),
            samples=Number(256, "[1, inf)"),  # for each number of steps
            final_samples=Number(1024, "[1, inf)"),  # after the last step
            # Judges beside the usual ones: smollm2, hf:NAME, run:DIRECTORY (autoregressive), mauve:smollm2, mauve:hf:NAME
            language_models=(),
        ),
        log_every=Number(20, "[1, inf)"),
        tensorboard=False,
    )


def defaults(family: str = "flow") -> ConfigDict:
    """Every setting of a run of a family. Locked: a key that is not here is an error."""
    config = ConfigDict(_plain(_settings(family)))
    config.model.update(NEEDS.get(family, {}))
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


def ranges(family: str) -> dict[str, Number]:
    """Every numeric setting of a family by its path."""
    return {name: value for name, value in flat(_settings(family)).items() if isinstance(value, Number)}


def check(config: ConfigDict, trained: bool = False) -> None:
    """Raises ValueError for the first setting that is out of its range; says what it may be and how to mend it.

    Args:
      trained: of a run that is over, where only the objective still matters, and `--objective` sets it.
    """
    family, held = config.objective.family, flat(config.to_dict())
    if others := set(config.objective) ^ set(_objective(family)):
        raise ValueError(
            f"the family {family} does not go with this experiment's objective ({', '.join(sorted(others))}): "
            "choose an experiment of that family"
        )
    for name, declared in flat(_settings(family)).items():
        if trained and not name.startswith("objective."):
            continue
        flag = f"--objective={name.removeprefix('objective.')}" if trained else f"--config.{name}"
        value = held[name]
        if isinstance(declared, Number):
            if not declared.holds(value):
                raise ValueError(f"{name} must be {declared}, got {value}: set {flag}={declared.shown()}")
        elif value is None and not isinstance(declared, FieldReference):
            raise ValueError(f"{name} cannot be None: leave out {flag}")
