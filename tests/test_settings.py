"""Every number among the settings has a range, which is checked in one place; and settings are what the last flag says."""

import math
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from command_line import error_of
from test_bad_input import CONFIG, ROOT, nothing_expensive  # noqa: F401
from toy import drawn, run_config

from flowlm import main
from flowlm.config import check_settings, declared, defaults, flat
from flowlm.data.tokenizers import shipped
from flowlm.engine import build as assembly
from flowlm.engine import overrides
from flowlm.engine.optimizers import make_optimizer, make_schedule
from flowlm.objectives import FAMILIES
from flowlm.runs import directory as run_directory
from flowlm.runs.checkpoint import save_params
from flowlm.studies import study
from flowlm.system.settings import settings_of

INF, NAN = math.inf, math.nan
# What each may be at the ends of its range, and what it may not be: written down a second time, by hand.
COUNT = (1, 10**6), (0, -1)
FROM_ZERO = (0, 10**6), (-1,)
POSITIVE = (1e-9, 1e9), (0.0, -1.0, INF, NAN)
NOT_NEGATIVE = (0.0, 1e9), (-1e-9, INF, NAN)
SHARE = (0.0, 1.0), (-0.01, 1.01, NAN)
BELOW_ONE = (0.0, 0.999), (1.0, 1.5, -0.1, NAN)
UP_TO_ONE = (1e-6, 1.0), (0.0, 1.01, -0.5, NAN)
DEVICES = (-1, 1, 64), (0, -2)
TEMPERATURE = (0.0, 1e-6, 3.0), (-1e-3, INF, NAN)
LIMITS = {
    "seed": ((0, 2**32 - 1), (-1, 2**32)),
    "ema_decay": ((0.0, 1.0), (1.5, -0.1, NAN)),
    "data.length": ((2, 10**6), (1, 0)),
    "model.time_embeddings": ((0, 1, 2), (-1, 3)),
    "optimizer.clip_norm": ((0.0, 1.0, INF), (-1.0, NAN)),
    "evaluation.taus": (((0.0, 1.0), (0.5,)), ((1.5,), (-0.1, 0.5), ("a",))),
    "evaluation.steps": (((1, 64), ()), ((0,), (8, 0), (-1,), (8.5,), (True,))),
    **dict.fromkeys(("steps", "batch_size", "accumulation", "log_every"), COUNT),
    **dict.fromkeys((f"model.{key}" for key in ("width", "blocks", "heads", "cond")), COUNT),
    **dict.fromkeys((f"checkpoint.{key}" for key in ("every", "keep_latest")), COUNT),
    **dict.fromkeys((f"evaluation.{key}" for key in ("held_out", "held_out_batch", "samples", "final_samples")), COUNT),
    "evaluation.loop_steps": COUNT,
    **dict.fromkeys(("objective.teacher_steps", "objective.auxiliary_updates"), COUNT),
    "objective.auxiliary_rate": POSITIVE,
    "objective.matched": UP_TO_ONE,
    "objective.tie": NOT_NEGATIVE,
    "objective.prompts": SHARE,
    "objective.taus": (((0.02, 0.98), (0.5,)), ((0.0, 0.5), (0.5, 1.0), (-0.1, 0.5), ("a",))),
    **dict.fromkeys(
        ("model.vocab_size", "checkpoint.keep_every", "evaluation.every", "optimizer.warmup_steps"), FROM_ZERO
    ),
    **dict.fromkeys(("objective.start", "objective.curriculum_steps", "objective.noises"), FROM_ZERO),
    **dict.fromkeys(("model.time_scale", "model.end_time_scale", "optimizer.learning_rate"), POSITIVE),
    **dict.fromkeys(("objective.teacher_temperature", "objective.curriculum_temperature"), POSITIVE),
    **dict.fromkeys(("model.gate_init", "model.attention_cap", "model.logit_cap"), NOT_NEGATIVE),
    **dict.fromkeys(("optimizer.weight_decay", "objective.guidance", "objective.prompt_guidance"), NOT_NEGATIVE),
    "objective.adaptive": NOT_NEGATIVE,
    **dict.fromkeys(
        ("model.dropout", "optimizer.b1", "optimizer.b2", "objective.diagonal", "objective.shared_noise"), BELOW_ONE
    ),
    **dict.fromkeys(("objective.eta", "objective.boundary", "objective.gamma", "objective.at_noise"), SHARE),
    **dict.fromkeys((f"objective.{key}" for key in ("noise_scale", "top_p", "jump", "tau_max")), UP_TO_ONE),
    **dict.fromkeys(("mesh.replica", "mesh.data", "mesh.model"), DEVICES),
    "objective.temperature": TEMPERATURE,
    "model.weak_dropout": ((1e-6, 0.999), (0.0, 1.0, NAN)),
    "model.prior_scale": POSITIVE,
    "model.preview_time": UP_TO_ONE,
    "model.early_until": UP_TO_ONE,
}


