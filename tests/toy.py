"""Small settings that several tests share."""

import copy
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowlm import config as settings
from flowlm import training
from flowlm.evaluation import evaluator as evaluation
from flowlm.maths.time_warp import TimeWarp
from flowlm.models.network import Network, Transformer
from flowlm.objectives import FAMILIES
from flowlm.training import train

# Compiler options of a program that runs thousands of steps; conftest.py has all others compiled quickly and run slowly.
OPTIMIZED = {"xla_backend_optimization_level": 3} | (
    {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}
)

FIELDS = dict(
    width=16,
    blocks=2,
    heads=2,
    cond=16,
    dropout=0.0,
    input="raw",
    preview=False,
    output="plain",
    time_embeddings=1,
    time_scale=1.0,
    end_time_scale=1.0,
    gate_init=1.0,
    attention_cap=50.0,
    logit_cap=30.0,
    learned_positions=False,
    mask_token=False,
    causal=False,
    remat="none",
    dtype="float32",
    attention="xla",
    loss_weight=False,
)


def network(vocab=12, length=6, prior="gaussian", warp="ambient", **fields):
    """A network of the tests' size; fields override FIELDS."""
    fields = FIELDS | fields
    return Transformer(vocab_size=vocab, length=length, warp=TimeWarp(prior, warp, vocab, fields["width"]), **fields)


@dataclasses.dataclass(frozen=True)
class FunctionNetwork(Network):
    """A network of given functions: apply(params, z, tau_s, tau_t, keys), head(params), and weak like apply."""

    apply: Callable = dataclasses.field()  # without what the base class has for a default
    head: Callable = dataclasses.field()
    vocab: int
    length: int
    width: int
    weak: Callable | None = None


def overriding(net, **functions):
    """The network with other functions in place of its methods."""
    if isinstance(net, FunctionNetwork):
        return dataclasses.replace(net, **functions)
    new = copy.copy(net)
    methods = {name: staticmethod(function) for name, function in functions.items()}
    object.__setattr__(new, "__class__", type("Overriding", (type(net),), methods))
    return new


def perturbed(params, scale=0.3, seed=0):
    """Parameters with nothing left at its zero initialisation."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([p + scale * jax.random.normal(k, jnp.shape(p)) for p, k in zip(leaves, keys, strict=True)])


def drawn(net, scale=0.2, seed=0):
    """Parameters of a network, all drawn from one normal law around 1 (norms) or 0: quick, and nothing is left at zero."""
    rng = np.random.default_rng(seed)

    def draw(path, a):
        return jnp.float32(scale * rng.standard_normal(a.shape) + ("scale" in jax.tree_util.keystr(path)))

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(net.init, jax.random.key(0)))


def run_config(data_dir, family="flow", **changes):
    """Settings of a short run on the grammar, cheap to evaluate; changes are {"section.key": value}.

    The rate is constant, so that it does not depend on the number of steps.
    """
    config = settings.defaults(family)
    config.update(steps=6, batch_size=16, log_every=1)
    config.data.update(name="grammar98", tokenizer="grammar98", length=19, dir=str(data_dir))
    config.model.update(settings.model("test").to_dict() | dict(vocab_size=99, gate_init=1.0))
    config.model.update(FAMILIES[family].needs)
    if family in ("flow_map", "matched", "gumbel", "residual"):
        config.model.update(input="both", time_embeddings=2)
    if family == "gumbel":
        config.model.width = 104  # of 99 tokens
    if family == "autoregressive":
        config.objective.start = 98
    config.optimizer.update(schedule="constant", warmup_steps=2)
    config.mesh.data = 1
    config.checkpoint.update(every=3, keep_latest=100)
    steps = 18 if family == "autoregressive" else 1
    config.evaluation.update(held_out=16, taus=(0.5,), steps=(steps,), samples=16, final_samples=16)
    config.update_from_flattened_dict(changes)
    return config


class NoEvaluation:
    def __init__(self, *args):
        pass

    def __call__(self, params, step, num_samples, final=False):
        return evaluation.Evaluation(step, {}, {})


def train_only(config, workdir):
    """`train` without its evaluations and its picture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "Evaluator", NoEvaluation)
        patch.setattr(training, "draw_curves", lambda workdir: None)
        train(config, workdir)


# For tests that interrupt it: the steps of an experiment file wait a little while the file `slow` is beside it, and its judges
# as many seconds as the file `judge_for` says, after they have made the file `judging`. No evaluation unless asked for. Where the
# file `count` is there, each process writes beside it how many rows its judges read and its devices drew.
_EXPERIMENT = """
import time
from pathlib import Path
import jax
import toy
from flowlm.engine import sampling, sharding
from flowlm.evaluation import evaluator, judging
from flowlm.system import cluster

judge = judging.Panel.judge

def slow_judge(self, *given):
    seconds = Path(__file__).with_name("judge_for")
    if seconds.exists():
        Path(__file__).with_name("judging").touch()
        time.sleep(float(seconds.read_text()))
    return judge(self, *given)

judging.Panel.judge = slow_judge
score_all, gathered = judging.score_all, sampling.gathered

def note(what, rows):
    if Path(__file__).with_name("count").exists():
        with Path(__file__).with_name(f"{{what}}.{{jax.process_index()}}").open("a") as file:
            print(rows, file=file)

def counted_scores(judges, ids, *given):
    note("judged", len(ids))
    return score_all(judges, ids, *given)

def counted_rows(array):
    if array.ndim == 2:  # ids; likelihoods are of one dimension
        note("drawn", sum(shard.data.shape[0] for shard in array.addressable_shards))
    return gathered(array)

# A command may read its experiment more than once, and each row is noted once.
if score_all.__name__ != "counted_scores":
    judging.score_all, sampling.gathered = counted_scores, counted_rows
rows = sharding.global_rows

def global_rows(*arguments):
    time.sleep(0.3 if Path(__file__).with_name("slow").exists() else 0)
    return rows(*arguments)

sharding.global_rows = global_rows
if not {evaluate}:
    evaluator.Evaluator = toy.NoEvaluation
cluster.TIMEOUT_SECONDS = 20

def get_config(arg=""):
    return toy.run_config({data_dir!r}, **{changes!r})
"""


_SWEEP = """
from flowlm.studies.study import Run, Study
from flowlm.studies.sweeps import runs, sweep

def get_study(arg=""):
    points = runs(sweep("ema_decay", (0.5, 0.9)), {experiment!r})
    return Study([*points, Run("student", {experiment!r}, {{}}, points[0].name)], ("entropy",))
"""


def sweep_file(directory, data_dir):
    """A sweep of two points and a student of the first, as a file for commands."""
    experiment = experiment_file(directory / "experiment.py", data_dir, evaluate=True, steps=3)
    path = directory / "sweep.py"
    path.write_text(_SWEEP.format(experiment=str(experiment)))
    return path


def experiment_file(path, data_dir, evaluate=False, **changes):
    """Writes `run_config` as an experiment for commands, whose PYTHONPATH must have the tests."""
    path.write_text(_EXPERIMENT.format(data_dir=str(data_dir), evaluate=evaluate, changes=changes))
    return path
