"""A run that is killed again and again is the run that was not; kills.py does the same a hundred times over."""

import json
import subprocess
import sys
from pathlib import Path

import kills
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path, processes):
    """Bitwise on one process, to 1e-5 on two."""
    line = ["--kills=4", f"--processes={processes}", "--steps=120", f"--workdir={tmp_path}/runs"]
    done = subprocess.run(
        [sys.executable, ROOT / "tests/kills.py", *line, f"--results={tmp_path}/report.json"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kills"] == report["started_again"] == 4


def test_kills_are_drawn_by_the_seed_and_of_every_kind():
    drawn = kills.drawn(100, 2, 0, 4000)
    assert drawn == kills.drawn(100, 2, 0, 4000) != kills.drawn(100, 2, 1, 4000)
    assert {kill.process for kill in drawn} == {None, 0, 1}
    assert 30 < sum(kill.starting for kill in drawn) < 70
    assert all(0 < kill.step < 4000 for kill in drawn)


def test_one_bit_is_a_difference():
    whole = {"a": np.ones(4, np.float32), "b": np.zeros(2, np.int32)}
    assert kills.difference(whole, whole) == 0
    other = whole | {"a": np.nextafter(np.ones(4, np.float32), 2)}
    assert 0 < kills.difference(other, whole) < 1e-6
