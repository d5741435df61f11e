"""Whatever is wrong is said in one clear line, before any expensive work."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from command_line import error_of
from toy import run_config

from flowlm import assembly, run_directory
from flowlm.checkpoint import Checkpoints
from flowlm.data import reader
from flowlm.sharding import Layout, make_mesh
from flowlm.tokenizers import shipped

ROOT = Path(__file__).parents[1]
CONFIG = "--config=experiments/test.py"


@pytest.fixture
def nothing_expensive(tmp_path, monkeypatch):
    """A data directory with nothing in it; preparing data or making a state there fails the test."""

    def expensive(*arguments, **settings):
        raise AssertionError("expensive work before the error")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(reader, "_prepare", expensive)
    monkeypatch.setattr("flowlm.training.Checkpoints", expensive)
    return tmp_path / "data"


# --- settings ----------------------------------------------------------------------------------------------------

SETTINGS = {
    ("optimizer.learnin_rate=1",): "no setting optimizer.learnin_rate: --config.optimizer.learning_rate=1",
    ("optimiser.learning_rate=1",): "no setting optimiser.learning_rate: --config.optimizer.learning_rate=1",
    ("steps=many",): "config.steps=many: .*int",
    ("optimizer.learning_rate=fast",): "config.optimizer.learning_rate=fast: .*float",
    ("model.vocab_size=100",): "model.vocab_size is 100, .*'grammar98' has 99 tokens.*--config.model.vocab_size=99",
    ("steps=0",): "steps must be at least 1, got 0: set --config.steps=1000",
    ("accumulation=3", "mesh.data=1"): "batch_size 32 is not a multiple of accumulation 3 x 1 devices: use 30 or 33",
    ("accumulation=8", "mesh.data=8"): "batch_size 32 is not a multiple of accumulation 8 x 8 devices: use 64",
    ("mesh.data=9",): "mesh.data = 9, mesh.model = 1, but 8 devices are here",
    ("objective.family=flows",): r"unknown objective.family 'flows': choose one of \[.*'flow'",
    (
        "objective.loss=mse",
    ): r"unknown objective.loss 'mse': choose one of \['cross_entropy', 'squared_error', 'velocity'\]",
    ("prior=laplace",): r"unknown prior 'laplace': choose one of \['dirichlet', 'gaussian'\]",
    ("prior=dirichlet",): "model.input 'both' .*needs the gaussian prior",
    ("prior=dirichlet", "model.input=raw"): "ancestral sampler needs the gaussian prior.*set objective.eta to 0",
    ("time_warp=none",): "unknown time warp 'none': choose one of",
    ("optimizer.schedule=linear",): r"unknown optimizer.schedule 'linear': choose one of \['constant', 'cosine'\]",
    ("steps=5",): "cosine schedule needs steps 5 > optimizer.warmup_steps 10",
    ("model.input=cooked",): "unknown model.input 'cooked': choose one of",
    ("model.output=skip",): "unknown model.output 'skip': choose one of",
    ("model.dtype=float16",): "unknown model.dtype 'float16': choose float32 or bfloat16",
    ("model.heads=5",): "model.width 32 must be a multiple of twice model.heads 5",
    ("data.name=grammar99",): "unknown dataset 'grammar99'; known are .*grammar98",
    ("data.tokenizer=grammar99",): "unknown tokenizer 'grammar99'; known are .*grammar98",
    ("data.length=32",): "length 32: rows of 'grammar98' have 19 ids",
    ("data.tokenizer=chars", "model.vocab_size=28"): "tokenizer is 'grammar98'",
}


@pytest.mark.parametrize("changes", SETTINGS, ids=", ".join)
def test_settings(changes, nothing_expensive, tmp_path):
    overrides = [f"--config.{change}" for change in (f"data.dir={nothing_expensive}", *changes)]
    message = error_of("train", CONFIG, f"--workdir={tmp_path / 'run'}", *overrides)
    assert re.search(SETTINGS[changes], message, re.IGNORECASE), message
    assert "\n" not in message
    assert not (tmp_path / "run").exists()


MISSING = {
    ("text8", "chars", 28): r"sources/text8 is missing: put text8 or text8.zip of http\S+ there",
    ("lm1b", "chars", 28): r"sources/lm1b/training\S+ is missing: put the directory of that name of the archive",
    ("openwebtext", "chars", 28): r"sources/openwebtext is missing: put \*\.jsonl files there",
    (
        "openwebtext",
        "gpt2",
        50257,
    ): r"tokenizer 'gpt2' is not in \S+/tokenizers; fetch it once in Python with\n.*from_pretrained",
}


@pytest.mark.parametrize(("name", "tokenizer", "vocab"), MISSING)
def test_missing_data_says_what_to_put_where(name, tokenizer, vocab, nothing_expensive, tmp_path):
    changes = {"data.dir": nothing_expensive, "data.name": name, "data.tokenizer": tokenizer, "model.vocab_size": vocab}
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    message = error_of("train", CONFIG, f"--workdir={tmp_path / 'run'}", *overrides)
    assert re.search(MISSING[name, tokenizer, vocab], message), message
    assert str(nothing_expensive) in message
    assert not (tmp_path / "run").exists()


# --- commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "no command trian: did you mean train?"),
        ([], "takes a command: `flowlm --help` lists them"),
        (["train"], "needs --config=experiments/NAME.py.* and --workdir=DIR"),
        (["train", CONFIG], "needs .*--workdir=DIR"),
        (["train", "--config=experiments/gramar.py"], "no experiment .*did you mean experiments/grammar.py"),
        (["train", "--config", "experiments/gramar.py"], "no experiment .*did you mean experiments/grammar.py"),
        (["train", "--config=nowhere"], "no experiment nowhere: there are .*experiments/grammar.py"),
        (["train", CONFIG, "--workdri=x"], "workdri"),
        (["train", CONFIG, "--workdir=x", "--profile_steps=5"], "--profile_steps takes the first step .*, got '5'"),
        (["sample"], "needs --checkpoint=DIR"),
        (["evaluate"], "needs --checkpoint=DIR"),
        (["evaluate", "--checkpoint=x", "--objective=eta=0"], "give --results=DIR"),
        (["evaluate", "--checkpoint=x", "--samples_only"], "give --results=DIR"),
        (["sample", "--checkpoint=x", "--objective=eta"], "--objective takes KEY=VALUE,..., got 'eta'"),
        (["study"], "needs --study=experiments/NAME.py.*, --workdir=DIR and --results=DIR"),
        (["study", "--study=x.py", "--workdir=x", "--results=x"], "no study x.py"),
        (["sample", "--checkpoint=x", "--steps=0"], "--steps takes positive whole numbers, got '0'"),
        (["sample", "--checkpoint=x", "--steps=8,some"], "--steps takes positive whole numbers, got '8,some'"),
        (["sample", "--checkpoint=x", "--num=0"], "num"),
        (["sample", "--checkpoint=x", "--seed=-1"], "seed"),
        (["sample", "--checkpoint=/nowhere"], "/nowhere is not a run directory .*--workdir of a `flowlm train`"),
        (["evaluate", "--checkpoint=/nowhere"], "/nowhere is not a run directory"),
    ],
)
def test_commands(arguments, expected, nothing_expensive):
    message = error_of(*arguments)
    assert re.search(expected, message), message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "no command trian"),
        (
            ["train", CONFIG, "--workdir=/nowhere", "--config.optimizer.learnin_rate=1"],
            "--config.optimizer.learning_rate=1",
        ),
        (["train", CONFIG, "--workdir=/nowhere", "--config.model.vocab_size=7"], "model.vocab_size is 7"),
    ],
)
def test_from_outside(arguments, expected):
    """An exit status that scripts see, one line that people read."""
    command = [sys.executable, "-m", "flowlm.main", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line.startswith("flowlm: ")]
    assert len(lines) == 1 and expected in lines[0]


# --- run directories ---------------------------------------------------------------------------------------------


def test_a_directory_of_another_experiment(data_dir, tmp_path, monkeypatch):
    """Names what differs; settings that may change do not count."""
    monkeypatch.setattr("flowlm.training.Checkpoints", None)
    held = run_config(data_dir, **{"optimizer.learning_rate": 0.5, "seed": 3, "log_every": 7})
    run_directory.prepare(tmp_path, held, shipped("grammar98"))
    before = (tmp_path / "config.json").read_text()
    (tmp_path / "experiment.py").write_text(
        f"from toy import run_config\ndef get_config(): return run_config({str(data_dir)!r})\n"
    )
    message = error_of("train", f"--config={tmp_path}/experiment.py", f"--workdir={tmp_path}")
    assert "2 settings differ: optimizer.learning_rate = 0.5 there, 0.001 here, seed = 3 there, 0 here" in message
    assert (tmp_path / "config.json").read_text() == before


def test_a_run_without_checkpoints(data_dir, tmp_path):
    run_directory.prepare(tmp_path, run_config(data_dir), shipped("grammar98"))
    assert "no checkpoints under" in error_of("sample", f"--checkpoint={tmp_path}")
    (tmp_path / "checkpoints").mkdir()
    assert "no complete checkpoint yet" in error_of("sample", f"--checkpoint={tmp_path}")
    assert "no complete checkpoint yet" in error_of("evaluate", f"--checkpoint={tmp_path}")


def test_an_unknown_sampler(data_dir, tmp_path):
    config = run_config(data_dir)
    run_directory.prepare(tmp_path, config, shipped("grammar98"))
    abstract = assembly.abstract_state(assembly.build(config, 99), Layout(make_mesh(data=1)))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract))
    checkpoints.close()
    message = error_of("sample", f"--checkpoint={tmp_path}", "--sampler=eule")
    assert "no sampler 'eule': there are euler, ancestral; did you mean euler?" in message


def test_sampling_takes_a_step():
    config = run_config("")
    experiment = assembly.build(config, 99)
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        experiment.family.sample(experiment.net, {"embedding": jnp.zeros((99, 32))}, jax.random.key(0), 4, 0)
