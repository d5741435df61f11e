"""The page of settings: each is declared once, beside what it sets, and says there what it may be and what it does."""

from flowlm import config
from flowlm.objectives import FAMILIES
from flowlm.system.settings import Setting, settings_of
from tables import markdown


def _row(path: str, declared: Setting) -> list[str]:
    default = "(none)" if declared.default in ((), "") else declared.shown()
    may = str(declared) if declared.range else " or ".join(sorted(declared.choices))
    return [f"`{path}`", f"`{default}`", may, declared.doc]


def _table(prefix: str, cls: type) -> str:
    rows = [_row(prefix + key, declared) for key, declared in settings_of(cls).items()]
    return markdown(["setting", "default", "may be", "what it is"], rows, figures=False)


def table(section: str) -> str:
    """One section, or `objective`: a table for each family.

    Raises:
      ValueError: there is no such section.
    """
    if section == "objective":
        return "\n".join(f"### {name}\n\n" + _table("objective.", family) for name, family in FAMILIES.items())
    if section == "run":
        return _table("", config.Run)
    if section not in config.SECTIONS:
        raise ValueError(f"there is no section {section!r} of settings: choose one of {['run', *config.SECTIONS]}")
    return _table(f"{section}.", config.SECTIONS[section])
