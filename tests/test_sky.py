"""launch/sky.yaml: its form is that of SkyPilot, and its commands do on every node what they should."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flowlm.cli.command import parse
from flowlm.cli.commands import COMMANDS
from flowlm.cli.train import TRAIN

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: pip install -e .[dev]")
ROOT = Path(__file__).parents[1]
TASK = yaml.safe_load((ROOT / "launch/sky.yaml").read_text())
SCHEMA = json.loads((ROOT / "tests/data/sky.json").read_text())


def wrong_with(task):
    return [error.message for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(task)]


def test_the_task_has_the_form_that_is_published():
    assert not wrong_with(TASK)
    assert "'setups' was unexpected" in str(wrong_with(TASK | {"setups": ""}))
    assert "is not valid" in str(wrong_with(TASK | {"resources": {"job_recovery": {"recover_on_exit_code": 75}}}))


def test_what_it_installs_is_locked():
    assert (ROOT / "requirements" / f"{TASK['envs']['EXTRAS'].replace(',', '+')}.txt").is_file()
    assert 'LOCKED=1 bash launch/setup.sh "$EXTRAS"' in TASK["setup"]


@pytest.mark.parametrize(("steps", "status"), [(None, 3), (4, 75), (5, 0)], ids=["failed", "saved", "finished"])
def test_a_node_trains_as_one_of_all_and_tells_how_it_ended(tmp_path, steps, status):
    """75, on which the task is started again, where the run has ended well before its last step."""
    workdir = tmp_path / "a run"
    workdir.mkdir()
    train = tmp_path / "train"
    train.write_text(
        f'printf "%s\\n" "$@" > {tmp_path}/words; env > {tmp_path}/env; exit {3 if steps is None else 0}\n'
    )
    if steps is not None:
        (workdir / "config.json").write_text('{"steps": 5}')
        (workdir / "evaluation.json").write_text(json.dumps({"step": steps}))
    # A Python that does not train, in the .venv of a checkout.
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    there = f"PYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)}"
    python.write_text(f'#!/bin/sh\n[ "$1" != -m ] || exec sh {train} "$@"\n{there} "$@"\n')
    python.chmod(0o755)
    node = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    given = TASK["envs"] | {"WORKDIR": str(workdir), "FLAGS": "--config.seed=3 --config.steps=5"}
    ended = subprocess.run(["bash", "-c", TASK["run"]], cwd=tmp_path, env=os.environ | node | given)
    assert ended.returncode == status
    words = (tmp_path / "words").read_text().splitlines()
    assert words[:3] == ["-m", "flowlm", "train"] and f"--workdir={workdir}" in words
    assert parse(TRAIN, words[3:], COMMANDS).config.steps == 5
    seen = dict(line.partition("=")[::2] for line in (tmp_path / "env").read_text().splitlines())
    assert (seen["JAX_COORDINATOR_ADDRESS"], seen["JAX_NUM_PROCESSES"], seen["JAX_PROCESS_ID"]) == (
        "10.0.0.1:8476", "2", "1",
    )  # fmt: skip


@pytest.mark.needs("sky")
def test_skypilot_itself_reads_the_task():
    import sky

    task = sky.Task.from_yaml(str(ROOT / "launch/sky.yaml"))
    assert (task.name, task.num_nodes, task.envs["EXTRAS"]) == ("flowlm", 1, "cuda,gcp")
    (asked,) = task.resources
    assert asked.accelerators == {"H100": 8} and asked.use_spot
    assert asked.job_recovery == {
        "strategy": None, "max_restarts_on_errors": 20, "recover_on_exit_codes": [75],
    }  # fmt: skip
