"""`flowlm report`: runs that were made, or are being made, to tables and one page that needs no network.

    runs.csv, runs.md    one line for each run, sampler and number of steps; a run that was not evaluated has one line
    index.html           the tables, curves, samples and how they settle; all data and code are inside

Only runs on the same data are in one table, with one line of held-out rows, and of each sampler that counts, for all of them.
Nothing is computed anew: everything is read from the run directories (runs/directory.py), whatever of them is there yet.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from etils import epath
from rich import box
from rich.table import Table
from rich.text import Text

from flowlm.judges.base import shown
from flowlm.runs import directory as run_directory
from flowlm.runs import tables
from flowlm.runs.directory import FREE, flat
from flowlm.runs.metrics import (
    by_row,
    held_out_key,
    parse_held_out_key,
    parse_row,
    parse_sample_key,
    read_metrics,
    row_name,
    sample_key,
)
from flowlm.studies.tables import markdown
from flowlm.system import storage
from flowlm.system.terminal import console

POINTS = 400  # of a curve in the page; of a longer one every k-th is taken, and the last
SHOWN_TEXT = 4000  # characters of the samples of each sampler
UNTOLD = ("data.dir",)  # settings that say nothing of an experiment
FEW = 5  # settings that vary are columns of the table if they are no more than this; they have a table of their own too
RENAMED = {"steps": "training_steps"}  # beside sampling_steps no step goes without its name
HEAD = ("loss", held_out_key("cross_entropy"), held_out_key("bound_nats_per_token"))


@dataclass(frozen=True)
class Report:
    """A run as it is found: settings flat, lines of metrics.jsonl, and of its evaluations what there is.

    Attributes:
      name: its path below the folder that was given.
      step: the newest that is known of.
      data: what its rows are (run_directory.data_name), or "" where it does not say.
      config: its settings, of which `steps` is called training_steps here.
      evaluated: the step its evaluation is of, or None.
      metrics: of the evaluation.
      judges: what the evaluation says of its metrics, "main", "meanings" and "notes" (results.py).
      texts: {sampler@steps: samples as text}.
      trajectories: as in trajectories.json.
    """

    name: str
    data: str
    config: dict[str, Any]
    lines: list[dict]
    step: int
    evaluated: int | None
    metrics: dict[str, float | None]
    judges: dict[str, Any]
    texts: dict[str, str]
    trajectories: dict[str, list]

    @property
    def status(self) -> str:
        end = self.config["training_steps"]
        if self.evaluated is not None and self.evaluated >= end:
            return "finished"
        if self.step >= end:
            return "trained"
        return "begun" if self.step == 0 else f"{100 * self.step // end} %"

    @property
    def told_step(self) -> int:
        """The training step that its figures are of: the evaluation's, else the last of a held-out likelihood, else the newest."""
        held = [line["step"] for line in self.lines if any(map(parse_held_out_key, line))]
        return self.evaluated if self.evaluated is not None else max(held, default=self.step)

    def figures(self) -> dict[str, float | None]:
        """HEAD at `told_step`: the evaluation's, or what was last logged by then."""
        logged = {key: value for line in self.lines if line["step"] <= self.told_step for key, value in line.items()}
        return {key: (logged | self.metrics).get(key) for key in HEAD}


def by_number(name: str) -> list:
    """A key that sorts names as their numbers are: rate=0.5 before rate=2 before rate=10."""
    parts = re.split(r"((?:(?<![\w.])-)?\d+(?:\.\d+)?(?:e-?\d+)?)", name)
    return [(0, float(part), "") if i % 2 else (1, 0.0, part) for i, part in enumerate(parts)]


def find_runs(folder: epath.Path) -> Iterator:
    """Run directories in the folder and below it, in the order of their numbers; a run directory itself is one."""
    if (folder / "config.json").exists():
        yield folder
    elif folder.is_dir():
        for path in sorted(folder.iterdir(), key=lambda path: by_number(path.name)):
            yield from find_runs(path)


def _json(path) -> Any:
    return storage.read_json(path) if path.exists() else None


