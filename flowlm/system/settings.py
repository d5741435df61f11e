"""What a setting is: a default, what it may be, and one line that says what it does. Each lies with the class that it sets.

@dataclass(frozen=True)
class Masked(Discrete):
    jump: float = setting(1 / 32, "step in time that a student learns to take at once", "(0, 1]")
"""

import dataclasses
from collections.abc import Collection
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """A field of a dataclass that experiments may set.

    Attributes:
      default: what it is where an experiment does not say.
      doc: what it does, in one line.
      range: of a number the interval that it lies in, such as "[0, 1)"; of a tuple of numbers each element's; otherwise "".
      note: what one value of it means, for the error.
      also: a number outside of the interval that has a meaning too.
      choices: of a name, all that it may be; otherwise ().
      optional: the type that it has when it is not None; None where it cannot be None.
    """

    default: Any
    doc: str
    range: str = ""
    note: str = ""
    also: float | None = None
    choices: Collection[str] = ()
    optional: type | None = None

    def holds(self, value: Any) -> bool:
        """Whether it may be `value`, as far as its range says."""
        if value is None:
            return self.optional is not None
        if not self.range:
            return True
        if isinstance(self.default, tuple):
            element = self._replace(default=self.default[0])
            return isinstance(value, tuple | list) and all(map(element.holds, value))
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low, high = map(float, self.range[1:-1].split(","))
        above = low < value or (value == low and self.range[0] == "[")
        below = value < high or (value == high and self.range[-1] == "]")
        whole = not isinstance(self.default, int) or value % 1 == 0
        return value == self.also or (above and below and whole)

    def __str__(self) -> str:
        """What it must be, as words."""
        if not self.range:
            return f"one of {sorted(self.choices)}" if self.choices else "set"
        low, high = self.range[1:-1].split(", ")
        bound = f"{'at least' if self.range[0] == '[' else 'above'} {low}"
        words = bound if high == "inf" else f"in {self.range}"
        words = f"whole and {words}" if isinstance(self.default, tuple) and isinstance(self.default[0], int) else words
        return words + (f" or {self.also}" if self.also is not None else "") + (f" ({self.note})" if self.note else "")

    def shown(self) -> str:
        """The default as a flag takes it."""
        return ",".join(map(str, self.default)) if isinstance(self.default, tuple) else str(self.default)


def setting(default: Any, doc: str, range: str = "", *, key: str = "", **rest: Any) -> Any:
    """A dataclass field that is a setting; `key` is its name for experiments where it is another than the field's."""
    return dataclasses.field(default=default, metadata={"setting": Setting(default, doc, range, **rest), "key": key})


def settings_of(cls: type) -> dict[str, Setting]:
    """{name for experiments: Setting} of a dataclass, in the order of its fields."""
    return {key: field.metadata["setting"] for key, field in _fields(cls).items()}


def field_names(cls: type) -> dict[str, str]:
    """{name for experiments: name of the field}."""
    return {key: field.name for key, field in _fields(cls).items()}


def check_choices(instance: Any, section: str) -> None:
    """Raises ValueError for the first field of `instance` that is none of its setting's choices."""
    for key, field in _fields(type(instance)).items():
        choices, value = field.metadata["setting"].choices, getattr(instance, field.name)
        if choices and value not in choices:
            raise ValueError(f"unknown {section}.{key} {value!r}: choose one of {sorted(choices)}")


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    return {f.metadata["key"] or f.name: f for f in dataclasses.fields(cls) if "setting" in f.metadata}
