"""An evaluation: what is read, what is judged, on which devices, and what must be found before anything is trained."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import error_of
from orbax.checkpoint.experimental import v1 as ocp
from toy import run_config

from flowlm import training
from flowlm.data import open_dataset
from flowlm.engine import sampling
from flowlm.engine.build import build
from flowlm.engine.sampling import on_rows
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.evaluation import evaluator as evaluation
from flowlm.evaluation import judging as panel
from flowlm.evaluation import results
from flowlm.evaluation.evaluator import Evaluator
from flowlm.evaluation.results import Evaluation
from flowlm.exchange.export import export
from flowlm.judges.language_model import LanguageModel
from flowlm.runs.trained import load_trained
from flowlm.scale import ahead_of_time
from flowlm.studies import report, study
from flowlm.system import processes, storage
from flowlm.training import train

ROOT = Path(__file__).parents[1]


def opened(config):
    data = config.data
    return open_dataset(data.name, data.tokenizer, data.length, data.dir)


# --- which rows --------------------------------------------------------------------------------------------------


class Rows:
    """A split whose rows are all one token."""

    def __init__(self, split, token):
        self._split, self._token = split, token

    def __getattr__(self, name):
        return getattr(self._split, name)

    def __len__(self):
        return len(self._split)

    def _all(self, rows):
        return np.concatenate([rows[:, :1], np.full_like(rows[:, 1:], self._token)], 1)

    def rows(self, start, stop):
        return self._all(self._split.rows(start, stop))

    def shuffled(self, seed):
        stream = self._split.shuffled(seed)
        return lambda start, stop: self._all(stream(start, stop))


def test_references_and_judged_rows_are_of_different_splits(data_dir, monkeypatch):
    """References, and the rows of the likelihood, are of validation; the held-out row of a table is of test, as documented."""
    config = run_config(data_dir)
    data = opened(config)
    splits = {name: Rows(getattr(data, name), token) for token, name in enumerate(("train", "validation", "test"), 3)}
    dataset = SimpleNamespace(
        **{name: getattr(data, name) for name in ("tokenizer", "length", "grammar", "sentences", "pad")},
        **splits,
        fitted=lambda name, facts, fit: fit(),
    )
    word = {name: data.tokenizer.decode([token]) for token, name in enumerate(("train", "validation", "test"), 3)}
    assert len(set(word.values())) == 3
    referred, judged = {}, []

    class Judge:
        read = staticmethod(lambda texts: None)

        def score(self, ids, texts):
            judged.append(ids[0, 1])
            return {}

    class Counting(panel.NGrams):
        @classmethod
        def fit(cls, rows, start, pad):
            referred["ngrams"] = set(rows[:, 1:].ravel().tolist())
            return super().fit(rows, start, pad)

    def language_models(names, length, data_dir, layout, dataset):
        referred["mauve"] = {token for text in panel.reference_texts(dataset, 5) for token in text.split()}
        return [Judge()]

    monkeypatch.setattr(panel, "NGrams", Counting)
    monkeypatch.setattr(panel, "make_language_models", language_models)
    config.evaluation.language_models = ("x",)
    experiment = build(config, 99)
    evaluator = Evaluator(experiment, dataset, Layout(make_mesh(data=1)), 0, config.evaluation, str(data_dir))
    assert referred == {"ngrams": {4}, "mauve": {word["validation"]}}
    likelihood = []
    monkeypatch.setattr(
        evaluator, "_of_rows", {"bound": lambda params, ids, key: likelihood.append(ids) or jnp.float32(ids[:, 1])}
    )
    monkeypatch.setattr(evaluation.naive, "SAMPLERS", {"of train": lambda rows, num, seed: rows[:num]})
    monkeypatch.setattr(evaluator, "_samplers", {})
    monkeypatch.setattr(evaluator, "_trajectories", {})
    result = evaluator(None, 1, 8)
    assert set(likelihood[0][:, 1].tolist()) == {4}
    assert judged == [3, 5]
    assert result.texts["held_out"] == [" ".join([word["test"]] * 18)] * 8
    assert result.metrics["samples/held_out/ngram_distance_1"] == 1.0


# --- which parameters --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def averaged(tmp_path_factory, data_dir):
    """(directory of a run, its average, what evaluations were shown) whose live parameters are others."""
    shown, workdir = [], tmp_path_factory.mktemp("averaged") / "run"

    class Watching:
        def __init__(self, *args):
            pass

        def __call__(self, params, step, num_samples, final=False):
            shown.append((step, jax.tree.map(np.asarray, params)))
            return Evaluation(step, {}, {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "Evaluator", Watching)
        train(run_config(data_dir, steps=3, **{"checkpoint.every": 1, "evaluation.every": 2}), workdir)
    states = {step: ocp.load(workdir / "checkpoints" / str(step)) for step in (2, 3)}
    for state in states.values():
        pairs = zip(jax.tree.leaves(state["params"]), jax.tree.leaves(state["ema"]), strict=True)
        assert np.mean([(np.asarray(live) != np.asarray(mean)).any() for live, mean in pairs]) > 0.3
    return workdir, {step: state["ema"] for step, state in states.items()}, shown


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_average_is_judged(averaged):
    _, means, shown = averaged
    assert [step for step, _ in shown] == [2, 3]
    for step, params in shown:
        assert_equal(params, means[step])


def test_a_run_is_judged_only_at_its_end_where_evaluation_every_is_zero(data_dir, tmp_path):
    from toy import NoEvaluation

    judged = []

    class Counting(NoEvaluation):
        def __call__(self, params, step, num_samples, final=False):
            judged.append((step, final))
            return super().__call__(params, step, num_samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "Evaluator", Counting)
        train(run_config(data_dir, steps=3, **{"checkpoint.every": 1, "evaluation.every": 0}), tmp_path / "run")
    assert judged == [(3, True)]


def test_the_average_is_sampled_and_exported(averaged, tmp_path):
    workdir, means, _ = averaged
    layout = Layout(make_mesh(data=1))
    assert_equal(load_trained(workdir, layout).params, means[3])
    export(str(workdir), str(tmp_path / "out"), layout, format="params")
    assert_equal(load_trained(tmp_path / "out", layout).params, means[3])


# --- on which devices --------------------------------------------------------------------------------------------


def flops(traced):
    """Of each device, by XLA's own account."""
    return traced.lower().compile().cost_analysis()["flops"]