def read_run(path: epath.Path, name: str) -> Report:
    """The run in `path`."""
    evaluation = _json(path / "evaluation.json")
    metrics, texts, judges = {}, {}, {}
    if evaluation is not None:
        judges = {key: evaluation[key] for key in ("main", "meanings", "notes") if key in evaluation}
        metrics, texts = dict(evaluation["metrics"]), dict(evaluation["samples"])
        if (path / "samples.txt").exists():
            blocks = f"\n{(path / 'samples.txt').read_text(encoding='utf-8')}".split("\n== ")[1:]
            texts |= {head: text[:SHOWN_TEXT] for head, _, text in (block.partition("\n") for block in blocks)}
    # Other settings of the sampler (head_to_head.py): the same, under the sampler's name and the setting.
    settings = (path / "sweep").iterdir() if (path / "sweep").exists() else ()
    for place in sorted(settings, key=lambda place: by_number(place.name)):
        if (other := _json(place / "evaluation.json")) is not None:
            for key, value in other["metrics"].items():
                sampler, steps, metric = parse_sample_key(key) or ("", None, "")
                if steps is not None:
                    metrics[sample_key(f"{sampler} {place.name}", steps, metric)] = value
            for row, text in other["samples"].items():
                sampler, steps = parse_row(row)
                if steps is not None:
                    texts[row_name(f"{sampler} {place.name}", steps)] = text
    lines = read_metrics(path)
    evaluated = None if evaluation is None else evaluation["step"]
    return Report(
        name=name,
        data=run_directory.data_name(path) or "",
        config={RENAMED.get(key, key): value for key, value in flat(_json(path / "config.json")).items()},
        lines=lines,
        step=max([line["step"] for line in lines] + [evaluated or 0]),
        evaluated=evaluated,
        metrics=metrics,
        judges=judges,
        texts=texts,
        trajectories=_json(path / "trajectories.json") or {},
    )


def gather(folders: Sequence[str]) -> list[Report]:
    """Every run below the folders. Raises FileNotFoundError naming a folder without one."""
    runs = []
    for folder in map(storage.path, folders):
        found = list(find_runs(folder))
        if not found:
            raise FileNotFoundError(
                f"no run below {folder}: a run is a folder with a config.json, made by `flowlm train`"
            )
        for path in found:
            below = str(path.relative_to(folder)) if path != folder else ""
            above = [folder.resolve().name] if len(folders) > 1 or not below else []
            runs.append(read_run(path, "/".join([*above, *filter(None, [below])])))
    return runs


def varied(runs: Sequence[Report]) -> list[str]:
    """Settings that are not the same in all runs, in the order of the configuration."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config if key not in UNTOLD))
    return [key for key in keys if len({json.dumps(run.config.get(key)) for run in runs}) > 1]


def compared(keys: Sequence[str]) -> list[str]:
    """The settings that change what is learnt, and the number of training steps."""
    return [key for key in keys if not key.startswith(FREE)]


def by_data(runs: Sequence[Report]) -> dict[str, list[Report]]:
    """The runs by what their rows are."""
    groups: dict[str, list[Report]] = {}
    for run in runs:
        groups.setdefault(run.data, []).append(run)
    return groups


def records(runs: Sequence[Report], keys: Sequence[str]) -> list[dict]:
    """Lines of the table of runs on the same data: run, status, step, the settings `keys`, and one sampler's metrics.

    Rows of reference (real text and counting samplers) belong to no run and come last.
    """
    out, beside = [], {}
    for run in runs:
        start = {"run": run.name, "data": run.data, "status": run.status, "training_step": run.told_step}
        start |= {key: run.config.get(key) for key in keys} | run.figures()
        samplers: dict[tuple, dict] = {}
        for row, values in by_row(run.metrics).items():
            sampler, steps = parse_row(row)
            if steps is None:
                known = beside.get(sampler, {})
                beside[sampler] = known | values | known
            else:
                samplers[sampler, steps] = values
        for (name, steps), values in samplers.items() or [(("", None), {})]:
            out.append(start | {"sampler": name, "sampling_steps": steps} | values)
    nobody = {"run": "", "data": runs[0].data, "sampling_steps": None}
    return out + [nobody | {"sampler": name} | values for name, values in beside.items()]


def columns(rows: Sequence[dict], settings: Sequence[str], here: Sequence[str]) -> list[str]:
    """Columns of a table: those with a value in any row, without standard errors, which stand behind their means.

    Args:
      settings: those that vary between any two runs of the report.
      here: those that vary between runs of this table.
    """
    keys = dict.fromkeys(key for row in rows for key in row)
    told = compared(here)
    left_out = {"data", *settings} - set(told if len(told) <= FEW else ())
    filled = (k for k in keys if k not in left_out and any(row.get(k) is not None for row in rows))
    return [k for k in filled if not k.endswith("_stderr")]


def cell_text(row: dict, column: str, settings: Sequence[str]) -> str:
    """A cell as text: settings as they were set, measurements to three decimals."""
    value, stderr = row.get(column), row.get(f"{column}_stderr")
    if value is None:
        return ""
    if column in settings or not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"


def table(runs: Sequence[Report], settings: Sequence[str]) -> dict[str, Any]:
    """The table of runs on the same data: its `data`, `titles`, `cells`, which columns are `numeric`, and how many columns are a
    run's `own`, which are written once a run.

    Args:
      settings: those that vary between any two runs of the report.
    """
    rows = records(runs, settings)
    chosen = columns(rows, settings, varied(runs))
    return {
        "data": runs[0].data,
        "titles": [c if c in settings and c not in RENAMED.values() else shown(c.replace("/", " ")) for c in chosen],
        "cells": [[cell_text(row, column, settings) for column in chosen] for row in rows],
        "numeric": [all(not isinstance(row.get(c), str | list | bool) for row in rows) for c in chosen],
        "own": chosen.index("sampler") if "sampler" in chosen else 0,
    }


def thinned(points: list) -> list:
    step = -(-len(points) // POINTS)
    return points if step <= 1 else points[:-1:step] + points[-1:]


def page_data(runs: Sequence[Report]) -> dict:
    """What the page's script draws from: for each run its curves, what judges said of samples, texts and trajectories."""
    # Runs on other data are not drawn beside each other, so what differs between those alone tells nothing.
    differ = {key for group in by_data(runs).values() for key in varied(group)}
    keys = compared([key for key in varied(runs) if key in differ])
    data = []
    for run in runs:
        curves: dict[str, list] = {}
        for line in run.lines:
            for key, value in line.items():
                if key != "step" and value is not None and not key.endswith("_stderr"):
                    curves.setdefault(key, []).append([line["step"], value])
        data.append(
            {
                "name": run.name,
                "data": run.data,
                "varied": {key: run.config.get(key) for key in keys},
                "curves": {key: thinned(points) for key, points in curves.items()},
                "judged": [
                    {"sampler": sampler, "steps": steps, "metric": metric, "value": value}
                    for key, value in run.metrics.items()
                    if value is not None and not key.endswith("_stderr")
                    for sampler, steps, metric in filter(None, [parse_sample_key(key)])
                ],
                "texts": run.texts,
                "trajectories": run.trajectories,
            }
        )
    main = list(dict.fromkeys(metric for run in runs for metric in run.judges.get("main", ())))
    return {"runs": data, "varied": keys, "main": main}


