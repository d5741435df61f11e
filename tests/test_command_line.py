"""Help says what each command takes, and no more; a line means what it says."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import error_of, flowlm

import flowlm as package
from flowlm import main
from flowlm.cli.command import given
from flowlm.cli.commands import COMMANDS
from flowlm.runs import directory as run_directory
from flowlm.runs.trained import Trained
from flowlm.system import terminal
from launch import run as launch

ROOT = Path(__file__).parents[1]
NAMES = [command.name for command in COMMANDS]
# What each takes, written down a second time, by hand.
OF_COMMANDS = {
    "train": {"config", "config.KEY", "workdir", "profile_steps", "compile_cache", "distributed"},
    "prepare data": {"config", "config.KEY", "workers"},
    "prepare judge": {"data_dir"},
    "prepare qm9": {"data_dir"},
    "inspect": {"checkpoint", "weights"},
    "import": {"checkpoint", "to", "weights", "config", "config.KEY"},
}


# --- help --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["--help", "-h", "help", "--helpfull"])
def test_help_lists_every_command(asked):
    ended = flowlm(asked)
    assert ended.status == 0 and not ended.err
    assert [name for name in NAMES if re.search(rf"^  {name} +\w", ended.out, re.MULTILINE)] == NAMES


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_help_of_a_command_lists_its_flags_and_no_others(command):
    ended = flowlm(*command.name.split(), "--help")
    assert ended.status == 0 and not ended.err
    listed = set(re.findall(r"^  --([\w.]+)", ended.out, re.MULTILINE))
    assert listed == {flag.name for flag in command.flags} | ({"config.KEY"} if command.flag("config") else set())
    assert listed == OF_COMMANDS.get(command.name, listed)
    assert flowlm("help", *command.name.split()).out == flowlm(*command.name.split(), "-h").out == ended.out


@pytest.mark.parametrize("line", [["--help"], *([*name.split(), "--help"] for name in NAMES)], ids=" ".join)
def test_help_fits_80_columns(line):
    assert max(map(len, flowlm(*line).out.splitlines())) <= 80


def test_the_version():
    assert flowlm("--version") == (0, f"flowlm {package.__version__}\n", "")


def test_a_flag_has_one_meaning_in_all_commands_that_share_its_name():
    """Or a mistake would name a flag of another command that does something else: such names are few and known."""
    forms = {}
    for command in COMMANDS:
        for flag in command.flags:
            forms.setdefault(flag.name, set()).add(flag.form)
    assert {name for name, found in forms.items() if len(found) > 1} == {"checkpoint", "steps", "out"}


# --- what a line means -------------------------------------------------------------------------------------------


def read(*line):
    return main.read_call(["flowlm", *line]).values


def test_words_stand_for_the_flag_that_says_where():
    for line in (
        ["sample", "a/b", "--num=3"],
        ["sample", "--num=3", "a/b"],
        ["sample", "--checkpoint=a/b", "--num", "3"],
    ):
        values = read(*line)
        assert (values.checkpoint, values.num) == ("a/b", 3)
    assert read("compare", "a", "b,c").runs == ["a", "b,c"] and read("compare", "--runs=a,b").runs == ["a", "b"]
    assert read("--verbosity=0", "prepare", "judge", "--data_dir=x").data_dir == "x"
    assert read("import", "x.ckpt", "--to=y").checkpoint == "x.ckpt"
    line = ["study", "--study=a.py", "--workdir=b", "--results=c", "--extra", "--config.steps=10,--nodistributed"]
    assert read(*line).extra == ["--config.steps=10", "--nodistributed"]


def test_no_line_sees_what_another_said():
    assert read("sample", "a", "--num=3", "--objective=eta=0").num == 3
    values = read("sample", "b")
    assert (values.num, values.objective, values["num"].present) == (8, [], 0)


def test_the_experiment_may_stand_anywhere_and_the_last_one_counts(monkeypatch):
    monkeypatch.chdir(ROOT)
    line = ["--config.steps=3", "--config=experiments/grammar.py", "--workdir=w", "--config=experiments/test.py"]
    for words in (line, [*line[:3], *line[3].split("=")], ["--config.steps", "3", *line[1:]]):
        config = read("train", *words).config
        assert (config.steps, config.data.name, config.model.width) == (3, "grammar98", 32)


def test_a_traceback_is_shown_where_it_is_asked_for(tmp_path, caplog):
    for flags, shown in (([], False), (["--verbosity=1"], True), (["-v", "1"], True)):
        caplog.clear()
        error_of("inspect", tmp_path, *flags)
        assert ("Traceback" in caplog.text and "FileNotFoundError" in caplog.text) == shown


def test_a_command_is_named_as_it_can_be_called(tmp_path, monkeypatch):
    """Where the environment is not active its path is, as a user in the checkout types it."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert terminal.command() == "flowlm"
    (tmp_path / "bin/flowlm").touch(mode=0o755)
    assert terminal.command() == "bin/flowlm"
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert terminal.command() == "flowlm"