def ranges(family):
    """Every setting of a family that has a range, by its path."""
    return {name: each for name, each in declared(family).items() if each.range}


def numeric(config):
    """Paths of all settings that are a number, a tuple of numbers, or a number that is not set."""

    def is_number(value):
        return isinstance(value, int | float) and not isinstance(value, bool)

    names = set()
    for name, value in flat(config.to_dict()).items():
        section, _, key = name.rpartition(".")
        kind = (config[section] if section else config).get_type(key)
        if is_number(value) or kind in (int, float) or (isinstance(value, tuple) and any(map(is_number, value))):
            names.add(name)
    return names


def test_every_number_among_the_settings_has_a_range():
    for family in FAMILIES:
        assert numeric(defaults(family)) == set(ranges(family))
    assert {name for family in FAMILIES for name in ranges(family)} == set(LIMITS)
    added = defaults().unlock()
    added.optimizer.beta3 = 0.5
    assert numeric(added) - set(ranges("flow")) == {"optimizer.beta3"}  # what a setting without one would look like


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_are_checked_at_the_ends_of_their_ranges_and_beyond(family):
    for name in ranges(family):
        inside, outside = LIMITS[name]
        section, _, key = name.rpartition(".")
        for value in (*inside, *outside, None):
            config = defaults(family)
            holder = config[section] if section else config
            holder[key] = value
            unset = family in ("flow", "flow_map", "matched") and name == "objective.temperature"
            if value in inside or (value is None and unset):
                check_settings(config)
                continue
            with pytest.raises(ValueError, match=rf"^{name} must be .*, got .*: set --config\.{name}=\S+$") as error:
                check_settings(config)
            assert f"got {value}" in str(error.value)


def test_the_defaults_that_an_error_tells_are_in_range():
    for family in FAMILIES:
        assert all(number.holds(number.default) for name, number in ranges(family).items() if number.shown() != "None")


@pytest.mark.parametrize(
    ("family", "name", "value", "message"),
    [
        (
            "flow",
            "optimizer.clip_norm",
            -1.0,
            "optimizer.clip_norm must be at least 0 (0: off), got -1.0: set --config.optimizer.clip_norm=1.0",
        ),
        ("flow", "model.dropout", 1.5, "model.dropout must be in [0, 1), got 1.5: set --config.model.dropout=0.0"),
        (
            "flow",
            "optimizer.learning_rate",
            0.0,
            "optimizer.learning_rate must be above 0, got 0.0: set --config.optimizer.learning_rate=0.001",
        ),
        (
            "flow",
            "mesh.data",
            0,
            "mesh.data must be at least 1 or -1 (-1: all that are left), got 0: set --config.mesh.data=-1",
        ),
        (
            "masked",
            "evaluation.steps",
            (8, 0),
            "evaluation.steps must be whole and at least 1, got (8, 0): set --config.evaluation.steps=1,8,64",
        ),
        (
            "flow_map",
            "objective.temperature",
            -1.0,
            "objective.temperature must be at least 0 (0: the likeliest token, None: no draw), got -1.0: "
            "set --config.objective.temperature=None",
        ),
        ("flow", "prior", None, "prior cannot be None: leave out --config.prior"),
        (
            "flow",
            "objective.family",
            "residual",
            "the family residual does not go with this experiment's objective (boundary, eta, guidance, loss, noise_scale, "
            "pairs, prompt_guidance, prompts, temperature): choose an experiment of that family",
        ),
    ],
)
def test_an_error_says_what_a_setting_may_be_and_how_to_mend_it(family, name, value, message):
    config = defaults(family)
    config.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError) as error:
        check_settings(config)
    assert str(error.value) == message