def test_each_device_computes_its_own_held_out_rows(data_dir):
    """An eighth of the products on each of eight devices, of 37 rows too; and the same numbers."""
    config = run_config(data_dir, **{"evaluation.held_out": 64, "evaluation.held_out_batch": 64})
    one, eight = (
        flops(ahead_of_time.trace_held_out(config, jax.devices()[:n]).traced)
        for n in (1, 8)
        if not config.mesh.update(data=n)
    )
    assert eight == pytest.approx(one / 8, rel=0.1)
    experiment, rows = build(config, 99), opened(config).validation.rows(0, 37)
    params = experiment.net.init(jax.random.key(0))
    values = []
    for n in (1, 8):
        bound = on_rows(Layout(make_mesh(data=n)), experiment.net, experiment.family.bound)
        values.append(np.asarray(bound(params, rows, jax.random.key(1))))
    np.testing.assert_allclose(*values, rtol=2e-5)
    # One device computes what it did without any placing, to the last digit.
    plain = jax.jit(lambda params, ids, key: experiment.family.bound(experiment.net, params, {"ids": ids}, key))
    np.testing.assert_array_equal(values[0], plain(params, rows, jax.random.key(1)))


# --- before anything is trained -----------------------------------------------------------------------------------


class Named(LanguageModel):
    """A judge with a name that reads the lengths of texts, unless it is `broken`."""

    def __init__(self, name, broken=False):
        def nats(ids):
            if broken:
                raise OSError("weights are cut short\nand more")
            return np.ones((len(ids), ids.shape[1] - 1))

        super().__init__(name, lambda texts: [[1] * len(text.split()) for text in texts], nats, 0, 19)


