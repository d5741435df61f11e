"""Says of a wrong command, flag or setting which one was meant, in one line."""

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from absl.flags import FlagValues

from flowlm.engine import overrides

if TYPE_CHECKING:
    from flowlm.cli.command import Command


def listed(names: Sequence[str], last: str = "and") -> str:
    """Names as a sentence lists them: a, b and c."""
    return f" {last} ".join([", ".join(names[:-1])] * (len(names) > 1) + list(names[-1:]))


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Whichever of `names` is most like a name that is none of them; None where none is like it."""
    return next(iter(difflib.get_close_matches(name, list(names), 1, cutoff)), None)


# What Python says of a value that it cannot read, and what is meant.
MEANT = {
    "invalid literal for int\\(\\) with base 10: .*": "not a whole number",
    "could not convert string to float: .*": "not a number",
}


def in_one_line(error: BaseException) -> str:
    """What an error of absl or ml_collections says. A KeyError shows the repr of its message, at times a repr of a repr."""
    message = str(error.args[0] if error.args else error).replace("\\n", " ")
    for said, meant in MEANT.items():
        message = re.sub(said, meant, message)
    return " ".join(re.sub(r"[\\']", "", message).strip('"').split())


def told(error: BaseException) -> str:
    """The words of an error; of an error of the operating system the path and the reason, without its number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    return str(error)


def unknown_command(name: str, names: Iterable[str]) -> str:
    close = nearest(name, names)
    return f"there is no command {name}: " + (f"did you mean {close}?" if close else "`flowlm --help` lists them")


def check_flags(
    command: "Command", given: Sequence[tuple[str, str | None]], values: FlagValues, commands: Sequence["Command"]
) -> None:
    """Checks the names of flags before any is read, because reading them loads an experiment and imports jax, which takes seconds.

    Args:
      given: (name, value) of the flags on its line.
      values: the flags that are known.
      commands: all, one of which a flag may belong to.

    Raises:
      ValueError: one is not the command's, or is no setting of its experiment; names what was meant. Or the experiment cannot be
        loaded.
    """
    wrong, settings = [], []
    for name, value in given:
        if command.flag("config") and (found := re.fullmatch(r"(?:no)?config\.(.*)", name)):
            settings.append((found[1], value))
        elif name not in values and not (name[:2] == "no" and name[2:] in values and values[name[2:]].boolean):
            wrong.append((name, value))
    if wrong:
        raise ValueError(_unknown_flag(command, *wrong[0], commands))
    if command.flag("config") is None:
        return
    experiment = dict(given).get("config")
    if experiment is None:
        if settings:
            raise ValueError(f"--config.{settings[0][0]} changes an experiment: give --config=experiments/NAME.py too")
        return
    known = overrides.names(overrides.load_experiment(experiment))
    for name, value in settings:
        if name not in known:
            meant = _setting(name, known) or nearest(name, known)
            hint = f"--config.{meant}{_behind(value)}" if meant else "flowlm/config.py lists them"
            raise ValueError(f"{experiment} has no setting {name}: {hint}")


def _behind(value: str | None) -> str:
    return "" if value is None else f"={value}"


def _setting(name: str, known: Iterable[str]) -> str | None:
    """The setting that `name` means, even if it names no section or a wrong one."""
    known = list(known)
    if name in known:
        return name
    deepest_first = sorted(known, key=lambda full: -full.count("."))
    # Of several settings with one last name the one in the uppermost section counts.
    ends = {full.rpartition(".")[2]: full for full in deepest_first}
    last = name.rpartition(".")[2]
    close = last if last in ends else nearest(last, ends, 0.8)
    return ends.get(close) if close else None


def _objective_settings() -> set[str]:
    """What --objective may set, of any family."""
    from flowlm.config import objective
    from flowlm.objectives import FAMILIES

    return {key for family in FAMILIES for key in objective(family)}


def _unknown_flag(command: "Command", name: str, value: str | None, commands: Sequence["Command"]) -> str:
    """Says of a flag that is not the command's what was meant: a flag of its own, a setting, or a flag of another command."""
    wrong = f"--{name} is no flag of {command.name}"
    own = [flag.name for flag in command.flags]
    if close := nearest(name, own, 0.75):
        return f"{wrong}: --{close}{_behind(value)}"
    if "config" in own:
        from flowlm.config import defaults

        if meant := _setting(name, overrides.names(defaults())):
            return f"{wrong}: --config.{meant}{_behind(value)}"
    if "objective" in own and name in _objective_settings():
        return f"{wrong}: --objective={name}{_behind(value)}"
    if others := [other.name for other in commands if other.flag(name)]:
        return f"{wrong}, but of {listed(others)}"
    if close := nearest(name, own):
        return f"{wrong}: --{close}{_behind(value)}"
    return f"{wrong}: `flowlm {command.name} --help` lists them"
