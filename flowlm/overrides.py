"""How values are said on the command line: settings in --config.key=value, and flags that hold flags.

A setting is what its last flag says, whatever its type; None unsets one that may be unset (config.check refuses it for others).
"""

import re

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags.tuple_parser import TupleParser


class _Optional(flags.ArgumentParser):
    """What another parser reads, and None."""

    def __init__(self, parser: flags.ArgumentParser):
        self._parser = parser
        self.syntactic_help = parser.syntactic_help

    def parse(self, argument):
        return None if argument in (None, "None") else self._parser.parse(argument)

    def flag_type(self) -> str:
        return self._parser.flag_type()


class _Tuple(flags.ArgumentParser):
    """A tuple from one flag. The library's own parser, which it looks for by its class, joins all flags of one name."""

    def parse(self, argument):
        return TupleParser().parse(argument)

    def flag_type(self) -> str:
        return "tuple"


def register() -> None:
    """Makes ml_collections read settings so. To be called before flags are parsed."""
    readers = {float: flags.FloatParser(), int: flags.IntegerParser(), str: flags.ArgumentParser()}
    for kind, parser in readers.items():
        config_flags.register_flag_parser_for_type(kind, _Optional(parser))
    config_flags.register_flag_parser_for_type(tuple, _Tuple())


class FlagsParser(flags.ListParser):
    """Flags with commas between them. A comma inside of a value, such as a tuple's, is part of it."""

    def parse(self, argument) -> list[str]:
        out: list[str] = []
        for part in super().parse(argument):
            if out and not re.match("--?[a-z]", part):
                out[-1] += f",{part}"
            else:
                out.append(part)
        return out
