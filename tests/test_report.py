"""The report is what the run directories say, whatever of them is there; the page is looked at in a real browser."""

import csv
import html
import json
import re
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import error_of
from toy import network, perturbed, run_config

from flowlm.data import open_dataset
from flowlm.maths.time_warp import TimeWarp
from flowlm.objectives import make_family
from flowlm.studies import report
from flowlm.training import train

NASTY = "</script><b id=nasty>&\"'"


def make_run(path, config, lines=(), evaluation=None, trajectories=None):
    """A run directory with just these files."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"steps": 20, "seed": 0, **config}))
    if lines:
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluation:
        metrics, samples = evaluation
        (path / "evaluation.json").write_text(json.dumps({"step": 20, "metrics": metrics, "samples": samples}))
    if trajectories:
        (path / "trajectories.json").write_text(json.dumps(trajectories))


@pytest.fixture
def runs(tmp_path):
    """Finished, in training (its last line cut short by a kill) and just begun."""
    lines = [{"step": k, "loss": 2.0 - k / 20, "grad_norm": 1.0} for k in range(1, 21)]
    metrics = {"held_out/cross_entropy": 0.5, "held_out/bound_nats_per_token": None}
    for sampler, entropy in (("map@1", 1.25), ("map@4", 2.5), ("held_out", 3.0)):
        metrics |= {f"samples/{sampler}/entropy": entropy, f"samples/{sampler}/entropy_stderr": 0.125}
    samples = {"map@1": "one", "map@4": NASTY, "held_out": "real"}
    follow = {"map@4": [[["a", "b", ""], ["a", "c", ""], ["x", "c", "d"], ["x", "c", NASTY]]]}
    finished = tmp_path / "w/finished/seed0"
    make_run(finished, {"model": {"input": "raw"}}, lines, (metrics, samples), follow)
    (finished / "samples.txt").write_text(f"== map@1\none\ntwo\n\n== map@4\n{NASTY}\nmore\n")
    swept = finished / "sweep/gamma=0.5"
    swept.mkdir(parents=True)
    other = {"samples/map@1/entropy": 7.0, "samples/held_out/entropy": 9.0}
    (swept / "evaluation.json").write_text(json.dumps({"step": 20, "metrics": other, "samples": {"map@1": "swept"}}))
    make_run(tmp_path / "w/training", {"model": {"input": "both"}}, lines[:5])
    with (tmp_path / "w/training/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    make_run(tmp_path / "w/begun", {"model": {"input": "both"}, "ema_decay": 0.9999})
    return tmp_path / "w"


def test_runs_as_they_are(runs, tmp_path, capsys):
    report.write_report([str(runs)], str(tmp_path / "out"))
    with (tmp_path / "out/runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    told = [
        tuple(r[k] for k in ("run", "status", "training_step", "sampler", "sampling_steps", "entropy")) for r in rows
    ]
    assert told == [
        ("begun", "begun", "0", "", "", ""),
        ("finished/seed0", "finished", "20", "map", "1", "1.25"),
        ("finished/seed0", "finished", "20", "map", "4", "2.5"),
        ("finished/seed0", "finished", "20", "map gamma=0.5", "1", "7.0"),
        ("training", "25 %", "5", "", "", ""),
        ("", "", "", "held_out", "", "3.0"),
    ]
    # Only settings that differ are columns, and each as it was set.
    assert [r["model.input"] for r in rows] == ["both", "raw", "raw", "raw", "both", ""]
    assert rows[0]["ema_decay"] == "0.9999" and not {"seed", "training_steps", "steps"} & set(rows[0])
    assert [r["loss"] for r in rows] == ["", "1.0", "1.0", "1.0", "1.75", ""]
    lines = (tmp_path / "out/runs.md").read_text().splitlines()
    head = ("run", "status", "training step", "model.input", "ema_decay", "loss", "held out cross entropy")
    assert lines[0] == f"| {' | '.join((*head, 'sampler', 'sampling steps', 'entropy'))} |"
    assert lines[3] == "| finished/seed0 | finished | 20 | raw |  | 1.000 | 0.500 | map | 1 | 1.250 ± 0.125 |"
    assert lines[-2] == "| training | 25 % | 5 | both |  | 1.750 |  |  |  |  |"
    assert lines[-1] == "|  |  |  |  |  |  |  | held_out |  | 3.000 ± 0.125 |"
    printed = capsys.readouterr().out
    assert printed.startswith("3 runs\n") and max(map(len, printed.splitlines()[:-1])) <= 80
    said = [line.split() for line in printed.splitlines()]
    assert ["training", "25", "%", "5", "1.750"] in said and ["begun", "begun", "0"] in said
    assert ["map@1", "1.250"] in said and ["held", "out", "3.000"] in said


def told(path, data, **settings):
    """A finished run of a name on the data, with its settings, whose map in one step has the entropy 2."""
    metrics = {"samples/map@1/entropy": 2.0, "samples/held_out/entropy": 3.0}
    where = {"name": data, "tokenizer": data, "length": 8, "dir": str(path)}
    make_run(path, {"data": where, **settings}, evaluation=(metrics, {"map@1": "one"}))


def test_runs_on_other_data_are_in_another_table_with_a_held_out_line_of_their_own(tmp_path):
    for name, data in (("a", "sotu"), ("b", "grammar98"), ("c", "sotu")):
        told(tmp_path / "w" / name, data)
    report.write_report([str(tmp_path / "w")], str(tmp_path / "out"))
    parts = (tmp_path / "out/runs.md").read_text().split("## ")[1:]
    assert [part.splitlines()[0] for part in parts] == ["sotu, sotu, rows of 8", "grammar98, grammar98, rows of 8"]
    firsts = [
        [line.split(" | ")[0].strip("| ") for line in part.splitlines() if line.startswith("|")] for part in parts
    ]
    assert firsts == [["run", "---|---|---|---|---|---", "a", "c", ""], ["run", "---|---|---|---|---|---", "b", ""]]
    assert [part.count("held_out |  | 3.000 |") for part in parts] == [1, 1]
    page = (tmp_path / "out/index.html").read_text()
    data = json.loads(html.unescape(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]))
    assert [run["data"] for run in data["runs"]] == [
        "sotu, sotu, rows of 8",
        "grammar98, grammar98, rows of 8",
        "sotu, sotu, rows of 8",
    ]
    assert re.findall("<h3>(.*?)</h3>", page) == ["sotu, sotu, rows of 8", "grammar98, grammar98, rows of 8"]


def test_text_of_ones_own_is_the_same_data_wherever_it_lies(tmp_path):
    for name, content in (("a", "0123456789"), ("b", "abcdef0123"), ("c", "0123456789")):
        told(tmp_path / "w" / name, "own_text")
        (tmp_path / "w" / name / "inputs.json").write_text(json.dumps({"data.dir": content}))
    runs = report.gather([str(tmp_path / "w")])
    assert {data: [run.name for run in group] for data, group in report.by_data(runs).items()} == {
        "own_text 01234567, rows of 8": ["a", "c"],
        "own_text abcdef01, rows of 8": ["b"],
    }


def test_settings_are_in_the_order_of_their_numbers(tmp_path):
    names = ["x", "noise=-1", "noise=0.5", "noise=2", "noise=1e1", "noise=10.5", "seed2", "seed10"]
    for name in sorted(names):
        told(tmp_path / "w" / name, "sotu")
    assert [run.name for run in report.gather([str(tmp_path / "w")])] == [*names[1:], "x"]


def test_figures_of_one_line_are_of_one_training_step(tmp_path):
    """Of a run that was trained on after its evaluation, and of one that was never evaluated at its end."""
    lines = [{"step": k, "loss": float(k)} for k in range(1, 16)]
    lines.insert(9, {"step": 9, "held_out/cross_entropy": 0.75})
    make_run(
        tmp_path / "w/evaluated",
        {},
        lines,
        ({"held_out/cross_entropy": 0.5, "samples/map@4/entropy": 2.0}, {"map@4": "a"}),
    )
    place = tmp_path / "w/evaluated/evaluation.json"
    place.write_text(place.read_text().replace('"step": 20', '"step": 12'))
    make_run(tmp_path / "w/training", {"steps": 30}, lines)
    rows = report.records(report.gather([str(tmp_path / "w")]), ["training_steps"])
    keys = ("run", "training_steps", "training_step", "loss", "held_out/cross_entropy", "sampling_steps")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        ("evaluated", 20, 12, 12.0, 0.5, 4),
        ("training", 30, 9, 9.0, 0.75, None),
    ]


def test_the_page_holds_all_and_asks_no_network(runs, tmp_path):
    report.write_report([str(runs), str(runs / "finished/seed0")], str(tmp_path / "out"))
    page = (tmp_path / "out/index.html").read_text()
    assert NASTY not in page and "<b id=nasty>" not in page
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:,"]
    assert re.findall(r"https?://[^\"' ]*", page) == ["http://www.w3.org/2000/svg"]
    data = json.loads(html.unescape(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]))
    by_name = {run["name"]: run for run in data["runs"]}
    # Of several folders each run has its folder's name in front.
    assert list(by_name) == ["w/begun", "w/finished/seed0", "w/training", "seed0"]
    whole = by_name["w/finished/seed0"]
    assert whole["curves"]["loss"] == [[k, 2.0 - k / 20] for k in range(1, 21)]
    assert whole["texts"] == {
        "map@1": "one\ntwo\n",
        "map@4": f"{NASTY}\nmore\n",
        "held_out": "real",
        "map gamma=0.5@1": "swept",
    }
    assert whole["trajectories"]["map@4"][0][-1] == ["x", "c", NASTY]
    assert by_name["w/begun"]["curves"] == {} and by_name["w/training"]["judged"] == []


def test_long_curves_are_thinned_to_true_points():
    points = [[k, float(np.sin(k))] for k in range(12_345)]
    thin = report.thinned(points)
    assert 200 < len(thin) <= 402 and thin[0] == points[0] and thin[-1] == points[-1]
    assert all(point == points[point[0]] for point in thin)
    assert report.thinned(points[:7]) == points[:7]


def test_what_is_wrong_is_named(tmp_path):
    assert "no run below" in error_of("report", str(tmp_path), f"--out={tmp_path / 'out'}")
    assert "report needs --runs=DIR,DIR,..." in error_of("report", f"--out={tmp_path / 'out'}")
    assert "report needs --out=DIR" in error_of("report", str(tmp_path))
    assert not (tmp_path / "out").exists()


# --- trajectories ------------------------------------------------------------------------------------------------


def test_a_trajectory_ends_in_the_samples():
    """And begins, for the flow, with what one step writes from the same noise."""
    warp, key = TimeWarp("gaussian", "ambient", 12, 16), jax.random.key(3)
    common = dict(temperature=None, noise_scale=0.8, guidance=1.0)
    flow = make_family("flow", warp, False, loss="cross_entropy", eta=0.7, **common)
    net = network(input="both")
    params = perturbed(net.init(jax.random.key(0)), 0.3)
    seen = flow.trajectory(net, params, key, 5, 6)
    assert seen.shape == (6, 5, 6)
    np.testing.assert_array_equal(seen[-1], flow.sample(net, params, key, 5, 6))
    np.testing.assert_array_equal(seen[0], flow.sample(net, params, key, 5, 1))
    assert (seen[0] != seen[-1]).any()
    np.testing.assert_array_equal(flow.trajectory(net, params, key, 5, 1)[0], seen[0])

    config = run_config("", "flow_map", **{"objective.gamma": 0.5})
    settings = {k: v for k, v in config.objective.to_dict().items() if k != "family"}
    family = make_family("flow_map", warp, False, **settings)
    net = network(input="both", time_embeddings=2)
    params = perturbed(net.init(jax.random.key(0)), 0.3)
    seen = family.trajectory(net, params, key, 5, 4)
    np.testing.assert_array_equal(seen[-1], family.sample(net, params, key, 5, 4))
    assert (seen[0] != seen[-1]).any()


def test_a_real_run(data_dir, tmp_path):
    """What training leaves behind has all that the page shows; the words of a trajectory are words of the grammar."""
    config = run_config(data_dir, **{"evaluation.steps": (1, 3)})
    train(config, tmp_path / "run")
    (run,) = report.gather([str(tmp_path / "run")])
    assert run.name == "run" and run.status == "finished" and run.evaluated == run.step == 6
    assert set(run.trajectories) == {"euler@3", "ancestral@3"}
    followed = np.array(run.trajectories["euler@3"])
    assert followed.shape == (2, 3, 19)
    words = open_dataset("grammar98", "grammar98", 19, data_dir).tokenizer.pieces
    assert set(followed.reshape(-1)) <= {*words, ""}
    assert {"euler@1", "ancestral@3", "held_out", "trigram"} <= set(run.texts)
    assert len([line for line in run.lines if "loss" in line]) == 6


# --- in a browser ------------------------------------------------------------------------------------------------


def browse(page, profile):
    """(the page's document after its scripts ran, its console's lines)."""
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={profile}",
        "--no-first-run",
    ]
    command += ["--enable-logging=stderr", "--virtual-time-budget=3000", "--host-resolver-rules=MAP * ~NOTFOUND"]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=240)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


# Moves the mouse over the middle of the first chart, and tells what is shown there.
HOVER = """<script>
const chartOfLoss = document.querySelector("#curves svg"), box = chartOfLoss.getBoundingClientRect();
const middle = {clientX: box.left + box.width * .53, clientY: box.top + 50, bubbles: true};
chartOfLoss.dispatchEvent(new PointerEvent("pointermove", middle));
</script>"""


@pytest.mark.needs("browser")
def test_the_page_in_a_browser(runs, tmp_path):
    report.write_report([str(runs)], str(tmp_path / "out"))
    page = tmp_path / "out/index.html"
    page.write_text(page.read_text() + HOVER)
    document, console = browse(page, tmp_path / "profile")
    assert console == []
    assert "<b id=nasty>" not in document and html.escape(NASTY, quote=False) in document
    assert len(re.findall("<figcaption>", document)) >= 5
    tip = html.unescape(
        re.sub("<[^>]*>", " ", re.search(r'<div class="tip" style="display: block.*?</figure>', document)[0])
    )
    step, values = int(re.search(r"step (\d+)", tip)[1]), tip.split()
    assert 5 < step < 15 and values[values.index("finished/seed0") + 1] == f"{2.0 - step / 20:g}"
    # Positions of the trajectory that still change: the first at two steps, the second at one, the last at three.
    assert len(re.findall('<td class="open">', document)) == 2 + 1 + 3

    # The console is really listened to.
    page.write_text(page.read_text() + "<script>nothing.here</script>")
    assert any("nothing is not defined" in line for line in browse(page, tmp_path / "profile")[1])


@pytest.mark.needs("browser")
def test_runs_that_have_only_begun(tmp_path):
    make_run(tmp_path / "w/a", {})
    report.write_report([str(tmp_path / "w")], str(tmp_path / "out"))
    document, console = browse(Path(tmp_path / "out/index.html"), tmp_path / "profile")
    assert console == [] and "Nothing was evaluated yet." in document and "No trajectory was written yet." in document


@pytest.mark.needs("browser")
def test_the_page_draws_runs_on_the_same_data_with_settings_in_order(tmp_path):
    for name, data, noise in (("a", "sotu", 10), ("b", "sotu", 0.5), ("c", "grammar98", 7), ("d", "sotu", 2)):
        told(tmp_path / "w" / name, data, noise=noise)
        place = tmp_path / "w" / name / "evaluation.json"
        found = json.loads(place.read_text()) | {"main": ["found"]}
        found["metrics"]["samples/map@1/found"] = 0.5
        place.write_text(json.dumps(found))
    report.write_report([str(tmp_path / "w")], str(tmp_path / "out"))
    document, console = browse(tmp_path / "out/index.html", tmp_path / "profile")
    assert console == []
    by_noise = re.search(
        r"<figcaption>found by noise, 1 sampling steps</figcaption>(.*?)</figure>", document, re.DOTALL
    )[1]
    assert re.findall(r'text-anchor="middle"[^>]*>([^<]*)<', by_noise) == ["0.5", "2", "10"]
    samples = re.search(r'id="samples">(.*?)<h2>', document, re.DOTALL)[1]
    assert re.findall("<h3>(.*?)</h3>", samples) == ["a", "b", "d"]
