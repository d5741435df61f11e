"""Makes one record for each cell of what a study found, and tables and pictures of these records."""

import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from flowlm.judges.base import shown
from flowlm.runs.curves import draw_panels
from flowlm.runs.metrics import by_row, held_out_key, parse_row
from flowlm.studies.matching import Point, matched
from flowlm.studies.study import Run, Study, kept_file, setting_name
from flowlm.system import storage

NEAR = 0.1  # nats: a picture shows what is no further than this from the diversity that is made equal


def evaluations(study: Study, kept: Path) -> Iterator[tuple[Run, int, str, Mapping[str, float]]]:
    """(run, seed, setting of the sampler or "", metrics) of every evaluation that is kept."""
    for run in (run for run in study.runs if run.listed):
        for seed in run.seeds:
            path = kept_file(kept, run, seed)
            if path.exists():
                found = storage.read_json(path)["evaluations"]
                for name in ("", *map(setting_name, run.sweep)):
                    if name in found:
                        yield run, seed, name, found[name]["metrics"]


def _same(values: Mapping[str, float], plain: Mapping[str, float]) -> bool:
    """Whether two evaluations are of the same samples: all but the time is equal."""
    return all(values.get(key) == value for key, value in plain.items() if key != "seconds_per_100")


def gather(study: Study, kept: Path) -> list[dict]:
    """One record for each finished run, setting, sampler and number of steps, and one for each row of reference of seed 0."""
    records = []
    for run, seed, setting, metrics in evaluations(study, kept):
        samples = by_row(metrics)
        bound = {key: metrics.get(held_out_key(key)) for key in ("bound_nats_per_token", "bound_nats_per_token_stderr")}
        if not setting:
            plain = samples
        for sampler, values in samples.items():
            if setting and sampler in plain and _same(values, plain[sampler]):
                continue  # because the setting does not change this sampler
            name, steps = parse_row(sampler)
            record = {
                "method": run.name,
                "seed": seed,
                "setting": setting,
                "sampler": name,
                "sampling_steps": steps or 0,
            }
            records.append(record | (bound if steps else {}) | values)
    references: dict[str, dict] = {}
    for record in records:
        if record["sampling_steps"] == 0:
            # Runs use different judges, so reference metrics that the first run lacks are filled in from later ones.
            name = record["sampler"]
            references[name] = record | {"method": name, "sampler": ""} | references.get(name, {})
    return [record for record in records if record["sampling_steps"]] + list(references.values())