def test_what_can_fail_of_the_judges_fails_before_training(data_dir, tmp_path, monkeypatch):
    judges = {"runs/a/seed0": "seed0", "runs/b/seed0": "seed0", "runs/b/broken": "broken", "runs/c/seed1": "seed1"}
    monkeypatch.setattr(panel, "run_judge", lambda rest, length, layout: Named(judges[rest], "broken" in rest))
    monkeypatch.setattr(training, "jit_step", None)

    def start(*names):
        return train(
            run_config(data_dir, **{"evaluation.language_models": tuple(f"run:{name}" for name in names)}),
            tmp_path / "run",
        )

    with pytest.raises(
        ValueError, match="'run:runs/a/seed0' and 'run:runs/b/seed0' are both called 'seed0' in the metr"
    ):
        start("runs/a/seed0", "runs/c/seed1", "runs/b/seed0")
    with pytest.raises(ValueError, match="'run:runs/c/seed1' and 'run:runs/c/seed1' are both called 'seed1'"):
        start("runs/c/seed1", "runs/c/seed1")
    with pytest.raises(ValueError, match="the judge 'run:runs/b/broken' cannot read this run's text: weights are cut"):
        start("runs/c/seed1", "runs/b/broken")
    with pytest.raises(TypeError, match="NoneType"):  # the training step, with judges that can read
        start("runs/c/seed1", "runs/a/seed0")
    monkeypatch.setattr(panel, "make_judges", lambda dataset: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        start()


def test_steps_that_a_sampler_does_not_take_are_an_error_before_training(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "jit_step", None)
    with pytest.raises(ValueError, match="takes 18 steps, got 8: set evaluation.steps or --steps to 18"):
        train(run_config(data_dir, "autoregressive", **{"evaluation.steps": (8,)}), tmp_path / "run")


def test_a_split_without_rows_is_named_before_training(data_dir):
    config = run_config(data_dir)
    data = opened(config)
    empty = SimpleNamespace(**{name: getattr(data, name) for name in ("tokenizer", "length", "grammar", "validation")})
    empty.test = []
    with pytest.raises(ValueError, match="the test split has no row, and evaluations read it"):
        panel.Panel(empty, (), "", None)


def test_results_that_cannot_be_written_are_an_error_before_any_work(averaged, tmp_path, monkeypatch):
    workdir, _, _ = averaged
    (tmp_path / "file").write_text("")
    out = tmp_path / "file/results"
    monkeypatch.setattr(evaluation, "Evaluator", None)
    said = f"flowlm: {tmp_path / 'file'} is a file, where a directory is wanted: give another place"
    assert error_of("evaluate", f"--checkpoint={workdir}", f"--results={out}").strip() == said
    assert error_of("report", str(workdir), f"--out={out}").strip() == said
    storage.check_writable(tmp_path / "new/results")
    assert not (tmp_path / "new").exists()


# --- files and terminals ------------------------------------------------------------------------------------------

MARKUP = "see [/usr/share] [b]bold[/b] :smile: [red]é\u4e2d"


def test_a_cut_evaluation_is_named(tmp_path):
    """By whatever reads it; and a new one appears whole or not at all."""
    run = tmp_path / "w/run"
    run.mkdir(parents=True)
    (run / "config.json").write_text('{"steps": 3}')
    path = run / "evaluation.json"
    result = Evaluation(3, {"samples/map@1/entropy": 1.0}, {"map@1": ["text"]})
    result.save(run)
    whole = path.read_text()
    path.write_text(whole[:40])
    for reader in (
        lambda: study.finished(run),
        lambda: results.compare([str(run)]),
        lambda: report.gather([str(tmp_path / "w")]),
    ):
        with pytest.raises(ValueError, match=f"{path} is cut or damaged .*restore it from a copy, or make it again"):
            reader()
    path.write_text(whole)
    failing = Evaluation(4, {"samples/map@1/entropy": 2.0}, {"map@1": ["text"]}, {"map@1": {1, 2}})
    with pytest.raises(TypeError):
        failing.save(run)
    assert path.read_text() == whole and study.finished(run)
    assert not list(run.glob("*.tmp"))


def test_what_users_and_models_wrote_is_shown_as_it_stands(tmp_path, capsys):
    directory = tmp_path / "run[1] [b]$x$"
    metrics = {
        "samples/map@1/[i]judge_nats": 1.0,
        "samples/map@1/$judge^_nats": 2.0,
        "samples/held_out/[i]judge_nats": 1.5,
    }
    result = Evaluation(3, metrics, {"map@1": [MARKUP], "held_out": ["real"]}, notes=("a [note]",))
    result.save(directory)
    result.show()
    results.compare([str(directory)])
    printed = capsys.readouterr().out
    assert f"  {MARKUP}\n" in printed
    assert printed.count("[i]judge  $judge^") == 2 and "a [note]" in printed
    assert "run[1] [b]$x$" in printed and "run[1] [b]$x$: a [note]" in printed
    assert (directory / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert MARKUP in (directory / "samples.txt").read_text("utf-8")


def test_a_terminal_that_is_not_utf8_shows_what_it_can(tmp_path):
    """And files are UTF-8 wherever they are written."""
    Evaluation(3, {"samples/map@1/entropy": 1.0}, {"map@1": [MARKUP]}).save(tmp_path / "run")
    environment = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    line = [sys.executable, "-m", "flowlm", "compare", f"--runs={tmp_path / 'run'}"]
    done = subprocess.run(
        line, cwd=ROOT, env=os.environ | environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()
    assert "see [/usr/share] [b]bold[/b] :smile: [red]??" in " ".join(done.stdout.decode("ascii").split())
    code = "import sys; from flowlm.evaluation.results import Evaluation; Evaluation(3, {}, {'a': [chr(0x4e2d)]}).save(sys.argv[1])"
    line = [sys.executable, "-c", code, str(tmp_path / "other")]
    subprocess.run(line, check=True, env=os.environ | environment | {"PYTHONPATH": str(ROOT)}, timeout=300)
    assert "\u4e2d" in (tmp_path / "other/samples.txt").read_text("utf-8")


# --- told to stop -------------------------------------------------------------------------------------------------


class Recorder:
    """An evaluator that is told to stop at some steps, once each."""

    events: list
    stops: set

    def __init__(self, *args):
        pass

    def __call__(self, params, step, num_samples, final=False):
        Recorder.events.append(("evaluate", step))
        if step in Recorder.stops:
            Recorder.stops.remove(step)
            raise processes.Stopped
        return Evaluation(step, {"samples/map@1/entropy": float(step)}, {"map@1": ["text"]})


@pytest.fixture
def events(monkeypatch):
    """What a training did, in order: saves and evaluations."""
    save = training.Checkpoints.save

    def spy(self, step, state):
        if step not in self.steps:
            Recorder.events.append(("save", step))
        save(self, step, state)

    monkeypatch.setattr(training.Checkpoints, "save", spy)
    monkeypatch.setattr(evaluation, "Evaluator", Recorder)
    Recorder.events, Recorder.stops = [], set()
    return Recorder.events


def judged_steps(workdir):
    return [line["step"] for line in training.read_metrics(workdir) if "samples/map@1/entropy" in line]


def test_a_checkpoint_is_saved_before_the_evaluation_of_its_step(events, data_dir, tmp_path):
    train(run_config(data_dir, steps=5, **{"checkpoint.every": 2, "evaluation.every": 2}), tmp_path / "run")
    assert events == [(what, step) for step in (2, 4, 5) for what in ("save", "evaluate")]
    lines = training.read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
    assert judged_steps(tmp_path / "run") == [2, 4, 5]


def test_stopped_in_an_evaluation_a_run_has_saved_and_evaluates_again(events, data_dir, tmp_path, capsys):
    """In its middle, at a step with no checkpoint due, and at its end; the metrics are those of a run that was not stopped."""
    config = run_config(data_dir, steps=4, **{"checkpoint.every": 100, "evaluation.every": 2})
    Recorder.stops = {2, 4}
    train(config, tmp_path / "run")
    assert events == [("evaluate", 2), ("save", 2)]
    assert "told to stop: at step 2" in capsys.readouterr().err
    events.clear()
    train(config, tmp_path / "run")
    assert events == [("evaluate", 2), ("save", 4), ("evaluate", 4)]
    assert "told to stop: all 4 steps are saved, and the same command evaluates them" in capsys.readouterr().err
    assert not (tmp_path / "run/evaluation.json").exists()
    events.clear()
    train(config, tmp_path / "run")
    assert events == [("evaluate", 4)]
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["step"] == 4
    assert judged_steps(tmp_path / "run") == [2, 4]
    losses = [line["step"] for line in training.read_metrics(tmp_path / "run") if "loss" in line]
    assert losses == [1, 2, 3, 4]
    # What is in the metrics already is not made again.
    events.clear()
    longer = config.copy_and_resolve_references()
    longer.steps = 5
    train(longer, tmp_path / "run")
    assert events == [("save", 5), ("evaluate", 5)]


def test_an_evaluation_asks_between_samplers_and_judges(data_dir, monkeypatch):
    """Whether to stop: before every call of a sampler, every judge and every likelihood."""
    config = run_config(data_dir, **{"evaluation.steps": (1,), "evaluation.taus": (0.2, 0.8)})
    evaluator = Evaluator(build(config, 99), opened(config), Layout(make_mesh(data=1)), 0, config.evaluation, "")
    asked = []
    for module in (evaluation, sampling, processes):
        monkeypatch.setattr(module, "check_stopped", lambda: asked.append(len(asked)))
    params = build(config, 99).net.init(jax.random.key(0))
    totals, begun = [], []

    @contextlib.contextmanager
    def parts(total):
        totals.append(total)
        yield begun.append

    monkeypatch.setattr(evaluation.progress, "parts", parts)
    evaluator(params, 1, 300)
    # Two cross-entropies at two times and a bound; two samplers of two calls; three judges of two samplers and three references;
    # and a trajectory of each sampler.
    assert len(asked) == 2 * 2 + 1 + 2 * 2 + 3 * (2 + 3) + 2
    # Before each of them the bar is told what comes.
    assert totals == [len(asked)] == [len(begun)]
    assert begun[4:15] == [
        "16 held-out rows: likelihood",
        *["300 rows at 1 step: sampling"] * 4,
        *(f"300 rows at 1 step: judge {i} of 3" for i in (1, 2, 3, 1, 2, 3)),
    ]
    assert begun[-5:] == [
        *(f"300 held-out rows: judge {i} of 3" for i in (1, 2, 3)),
        *(f"following 2 samples of {name}@1" for name in ("euler", "ancestral")),
    ]

    def stop():
        raise processes.Stopped

    monkeypatch.setattr(processes, "check_stopped", stop)
    with pytest.raises(processes.Stopped):
        evaluator(params, 1, 16)
