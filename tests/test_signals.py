"""Ctrl-C, SIGTERM and SIGHUP: one line and the right exit status, whatever the process is in the middle of."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flowlm.cli.commands import COMMANDS

ROOT = Path(__file__).parents[1]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
_BEGIN = """
import hashlib, os, signal, sys, threading, time
from flowlm.system import signals
signals.GRACE = 0.3
signals.listen()
def tell(name=sys.argv[1]):
    os.kill(os.getpid(), int(name))
def compute():
    # As in a compiled program, Python's handlers wait until it returns, in some minutes.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
def tell_while_it_computes(times=1):
    def run():
        while sys._current_frames()[threading.main_thread().ident].f_code is not compute.__code__:
            time.sleep(0.01)
        for _ in range(times):
            time.sleep(0.1)
            tell()
    threading.Thread(target=run, daemon=True).start()
"""


def heeds_hangup():
    """SIGHUP as a terminal's children have it, though these tests be run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def ended(program, signum=signal.SIGINT, **how):
    """(exit status, lines on both streams) of a program that may send itself the signal."""
    line = [sys.executable, "-c", _BEGIN + program, str(int(signum))]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    how = {"preexec_fn": heeds_hangup} | how
    done = subprocess.run(line, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, timeout=60, **how)
    return done.returncode, [text for text in ((done.stdout or "") + (done.stderr or "")).splitlines() if text]


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize(
    "busy, closed", [("tell(); time.sleep(60)", ["closed"]), ("tell_while_it_computes(); compute()", [])]
)
def test_what_loses_nothing_ends_at_once_in_one_line(signum, busy, closed):
    """With 0 where the same command goes on, else as shells expect; what was opened is closed where Python can."""
    program = f"try:\n    {busy}\nfinally:\n    print('closed', flush=True)"
    assert ended(program, signum) == (128 + signum, [*closed, "flowlm: told to stop"])
    again = "signals.resumable('it goes on')\n" + program
    assert ended(again, signum) == (0, [*closed, "flowlm: told to stop: it goes on"])


@pytest.mark.parametrize("signum", SIGNALS)
def test_what_has_something_to_save_is_asked_to(signum):
    program = """
others = []
with signals.held(lambda: others.append(1)):
    tell()
    while not signals.told() or not others:
        time.sleep(0.01)
    time.sleep(2 * signals.GRACE)
    signals.say_stopped("at step 3")
print(others)
"""
    asked = ["flowlm: interrupted, so it saves and stops; Ctrl-C again ends it at once, unsaved"]
    assert ended(program, signum) == (
        0,
        ["[1]", *(asked if signum == signal.SIGINT else []), "told to stop: at step 3"],
    )


@pytest.mark.parametrize("held", [True, False])
def test_a_second_ctrl_c_ends_with_130_at_once(held):
    program = f"""
signals.GRACE = 600
signals.resumable("it goes on")
{"signals.hold()" if held else ""}
tell_while_it_computes(2)
compute()
"""
    status, lines = ended(program)
    assert status == 130 and len(lines) == 1


def test_what_was_said_when_the_signal_came_is_not_said_again():
    """Though who cleans up is faster than the thread that says it."""
    program = """
say = signals._say
signals._say = lambda text: (time.sleep(0.2), say(text))
signals.resumable("it goes on")
try:
    tell()
    time.sleep(60)
except signals.Stopped:
    signals.say_stopped("at step 2")
    raise
"""
    assert ended(program) == (0, ["flowlm: told to stop: it goes on"])


def test_an_exception_that_python_drops_is_raised_again():
    """As in a finaliser, which runs when an object is freed."""
    program = """
class Freed:
    def __del__(self):
        tell()
        time.sleep(0.01)
signals.GRACE = 600
Freed()
time.sleep(60)
"""
    assert ended(program) == (130, ["flowlm: told to stop"])


def test_an_error_is_shown_as_ever():
    status, lines = ended("1 / 0")
    assert status == 1 and lines[-1] == "ZeroDivisionError: division by zero"


def test_nohup_is_heeded():
    def ignored():
        return signal.signal(signal.SIGHUP, signal.SIG_IGN)

    assert ended("tell()\ntime.sleep(0.1)\nprint('alive')", signal.SIGHUP, preexec_fn=ignored) == (0, ["alive"])


def test_what_is_printed_to_a_terminal_that_is_gone_is_no_error(tmp_path):
    master, slave = pty.openpty()
    os.set_inheritable(slave, True)
    program = f"""
with signals.held():
    os.close({master})  # the terminal's last holder
    tell()
    while not signals.told():
        time.sleep(0.01)
    print("printed", flush=True)
    signals.say_stopped("at step 3")
open({str(tmp_path / "saved")!r}, "w").close()
"""
    line = [sys.executable, "-c", _BEGIN + program, str(int(signal.SIGHUP))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        line, stdout=slave, stderr=slave, env=environment, pass_fds=[master], preexec_fn=heeds_hangup
    )
    os.close(master)
    os.close(slave)
    assert child.wait(60) == 0 and (tmp_path / "saved").exists()


def test_signals_are_heard_before_anything_is_imported():
    """The command's modules take seconds to import; the first of them sends the signal here."""
    program = """
import flowlm, types
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "flowlm.main":
            tell()
            time.sleep(60)
sys.meta_path.insert(0, Slow())
from flowlm.__main__ import run
run()
"""
    assert ended(program) == (130, ["flowlm: told to stop"])


def test_commands_that_go_on_where_they_were():
    assert {command.name for command in COMMANDS if command.again} == {
        "train",
        "prepare",
        "prepare data",
        "evaluate",
        "study",
        "serve",
    }
