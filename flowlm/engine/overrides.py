"""How values are given on the command line: settings as --config.key=value, and flags that hold other flags.

Of several flags of one setting the last counts, whatever its type. None unsets a setting that may be unset; config.check_settings
refuses it for all others.
"""

import ast
import difflib
import re
import runpy
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.tuple_parser import TupleParser


class _Optional(flags.ArgumentParser):
    """A parser that reads None beside what another one reads."""

    def __init__(self, parser: flags.ArgumentParser):
        self._parser = parser
        self.syntactic_help = parser.syntactic_help

    def parse(self, argument: str):
        return None if argument in (None, "None") else self._parser.parse(argument)

    def flag_type(self) -> str:
        return self._parser.flag_type()


class _Tuple(flags.ArgumentParser):
    """A tuple from one flag, because the library's own parser joins all flags of one name. Words need no quotes: a,b."""

    def parse(self, argument: str):
        if isinstance(argument, str) and not re.search(r"['\"()\[\]{}\s]", argument):
            try:
                ast.literal_eval(argument)
            except (ValueError, SyntaxError):
                return tuple(filter(None, argument.split(",")))
        return TupleParser().parse(argument)

    def flag_type(self) -> str:
        return "tuple"


def register() -> None:
    """Makes ml_collections read settings by these parsers. To be called before flags are parsed."""
    readers = {float: flags.FloatParser(), int: flags.IntegerParser(), str: flags.ArgumentParser()}
    for kind, parser in readers.items():
        config_flags.register_flag_parser_for_type(kind, _Optional(parser))
    config_flags.register_flag_parser_for_type(tuple, _Tuple())


class FlagsParser(flags.ListParser):
    """Flags with commas between them. A comma inside of a value, such as a tuple's, is part of it."""

    def parse(self, argument: str) -> list[str]:
        out: list[str] = []
        for part in super().parse(argument):
            if out and not re.match("--?[a-z]", part):
                out[-1] += f",{part}"
            else:
                out.append(part)
        return out


def call(path: str, function: str, *arguments: str) -> Any:
    """What a function of a Python file of the user's returns.

    Raises:
      ValueError, FileNotFoundError: the file cannot be run or has no such function, in one line; or the function raises it.
    """
    try:
        made = runpy.run_path(path)
        if function not in made:
            raise ValueError(f"{path} has no {function}: give another file")
        return made[function](*arguments)
    except (ValueError, FileNotFoundError):
        raise
    except Exception as error:  # whatever such a file may do
        place, told = ":".join([path, *arguments]), " ".join(str(error).split())
        raise ValueError(f"{place} cannot be loaded: {type(error).__name__}: {told}") from error


def load_experiment(experiment: str) -> ConfigDict:
    """The settings of `FILE.py[:ARGUMENT]`, locked.

    Raises:
      ValueError: there is no such file, it cannot be run, or it does not know the argument; in one line.
    """
    path, colon, argument = experiment.partition(":")
    if not Path(path).is_file():
        known = sorted(str(p) for p in Path("experiments").glob("*.py") if "def get_config" in p.read_text("utf-8"))
        close = difflib.get_close_matches(path, known, 1)
        there = f"there are {', '.join(known)}" if known else "run from a checkout, there it is experiments/NAME.py"
        raise ValueError(f"no experiment {path}: " + (f"did you mean {close[0]}?" if close else there))
    config = call(path, "get_config", *[argument] * bool(colon))
    if not isinstance(config, ConfigDict):
        raise ValueError(f"get_config of {path} makes no ConfigDict: begin with flowlm.config.defaults()")
    return config.lock()


def names(config: ConfigDict) -> list[str]:
    """What --config.NAME=value may name: every setting, and every section that holds some."""
    from flowlm.config import flat

    settings = list(flat(config.to_dict()))
    sections = [".".join(parts[:n]) for parts in (s.split(".") for s in settings) for n in range(1, len(parts))]
    return settings + list(dict.fromkeys(sections))
