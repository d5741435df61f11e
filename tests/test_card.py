"""What a model card says is so: the commands, the cost, and the judges' figures with their errors."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from test_trained import make_run

from flowlm import main
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.exchange.card import make_card
from flowlm.runs import directory as run_directory
from flowlm.runs.trained import load_trained
from flowlm.system import terminal

ROOT = Path(__file__).parents[1]
PLACE = "hub:owner/model"
FACTS = dict(family="masked", step=5, length=19, vocab=99, start=98, dtype="float32", checksum="abc", count=12345)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(
        tmp_path_factory.mktemp("runs") / "run", "masked", **{"init_from": str(Path.home() / "runs/before")}
    )


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """A run that was trained here and evaluated: its speed is 100 tokens a second, its figures are those of results/."""
    place = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(run, place)
    versions = json.loads((place / "versions.json").read_text())
    command = f"flowlm train --config=experiments/grammar.py:masked --workdir={Path.home()}/runs/masked"
    (place / "versions.json").write_text(json.dumps(versions | {"command": command, "device": "abacus"}))
    lines = [
        {"step": step, "loss": 1.0, "tokens_per_second": speed} for step, speed in ((1, 5.0), (2, 100.0), (3, 2e6))
    ]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = json.loads((ROOT / "results/everyday_map.json").read_text()) | {"step": 4, "num": 4096}
    (place / "evaluation.json").write_text(json.dumps(record))
    return place


def card_of(place, told=True):
    loaded = load_trained(place, Layout(make_mesh(data=1)))
    return make_card(loaded, FACTS, PLACE, place if told else None)


@pytest.fixture(scope="module")
def card(trained):
    return card_of(trained)


def test_the_figures_are_those_of_the_evaluation(card, trained):
    metrics = json.loads((trained / "evaluation.json").read_text())["metrics"]
    (head,) = re.findall(r"^\| samples \| (.*) \|$", card, re.MULTILINE)
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", card, re.MULTILINE))
    column = head.split(" | ").index("nats / char")
    for name in ("map@1", "map-noise0.5@1", "held_out"):
        value, error = (float(part) for part in rows[name].split(" | ")[column].split(" ± "))
        key = f"samples/{name}/nats_per_char"
        np.testing.assert_allclose([value, error], [metrics[key], metrics[f"{key}_stderr"]], atol=6e-4)
    assert "negative log-likelihood of held-out rows: 10.978 ± 0.325 nats a token" in card
    assert "the figures are of step 4." in card
    assert "- held out has only 1,618 rows beside 4,096 samples" in card


def test_the_cost_is_counted(card):
    """5 steps of 16 rows of 19 tokens, at the middle of three speeds; a network that trains alone costs three passes."""
    assert re.search(
        r"5 steps of 16 rows, 1,520 tokens; a row costs (2\.9|3\.0|3\.1) passes of the network\. 0\.3 min", card
    )
    assert "0.3 minutes on abacus" in card


def test_data_and_licence_are_named(card):
    assert "**Data**: `grammar98`, tokenizer `grammar98`. Licence of the data: Apache-2.0" in card


def test_its_commands_can_be_given_and_name_nobodys_home(card, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = re.findall(r"^    (flowlm .*)$", card, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        main.read_call(shlex.split(line))
    assert "    flowlm evaluate hub:owner/model --steps=1,8 --num=4096 --results=DIR" in card
    assert "--workdir=~/runs/masked" in card and "`init_from` was `~/runs/before`" in card
    assert str(Path.home()) not in card
    compile(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], "card", "exec")


def test_what_is_not_known_is_not_told(run):
    """The versions of a run that was exported or imported are of who did that."""
    card = card_of(run)
    assert "It was not evaluated. `flowlm evaluate hub:owner/model --results=DIR` does it." in card
    assert " minutes on " not in card and "flowlm train " not in card and "5 steps of 16 rows" in card
    assert "## " not in card_of(run, told=False)


def test_a_run_keeps_the_line_that_began_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [f"{ROOT}/flowlm/main.py", "train", "--config=a b.py", "--workdir=x"])
    place = make_run(tmp_path / "copied", "masked")
    assert "command" not in json.loads((place / "versions.json").read_text())
    config, tokenizer = run_directory.load_workdir(place)
    run_directory.prepare_workdir(tmp_path / "run", config, tokenizer)
    kept = json.loads((tmp_path / "run/versions.json").read_text())["command"]
    assert shlex.split(kept) == ["flowlm", "train", "--config=a b.py", "--workdir=x"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pytest", "train"])
    assert terminal.line() is None
