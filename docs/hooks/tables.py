"""Tables of what is kept in results/, made when the pages are: no figure of a file is typed again."""

import csv
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flowlm.judges.base import shown
from flowlm.runs.metrics import by_row, of_held_out, parse_row

ROOT = Path(__file__).parents[2]
GIB, GB = 2**30, 1e9


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], figures: bool = True) -> str:
    """A table; figures stand to the right, words and the first column to the left."""

    def line(cells):
        return f"| {' | '.join(cells)} |"

    rule = "|---" + ("|--:" if figures else "|---") * (len(head) - 1) + "|"
    return "\n".join([line(head), rule, *map(line, rows)]) + "\n"


def read(path: str) -> dict:
    """A JSON file of the checkout."""
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def block(path: str, *head: str) -> str:
    """One table of a Markdown file with several, by its metric or the head of its first column; a number takes the n-th of that.

    Columns in which no row has a figure are left out.
    """
    which = head[-1] if head[-1].isdigit() else "1"
    head = shown(", ".join(head[:-1] if head[-1].isdigit() else head))
    found = [part.splitlines() for part in (ROOT / path).read_text(encoding="utf-8").split("\n\n")]
    found = [lines for lines in found if lines and lines[0].startswith(f"| {head} |")]
    if len(found) < int(which):
        raise ValueError(f"{path} has {len(found)} tables of {head!r}, not {which}")
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in found[int(which) - 1]]
    names, rows = cells[0], cells[2:]
    if all(name.isdigit() for name in names[1:]):
        rows = [[short(cell) for cell in _once(row)] for row in rows]
    kept = [i for i in range(len(names)) if i == 0 or any(row[i] not in ("-", "") for row in rows)]
    return markdown([names[i] for i in kept], [[row[i] for i in kept] for row in rows])


def short(cell: str) -> str:
    """Figures below one without their zero, so that a wide table fits."""
    return re.sub(r"(?<![\d.])0(\.\d\d)", r"\1", cell)


def _once(row: list[str]) -> list[str]:
    """A row of reference takes no steps, and has the same figure under every number of them: it is said once."""
    has_steps = "," in row[0]  # method, sampler
    return row if has_steps else [*row[:2], *[""] * (len(row) - 2)]


def _number(values: dict, metric: str) -> str:
    value, error = values.get(metric), values.get(f"{metric}_stderr")
    if value is None:
        return "-"
    digits = _digits(value)
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _digits(value: float) -> int:
    """Of a share of few rows more, because three would leave it none."""
    return 5 if 0 < abs(value) < 0.01 else 3


def _judged(metrics: dict) -> dict[str, dict]:
    """{sampler@steps: {metric: value}}, samplers one after another by their steps; rows of reference, which have none, last."""
    out = by_row(metrics)
    order = list(dict.fromkeys(parse_row(name)[0] for name in out))

    def place(name):
        sampler, steps = parse_row(name)
        return steps is None, order.index(sampler), steps or 0

    return {name: out[name] for name in sorted(out, key=place)}


def _called(row: str) -> str:
    """A row as people read it: the sampler and its steps."""
    sampler, steps = parse_row(row)
    return shown(sampler) if steps is None else f"{shown(sampler)}, {steps}"


def samples(path: str, *metrics: str) -> str:
    """The samples of an evaluation before the judges: a line for each sampler and number of steps."""
    rows = [
        [_called(name), *(_number(values, metric) for metric in metrics)]
        for name, values in _judged(read(path)["metrics"]).items()
    ]
    return markdown(["sampler, steps", *map(shown, metrics)], rows)


def held_out(path: str) -> str:
    """Held-out cross-entropy on the grid of warped time, and the bound on the likelihood."""
    held, taus = of_held_out(read(path)["metrics"])
    names = {"cross_entropy": "network", "context_free": "context-free line"}
    rows = [[names[key], *(f"{at[key]:.3f}" for at in taus.values()), f"{held[key]:.3f}"] for key in names]
    nats, bits = (_number(held, f"bound_{unit}_per_token") for unit in ("nats", "bits"))
    return (
        markdown(["tau", *taus, "mean"], rows)
        + f"\nBound on the likelihood: {nats} nats ({bits} bits) a token, standard errors.\n"
    )


def seeds(names: str, *metrics: str) -> str:
    """Mean and standard deviation over seeds of evaluations `results/NAME.json`, and each seed's own in brackets."""
    judged = [_judged(read(f"results/{name}.json")["metrics"]) for name in names.split()]
    rows = []
    for sampler in judged[0]:
        cells = []
        for metric in metrics:
            values = [each[sampler].get(metric) for each in judged if sampler in each]
            if None in values:
                cells.append("-")
                continue
            digits = _digits(np.mean(values))
            each = ", ".join(f"{value:.{digits}f}" for value in values)
            cells.append(f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f} ({each})")
        rows.append([_called(sampler), *cells])
    return markdown(["sampler, steps", *map(shown, metrics)], rows)


