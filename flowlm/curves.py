"""curves.png: the loss and every evaluated metric against steps, drawn from metrics.jsonl."""

from collections import defaultdict

import matplotlib
from etils import epath
from matplotlib.figure import Figure

from flowlm.metrics import read_metrics

COLUMNS = 4


def draw_curves(workdir) -> None:
    """Writes `workdir`/curves.png; one panel a metric, one line for each sampler, number of steps or time."""
    matplotlib.use("Agg")
    panels: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for line in read_metrics(workdir):
        for name, value in line.items():
            if name == "step" or value is None or name.endswith("_stderr"):
                continue
            # "samples/ancestral@64/entropy" is the line "ancestral@64" of the panel "entropy".
            *_, label, panel = ("", *name.split("/"))
            if label in ("samples", "held_out", ""):
                panel, _, label = panel.partition("@")
            panels[panel][label].append((line["step"], value))
    if not panels:
        return
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 2.8 * rows), layout="constrained")
    for axes, (panel, lines) in zip(figure.subplots(rows, COLUMNS, squeeze=False).flat, panels.items(), strict=False):
        for label, points in lines.items():
            axes.plot(
                *zip(*points, strict=True), marker="o" if len(points) < 20 else None, markersize=3, label=label or None
            )
        axes.set_title(panel.replace("_", " "), fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        if any(lines):
            axes.legend(fontsize=6)
    for axes in list(figure.axes)[len(panels) :]:
        axes.set_visible(False)
    with (epath.Path(workdir) / "curves.png").open("wb") as file:
        figure.savefig(file, format="png", dpi=90)
