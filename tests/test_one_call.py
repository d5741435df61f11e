"""The package as it is called from Python and from a shell: experiments, training, and `flowlm sample`."""

import configparser
import functools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from command_line import error_of
from command_line import flowlm as command
from test_trained import FAMILIES, ROOT, make_run

import flowlm
from flowlm import config, main, training
from flowlm.data.tokenizers import Tokenizer
from flowlm.runs import directory as run_directory

EXPERIMENT = "experiments/grammar.py:flow_map"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", "flow_map", **FAMILIES["flow_map"])


@pytest.fixture
def model(run, monkeypatch):
    """The run, loaded once for all commands, so that its sampler is compiled once."""
    model = _loaded(run)
    monkeypatch.setattr(flowlm, "load", lambda path, **objective: model)
    return model


_loaded = functools.cache(flowlm.load)


# --- from Python -------------------------------------------------------------------------------------------------


def python(code):
    """Runs it in a new process."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_importing_flowlm_imports_nothing_that_takes_time():
    done = python("import sys, flowlm; print(flowlm.__version__, 'jax' in sys.modules, 'numpy' in sys.modules)")
    assert done.stdout.split() == [flowlm.__version__, "False", "False"], done.stderr


def test_the_version_is_written_in_one_place():
    told = configparser.ConfigParser()
    told.read(ROOT / "setup.cfg")
    assert told["metadata"]["version"] == "attr: flowlm.__version__"
    assert "version" not in (ROOT / "pyproject.toml").read_text()


def test_an_experiment_is_what_the_command_makes_of_its_flags(monkeypatch):
    """Of every type that a setting has."""
    monkeypatch.chdir(ROOT)
    changes = {"optimizer.learning_rate": 2e-5, "tensorboard": True, "evaluation.steps": (1, 3), "teacher": "runs/a b"}
    changes |= {"seed": 3, "objective.temperature": 0.5, "evaluation.language_models": ("smollm2",), "steps": 10**4}
    words = {"evaluation.steps": "1,3", "evaluation.language_models": "smollm2", "tensorboard": "true"}
    line = [f"--config.{key}={words.get(key, value)}" for key, value in changes.items()]
    wanted = main.read_call(["flowlm", "train", f"--config={EXPERIMENT}", *line, "--workdir=x"]).values.config
    made = flowlm.experiment(EXPERIMENT, **changes)
    assert made.to_json() == wanted.to_json() and made.is_locked
    flat = config.flat(made.to_dict())
    assert {key: flat[key] for key in changes} == changes
    assert config.flat(flowlm.experiment(EXPERIMENT, teacher=None, seed=np.int64(4)).to_dict())["seed"] == 4


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        (
            EXPERIMENT,
            {"optimizer.learnin_rate": 1.0},
            "no setting optimizer.learnin_rate: --config.optimizer.learning_rate=1",
        ),
        (EXPERIMENT, {"learning_rate": 1.0}, "no setting learning_rate: --config.optimizer.learning_rate=1.0"),
        (EXPERIMENT, {"steps": "many"}, "config.steps=many: not a whole number"),
        (EXPERIMENT, {"steps": 0}, "steps must be at least 1, got 0: set --config.steps="),
        (EXPERIMENT, {"optimizer.b1": 1.5}, r"optimizer.b1 must be in \[0, 1\), got 1.5"),
        ("experiments/gramar.py", {}, "no experiment experiments/gramar.py: did you mean experiments/grammar.py"),
    ],
    ids=str,
)
def test_an_experiment_that_cannot_be_is_named(path, changes, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message) as error:
        flowlm.experiment(path, **changes)
    assert "\n" not in str(error.value)


def test_training_is_the_loop_of_the_command(tmp_path, monkeypatch):
    """And the module of that loop, which is imported by now, is not in the function's place."""
    called = []
    monkeypatch.setattr(training, "train", lambda *arguments: called.append(arguments))
    flowlm.train("settings", tmp_path / "run")
    assert called == [("settings", str(tmp_path / "run"))]


# --- flowlm sample -----------------------------------------------------------------------------------------------


