"""What Weights & Biases is given: the lines of metrics.jsonl, samples, settings; and a run that goes on as the same one."""

import json
import os
import struct
import subprocess
import sys
import types

import pytest
from command_line import error_of
from test_bad_input import CONFIG, ROOT, nothing_expensive  # noqa: F401
from toy import experiment_file, run_config

from flowlm.evaluation import evaluator as evaluation
from flowlm.runs.boards import WeightsAndBiases
from flowlm.runs.metrics import MetricWriter, read_metrics
from flowlm.training import train

TEXTS = {"map@1": ["one", "two"], "held_out": ["three"]}


class Told:
    """An evaluation of little cost."""

    def __init__(self, *args):
        pass

    def __call__(self, params, step, num_samples, final=False):
        return evaluation.Evaluation(
            step, {"samples/map@1/entropy": step / 8, "samples/map@1/nats": float("nan")}, TEXTS
        )


class _Stub(types.ModuleType):
    """Stands for the package: it keeps what it is given."""

    Error = type("Error", (Exception,), {})

    def __init__(self):
        super().__init__("wandb")
        self.runs = []

    def Settings(self, **settings):
        return settings

    def Table(self, columns, data):
        return [dict(zip(columns, row)) for row in data]

    def init(self, **told):
        run = types.SimpleNamespace(told=told, logged=[], ended=[])
        run.log = lambda values, step: run.logged.append((step, values))
        run.finish = lambda exit_code: run.ended.append(exit_code)
        self.runs.append(run)
        return run


@pytest.fixture
def stub(monkeypatch):
    module = _Stub()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(evaluation, "Evaluator", Told)
    return module


def finite(line):
    return {key: value for key, value in line.items() if key != "step" and value is not None}


def test_it_is_given_what_metrics_jsonl_has(stub, data_dir, tmp_path):
    small = {"model.width": 16, "model.blocks": 1, "steps": 4, "evaluation.every": 2, "wandb": True}
    train(run_config(data_dir, **small), tmp_path / "run")
    (run,) = stub.runs
    assert run.told["name"] == "run" and run.told["config"]["model"]["width"] == 16
    lines = read_metrics(tmp_path / "run")
    assert [step for step, _ in run.logged] == [line["step"] for line in lines]
    for (_, values), line in zip(run.logged, lines, strict=True):
        assert {key: value for key, value in values.items() if key != "texts"} == finite(line)
    table = [{"sampler": name, "text": text} for name, some in TEXTS.items() for text in some]
    assert [(step, values["texts"]) for step, values in run.logged if "texts" in values] == [(2, table), (4, table)]
    assert run.ended == [0]


def test_it_goes_on_as_the_same_run_and_an_error_does_not_finish_it(stub, tmp_path):
    config = run_config("")
    for folder in ("one", "one", "two"):
        (tmp_path / folder).mkdir(exist_ok=True)
        writer = MetricWriter(tmp_path / folder, boards=[WeightsAndBiases(tmp_path / folder, config)])
        with pytest.raises(FloatingPointError):
            try:
                raise FloatingPointError
            finally:
                writer.close()
    first, second, other = stub.runs
    assert first.told["id"] == second.told["id"] != other.told["id"] and first.ended == [1]


def test_what_it_says_where_it_cannot_begin_is_one_line(stub, tmp_path, monkeypatch):
    def refuse(**told):
        raise stub.Error("api_key not configured (no-tty).\ncall wandb.login(key=[your_api_key])")

    monkeypatch.setattr(stub, "init", refuse)
    wanted = r"cannot begin \(api_key not configured \(no-tty\)\): `wandb login`, or set WANDB_MODE=offline$"
    with pytest.raises(ValueError, match=wanted):
        WeightsAndBiases(tmp_path, run_config(""))


@pytest.mark.parametrize(("setting", "package"), [("wandb", "wandb"), ("tensorboard", "tensorboardX")])
def test_a_missing_extra_is_named_before_anything_else(setting, package, nothing_expensive, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, package, None)
    told = error_of("train", CONFIG, f"--workdir={tmp_path / 'run'}", f"--config.{setting}=True")
    assert told == f"flowlm: --config.{setting}=True needs {package}: pip install -e .[{setting}]"
    assert not (tmp_path / "run").exists()


# --- the package itself, offline -----------------------------------------------------------------------------------


BLOCK = 1 << 15


def messages(content):
    """Records of a .wandb file: a log of LevelDB behind a head of 7 bytes, in blocks of parts (checksum, size, kind, bytes)."""
    assert content[:4] == b":W&B"
    place, whole = 7, b""
    while place + 7 <= len(content):
        if BLOCK - place % BLOCK < 7:  # too few for a part: zeros
            place += BLOCK - place % BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def records(directory):
    """What the package wrote of each of its runs there, oldest first: (settings, {step: values}, tables, exit code)."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(directory.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        settings, history, ended = {"id": path.stem.removeprefix("run-")}, {}, None
        for record in map(Record.FromString, messages(path.read_bytes())):
            for each in (*record.run.config.update, *record.config.update):
                settings[each.key] = json.loads(each.value_json)
            if record.history.item:
                values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                history.setdefault(values["_step"], {}).update(values)
            ended = record.exit.exit_code if record.HasField("exit") else ended
        tables = [json.loads(file.read_text()) for file in sorted(path.parent.glob("files/media/table/*.json"))]
        yield settings, history, tables, ended


@pytest.mark.needs("wandb")
def test_offline_all_of_a_run_is_on_this_disk(data_dir, tmp_path):
    """By the command, twice: the second goes on."""
    small = {"model.width": 16, "model.blocks": 1, "evaluation.every": 2}
    experiment = experiment_file(tmp_path / "experiment.py", data_dir, **small)
    with experiment.open("a") as file:
        file.write("\nimport test_boards\nevaluator.Evaluator = test_boards.Told\n")
    told = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "WANDB_SILENT": "true"}
    for steps in (2, 4):
        line = ["train", f"--config={experiment}", f"--workdir={tmp_path / 'run'}", "--config.wandb=True"]
        command = [sys.executable, "-m", "flowlm.main", *line, f"--config.steps={steps}"]
        done = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    assert_kept(tmp_path / "run", *records(tmp_path / "run"))


def assert_kept(run, first, second):
    """That two runs of Weights & Biases are what a run directory has, which was trained for two steps and for two more."""
    (settings, history, tables, ended), config = second, json.loads((run / "config.json").read_text())
    assert {key: settings[key] for key in config} == config and first[0]["steps"] == 2
    assert first[0]["id"] == settings["id"] and first[3] == ended == 0
    assert (first[1].keys(), history.keys()) == ({1, 2}, {3, 4})
    for line in read_metrics(run):
        kept, told = (first[1] | history)[line["step"]], finite(line)
        assert {key: kept[key] for key in told} == pytest.approx(told)
    for table in (*first[2], *tables):
        assert table["columns"] == ["sampler", "text"]
        assert table["data"] == [[name, text] for name, some in TEXTS.items() for text in some]
    assert len(first[2]) == len(tables) == 1
