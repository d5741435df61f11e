"""What is seen while work is done: the bar of an evaluation, one line of a preparation, and no line that libraries write."""

import io
import logging
import os
import re
import types

import absl.flags
import absl.logging
import pytest

from flowlm import main
from flowlm.cli.command import Command
from flowlm.data import builders, open_dataset
from flowlm.runs import boards, metrics
from flowlm.system import platforms, processes, progress


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.fixture
def shown(monkeypatch):
    """What three parts of work write on standard error."""

    def run(terminal):
        stream = Stream(terminal)
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setenv("COLUMNS", "80")
        with progress.parts(3) as begin:
            for what in ("1,024 rows at 64 steps: sampling", "judge 1 of 2", "judge 2 of 2"):
                begin(what)
        return stream.getvalue()

    return run


def test_a_terminal_sees_what_is_done_now_and_how_many_parts_are_done(shown):
    lines = [line.strip() for line in re.split("[\r\n]", shown(True)) if line.strip()]
    told = [re.fullmatch(r"(.+) \|.*\| (\d/3) .*", line) for line in lines if line[0] != "|"]
    assert [found.groups() for found in told] == [
        ("1,024 rows at 64 steps: sampling", "0/3"),
        ("judge 1 of 2", "1/3"),
        ("judge 2 of 2", "2/3"),
    ]
    assert max(map(len, lines)) <= 80


def test_what_is_no_terminal_sees_nothing(shown):
    assert shown(False) == ""


def test_other_processes_than_the_first_show_nothing(shown, monkeypatch):
    monkeypatch.setattr(processes, "is_first", lambda: False)
    assert shown(True) == ""


def test_data_are_prepared_with_a_line_of_ours_and_opened_with_none(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setattr(builders, "GRAMMAR_ROWS", dict.fromkeys(("train", "validation", "test"), 64))
    assert len(open_dataset("grammar98", "grammar98", 19, tmp_path).test) == 64
    out, err = capfd.readouterr()
    lines = [line for line in re.split("[\r\n]+", err) if line.strip()]
    assert out == "" and lines[:2] == [
        "preparing grammar98 in rows of 19, once:",
        f"  {next(tmp_path.glob('tfds/*/*/*'))}",
    ]
    open_dataset("grammar98", "grammar98", 19, tmp_path)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_warning_is_its_words_alone(monkeypatch):
    """No date, thread or line of code, which nobody who gives a command looks for."""
    said = io.StringIO()
    monkeypatch.setattr(absl.logging.get_absl_handler().python_handler, "stream", said)
    command = Command("warn", "warns", [], lambda values: absl.logging.get_absl_handler().handle(warning))
    warning = logging.makeLogRecord(
        {"name": "absl", "levelno": logging.WARNING, "msg": "%d rows left out", "args": (3,)}
    )
    absl.flags.FLAGS.mark_as_parsed()
    monkeypatch.setattr(absl.flags.FLAGS["verbosity"], "present", 0)  # which a line before may have set
    main.carry_out(main.Call(command, absl.flags.FlagValues()))
    assert said.getvalue() == "3 rows left out\n"


@pytest.mark.parametrize(
    ("modules", "devices", "told", "wanted"),
    [
        ({"libtpu"}, (), None, "cpu"),
        ({"libtpu"}, ("accel0",), None, None),
        ({"libtpu"}, ("vfio/0",), None, None),
        ({"libtpu", "jax_plugins"}, (), None, None),
        (set(), (), None, None),
        ({"libtpu"}, (), "tpu", "tpu"),
    ],
)
def test_libtpu_is_asked_only_where_there_may_be_a_tpu(modules, devices, told, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(platforms.importlib.util, "find_spec", lambda name: name if name in modules else None)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if told:
        monkeypatch.setenv("JAX_PLATFORMS", told)
    for name in devices:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    platforms.leave_out_absent_tpu(tmp_path)
    assert os.environ.get("JAX_PLATFORMS") == wanted


def test_a_board_gets_finite_numbers_alone(tmp_path, monkeypatch):
    """TensorBoard draws no others, and warns at each."""
    written = []
    board = types.SimpleNamespace(add_scalar=lambda *scalar: written.append(scalar), close=lambda: None)
    monkeypatch.setitem(main.sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=lambda path: board))
    writer = metrics.MetricWriter(tmp_path, boards=[boards.TensorBoard(tmp_path)])
    writer.write(3, {"loss": 0.5, "entropy": float("nan"), "nats": float("inf")})
    writer.close()
    assert written == [("loss", 0.5, 3)]
    assert metrics.read_metrics(tmp_path) == [{"step": 3, "loss": 0.5, "entropy": None, "nats": None}]
