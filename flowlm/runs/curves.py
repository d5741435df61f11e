"""Pictures of a run: curves.png (every metric against training steps) and evaluation.png (samples against sampling steps)."""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from etils import epath
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flowlm.judges.base import shown
from flowlm.runs.metrics import by_row, parse_held_out_key, parse_row, parse_sample_key, read_metrics, row_name
from flowlm.system import storage

COLUMNS = 4
MOST = 6  # lines of a legend in every panel


def draw_panels(
    path: Path | epath.Path,
    panels: Mapping[str, Mapping[str, list]],
    x_label: str,
    finish: Callable[[Axes, str], Any],
) -> None:
    """One small plot a panel, one line a label, in one colour everywhere. `finish(axes, panel)` may change each plot."""

    def plain(text):
        return text.replace("$", r"\$")  # matplotlib would read a formula behind it

    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    palette = colormaps["tab10" if len(labels) <= 10 else "tab20"]
    colours = {label: palette(i % palette.N) for i, label in enumerate(labels)}
    shared = {}  # with many lines one legend serves all panels
    grid = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axes, (panel, lines) in zip(grid, panels.items(), strict=False):
        for label, points in lines.items():
            x, y = zip(*points, strict=True)
            marker = "o" if len(points) < 20 else None
            named = {"label": plain(label) or None, "color": colours[label]}
            shared[plain(label)] = axes.plot(x, y, marker=marker, markersize=3, **named)[0]
        finish(axes, panel)
        axes.set_title(plain(shown(panel)), fontsize=9)
        axes.set_xlabel(x_label, fontsize=8)
        axes.tick_params(labelsize=8)
        if any(lines) and len(labels) <= MOST:
            axes.legend(fontsize=6)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    if len(labels) > MOST:
        figure.legend(shared.values(), shared, loc="outside lower center", ncols=6, fontsize=8)
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=90)


def _panel(key: str) -> tuple[str, str]:
    """(panel, line in it) of a metric: of samples a line for each row, of held-out rows one for each warped time."""
    if (parsed := parse_sample_key(key)) is not None:
        sampler, steps, metric = parsed
        return metric, row_name(sampler, steps)
    metric, tau = parse_held_out_key(key) or (key, None)
    return metric, tau or ""


def draw_curves(workdir: str | os.PathLike) -> None:
    """Writes `workdir`/curves.png from metrics.jsonl: the loss and every evaluated metric against training steps."""
    panels: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for line in read_metrics(workdir):
        for name, value in line.items():
            if name == "step" or value is None or name.endswith("_stderr"):
                continue
            panel, label = _panel(name)
            panels[panel][label].append((line["step"], value))
    if panels:
        draw_panels(storage.path(workdir) / "curves.png", panels, "training steps", lambda axes, panel: None)


def draw_evaluation(directory: str | os.PathLike) -> None:
    """Writes `directory`/evaluation.png from evaluation.json: every judge's metric against sampling steps, held-out dashed."""
    directory = storage.path(directory)
    metrics = storage.read_json(directory / "evaluation.json")["metrics"]
    panels: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    real: dict[str, float] = {}
    for row, values in by_row(metrics).items():
        sampler, steps = parse_row(row)
        for panel, value in values.items():
            if panel.endswith("_stderr") or value is None:
                continue
            if steps is not None:
                panels[panel][sampler].append((steps, value))
            elif sampler == "held_out":
                real[panel] = value

    def finish(axes, panel):
        axes.set_xscale("log", base=2)
        if panel in real:
            axes.axhline(real[panel], linestyle="--", color="grey", linewidth=1, label="held out")

    if panels:
        draw_panels(directory / "evaluation.png", panels, "sampling steps (network calls)", finish)
