"""What a command is, and how its line is read: each has flags of its own, and no other flag is taken."""

import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from flowlm.cli import mistakes
from flowlm.engine import overrides

overrides.register()


class Flag(NamedTuple):
    """A flag of a command.

    Attributes:
      form: what help shows behind its equals sign, such as DIR; "" for a switch.
      define: makes the flag, given (values, line). The values are new for every line, so that no line sees what another said;
        --config alone reads the line, where it looks for its settings.
      is_output: whether it names a directory that the command writes.
    """

    name: str
    form: str
    help: str
    define: Callable[[flags.FlagValues, Sequence[str]], Any]
    is_output: bool = False

    @property
    def written(self) -> str:
        """The flag as it is written on a line."""
        return f"--{self.name}={self.form}" if self.form else f"--{self.name}"

    @property
    def alone(self) -> str:
        """The value as it is written on a line that leaves out the name of the flag."""
        return self.form.replace(",", " ")


def _flag(define, name: str, form: str, help: str, default: Any, *more: Any, is_output: bool = False) -> Flag:
    shown = ",".join(default) if isinstance(default, list) else default
    told = help if shown in (None, "", False) or isinstance(default, bool) else f"{help} (default: {shown})"

    def make(values, line):
        return define(name, default, help, *more, flag_values=values)

    return Flag(name, form, told, make, is_output)


def text(name: str, form: str, help: str, default: str | None = None) -> Flag:
    return _flag(flags.DEFINE_string, name, form, help, default)


def output(name: str, help: str) -> Flag:
    """A directory that the command writes."""
    return _flag(flags.DEFINE_string, name, "DIR", help, None, is_output=True)


def whole(name: str, help: str, default: int | None = None, low: int | None = None, high: int | None = None) -> Flag:
    return _flag(flags.DEFINE_integer, name, "N", help, default, low, high)


def number(name: str, help: str, default: float, low: float | None = None) -> Flag:
    return _flag(flags.DEFINE_float, name, "X", help, default, low)


def switch(name: str, help: str, default: bool = False) -> Flag:
    """A flag that is given or not; one that is on by default is switched off as --noNAME."""
    flag = _flag(flags.DEFINE_bool, name, "", help, default)
    return flag._replace(help=f"{help} (default: yes; --no{name}: no)") if default else flag


def words(name: str, form: str, help: str, default: Sequence[str] | None = None) -> Flag:
    """Values with commas between them."""
    return _flag(flags.DEFINE_list, name, form, help, default)


def choice(name: str, help: str, default: str | None, choices: Sequence[str]) -> Flag:
    def define(name, default, help, **more):
        return flags.DEFINE_enum(name, default, list(choices), help, **more)

    return _flag(define, name, "|".join(choices), help, default)


def flags_of_another(name: str, help: str) -> Flag:
    def make(values, line):
        return flags.DEFINE(overrides.FlagsParser(), name, None, help, flag_values=values)

    return Flag(name, "FLAG,FLAG,...", help, make)


def experiment(help: str) -> Flag:
    """The flag --config, with which come --config.KEY=VALUE for every setting of the experiment."""

    def make(values, line):
        return config_flags.DEFINE_config_file("config", None, help, flag_values=values, sys_argv=list(line))

    return Flag("config", "experiments/NAME.py[:ARG]", help, make)


class Command(NamedTuple):
    """A command.

    Attributes:
      name: a word, or two.
      summary: what it does, in one line.
      flags: all that it takes.
      run: carries it out, given the values of its flags.
      needs: names of flags without which it does nothing.
      place: the flag that words without a dash stand for, so `flowlm sample DIR` is `flowlm sample --checkpoint=DIR`.
      notes: what help says below the flags.
      again: what the same line does after Ctrl-C or another signal has ended the command, which then has exit status 0; "" where
        all of it has to be done again.
    """

    name: str
    summary: str
    flags: Sequence[Flag]
    run: Callable[[flags.FlagValues], None]
    needs: Sequence[str] = ()
    place: str = ""
    notes: str = ""
    again: str = ""

    def flag(self, name: str) -> Flag | None:
        return next((flag for flag in self.flags if flag.name == name), None)


