"""The bar of an evaluation: what a terminal sees, and that nothing else sees anything."""

import io
import re

import pytest

from flowlm import processes, progress


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
