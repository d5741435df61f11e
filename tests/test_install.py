"""How flowlm is installed: lock files that agree with setup.cfg, and the script that makes .venv."""

import configparser
import os
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
PYTHONS = ("3.11", "3.12", "3.13")


def direct(extras):
    """What setup.cfg asks for, as {name: (specifier, extras)}."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].split("\n")
    for extra in extras:
        lines += config["options.extras_require"][extra].split("\n")
    return [Requirement(line) for line in lines if line]


def locked(path, python):
    """{name: version} that a lock file installs on that Python, on Linux; the markers of every line are honoured."""
    environment = default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }
    lines = [Requirement(line) for line in path.read_text().splitlines()]
    taken = [line for line in lines if line.marker is None or line.marker.evaluate(environment)]
    names = [canonicalize_name(line.name) for line in taken]
    assert len(names) == len(set(names)), f"{path.name} names a package twice"
    assert all(re.fullmatch(r"==[\w.]+", str(line.specifier)) for line in taken)
    return {name: str(line.specifier)[2:] for name, line in zip(names, taken)}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_has_one_version_of_all_that_setup_cfg_asks_for(path, python):
    extras = [] if path.stem == "core" else path.stem.split("+")
    versions = locked(path, python)
    for asked in direct(extras):
        version = versions[canonicalize_name(asked.name)]
        assert asked.specifier.contains(version), f"{asked} is locked to {version}: bash requirements/lock.sh"
    assert versions["jaxlib"] == versions["jax"]
    assert ("libtpu" in versions) == ("tpu" in extras) and ("jax-cuda12-plugin" in versions) == ("cuda" in extras)


def test_what_is_named_in_launchers_and_the_dockerfile_has_a_lock():
    named = re.findall(
        r"LOCKED=1 .*setup\.sh ([\w,]+)", "".join(p.read_text() for p in (ROOT / "launch").iterdir() if p.is_file())
    )
    assert {"tpu,gcp", "cuda"} <= set(named)
    sets = re.search(r"requirements/ has a lock file: (.*?), or nothing", (ROOT / "Dockerfile").read_text())[1].split(
        ", "
    )
    assert {name.replace(",", "+") for name in [*named, *sets, "core"]} == {path.stem for path in LOCKS}


@pytest.mark.parametrize("kind", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_what_this_project_uses_must_not_be_deprecated(kind):
    """By setup.cfg's filters a warning in the name of these modules is an error, and of what others do among themselves none."""
    for module in (
        "flowlm.engine.state",
        "test_models",
        "optax._src.linear_algebra",
        "orbax.checkpoint.experimental.v1",
    ):
        with pytest.raises(kind):
            warnings.warn_explicit("use another name", kind, "file.py", 1, module=module)
    warnings.warn_explicit("use another name", DeprecationWarning, "file.py", 1, module="tensorflow_datasets.core")


# ---- launch/setup.sh ---------------------------------------------------------------------------------------------

PYTHON = """#!/bin/sh
case "$1" in
-c | -V) exit 0 ;;
esac
case "$2" in
venv) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
pip)
    echo "$@" >> pip.log
    [ -z "$FAILS" ] || { echo "ERROR: no such package" >&2; exit 1; }
    for i in 1 2 3 4 5 6 7 8 9 10 11; do echo "Collecting package$i<2,>=1 (from flowlm==0.1.0)"; done
    echo "Installing collected packages: many"
    ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """Only what the script reads, and an interpreter that writes down what pip is asked for."""
    for name in ("launch", "requirements"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / "launch/setup.sh", tmp_path / "launch")
    for name in ("setup.cfg", "requirements/tpu+gcp.txt", "requirements/core.txt"):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def run_setup(checkout, *extras, **environment):
    """The script, finished. Raises CalledProcessError."""
    return subprocess.run(
        ["bash", "launch/setup.sh", *extras],
        cwd=checkout,
        env=os.environ | {"PYTHON": "./python", "LOCKED": ""} | environment,
        check=True,
        capture_output=True,
        text=True,
    )


def setup(checkout, *extras, **environment):
    """What pip is asked for, line by line. Raises CalledProcessError."""
    (checkout / "pip.log").write_text("")
    run_setup(checkout, *extras, **environment)
    said = (checkout / "pip.log").read_text().splitlines()
    return [line.removeprefix("-m pip install --disable-pip-version-check --progress-bar off ") for line in said]


def test_installation_says_what_it_does_and_a_failure_of_pip_is_one_of_its_own(checkout):
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_setup(checkout, FAILS="yes")
    assert error.value.stderr == "ERROR: no such package\n" and not list((checkout / ".venv").glob(".flowlm*"))
    assert run_setup(checkout, "dev").stdout.splitlines() == [
        "installing flowlm with dev and what it needs, about 2 minutes",
        "  10 packages fetched, package10 the last",
        "  unpacking",
        "flowlm is in .venv: source .venv/bin/activate, or call it .venv/bin/flowlm",
    ]
    shutil.rmtree(checkout / ".venv")
    assert run_setup(checkout).stdout.startswith("making .venv\ninstalling flowlm and what it needs, about 2 minutes\n")
    assert run_setup(checkout).stdout == ""


def test_a_locked_set_is_installed_from_its_lock_alone_and_again_when_that_changes(checkout):
    lock = checkout / "requirements/tpu+gcp.txt"
    wanted = ["--requirement requirements/tpu+gcp.txt", "--no-deps --editable .[tpu,gcp]"]
    assert setup(checkout, "tpu,gcp", LOCKED="1") == wanted
    assert setup(checkout, "tpu,gcp", LOCKED="1") == []
    os.utime(lock, (2**32, 2**32))
    assert setup(checkout, "tpu,gcp", LOCKED="1") == wanted


def test_without_a_lock_the_ranges_of_setup_cfg_count(checkout):
    assert setup(checkout) == ["--editable ."]
    assert setup(checkout, "dev") == ["--editable .[dev]"]
    assert setup(checkout, LOCKED="1") == ["--requirement requirements/core.txt", "--no-deps --editable ."]


def test_a_set_without_a_lock_is_refused(checkout):
    with pytest.raises(subprocess.CalledProcessError) as error:
        setup(checkout, "hf,judge", LOCKED="1")
    assert "requirements/hf+judge.txt: make it by `bash requirements/lock.sh hf,judge`" in error.value.stderr
    assert not (checkout / ".venv").exists()
