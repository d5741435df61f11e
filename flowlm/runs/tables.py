"""Evaluations at a terminal: tables that fit it, what their columns mean, and samples as whole lines."""

import textwrap
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flowlm.judges.base import shown
from flowlm.runs.metrics import by_row, of_held_out, parse_row
from flowlm.system.terminal import console

COLUMNS = 6  # of a table, the first of them for names, unless all are asked for
HEAD = 8  # characters of a column's head in one line, unless a word of it is longer

Line = tuple[str, str, dict[str, float]]


def _table(names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(names, overflow="fold")
    return table


def _add(table: Table, head: str) -> None:
    width = max(HEAD, *map(len, head.split()))
    table.add_column("\n".join(textwrap.wrap(head, width)), justify="right", no_wrap=True)


def _width(table: Table) -> int:
    """How many columns of the terminal the table takes if no cell is broken."""
    return console(least=10_000).measure(table).maximum


def print_likelihood(metrics: Mapping[str, float], step: int) -> None:
    """Prints what an evaluation says of held-out rows: cross-entropies by time, a line each, and the likelihood bound."""
    held, taus = of_held_out(metrics)
    columns = [name for name in ("cross_entropy", "context_free") if name in held]
    screen = console()
    if taus:
        screen.print(Text(f"Held-out nats / token at step {step}", style="bold"))
        grid = _table("tau")
        for column in columns:
            grid.add_column(shown(column), justify="right")
        for tau, at in taus.items():
            grid.add_row(tau, *(f"{at[column]:.3f}" for column in columns))
        grid.add_row("mean", *(f"{held[column]:.3f}" for column in columns))
        screen.print(grid)
        screen.print(Text("context free: the best guess that looks at a token's own position alone\n"))
    if "bound_nats_per_token" in held:
        nats, bits = (
            f"{held[key]:.3f} ± {held[f'{key}_stderr']:.3f}" for key in ("bound_nats_per_token", "bound_bits_per_token")
        )
        screen.print(Text("Likelihood bound of held-out rows", style="bold"))
        screen.print(Text(f"{nats} nats / token, {bits} bits / token\n"))


def _lines(runs: Mapping[str, Mapping]) -> list[Line]:
    """(run, sampler@steps, metrics), a line each; at the end, with "" for the run, the rows of reference that all are read beside.

    Those are real text and counting samplers. A metric that the first run did not measure of them is taken from a later run.
    """
    samplers: dict[tuple[str, str], dict] = {}
    beside: dict[tuple[str, str], dict] = {}
    for run, record in runs.items():
        for name, values in by_row(record["metrics"]).items():
            lines, place = (samplers, run) if _takes_steps(name) else (beside, "")
            known = lines.get((place, name), {})
            lines[place, name] = known | values | known
    return [(run, name, values) for (run, name), values in (samplers | beside).items()]


def _fitting(lines: Sequence[Line], columns: Sequence[str], named: bool, wide: bool) -> tuple[Table, Sequence[str]]:
    """The table, and those of the columns that it has: all if `wide`, otherwise as many from the left as there is room for."""
    while True:
        table = _table("sampler @ steps")
        for column in columns:
            _add(table, shown(column))
        above = ""
        for run, name, values in lines:
            if named and run not in ("", above):
                table.add_row(Text(run, style="bold"))
            above = run
            label = f"  {name}" if named and run else _called(name)
            table.add_row(label, *(cell(values, column, wide) for column in columns))
        if wide or len(columns) <= 1 or _width(table) <= console().width:
            return table, columns
        columns = columns[:-1]


def _takes_steps(name: str) -> bool:
    """Whether a row is a sampler's, and not one of reference."""
    return parse_row(name)[1] is not None


def _called(name: str) -> str:
    """The name of a row as people read it; a sampler's is shown as it is typed after --sampler."""
    return name if _takes_steps(name) else shown(name)


def cell(values: Mapping[str, float], metric: str, wide: bool) -> str:
    """What a table says of a metric: its value, if there is one, and if `wide` its standard error."""
    value, stderr = values.get(metric), values.get(f"{metric}_stderr")
    # A small value has a fourth place, and its error has as many places as it has.
    places = 4 if value is not None and 0 < abs(value) < 0.01 else 3
    told = "" if value is None else f"{value:.{places}f}"
    return told if stderr is None or not told or not wide else f"{told} ± {stderr:.{places}f}"


def print_samples(
    runs: Mapping[str, Mapping],
    texts: Mapping[str, Mapping[str, Sequence[str]]],
    wide: bool,
    title: str = "Samples before the judges",
) -> None:
    """Prints what the judges said of samples, what each column means, and samples as whole lines.

    Args:
      runs: {name of the run, or "" where it needs none: its evaluation.json}.
      texts: {name of the run: {sampler@steps: samples to be shown}}.
      wide: all metrics, with standard errors, in a table as wide as it gets.
    """
    lines, named = _lines(runs), any(runs)
    known = dict.fromkeys(m for _, _, values in lines for m in values if not m.endswith("_stderr"))
    main = dict.fromkeys(m for record in runs.values() for m in record.get("main", ()) if m in known)
    columns = [*(main | known)] if wide or not main else [*main]
    table, columns = _fitting(lines, columns if wide else columns[: COLUMNS - 1], named, wide)
    screen = console(least=_width(table) if wide else 0)
    screen.print(Text(title, style="bold"), table, sep="\n")
    meanings = {m: text for record in runs.values() for m, text in record.get("meanings", {}).items()}
    told = [f"{shown(column)}: {meanings[column]}" for column in columns if column in meanings]
    counting = [shown(name) for _, name, _ in lines if not _takes_steps(name) and name != "held_out"]
    told += [f"{', '.join(counting)}: made by counting training text, without a network"] if counting else []
    if left_out := len(known) - len(columns):
        told.append(f"{left_out} more metrics are in evaluation.json, and shown by --wide")
    notes = {f"{run}: {note}" if run else note for run, record in runs.items() for note in record.get("notes", ())}
    for number, sentence in enumerate((*told, *sorted(notes))):
        screen.print(Text(sentence if number else f"\n{sentence}"))
    _print_texts(screen, texts)


def _print_texts(screen: Console, texts: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
    """Prints samples as whole lines under their names; rows of reference, the same for all runs, are those of the first run."""
    beside = set()
    for run, samples in texts.items():
        for name, some in samples.items():
            own = _takes_steps(name)
            if not own and name in beside:
                continue
            beside.add(name)
            screen.print(Text(f"\n{run} {name}" if run and own else f"\n{_called(name)}", style="bold"))
            for sample in some:
                for line in Text(sample).wrap(screen, screen.width - 2):
                    screen.print(Text("  ") + line)