# --- commands ----------------------------------------------------------------------------------------------------

DISTORTING = [
    "optimizer.clip_norm=-1",
    "ema_decay=1.5",
    "seed=-1",
    "evaluation.taus=(1.5,)",
    "objective.temperature=-1",
]


@pytest.mark.parametrize("change", DISTORTING)
@pytest.mark.parametrize("command", ["train", "plan"])
def test_commands_refuse_a_setting_out_of_range_before_anything_expensive(command, change, nothing_expensive, tmp_path):  # noqa: F811
    place = {"train": f"--workdir={tmp_path / 'run'}", "plan": "--device"}[command]
    message = error_of(command, CONFIG, place, f"--config.data.dir={nothing_expensive}", f"--config.{change}")
    assert f"{change.partition('=')[0]} must be" in message and "\n" not in message
    assert not (tmp_path / "run").exists()


def directory_of(family, path):
    """A run directory with parameters alone."""
    config = run_config("/nowhere", family)
    # Of a run from before there were ranges: they are of its training, which is over.
    config.update(seed=-1)
    config.optimizer.update(clip_norm=-1.0)
    made = assembly.build(config, 99, trained=True)
    run_directory.prepare_workdir(path, config, shipped("grammar98"))
    save_params(path, drawn(made.net), 1, jnp.float32)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return {family: directory_of(family, tmp_path_factory.mktemp("runs") / family) for family in ("flow_map", "masked")}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("flow_map", "temperature=-1", "objective.temperature must be at least 0 .*: set --objective=temperature=None"),
        ("flow_map", "top_p=0", r"objective.top_p must be in \(0, 1\], got 0.*: set --objective=top_p=1.0"),
        ("masked", "temperature=-0.5", "objective.temperature must be at least 0 .*: set --objective=temperature=1.0"),
        ("masked", "temperature=None", "objective.temperature must be at least 0 .*, got None"),
        ("masked", "greedy=None", "objective.greedy cannot be None: leave out --objective=greedy"),
        ("masked", "family=uniform", "the family uniform does not go with this experiment's objective"),
    ],
)
@pytest.mark.parametrize("command", ["sample", "evaluate", "export"])
def test_a_sampler_out_of_range_is_refused_wherever_it_is_set(command, family, change, message, runs, tmp_path):
    arguments = {
        "sample": [f"--checkpoint={runs[family]}"],
        "evaluate": [f"--checkpoint={runs[family]}", f"--results={tmp_path / 'out'}"],
        "export": [str(runs[family]), f"--out={tmp_path / 'out'}"],
    }
    told = error_of(command, *arguments[command], f"--objective={change}")
    assert re.search(message, told), told
    assert not (tmp_path / "out").exists()


def parsed(*arguments):
    """The settings of the test experiment after these flags."""
    with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        values = main.read_call(["flowlm", "train", CONFIG, "--workdir=w", *arguments]).values
    return values.config.copy_and_resolve_references()


def test_the_last_flag_of_a_setting_is_its_value():
    flags = ["--config.evaluation.steps=(1,8)", "--config.evaluation.taus=0.1,0.2", "--config.steps=3"]
    config = parsed(*flags, "--config.evaluation.steps=(4,)", "--config.evaluation.taus=0.5", "--config.steps=7")
    assert (config.evaluation.steps, config.evaluation.taus, config.steps) == ((4,), (0.5,), 7)
    named = parsed("--config.evaluation.language_models=smollm2,rdkit,run:a/b-1")
    assert named.evaluation.language_models == ("smollm2", "rdkit", "run:a/b-1")
    assert parsed("--config.evaluation.language_models=smollm2,").evaluation.language_models == ("smollm2",)
    judges = parsed("--config.evaluation.language_models=smollm2", "--config.evaluation.language_models=run:a/b")
    assert judges.evaluation.language_models == ("run:a/b",)


