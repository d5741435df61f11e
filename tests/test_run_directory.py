"""A run knows what it was made from by its content, wherever that lies; and what cannot be read or written is one clear line."""

import errno
import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
from command_line import error_of, flowlm
from toy import drawn, run_config

from flowlm import main
from flowlm.cli.evaluate import COMPARE
from flowlm.data.prepare import prepare_text
from flowlm.data.tokenizers import Tokenizer, shipped
from flowlm.engine.build import build
from flowlm.evaluation import evaluator as evaluation
from flowlm.runs import directory as run_directory
from flowlm.runs.checkpoint import save_params
from flowlm.system import storage

ROOT = Path(__file__).parents[1]
GRAMMAR = shipped("grammar98")


def made(place, data_dir, **changes):
    run_directory.prepare_workdir(place, run_config(data_dir, **changes), GRAMMAR)
    return place


def taken_up(place, data_dir, **changes):
    """Takes up the run of another flow's weights that `place` holds."""
    made(place, data_dir, **changes)
    return run_directory.load_workdir(place)[0]


# --- other runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["teacher", "init_from"])
def test_a_run_is_the_same_wherever_it_lies(setting, data_dir, tmp_path, monkeypatch, caplog):
    """Spelled otherwise, linked, moved: taken up, and a move is said. Another run in its place is refused."""
    first = made(tmp_path / "first", data_dir)
    run = made(tmp_path / "run", data_dir, **{setting: str(first)})
    (tmp_path / "link").symlink_to(first)
    monkeypatch.chdir(tmp_path)
    for spelling in (f"{first}/", "first", "./first/../first", f"{tmp_path}//first"):
        assert taken_up(run, data_dir, **{setting: spelling})[setting] in (str(first), str(storage.path(spelling)))
    assert not caplog.text
    taken_up(run, data_dir, **{setting: str(tmp_path / "link")})
    assert "the content is the same" in caplog.text
    caplog.clear()

    first.rename(tmp_path / "moved")
    made(first, data_dir, seed=1)
    assert taken_up(run, data_dir, **{setting: str(tmp_path / "moved")})[setting] == str(tmp_path / "moved")
    assert (
        f"{setting} was " in caplog.text and f"and is {tmp_path / 'moved'} now: the content is the same" in caplog.text
    )
    with pytest.raises(ValueError, match=rf"1 settings differ: {setting} = '{tmp_path}/moved' there, '{first}' here"):
        taken_up(run, data_dir, **{setting: str(first)})
    with pytest.raises(ValueError, match=rf"{setting} = '{tmp_path}/moved' there, None here"):
        taken_up(run, data_dir)


def test_a_run_that_recorded_no_digests_is_compared_where_it_says(data_dir, tmp_path):
    first = made(tmp_path / "first", data_dir)
    run = made(tmp_path / "run", data_dir, teacher=str(first))
    (run / "inputs.json").unlink()
    shutil.copytree(first, tmp_path / "copy")
    assert taken_up(run, data_dir, teacher=str(tmp_path / "copy")).teacher == str(tmp_path / "copy")


def test_a_relative_teacher_is_found_from_anywhere(data_dir, tmp_path, monkeypatch):
    made(tmp_path / "first", data_dir)
    monkeypatch.chdir(tmp_path)
    assert taken_up(tmp_path / "run", data_dir, teacher="first").teacher == str(tmp_path / "first")


# --- data --------------------------------------------------------------------------------------------------------


def own_text(tmp_path, name, word):
    """(a folder of prepared text, settings of a run on it)."""
    (tmp_path / f"texts-{name}").mkdir()
    for i in range(9):
        (tmp_path / f"texts-{name}/{i}.txt").write_text(f"The {word} of year {i} was laid before both houses. " * 20)
    folder = tmp_path / name
    prepare_text("textfiles", str(tmp_path / f"texts-{name}"), "sotu_bpe_512", 16, str(folder), "")
    return folder, on(folder)


def on(folder):
    config = run_config(folder, **{"model.vocab_size": 512, "data.length": 16, "data.name": "own_text"})
    config.data.tokenizer = str(folder / "tokenizer.json")
    return config


def test_data_that_moved_are_the_same_data(tmp_path, monkeypatch, caplog):
    """For a run that goes on, and for `flowlm evaluate`, which is told where they lie now."""
    folder, config = own_text(tmp_path, "data", "report")
    other, other_config = own_text(tmp_path, "other", "letter")
    tokenizer, run = Tokenizer.load(folder / "tokenizer.json"), tmp_path / "run"
    run_directory.prepare_workdir(run, config, tokenizer)
    save_params(run, drawn(build(config, 512, tokenizer.start).net), 5, jnp.float32)
    folder.rename(tmp_path / "moved")

    opened = []

    class Looks:
        def __init__(self, experiment, dataset, *arguments):
            opened.append(dataset.train.text(24))

        def __call__(self, *arguments):
            return evaluation.Evaluation(5, {}, {})

    monkeypatch.setattr(evaluation, "Evaluator", Looks)
    monkeypatch.setattr(evaluation.Evaluation, "show", lambda self, wide: None)
    monkeypatch.setattr(evaluation.Evaluation, "save", lambda self, *places: None)

    assert "has no manifest.json: make it with" in error_of("evaluate", run)
    assert flowlm("evaluate", run, f"--data_dir={tmp_path / 'moved'}").status == 0
    assert opened[0].startswith("The report")

    run_directory.prepare_workdir(run, on(tmp_path / "moved"), tokenizer)
    assert f"data.dir was {folder} and is {tmp_path / 'moved'} now: the content is the same" in caplog.text
    assert flowlm("evaluate", run).status == 0
    with pytest.raises(ValueError, match=f"1 settings differ: data.dir = '{tmp_path / 'moved'}' there, '{other}' here"):
        run_directory.prepare_workdir(run, other_config, tokenizer)


