"""What README, pages and runbook say is so: each command line is read by the real parsers, and each name is there."""

import ast
import configparser
import functools
import http.server
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import threading

import pages
import pytest
from pages import ROOT

import flowlm
import generated
import headline
from flowlm import config, main
from flowlm.cli.command import parse
from flowlm.cli.commands import COMMANDS
from flowlm.cli.train import TRAIN
from flowlm.studies import study
from launch import run


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def _check_flowlm(words: list[str], whole: bool) -> None:
    """`whole`: a line that can be given as it is, and no part of one in a sentence."""
    if "COMMAND" in words or len(words) == 1:
        return
    words = [pages.OWN_TEXT.sub("experiments/grammar.py", word) for word in words]
    for asked in (word.removeprefix("--study=") for word in words if word.startswith("--study=")):
        study.load_study(asked)
    try:
        main.read_call(words)
    except SystemExit as error:
        told = str(error.code or "")
        if told and (whole or not re.search("Missing value| needs ", told)):
            raise AssertionError(told) from None


def _check_launch(words: list[str]) -> None:
    action, *others = words if words and not words[0].startswith("-") else ["start", *words]
    for each in action.split("|"):
        assert each in run.ACTIONS
    backend = next((word.partition("=")[2] for word in others if word.startswith("--backend=")), None)
    parser = run._parser(run.load_backend(backend) if backend in run.BACKENDS else None)
    others = [word for word in others if word not in ("--help", "--backend=...")]
    asked, extra = run._parsed(parser, run.joined(others))
    if asked.sweep:
        study.load_study(asked.sweep.replace("NAME", "target"))
    if asked.config:
        parse(TRAIN, [f"--config={asked.config}", "--workdir=DIR", *extra], COMMANDS)


def _check_pip(words: list[str]) -> None:
    known = configparser.ConfigParser()
    known.read(ROOT / "setup.cfg")
    for extras in (match[1] for word in words if (match := re.fullmatch(r"\.\[(.*)\]", word))):
        for extra in extras.split(","):
            assert extra in known["options.extras_require"] or extra.isupper()


def _check_bash(words: list[str]) -> None:
    script, *arguments = words
    assert (ROOT / script).is_file()
    if script == "launch/setup.sh":
        _check_pip([f".[{arguments[0]}]"] if arguments else [])
    if script == "launch/study.sh" and arguments:
        study.load_study(f"experiments/head_to_head.py:{arguments[0]}")
    if script == "launch/quickstart.sh":
        settings = [word for word in arguments if word.startswith("--")]
        parse(TRAIN, ["--config=experiments/quickstart.py", "--workdir=DIR", *settings], COMMANDS)
    if script == "tests/run.sh":
        for word in arguments:
            assert (
                not word.startswith("--with-")
                or word.removeprefix("--with-") in importlib.import_module("conftest").SUITES
            )
            assert not word.startswith("tests/") or (ROOT / word).is_file()


def _check_python(words: list[str]) -> None:
    if words[:2] == ["-m", "flowlm.main"]:
        _check_flowlm(["flowlm", *words[2:]], len(words) > 2)
    elif words[:2] == ["-m", "launch.run"]:
        _check_launch(words[2:])
    elif words[0] == "-m":
        assert importlib.util.find_spec(words[1])
    elif words[0] == "-c":
        assert_imports_exist(words[1])
    else:
        assert (ROOT / words[0]).is_file()


def assert_imports_exist(code: str) -> None:
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "flowlm":
            assert hasattr(flowlm, node.attr), f"flowlm has no {node.attr}"


def assert_can_be_given(said: pages.Said) -> None:
    for program, *words in pages.split(said.what):
        if program.endswith("flowlm"):
            _check_flowlm(["flowlm", *words], not said.in_sentence)
        elif program == "bash":
            _check_bash(words)
        elif program.endswith("python"):
            _check_python(words)
        elif program == "pip":
            _check_pip(words)


@pytest.mark.parametrize("said", pages.command_lines(), ids=str)
def test_a_command_line_can_be_given(said):
    assert_can_be_given(said)


@pytest.mark.parametrize(
    "line",
    [
        "flowlm trian --config=experiments/grammar.py --workdir=DIR",
        "flowlm train --config=experiments/grammar.py --steps=20 --workdir=DIR",
        "flowlm train --config=experiments/grammar.py --config.stepz=20 --workdir=DIR",
        "flowlm train --config=experiments/gramar.py --workdir=DIR",
        "flowlm sample --steps=1",
        "flowlm study --study=experiments/ablations.py:nothing --workdir=DIR --results=DIR2",
        "python -m launch.run --backend=local --config=experiments/grammar.py --config.stepz=20 --workdir=DIR",
        "python -m flowlm.nothing",
        "python -c 'from flowlm.data import nothing'",
        "bash launch/nothing.sh",
        "bash launch/study.sh nothing",
        "bash tests/run.sh --with-nothing",
        "pip install -e .[nothing]",
    ],
)
def test_a_line_that_cannot_be_given_is_found(line):
    assert pages.split(line)
    with pytest.raises((AssertionError, ValueError, SystemExit)):
        assert_can_be_given(pages.Said("a page", line))


