"""`flowlm report`: runs that were made, or are being made, to a table and one page that needs no network.

    runs.csv, runs.md    one line for each run, sampler and number of steps; a run that was not evaluated has one line
    index.html           the table, curves, samples and how they settle; all data and code are inside

Nothing is computed anew: everything is read from the run directories (run_directory.py), whatever of them is there yet.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from rich.table import Table

from flowlm import storage
from flowlm.metrics import read_metrics
from flowlm.run_directory import FREE, flat
from flowlm.study_tables import markdown
from flowlm.terminal import console

POINTS = 400  # of a curve in the page; of a longer one every k-th is taken, and the last
SHOWN_TEXT = 4000  # characters of the samples of each sampler
UNTOLD = ("data.dir",)  # settings that say nothing of an experiment
FEW = 5  # settings that vary are columns of the table if they are no more than this; they have a table of their own too
HEAD = ("loss", "held_out/cross_entropy", "held_out/bound_nats_per_token")


@dataclass(frozen=True)
class Report:
    """A run as it is found: settings flat, lines of metrics.jsonl, and of its evaluations what there is.

    Attributes:
      name: its path below the folder that was given. step: the newest that is known of.
      evaluated: the step its evaluation is of, or None. metrics: of the evaluation.
      texts: {sampler@steps: samples as text}. trajectories: as in trajectories.json.
    """

    name: str
    config: dict[str, Any]
    lines: list[dict]
    step: int
    evaluated: int | None
    metrics: dict[str, float | None]
    texts: dict[str, str]
    trajectories: dict[str, list]

    @property
    def status(self) -> str:
        if self.evaluated is not None and self.evaluated >= self.config["steps"]:
            return "finished"
        if self.step >= self.config["steps"]:
            return "trained"
        return "begun" if self.step == 0 else f"{100 * self.step // self.config['steps']} %"


def find_runs(folder) -> Iterator:
    """Run directories in the folder and below it, in order; a run directory itself is one."""
    if (folder / "config.json").exists():
        yield folder
    elif folder.is_dir():
        for path in sorted(folder.iterdir()):
            yield from find_runs(path)


def _json(path) -> Any:
    return storage.read_json(path) if path.exists() else None


def read_run(path, name: str) -> Report:
    """The run in `path`."""
    evaluation = _json(path / "evaluation.json")
    metrics, texts = {}, {}
    if evaluation is not None:
        metrics, texts = dict(evaluation["metrics"]), dict(evaluation["samples"])
        if (path / "samples.txt").exists():
            blocks = f"\n{(path / 'samples.txt').read_text(encoding='utf-8')}".split("\n== ")[1:]
            texts |= {head: text[:SHOWN_TEXT] for head, _, text in (block.partition("\n") for block in blocks)}
    # Other settings of the sampler (study.py): the same, under the sampler's name and the setting.
    for place in sorted((path / "sweep").iterdir()) if (path / "sweep").exists() else ():
        if (other := _json(place / "evaluation.json")) is not None:
            renamed = lambda sampler, place=place: sampler.replace("@", f" {place.name}@")
            for key, value in other["metrics"].items():
                if key.startswith("samples/") and "@" in key:
                    metrics[renamed(key)] = value
            texts |= {renamed(key): text for key, text in other["samples"].items() if "@" in key}
    lines = read_metrics(path)
    evaluated = None if evaluation is None else evaluation["step"]
    return Report(
        name=name,
        config=flat(_json(path / "config.json")),
        lines=lines,
        step=max([line["step"] for line in lines] + [evaluated or 0]),
        evaluated=evaluated,
        metrics=metrics,
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
    """Those of the settings that change what is learnt, the number of steps among them."""
    return [key for key in keys if key == "steps" or not key.startswith(FREE)]


def records(runs: Sequence[Report]) -> list[dict]:
    """The lines of the table: run, status, step, the settings that vary, and one sampler's metrics."""
    keys, out = varied(runs), []
    for run in runs:
        last = {key: value for line in run.lines for key, value in line.items()} | run.metrics
        start = {"run": run.name, "status": run.status, "step": run.step}
        start |= {key: run.config.get(key) for key in keys} | {key: last.get(key) for key in HEAD}
        samplers: dict[str, dict] = {}
        for key, value in run.metrics.items():
            if key.startswith("samples/"):
                _, sampler, metric = key.split("/")
                samplers.setdefault(sampler, {})[metric] = value
        for sampler, values in samplers.items() or [("", {})]:
            name, _, steps = sampler.partition("@")
            out.append(start | {"sampler": name, "sampling_steps": int(steps) if steps else None} | values)
    return out