def write_tables(study: Study, kept: Path, results: Path) -> None:
    """Writes the tables and pictures of a study to `results`.

    study.csv           every record
    study.md            means over seeds, with their spread
    study_grid.md       the same as a table of methods by steps for each metric
    study_matched.md    such tables at equal diversity, and a picture of the last
    study_budget.md     what each run's training costs, in passes of the network
    study.png           metrics against sampling steps, without swept settings
    study_time.png      the same against time
    """
    records = gather(study, kept)
    if not records:
        return
    results.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for record in records for key in record))
    with (results / "study.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(records)

    cells: dict[tuple, list[dict]] = defaultdict(list)
    for record in (record for record in records if not (record["setting"] and study.matched)):
        method = f"{record['method']} {record['setting']}".strip()
        name = f"{method}, {record['sampler']}" if record["sampler"] else method
        cells[name, record["sampling_steps"] or ""].append(record)
    table = {cell: [mean_and_spread(group, metric) for metric in study.metrics] for cell, group in cells.items()}
    rows = [[name, steps, len(cells[name, steps]), *values] for (name, steps), values in table.items()]
    (results / "study.md").write_text(
        "\n".join(markdown(["method", "sampling steps", "seeds", *map(shown, study.metrics)], rows)) + "\n",
        encoding="utf-8",
    )

    (results / "study_grid.md").write_text("\n".join(grids(study.metrics, table)), encoding="utf-8")
    if study.matched:
        held_out = next(record[study.diversity] for record in records if record["method"] == "held_out")
        lines = []
        for below in study.below:
            name = shown(study.diversity)
            lines += [f"At {name} {held_out - below:.3f} nats, {below:g} below that of held-out rows.", ""]
            points = matched(records, study.matched, held_out - below, study.diversity)
            texts = {cell: [_text(point, held_out - below) for point in row] for cell, row in points.items()}
            lines += grids(study.matched, texts)
        (results / "study_matched.md").write_text("\n".join(lines), encoding="utf-8")
        draw_matched(study, points, held_out - below, results / "study_matched.png")

    (results / "study_budget.md").write_text("\n".join(budgets(study, kept)) + "\n", encoding="utf-8")

    drawn = {run.name for run in study.runs if run.drawn}
    steps_panels, time_panels = ({metric: defaultdict(list) for metric in study.metrics} for _ in range(2))
    for (name, steps), group in cells.items():
        if steps and not group[0]["setting"] and group[0]["method"] in drawn:
            for metric in study.metrics:
                values = [record[metric] for record in group if record.get(metric) is not None]
                if values:
                    steps_panels[metric][name].append((steps, np.mean(values)))
                    milliseconds = 10 * np.mean([record["seconds_per_100"] for record in group])
                    time_panels[metric][name].append((milliseconds, np.mean(values)))
    for panels, name, label in (
        (steps_panels, "study.png", "sampling steps (network calls)"),
        (time_panels, "study_time.png", "milliseconds a sample"),
    ):
        draw_panels(results / name, panels, label, lambda axes, panel: axes.set_xscale("log", base=2))


def budgets(study: Study, kept: Path) -> list[str]:
    """Lines of a table of what training costs, in rows that the network passes forward (engine/flops.py); a backward pass is two.

    The last column adds the runs that a student comes of.
    """
    runs = {run.name: run for run in study.runs}
    costs, rows = {}, []
    for run in study.runs:
        path = next(filter(Path.exists, (kept_file(kept, run, seed) for seed in run.seeds)), None)
        record = {} if path is None else storage.read_json(path)
        if "passes" in record:
            config = record["config"]
            costs[run.name] = config["steps"] * config["batch_size"] * record["passes"] / 1e6
            chain = [run.name]
            while (teacher := runs[chain[-1]].teacher) is not None:
                chain.append(teacher)
            told = sum(costs[name] for name in chain) if costs.keys() >= set(chain) else None
            numbers = config["steps"], config["batch_size"], f"{record['passes']:.1f}", f"{costs[run.name]:.2f}"
            rows.append([run.name, *numbers, "-" if told is None else f"{told:.2f}"])
    return markdown(["run", "steps", "rows", "passes a row", "million passes", "with its teachers"], rows)


def draw_matched(study: Study, points: Mapping[tuple, Sequence[Point | None]], target: float, path: Path) -> None:
    """Each of study.matched against steps; what lies further than NEAR from the diversity is not comparable, and left out."""
    panels: dict[str, dict] = {metric: defaultdict(list) for metric in study.matched}
    drawn = {run.name for run in study.runs if run.drawn}
    for (name, steps), row in points.items():
        if steps and name.partition(",")[0] in drawn:
            for metric, point in zip(study.matched, row, strict=True):
                if point is not None and abs(point.diversity - target) < NEAR:
                    panels[metric][name].append((steps, point.value))
    label = f"sampling steps, at {shown(study.diversity)} {target:.2f} nats"
    draw_panels(path, panels, label, lambda axes, panel: axes.set_xscale("log", base=2))


def mean_and_spread(group: Sequence[dict], metric: str) -> str:
    """Mean ± spread of the records of one cell: over seeds their standard deviation, of one seed the samples' standard error."""
    values = np.array([record[metric] for record in group if record.get(metric) is not None], float)
    if not len(values):
        return "-"
    spread = values.std(ddof=1) if len(values) > 1 else group[0].get(f"{metric}_stderr")
    return f"{values.mean():.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def markdown(head: Sequence, rows: Sequence[Sequence]) -> list[str]:
    """Lines of a table, in which no cell can end a cell or a line."""

    def escaped(cell):
        return str(cell).replace("|", "\\|").replace("\n", " ")

    def line(cells):
        return f"| {' | '.join(map(escaped, cells))} |"

    return [line(head), "|---" * len(head) + "|", *map(line, rows)]


def grids(metrics: Sequence[str], table: Mapping[tuple, Sequence[str]]) -> list[str]:
    """Lines of a table for each metric, methods by steps, of {(method, steps): a cell for each metric}."""
    names, lines = list(dict.fromkeys(name for name, _ in table)), []
    steps = sorted({steps for _, steps in table if steps})
    nothing = ["-"] * len(metrics)
    for i, metric in enumerate(metrics):
        # Real text and the naive samplers take no steps.
        rows = [[name, *(table.get((name, n), table.get((name, ""), nothing))[i] for n in steps)] for name in names]
        lines += [*markdown([shown(metric), *steps], rows), ""]
    return lines


def _text(point: Point | None, target: float) -> str:
    """A cell: value and spread, and where the target was not reached the entropy."""
    if point is None:
        return "-"
    reached = "" if point.diversity == target else f" (at {point.diversity:.2f})"
    return f"{point.value:.3f}" + (f" ± {point.stderr:.3f}" if round(point.stderr, 3) else "") + reached