def test_command_lines_are_found():
    """Among them all commands: a reader that finds nothing would prove nothing."""
    found = {words[1] for said in pages.command_lines() for words in pages.split(said.what) if words[0] == "flowlm"}
    assert {command.name.split()[0] for command in COMMANDS} <= found


@pytest.mark.parametrize("said", pages.python_blocks(), ids=lambda said: said.where)
def test_a_block_of_python_imports_what_is_there(said):
    assert_imports_exist(said.what)


@functools.cache
def _settings() -> set[str]:
    return {
        name for family in generated.settings_table.FAMILIES for name in config.flat(config.defaults(family).to_dict())
    }


def _is_code(name: str) -> bool:
    """Whether a dotted name is of the package's code."""
    for parts in range(name.count("."), -1, -1):
        module, rest = ".".join(name.split(".")[: parts + 1]), name.split(".")[parts + 1 :]
        try:
            found = importlib.import_module(module)
        except ImportError:
            continue
        try:
            functools.reduce(getattr, rest, found)
            return True
        except AttributeError:
            return False
    return False


def test_every_setting_that_is_named_is_there():
    wrong = [str(said) for said in pages.settings() if said.what not in _settings()]
    assert not wrong


def test_every_file_that_is_named_is_there():
    of_a_run = "launch/turn"  # in the run directory, not in the checkout
    wrong = [str(said) for said in pages.files() if said.what != of_a_run and not any(ROOT.glob(said.what.rstrip("/")))]
    assert not wrong


def test_every_link_leads_to_a_file():
    def exists(said):
        place = (ROOT / said.where).parent / said.what
        # Pictures of results/ stand beside the pages, and those of the API are made from the package.
        beside = ROOT / os.path.relpath(place, ROOT / "docs")
        return place.exists() or (beside.suffix == ".png" and beside.exists())

    wrong = [str(said) for said in pages.links() if not exists(said)]
    assert not wrong


def test_every_name_of_code_is_there():
    wrong = [str(said) for said in pages.names() if not _is_code(said.what)]
    assert not wrong


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_what_a_page_asks_for_is_made(page):
    made = generated.expanded(page.read_text(encoding="utf-8"))
    assert not generated.COMMENT.search(made)
    assert "nan" not in made.split()


def test_the_readme_fits_on_a_page():
    assert (ROOT / "README.md").stat().st_size <= 8192


def test_what_the_readme_shows_of_the_quickstart_is_what_it_prints():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```text\n(.*?)```", readme, re.DOTALL)
    screen = (ROOT / "results/everyday_screen.txt").read_text(encoding="utf-8").splitlines()
    assert not [line for line in shown.splitlines() if line not in screen]


def test_what_the_quickstart_says_itself_fits_80_columns():
    script = (ROOT / "launch/quickstart.sh").read_text(encoding="utf-8")
    (said,) = re.findall(r"cat <<END\n(.*?)\nEND", script, re.DOTALL)
    lines = said.replace("$workdir", "runs/quickstart").splitlines()
    assert max(map(len, lines)) <= 80


def test_the_table_of_the_readme_is_that_of_the_study():
    assert headline.table() in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.py")), ids=lambda path: path.stem)
def test_an_experiment_says_in_eight_lines_what_it_is(path):
    told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert len(told.splitlines()) <= 8
    assert f"experiments/{path.name}" in told


# --- the site ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages as a browser gets them, built as `mkdocs build` does: any warning is an error."""
    out = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.needs("docs")
def test_the_site_is_whole_and_loads_nothing_from_elsewhere(site):
    found = {page.relative_to(site).as_posix(): page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    assert len(found) > 80
    for name, page in found.items():
        loads = re.findall(
            r'<(?:script|img|iframe)[^>]* src="([^"]+)"|<link[^>]* rel="(?:stylesheet|icon)"[^>]*>', page
        )
        assert not [each for each in loads if each.startswith("http")], name
        assert "fonts.googleapis" not in page
        assert 'class="arithmatex"' not in page, name
        for picture in re.findall(r'<img[^>]* src="([^"]+)"', page):
            assert (site / name).parent.joinpath(picture).is_file(), (name, picture)
    assert sum(page.count("<math") for page in found.values()) > 100
    # Numbers of results, defaults of settings and flags of commands, as the files and the code have them.
    assert "0.765 ± 0.009" in found["results/grammar.html"] or ".765 ± .009" in found["results/grammar.html"]
    assert "objective.teacher_temperature" in found["reference/settings.html"]
    assert "--profile_steps" in found["reference/commands.html"]
    assert 'id="flowlm.objectives.flow.Flow.loss"' in "".join(found.values())


@pytest.mark.needs("docs")
@pytest.mark.needs("browser")
def test_pages_in_a_browser_say_nothing_on_its_console(site, tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            return None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for page in ("index.html", "concepts/flow_map.html", "results/head_to_head.html", "reference/settings.html"):
            command = [
                "chromium",
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={tmp_path}",
                "--no-first-run",
            ]
            command += ["--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom"]
            command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
            url = f"http://127.0.0.1:{server.server_address[1]}/{page}"
            done = subprocess.run([*command, url], capture_output=True, text=True, timeout=240)
            assert "</html>" in done.stdout
            assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line], page
    finally:
        server.shutdown()
        server.server_close()