def columns(rows: Sequence[dict], settings: Sequence[str]) -> list[str]:
    """Columns of the table: what has something in it, but for standard errors, which stand beside what they are of."""
    keys = dict.fromkeys(key for row in rows for key in row)
    told = compared(settings)
    left_out = set(settings) - set(told if len(told) <= FEW else ())
    filled = (k for k in keys if k not in left_out and any(row.get(k) is not None for row in rows))
    return [k for k in filled if not k.endswith("_stderr")]


def show(row: dict, column: str, settings: Sequence[str]) -> str:
    """A cell as text: settings as they were set, measurements to three decimals."""
    value, stderr = row.get(column), row.get(f"{column}_stderr")
    if value is None:
        return ""
    if column in settings or not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"


def thinned(points: list) -> list:
    step = -(-len(points) // POINTS)
    return points if step <= 1 else points[:-1:step] + points[-1:]


def page_data(runs: Sequence[Report]) -> dict:
    """What the page's script draws from: for each run its curves, final metrics, texts and trajectories."""
    keys = compared(varied(runs))
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
                "varied": {key: run.config.get(key) for key in keys},
                "curves": {key: thinned(points) for key, points in curves.items()},
                "metrics": run.metrics,
                "texts": run.texts,
                "trajectories": run.trajectories,
            }
        )
    return {"runs": data, "varied": keys}


def write(folders: Sequence[str], out: str) -> None:
    """Writes runs.csv, runs.md and index.html to `out` and prints the table.

    Raises:
      FileNotFoundError: as `gather`. ValueError: a file of a run is damaged, or nothing can be written to `out`.
    """
    runs = gather(folders)
    storage.check_writable(out)
    rows, keys, out = records(runs), varied(runs), storage.path(out)
    shown = columns(rows, keys)
    cells = [[show(row, column, keys) for column in shown] for row in rows]
    titles = [c if c in keys else c.replace("_", " ").replace("/", " ") for c in shown]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "runs.csv").open("w", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (out / "runs.md").write_text("\n".join(markdown(titles, cells)) + "\n", encoding="utf-8")
    templates = jinja2.Environment(loader=jinja2.PackageLoader("flowlm", "templates"), autoescape=True)
    templates.policies["json.dumps_kwargs"] = {}  # in its own order, not sorted
    page = templates.get_template("report.html").render(
        folders=[str(folder) for folder in folders],
        runs=runs,
        titles=titles,
        cells=cells,
        numeric=[all(not isinstance(row.get(c), str | list | bool) for row in rows) for c in shown],
        own=shown.index("sampler") if "sampler" in shown else 0,  # columns of the run, told once
        varied=[(key, ["" if (v := run.config.get(key)) is None else str(v) for run in runs]) for key in keys],
        data=page_data(runs),
    )
    (out / "index.html").write_text(page, encoding="utf-8")
    _print(titles, cells, f"{len(runs)} runs")
    print(f"{out / 'index.html'}")


def _print(titles: Sequence[str], cells: Sequence[Sequence[str]], caption: str) -> None:
    """The first columns of the table, as many as the terminal is wide."""
    screen = console()
    table, room = Table(title=caption), screen.width - 1
    widths = [max(len(title), *(len(line[i]) for line in cells)) + 3 for i, title in enumerate(titles)]
    count = sum(1 for i in range(len(widths)) if sum(widths[: i + 1]) <= room)
    for title in titles[:count]:
        table.add_column(title, no_wrap=True)
    for line in cells:
        table.add_row(*line[:count])
    screen.print(table)
    if count < len(titles):
        print(f"{len(titles) - count} more columns, from {titles[count]!r} on, are in runs.md")
