"""Every experiment builds, and its step lowers at its full size, here and for TPUs, without an array being made."""

import ast
import importlib.util
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from flowlm import objectives
from flowlm.config import defaults
from flowlm.data import tokenizers
from flowlm.data.grammar import Grammar, shipped_names
from flowlm.engine import optimizers
from flowlm.engine.build import abstract_state, abstract_teacher, build, jit_step
from flowlm.engine.sharding import Layout, check_batch, make_mesh
from flowlm.engine.state import make_step
from flowlm.objectives.base import Teacher
from flowlm.runs import checkpoint
from flowlm.system.settings import field_names

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for path in (ROOT / "experiments").glob("*.py")
    if path.stem not in ("head_to_head", "ablations", "one_step", "my_text")
)
ARGUMENTS = {
    "grammar1k": ("flow_map", "residual", "autoregressive", "masked", "uniform", "sdtt", "dcd"),
    "grammar": (
        *("raw", "scaled", "posterior", "both", "white", "flow_map", "matched", "gumbel", "residual"),
        *("autoregressive", "masked", "uniform", "sdtt", "dcd"),
    ),
    "molecules": ("flow_map", "residual", "autoregressive", "masked", "uniform", "sdtt", "dcd"),
    "lm1b": ("flow_map",),
    "lm1b_gpu": ("flow_map", "autoregressive", "masked", "uniform", "sdtt", "dcd"),
    "openwebtext": ("flow_map",),
    "fineweb_edu": ("flow_map",),
    "tinystories": ("flow_map",),
    "quickstart": ("flow_map", "matched", "autoregressive", "masked", "uniform", "sdtt", "dcd"),
    "speeches": ("flow_map", "autoregressive", "masked", "uniform", "sdtt", "dcd"),
}
LARGER = ("grammar1k", "molecules")  # whose baselines and their students are the grammar's with other sizes


def case(path, argument):
    again = path.stem in LARGER and argument not in ("", "flow_map")
    return pytest.param(path, argument, marks=pytest.mark.slow if again else ())


CASES = [case(path, argument) for path in FILES for argument in ("", *ARGUMENTS.get(path.stem, ()))]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("path", "argument"), CASES, ids=lambda value: getattr(value, "stem", value))
def test_builds_and_lowers(path, argument):
    config = load(path).get_config(argument)
    assert config.is_locked
    vocab = config.model.vocab_size
    if config.data.tokenizer in tokenizers.shipped_names():
        vocab = tokenizers.shipped(config.data.tokenizer).vocab_size
    if config.data.name in shipped_names():
        assert config.data.length == Grammar.load(config.data.name).length + 1
    distils = argument.startswith(("flow_map", "matched", "gumbel", "residual", "sdtt", "dcd"))
    config.teacher = "its run directory" if distils else None
    experiment = build(config, vocab)

    layout = Layout(make_mesh())
    check_batch(config.batch_size, config.accumulation, getattr(experiment.family, "group", 1), layout.devices)
    state = abstract_state(experiment, layout)
    ids = jax.ShapeDtypeStruct((config.batch_size, config.data.length), jnp.int32)
    step = jit_step(config, experiment, layout, state)
    traced = step.trace(state, ids, abstract_teacher(config, experiment, layout))
    new, metrics = traced.out_info

    def shapes(tree):
        return jax.tree.map(lambda a: (a.shape, a.dtype), tree)

    assert shapes(new) == shapes(state)  # or the second step would be another program
    assert all(metric.shape == () for metric in metrics.values())
    for platform in ("cpu", "tpu") if config.model.attention == "xla" else ("tpu",):
        assert traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("target", ["psd", "teacher_steps", "lsd", "csd", "esd", "esd_logit"])
def test_every_kind_of_flow_map_step_lowers_for_tpus(target):
    """Derivatives go through the attention that is used. Compiling needs the libtpu wheel, lowering does not."""
    config = load(ROOT / "experiments/grammar.py").get_config("flow_map")
    config.objective.update(target=target, tau_max=0.99)
    config.teacher = "its run directory"
    experiment = build(config, 99)
    state = abstract_state(experiment, Layout(make_mesh()))
    settings = dict(seed=0, ema_decay=0.999, accumulation=1, dropout=False)
    step = make_step(experiment.net, experiment.family, experiment.optimizer, **settings)
    ids = jax.ShapeDtypeStruct((config.batch_size, config.data.length), jnp.int32)
    traced = jax.jit(step).trace(state, ids, Teacher(state.ema))
    assert "tanh" in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_docstring_states_the_command(path):
    command = f"flowlm train --config=experiments/{path.name}"
    assert command in (load(path).__doc__ or ""), f"{path.name} does not say `{command}`"


@pytest.mark.parametrize("path", [path for path in FILES if path.stem in ARGUMENTS], ids=lambda path: path.stem)
def test_arguments_change_the_experiment(path):
    seen = {load(path).get_config(argument).to_json() for argument in ARGUMENTS[path.stem]}
    assert len(seen) == len(ARGUMENTS[path.stem])


# --- no setting is without effect --------------------------------------------------------------------------------

# Sections handed over whole, as keyword arguments, and who takes them.
TAKERS = {
    "optimizer": [optimizers.make_schedule, optimizers.make_optimizer],
    "checkpoint": [checkpoint.Checkpoints.__init__],
}
# Sections read key by key: how the objects that hold them are called. The network and the families hold their own.
HOLDERS = {
    "data": {"data"},
    "evaluation": {"evaluation", "settings", "_settings"},
    "mesh": {"mesh", "wanted"},
    "model": {"self"},
    "objective": {"self", "objective"},
}


def attributes_read():
    """{(holder, attribute)} of every `holder.attribute` in the package but in its settings."""
    read = set()
    for path in (ROOT / "flowlm").rglob("*.py"):
        if path.name != "config.py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    holder = (
                        node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", None)
                    )
                    read.add((holder, node.attr))
    return read


def unused(config):
    read = attributes_read()
    # Where a field is named otherwise than its setting.
    fields = field_names(objectives.FAMILIES[config.objective.family])

    def is_read(name, key):
        if name in TAKERS:
            return any(key in inspect.signature(taker).parameters for taker in TAKERS[name])
        field = fields.get(key, key) if name == "objective" else key
        return any((holder, field) in read for holder in HOLDERS.get(name, ()))

    keys = set()
    for name, section in config.items():
        if not isinstance(section, ConfigDict):
            keys |= set() if ("config", name) in read else {name}
        else:
            keys |= {f"{name}.{key}" for key in section if not is_read(name, key)}
    return keys - {"objective.family"}  # which says whose settings they are


def test_every_setting_is_used():
    assert all(unused(defaults(family)) == set() for family in objectives.FAMILIES)
    config = defaults().unlock()
    added = {"colour": 1, "brand": {"new": 1}}
    for name in ("data", "model", "objective", "optimizer", "mesh", "checkpoint", "evaluation"):
        config[name].update(colour=1)
    config.update(added)
    sections = {
        f"{name}.colour" for name in ("data", "model", "objective", "optimizer", "mesh", "checkpoint", "evaluation")
    }
    assert unused(config) == {"colour", "brand.new"} | sections