def test_texts_go_to_standard_output_and_how_they_were_made_to_error(run, model):
    ended = command("sample", run, "--steps=1,2", "--num=3", "--seed=5")
    assert ended.out.splitlines() == model.sample(3, 1, 5) + model.sample(3, 2, 5)
    told = [re.sub(r"\d+\.\d+", "T", line) for line in ended.err.splitlines()]
    took = "3 texts in T s, after T s of compiling"
    assert told == ["map-noiseT, 1 step, seed 5", took, "map-noiseT, 2 steps, seed 5", took]


def test_the_command_hands_on_sampler_and_settings(run, model, monkeypatch):
    loaded = []
    monkeypatch.setattr(flowlm, "load", lambda path, **objective: loaded.append((path, objective)) or model)
    ended = command("sample", run, "--steps=1", "--num=1", "--sampler=map", "--objective=temperature=0.1,gamma=1")
    assert loaded == [(str(run), {"temperature": 0.1, "gamma": 1})]
    assert ended.out.splitlines() == model.sample(1, 1, 0, "map")
    assert ended.err.startswith("map, 1 step, seed 0\n1 text in ")


def test_json_is_an_object_for_each_text(run, model):
    ended = command("sample", run, "--steps=2", "--num=3", "--seed=5", "--json")
    facts = {"sampler": "map-noise0.5", "steps": 2, "seed": 5}
    wanted = [{"text": text} | facts | {"index": i} for i, text in enumerate(model.sample(3, 2, 5))]
    assert [json.loads(line) for line in ended.out.splitlines()] == wanted
    assert "leave out --delimiter" in error_of("sample", run, "--json", "--delimiter=%")


@pytest.mark.parametrize(
    ("texts", "flags", "wanted"),
    [
        (["a\nb", "c"], [], "a\nb\n---\nc\n---\n"),
        (["a\n---", "----"], [], "a\n---\n-----\n----\n-----\n"),
        (["a\nb", "c"], ["--delimiter=%%"], "a\nb\n%%\nc\n%%\n"),
        (["a", "c"], ["--delimiter=%%"], "a\n%%\nc\n%%\n"),
        (["a", "c"], [], "a\nc\n"),
        (["a\nb"], ["--json"], '{"text": "a\\nb", "sampler": "map-noise0.5", "steps": 2, "seed": 0, "index": 0}\n'),
    ],
    ids=str,
)
def test_texts_with_line_breaks_are_told_apart(texts, flags, wanted, run, model, monkeypatch):
    monkeypatch.setattr(Tokenizer, "decode_batch", lambda self, ids: texts)
    ended = command("sample", run, "--steps=2", "--num=3", *flags)
    assert ended.out == wanted
    line = wanted.splitlines()[-1]
    assert (f"texts have line breaks, so a line {line} ends each: --delimiter" in ended.err) == ("--" in line)


def test_texts_go_to_a_file(run, model, tmp_path):
    ended = command("sample", run, "--steps=2", "--num=3", f"--out={tmp_path / 'texts.txt'}")
    assert not ended.out and ended.err.splitlines()[-1] == f"in {tmp_path / 'texts.txt'}"
    assert (tmp_path / "texts.txt").read_text("utf-8").splitlines() == model.sample(3, 2)


def test_a_file_that_cannot_be_written_is_named_before_anything_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "load_workdir", None)

    def refused(out):
        return error_of("sample", run, f"--out={out}")

    (tmp_path / "file").touch()
    assert f"{tmp_path} is a directory, where a file is wanted" in refused(tmp_path)
    assert f"there is no directory {tmp_path / 'not/there'} for texts.txt" in refused(tmp_path / "not/there/texts.txt")
    assert f"{tmp_path / 'file'} is a file, where a directory is wanted" in refused(tmp_path / "file/texts.txt")


def test_a_reader_that_has_enough_ends_a_command_without_a_word():
    """As `flowlm ... | head -1` does."""
    code = """
from flowlm import main
from flowlm.cli.command import Command

def write(values):
    for number in range(10**5):
        print(number)

main.carry_out(main.Call(Command("count", "", [], write), None))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 141