def best_settings(path: str, metric: str) -> dict[str, dict[int, tuple[np.ndarray, list[dict], str]]]:
    """{method: {steps: (of each seed, its records, round and setting)}} where the mean of `metric` over seeds is largest.

    Settings that repeat rows are left out, and rounds of one student are one method.
    """
    with (ROOT / path).open(newline="", encoding="utf-8") as file:
        records = [
            record
            for record in csv.DictReader(file)
            if record["sampling_steps"] not in ("", "0") and int(record["sampling_steps"]) <= 8
        ]
    cells: dict[tuple, list[dict]] = defaultdict(list)
    for record in records:
        cells[record["method"], record["setting"], record["sampler"], int(record["sampling_steps"])].append(record)
    found: dict[str, dict[int, tuple]] = defaultdict(dict)
    for (method, setting, sampler, steps), group in cells.items():
        if np.mean([float(record["distinct_rows"]) for record in group]) < 0.99:
            continue
        student, _, jumps = method.partition("_")
        is_round = student in ("sdtt", "dcd")
        how = f"1/{jumps.partition('_')[0]}" if is_round else sampler
        entry = np.array([float(record[metric]) for record in group]), group, f"{how}, {setting or 'as it is'}"
        row = found[student if is_round else method]
        if steps not in row or entry[0].mean() > row[steps][0].mean():
            row[steps] = entry
    return found


def mean_and_spread(values: np.ndarray) -> str:
    """Mean over seeds and their standard deviation."""
    return short(f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""))


def best(path: str, metric: str, *beside: str) -> str:
    """The best setting of each method by the number of steps; in brackets the means of `beside`, the round and the setting."""
    found = best_settings(path, metric)
    columns = sorted({steps for row in found.values() for steps in row})

    def cell(entry: tuple | None) -> str:
        if entry is None:
            return "-"
        values, group, told = entry
        if not values.any():
            return mean_and_spread(values)
        others = ", ".join(f"{np.mean([float(r[key]) for r in group if r[key]]):.2f}" for key in beside)
        return f"{mean_and_spread(values)}<br>({short(others)};<br>{told})"

    rows = [[shown(method), *(cell(row.get(steps)) for steps in columns)] for method, row in found.items()]
    return markdown(["best setting of each", *map(str, columns)], rows)


def bench(*wanted: str) -> str:
    """Ratios of time and memory, with their range over rounds: each argument is a file of results and one pair in it."""
    pairs = [(path, pair) for path, _, pair in (each.partition(" ") for each in wanted)]
    results = {pair: read(path)["result"][pair] for path, pair in pairs}
    names = {
        "seconds": "time",
        "resident": "peak resident memory",
        "step": "XLA's account of the step",
        "state + step": "the same, training state included",
    }

    def ratio(found: dict | None) -> str:
        if not found:
            return "-"
        digits = 2 if found["ratio"] >= 0.1 else 4
        return f"{found['ratio']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"

    rows = [[told, *(ratio(found.get(key)) for found in results.values())] for key, told in names.items()]
    return markdown(["", *results], [row for row in rows if set(row[1:]) != {"-"}])


def plans(*names: str) -> str:
    """The first slice of plans in results/plan: what each chip needs and sends."""
    rows = []
    for name in names:
        found = read(f"results/plan/{name}/plan.json")
        train, data, versions = found["points"][0]["train"], found["config"]["data"]["name"], found["versions"]
        fsdp, kind = found["config"]["mesh"]["fsdp"], found["config"]["mesh"]["grad_reduce_dtype"]
        family = found["config"]["objective"]["family"]
        told = f"{data}, {shown(family)}, {'FSDP' if fsdp else 'data parallel'}, gradients summed in {kind}"
        gib = f"{train['hbm']['total'] / GIB:.2f} of {train['hbm']['limit'] / GIB:.2f}"
        cells = [found["points"][0]["topology"], f"{train['per_chip']:g}", gib, f"{train['wire'] / GB:.2f}"]
        rows.append([told, *cells, f"{versions['jax']}, {versions['libtpu']}"])
    head = ["at the paper's batch", "slice", "sequences per chip", "HBM per chip, GiB", "sent per chip and step, GB"]
    return markdown([*head, "jax, libtpu"], rows)


def evaluations(*names: str) -> str:
    """What evaluating takes by plans in results/plan, one beside the other: the rows that begin with the start of a run."""
    tables = []
    for name in names:
        lines = (ROOT / f"results/plan/{name}/plan.md").read_text(encoding="utf-8").splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        first = next(i for i, row in enumerate(cells) if row[0].startswith("start: "))
        config = read(f"results/plan/{name}/plan.json")["config"]
        told = f"{config['data']['name']}, {shown(config['objective']['family'])}, {cells[0][1]}"
        tables.append([["", told], *cells[first:]])
    head, *rows = [[beside[0][0], *(row[1] for row in beside)] for beside in zip(*tables, strict=True)]
    return markdown(head, rows)


def kills(*paths: str) -> str:
    """Runs that were killed again and again beside those that were not, as tests/kills.py reports them."""
    rows = []
    for path in paths:
        found = read(path)
        early = sum(kill["reached"] < 0 for kill in found["met"])
        both = sum(kill["process"] is None for kill in found["met"])
        ends = [found["difference"], found["difference_of_losses"]]
        counts = [found["kills"], early, both, found["steps"], found["seed"]]
        rows.append([str(found["processes"]), *map(str, counts), *("0" if end == 0 else f"{end:.1e}" for end in ends)])
    head = ["processes", "kills", "before a first step", "of all at once", "steps", "seed"]
    return markdown([*head, "largest difference of an array", "of a loss"], rows)