def test_other_data_are_said_to_be_other(tmp_path, data_dir, capsys):
    folder, config = own_text(tmp_path, "data", "report")
    other, _ = own_text(tmp_path, "other", "letter")
    assert run_directory.content_of_data(config) != run_directory.content_of_data(on(other))
    shutil.copytree(folder, tmp_path / "copy")
    assert run_directory.content_of_data(config) == run_directory.content_of_data(on(tmp_path / "copy"))
    assert run_directory.content_of_data(run_config(data_dir)) is None


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: told["model"].update(future=1), r"does not know \(model.future = 1\): use a newer one"),
        (lambda told: told.update(future={"deep": 2}), r"does not know \(future.deep = 2\)"),
        (lambda told: told["objective"].update(family="dream"), "has not the settings of a run .*'dream'"),
        (lambda told: told.pop("objective"), "has not the settings of a run"),
        (lambda told: told.update(steps="many"), "has not the settings of a run"),
    ],
)
def test_settings_that_are_not_known_are_named(change, message, data_dir, tmp_path):
    run = made(tmp_path / "run", data_dir)
    told = json.loads((run / "config.json").read_text())
    change(told)
    (run / "config.json").write_text(json.dumps(told))
    said = error_of("sample", f"--checkpoint={run}")
    assert str(run / "config.json") in said and "\n" not in said
    with pytest.raises(ValueError, match=message):
        run_directory.load_workdir(run)


def test_settings_that_are_cut_name_their_file(data_dir, tmp_path):
    run = made(tmp_path / "run", data_dir)
    (run / "config.json").write_text((run / "config.json").read_text()[:-30])
    assert f"{run / 'config.json'} is damaged" in error_of("sample", f"--checkpoint={run}")


def test_settings_of_all_that_was_kept_are_known():
    files = [*ROOT.glob("checkpoints/*/config.json"), ROOT / "tests/data/run/config.json"]
    kept = [*ROOT.glob("results/**/runs/*/seed*.json")]
    assert len(files) == 7 and len(kept) > 100
    for file in files:
        run_directory.settings_of(json.loads(file.read_text()), file)
    for file in kept:
        run_directory.settings_of(json.loads(file.read_text())["config"], file)


# --- places that cannot be written -------------------------------------------------------------------------------


COMMANDS = {
    "train": ["train", "--config=experiments/test.py", "--workdir={}"],
    "export": ["export", "checkpoints/grammar_fmlm", "--out={}"],
    "import": ["import", "x.ckpt", "--to={}"],
    "report": ["report", "results", "--out={}"],
    "prepare": ["prepare", "--source=jsonl", "--path=x", "--tokenizer=chars", "--length=8", "--out={}"],
    "evaluate": ["evaluate", "--checkpoint=checkpoints/grammar_fmlm", "--results={}"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_place_that_cannot_be_written_is_said_first(name, tmp_path, monkeypatch, data_dir):
    """A file, something below a file, and a file system that cannot be written."""
    monkeypatch.chdir(ROOT)

    def expensive(*arguments, **settings):
        return pytest.fail("expensive work before the error")

    # Where it comes from is last, so that no module is imported, and keeps it, while it is replaced.
    for module in (
        "evaluation.judging",
        *(f"exchange.{name}" for name in ("export", "importing", "inspection")),
        "runs.model",
        "runs.trained",
    ):
        monkeypatch.setattr(f"flowlm.{module}.load_trained", expensive)
    monkeypatch.setattr("flowlm.training.Checkpoints", expensive)
    (tmp_path / "file").write_text("it")
    line = [part.format(tmp_path / "file") for part in COMMANDS[name]] + [f"--config.data.dir={data_dir}"] * (
        name == "train"
    )
    assert f"{tmp_path / 'file'} is a file, where a directory is wanted" in error_of(*line)
    below = [part.replace(str(tmp_path / "file"), str(tmp_path / "file/deep/er")) for part in line]
    assert f"{tmp_path / 'file'} is a file, where a directory is wanted" in error_of(*below)
    monkeypatch.setattr(os, "access", lambda place, mode: str(place) != str(tmp_path))
    ro = [part.replace(str(tmp_path / "file"), str(tmp_path / "new")) for part in line]
    assert f"nothing can be written to {tmp_path}" in error_of(*ro)
    assert (tmp_path / "file").read_text() == "it" and not (tmp_path / "new").exists()


def test_what_the_system_refuses_is_one_line(monkeypatch):
    def refused(values):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/somewhere/x")

    monkeypatch.setattr(main, "COMMANDS", [COMPARE._replace(run=refused)])
    assert error_of("compare", "x") == "flowlm: /somewhere/x: Read-only file system"