@pytest.mark.parametrize(
    "line",
    [
        "sample a --num=1 --steps=1 --seed=0",
        "sample a --seed=4294967295 --steps=1,1024",
        "evaluate a --num=1",
        "prepare --source=jsonl --path=a --tokenizer=b --length=2 --out=c",
        "study --study=a.py --workdir=b --results=c --parallel=1",
        "bench --vocab=1 --batch=1 --repeats=1 --rounds=1 --attention_cap=0",
        "export a --out=b --format=jax --steps=1 --dtype=bfloat16",
    ],
)
def test_what_lies_at_the_end_of_a_range_is_taken(line):
    assert read(*line.split())


def documented():
    """(where, line) of the commands in the documentation: indented lines, and those between backticks."""
    files = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "launch/README.md",
        *(ROOT / "experiments").glob("*.py"),
    ]
    for path in files:
        text = path.read_text()
        for line in re.findall(r"^ {4}(flowlm .*)$", text, re.MULTILINE) + re.findall(r"`(flowlm [^`]*)`", text):
            # Behind the command stands what it does: after a hash, or after two blanks in the experiments.
            yield path.name, re.split(r" # |  +|&&", " ".join(line.split("\n")))[0].strip()


@pytest.mark.parametrize("where, line", sorted(set(documented())))
def test_every_command_in_the_documentation_is_one(where, line):
    words = re.sub(r"[\[\]]", "", line).split()[1:]
    if words[0] == "COMMAND" or words[0].startswith("-"):
        return
    command, others = main._find(words)
    known = {flag.name for flag in command.flags} | {f"no{flag.name}" for flag in command.flags if not flag.form}
    for name, _ in given(others):
        assert name in known or (name.startswith("config.") and "config" in known), name


# --- the repository's checkpoints --------------------------------------------------------------------------------


def test_an_evaluation_is_never_written_beside_the_repositorys_checkpoints(tmp_path, monkeypatch):
    """What is there stays as it is, by whatever path it is named; --results keeps the evaluation, and a copy is a run like any."""
    saved = []

    class Judge:
        def __init__(self, *arguments):
            pass

        def __call__(self, *arguments, final):
            return self

        def save(self, place, run):
            saved.append(str(place))

        def show(self, wide):
            print("shown")

    monkeypatch.setattr("flowlm.evaluation.evaluator.Evaluator", Judge)
    shipped = ROOT / "checkpoints/grammar_fmlm"
    run = Trained(*run_directory.load_workdir(shipped), SimpleNamespace(), None, 0)
    monkeypatch.setattr("flowlm.runs.trained.load_trained", lambda *arguments: run)
    monkeypatch.setattr("flowlm.data.open_dataset", lambda *arguments, **named: None)
    (tmp_path / "link").symlink_to(shipped)
    for place in (shipped, tmp_path / "link"):
        ended = flowlm("evaluate", place)
        assert ended.status == 0 and ended.out == "shown\n" and saved == []
        (said,) = ended.err.splitlines()
        assert f"{place} is only read: nothing is written there" in said and "--results=DIR" in said
    ended = flowlm("evaluate", shipped, f"--results={tmp_path / 'out'}")
    assert ended.status == 0 and not ended.err and saved == [f"{tmp_path / 'out'}"]


# --- beside flowlm -----------------------------------------------------------------------------------------------


def test_help_of_the_launcher(capsys):
    launch.main(["--help"])
    everywhere = capsys.readouterr().out
    assert (
        "--backend=local|slurm|tpu_vm|gke" in everywhere and "--dry_run" in everywhere and "--nodes" not in everywhere
    )
    launch.main(["--backend=slurm", "-h"])
    assert "--nodes" in capsys.readouterr().out
    assert max(map(len, everywhere.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "usage: python examples/run_exported.py DIRECTORY NUMBER_OF_SAMPLES SEED"),
        (["somewhere", "8"], "usage: python examples/run_exported.py DIRECTORY NUMBER_OF_SAMPLES SEED"),
        (["somewhere", "8", "x"], "usage: python examples/run_exported.py DIRECTORY NUMBER_OF_SAMPLES SEED"),
        (
            ["/nowhere", "8", "0"],
            "there is no sampler.jax in /nowhere: give a directory that `flowlm export --format=jax`",
        ),
    ],
)
def test_the_example_says_what_it_takes(arguments, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["examples/run_exported.py", *arguments])
    with pytest.raises(SystemExit, match=re.escape(expected)):
        runpy.run_path(str(ROOT / "examples/run_exported.py"), run_name="__main__")


def test_an_interpreter_that_is_not_there_is_named(tmp_path):
    ended = subprocess.run(
        ["bash", "launch/setup.sh"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHON": "/nowhere/python"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1 and not ended.stdout
    assert ended.stderr == "There is no Python at /nowhere/python: set PYTHON=/path/to/python, version 3.11 to 3.13.\n"


# --- what commands tell users to install -------------------------------------------------------------------------


def test_extras_are_installed_from_the_checkout():
    """There is no flowlm on the package index."""
    for path in (p for folder in ("flowlm", "launch", "experiments") for p in (ROOT / folder).rglob("*.py")):
        assert not re.search(r"pip install ['\"]?flowlm", path.read_text()), path
