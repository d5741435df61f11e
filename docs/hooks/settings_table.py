"""The page of settings, read from flowlm/config.py: names, defaults and ranges from the settings, what each is from its comment."""

import ast
import io
import tokenize
from pathlib import Path

from ml_collections import FieldReference

from flowlm import config
from tables import markdown

_SOURCE = Path(config.__file__)
FAMILIES = ("flow", "flow_map", "residual", "autoregressive", "masked", "uniform")
_SECTIONS = ("_settings", "_model", "_objective")


def comments() -> dict[tuple[str, str], str]:
    """{(function of config.py, path of the setting in it): the comment behind it or on the line above}."""
    text = _SOURCE.read_text(encoding="utf-8")
    told, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            told[token.start[0]] = token.string.lstrip("# ").strip()
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    out = {}
    for function in ast.parse(text).body:
        if getattr(function, "name", "") not in _SECTIONS:
            continue
        assigned = {
            statement.targets[0].id: statement.value for statement in function.body if isinstance(statement, ast.Assign)
        }

        def walk(call: ast.expr, prefix: str, name=function.name, assigned=assigned) -> None:
            for keyword in call.keywords:
                value = keyword.value
                if keyword.arg is None:
                    if isinstance(value, ast.Name):
                        walk(assigned[value.id], prefix)
                    continue
                path = prefix + keyword.arg
                if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "dict":
                    walk(value, f"{path}.")
                above = keyword.lineno - 1
                comment = told.get(value.end_lineno, told[above] if above in alone else "")
                out[name, path] = comment

        for value in [*assigned.values(), *(s.value for s in function.body if isinstance(s, ast.Return))]:
            if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "dict":
                walk(value, "")
    return out


def _row(path: str, declared, comment: str) -> list[str]:
    if isinstance(declared, config.Number):
        default, may = declared.shown(), str(declared)
    else:
        value = declared.get() if isinstance(declared, FieldReference) else declared
        if comment.startswith("or "):
            comment = f"{value} | {comment.removeprefix('or ')}"
        choices, _, rest = comment.partition(": ") if "|" in comment else ("", "", comment)
        default = "(none)" if value in ((), "") else str(value)
        may, comment = choices.replace("|", "or"), rest
    return [f"`{path}`", f"`{default}`", may, comment.replace("|", "\\|")]


def table(section: str) -> str:
    """One section, or `objective`: a table for each family.

    Raises:
      ValueError: there is no such section.
    """
    told = comments()
    if section == "objective":
        parts = []
        for family in FAMILIES:
            rows = [
                _row(
                    f"objective.{key}",
                    value,
                    told.get(("_objective", f"{family}.{key}"), told.get(("_objective", key), "")),
                )
                for key, value in config._objective(family).items()
                if key != "family"
            ]
            parts.append(
                f"### {family}\n\n" + markdown(["setting", "default", "may be", "what it is"], rows, figures=False)
            )
        return "\n".join(parts)
    sections = {key: value for key, value in config._settings("flow").items() if isinstance(value, dict)}
    if section == "run":
        held, prefix = {k: v for k, v in config._settings("flow").items() if not isinstance(v, dict)}, ""
    elif section in sections:
        held, prefix = sections[section], f"{section}."
    else:
        raise ValueError(f"there is no section {section!r} of settings: choose one of {['run', *sections]}")
    comment = lambda key: told.get(("_model", key) if section == "model" else ("_settings", prefix + key), "")
    rows = [_row(prefix + key, value, comment(key)) for key, value in held.items()]
    return markdown(["setting", "default", "may be", "what it is"], rows, figures=False)