def test_the_last_flag_wins_among_those_that_a_study_hands_on():
    run = study.Run(
        "a", CONFIG.partition("=")[2], {"evaluation.steps": (1, 8), "steps": 5, "objective.temperature": None}
    )
    extra = overrides.FlagsParser().parse("--config.evaluation.steps=(4, 2),--config.steps=7,--config.log_every=9")
    flags = shlex.split(shlex.join(study.flags_of(run, 0, Path("w"), {}, extra)))
    config = parsed("--config.objective.temperature=0.5", *flags)
    assert (config.evaluation.steps, config.steps, config.log_every) == ((4, 2), 7, 9)
    assert config.objective.temperature is None


@pytest.mark.parametrize("name", ["objective.temperature", "teacher", "init_from"])
def test_what_may_be_unset_can_be_unset_again(name):
    value = {"objective.temperature": "0.5"}.get(name, "there")
    assert flat(parsed(f"--config.{name}={value}").to_dict())[name] is not None
    assert flat(parsed(f"--config.{name}={value}", f"--config.{name}=None").to_dict())[name] is None


def test_what_must_be_set_cannot_be_unset(nothing_expensive, tmp_path):  # noqa: F811
    for name, words in (("seed", "seed must be in"), ("data.name", "data.name cannot be None")):
        message = error_of("train", CONFIG, f"--workdir={tmp_path / 'run'}", f"--config.{name}=None")
        assert words in message


# --- what 0 means ------------------------------------------------------------------------------------------------


def test_clip_norm_0_is_off():
    """The same updates as with a norm that no gradient reaches, and the same form of state."""
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    gradients = jax.tree.map(lambda a: 1e3 * jnp.ones_like(a), params)
    settings = dict(b1=0.9, b2=0.99, weight_decay=0.1, decay_pattern="kernel$")
    made = {clip: make_optimizer(lambda step: 1e-2, clip_norm=clip, **settings) for clip in (0.0, 1e30, 1e-30)}
    states = {clip: optimizer.init(params) for clip, optimizer in made.items()}
    assert jax.tree.structure(states[0.0]) == jax.tree.structure(states[1e30])
    moves = {clip: optimizer.update(gradients, states[clip], params)[0] for clip, optimizer in made.items()}
    jax.tree.map(np.testing.assert_array_equal, moves[0.0], moves[1e30])
    assert not np.allclose(*(jax.tree.leaves(moves[clip])[0] for clip in (0.0, 1e-30)))


def test_a_pattern_that_is_none_is_refused(nothing_expensive, tmp_path):  # noqa: F811
    message = error_of("train", CONFIG, f"--workdir={tmp_path / 'run'}", "--config.optimizer.decay_pattern=(kernel")
    assert "optimizer.decay_pattern '(kernel' is no regular expression" in message


# --- the schedule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "warmup", "top"), [(30, 100, 15), (7, 100, 3), (100, 30, 30), (20, 10, 10), (1, 100, 0)]
)
def test_the_warm_up_of_a_cosine_takes_at_most_half_of_the_steps(steps, warmup, top):
    rate = make_schedule(2e-3, "cosine", warmup, steps)
    rates = [float(rate(step)) for step in range(steps + 1)]
    assert (
        int(np.argmax(rates)) == top and rates[top] == pytest.approx(2e-3) and rates[-1] == pytest.approx(0, abs=1e-9)
    )
    for step in range(top):
        assert rates[step] == pytest.approx(2e-3 * step / top, rel=1e-5)


def test_a_constant_rate_does_not_depend_on_the_steps():
    short, long = (make_schedule(2e-3, "constant", 100, steps) for steps in (10, 10_000))
    for step in (0, 5, 50, 100, 5000):
        assert float(short(step)) == float(long(step)) == pytest.approx(2e-3 * min(1, step / 100))


@pytest.mark.parametrize("key", ["noise_scale", "guidance"])
def test_what_flow_and_flow_map_have_alike_is_declared_once(key):
    """By the class that they share, so that a change of it is a change in both."""
    classes = {each for family in ("flow", "flow_map") for each in FAMILIES[family].__mro__}
    assert [each.__name__ for each in classes if key in vars(each).get("__annotations__", {})] == ["PathSampler"]
    assert settings_of(FAMILIES["flow"])[key] is settings_of(FAMILIES["flow_map"])[key]