def given(line: Sequence[str], known: Container[str] = ()) -> Iterator[tuple[str, str | None]]:
    """(name, value) of the flags on a line; the value of one without `=` is the word behind it, or None if that is a flag.

    Args:
      known: names of flags whose value is the word behind them whatever it looks like.
    """
    words = iter(enumerate(line))
    for i, word in words:
        if found := re.match("--?([A-Za-z][^=]*)(=?)(.*)", word, re.DOTALL):
            name, equals, value = found.groups()
            behind = line[i + 1] if i + 1 < len(line) else None
            if equals:
                yield name, value
            elif name in known:
                next(words, None)
                yield name, behind
            else:
                yield name, None if behind is None or behind.startswith("-") else behind


def parse(command: Command, line: Sequence[str], commands: Sequence[Command]) -> flags.FlagValues:
    """The values of a command's flags on a line, and of those that absl has for all programs.

    Args:
      line: the words behind the command's name.
      commands: all, one of which a flag may belong to.

    Raises:
      ValueError: what is wrong, in one line: a flag that is not this command's, a value that it cannot have, an experiment that
        cannot be loaded, a setting that it has not, or something that the command needs and that is missing.
    """
    values = flags.FlagValues()
    line = _experiment_first(line)
    for flag in command.flags:
        flag.define(values, line)
    for name in sorted(flags.FLAGS, key=len, reverse=True):
        if name not in values:  # a short name comes with its long one
            values[name] = flags.FLAGS[name]
    valued = {name for name in values if not values[name].boolean}
    mistakes.check_flags(command, list(given(line, valued)), values, commands)
    places = _read(values, line)
    flags.FLAGS.mark_as_parsed()
    if places:
        _fill(command, values, places)
    missing = [command.flag(name) for name in command.needs if not values[name].value]
    if missing:
        told = [flag.written + f" (or {flag.alone} alone)" * (flag.name == command.place) for flag in missing]
        raise ValueError(f"{command.name} needs {mistakes.listed(told)}: see `flowlm {command.name} --help`")
    return values


def _read(values: flags.FlagValues, line: Sequence[str]) -> list[str]:
    """Reads a line into values; its words without a dash. Raises ValueError: a value that a flag cannot have, in one line."""
    try:
        return values(["flowlm", *line])[1:]
    except (flags.Error, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(mistakes.in_one_line(error)) from error


def configured(path: str, changes: Mapping[str, Any]) -> ConfigDict:
    """The settings that `--config=PATH --config.KEY=VALUE ...` makes. Raises ValueError as `parse`."""
    line = [f"--config={path}", *(f"--config.{key}={value}" for key, value in changes.items())]
    command, values = Command("experiment", "", [experiment("")], lambda values: None), flags.FlagValues()
    command.flags[0].define(values, line)
    mistakes.check_flags(command, list(given(line)), values, [])
    _read(values, line)
    return values.config


def _experiment_first(line: Sequence[str]) -> list[str]:
    """A line with the last experiment that it names in front, because the settings that may follow are those of that experiment."""
    experiments, others, words = [], [], iter(line)
    for word in words:
        if word in ("--config", "-config") and (behind := next(words, None)) is not None:
            word = f"--config={behind}"
        (experiments if re.match("--?config=", word) else others).append(word)
    return experiments[-1:] + others


def _fill(command: Command, values: flags.FlagValues, places: list[str]) -> None:
    """Gives words without a dash to the flag that they stand for. Raises ValueError: there is none, or they are too many."""
    if not command.place:
        raise ValueError(f"{command.name} takes flags only, got {' '.join(places)}")
    if values[command.place].present:
        raise ValueError(f"give {' '.join(places)} or --{command.place}, not both")
    several = isinstance(values[command.place].parser, flags.ListParser)
    if len(places) > 1 and not several:
        raise ValueError(
            f"{command.name} takes one {command.flag(command.place).form}, got {len(places)}: {' '.join(places)}"
        )
    setattr(values, command.place, places if several else places[0])