def write_report(folders: Sequence[str], out: str) -> None:
    """Writes runs.csv, runs.md and index.html to `out` and prints what they say in short.

    Raises:
      FileNotFoundError: as `gather`. ValueError: a file of a run is damaged, or nothing can be written to `out`.
    """
    runs = gather(folders)
    storage.check_writable(out)
    keys, groups, out = varied(runs), by_data(runs), storage.path(out)
    rows = [row for group in groups.values() for row in records(group, keys)]
    found = [table(group, keys) for group in groups.values()]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "runs.csv").open("w", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        [f"## {one['data']}", ""] * bool(one["data"]) + [*markdown(one["titles"], one["cells"]), ""] for one in found
    ]
    (out / "runs.md").write_text("\n".join(line for part in lines for line in part), encoding="utf-8")
    templates = jinja2.Environment(loader=jinja2.PackageLoader("flowlm.studies", "templates"), autoescape=True)
    templates.policies["json.dumps_kwargs"] = {}  # in its own order, not sorted
    page = templates.get_template("report.html").render(
        folders=[str(folder) for folder in folders],
        runs=runs,
        tables=found,
        varied=[(key, ["" if (v := run.config.get(key)) is None else str(v) for run in runs]) for key in keys],
        data=page_data(runs),
    )
    (out / "index.html").write_text(page, encoding="utf-8")
    _print(groups)
    print(f"{out / 'index.html'}")


def _print(groups: Mapping[str, Sequence[Report]]) -> None:
    """How far each run is, and a table of samples for each set of data."""
    progress = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for title in ("run", "status", "training step", "loss"):
        progress.add_column(title, overflow="fold")
    runs = [run for group in groups.values() for run in group]
    for run in runs:
        loss = run.figures()["loss"]
        progress.add_row(run.name, run.status, str(run.told_step), "" if loss is None else f"{loss:.3f}")
    console().print(Text(f"{len(runs)} runs", style="bold"), progress, sep="\n")
    for data, group in groups.items():
        judged = {run.name: run.judges | {"metrics": run.metrics} for run in group if run.metrics}
        if judged:
            tables.print_samples(
                judged, {}, wide=False, title=f"\nSamples before the judges{f': {data}' if data else ''}"
            )
    print()
