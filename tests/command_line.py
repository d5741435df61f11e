"""`flowlm` as a user gives it, in this process: a subprocess would spend seconds on importing jax for each line."""

import contextlib
import io
from typing import NamedTuple

import pytest
from absl.testing import flagsaver

from flowlm import main
from flowlm.system import processes, terminal


class Ended(NamedTuple):
    """What a shell sees of a command that has ended."""

    status: int
    out: str
    err: str


def flowlm(*arguments) -> Ended:
    """Gives the command these arguments."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(flagsaver.flagsaver())  # of absl's own flags, which are of the process
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(processes, "start", lambda distributed: None)  # only at the start of a process
        patch.setattr(terminal, "command", lambda: "flowlm")  # wherever the tests run
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            main.carry_out(main.read_call(["flowlm", *map(str, arguments)]))
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else 1  # as Python does with a message
            if isinstance(exit.code, str):
                err.write(exit.code + "\n")
    return Ended(status, out.getvalue(), err.getvalue())


def error_of(*arguments) -> str:
    """What a command says before it ends with exit status 1."""
    ended = flowlm(*arguments)
    assert ended.status == 1, ended
    assert "Traceback" not in ended.err
    return ended.err[ended.err.index("flowlm: ") :].strip()
