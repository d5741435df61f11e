"""The page of commands: what each is, how it is written and all its flags, read from flowlm/cli."""

from flowlm.cli.command import Command
from flowlm.cli.commands import COMMANDS
from flowlm.cli.help import of_command
from tables import markdown


def table(which: str) -> str:
    """One command by its name, or `all`, a section each. Raises KeyError: there is no such command."""
    known = {command.name: command for command in COMMANDS}
    return "\n".join(map(_section, known.values() if which == "all" else [known[which]]))


def _section(command: Command) -> str:
    rows = [[f"`{flag.written}`".replace("|", "\\|"), _cell(flag.help)] for flag in command.flags]
    if command.flag("config"):
        rows.append(["`--config.KEY=VALUE`", "a [setting](settings.md) of the experiment"])
    usage = of_command(command).split("\n\n")[1].removeprefix("usage: ")
    summary = _cell(command.summary[0].upper() + command.summary[1:])
    parts = [f"## {command.name}", f"{summary}.", f"```text\n{usage}\n```"]
    parts.append(markdown(["flag", "what it is"], rows, figures=False))
    if command.notes:
        parts.append(f"```text\n{command.notes.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """Text in a table, where a bar would end its cell and an angle bracket begin a tag."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
