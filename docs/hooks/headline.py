"""What the README has of the head-to-head: `python docs/hooks/headline.py` makes its picture, docs/headline.png, and its table."""

import csv
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tables import best_settings, markdown, mean_and_spread

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "results/study/grammar/study.csv"
# (method, whether its sampler's noise is halved): its name and colour. Others would hide these.
SHOWN = {
    ("flow_map", True): ("FMLM, noise 0.5", "tab:red"),
    ("flow_map", False): ("FMLM", "lightcoral"),
    ("flow", False): ("FLM, ancestral", "tab:blue"),
    ("dcd_2", False): ("DCD, rounds to 1/2", "tab:green"),
    ("sdtt_2", False): ("SDTT, rounds to 1/2", "tab:olive"),
    ("uniform", False): ("uniform (UDLM)", "tab:purple"),
    ("masked", False): ("masked (MDLM)", "tab:gray"),
}
METHODS = {
    "masked": "masked diffusion (MDLM)",
    "uniform": "uniform diffusion (UDLM)",
    "sdtt": "SDTT, masked distilled, best of all rounds",
    "dcd": "DCD, uniform distilled, best of all rounds",
    "flow": "flow (FLM)",
    "flow_map": "**flow map (FMLM)**",
}
TABLE = re.compile(r"(<!-- begin results -->\n).*?(<!-- end results -->)", re.DOTALL)


def table() -> str:
    """Share grammatical by network calls, every method at its best setting."""
    found = best_settings(STUDY.relative_to(ROOT).as_posix(), "grammatical")

    def cell(row, steps):
        return mean_and_spread(row[steps][0]) if steps in row else "-"

    rows = [[told, *(cell(found[method], steps) for steps in (1, 2, 4, 8))] for method, told in METHODS.items()]
    return markdown(["share grammatical, by network calls", "1", "2", "4", "8"], rows)


def shares() -> dict[tuple[str, bool], dict[int, list[float]]]:
    """{method: {steps: share grammatical of each seed}} of samplers as they are set, by the family's last sampler."""
    out: dict = defaultdict(lambda: defaultdict(list))
    with STUDY.open(newline="", encoding="utf-8") as file:
        for record in csv.DictReader(file):
            halved = "noise" in record["sampler"]
            if record["setting"] or record["sampler"] == "euler" or (record["method"], halved) not in SHOWN:
                continue
            out[record["method"], halved][int(record["sampling_steps"])].append(float(record["grammatical"]))
    return out


def draw(path: Path) -> None:
    """Mean over seeds, and their standard deviation as a band."""
    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes, found = figure.subplots(), shares()
    for key, (name, colour) in SHOWN.items():
        steps = sorted(found[key])
        mean, spread = (np.array([of(found[key][n]) for n in steps]) for of in (np.mean, lambda x: np.std(x, ddof=1)))
        axes.plot(steps, mean, marker="o", markersize=3, label=name, color=colour)
        axes.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
    axes.axhline(0.625, linestyle=":", color="black", linewidth=1, label="trigram chain")
    axes.set_xscale("log", base=2)
    axes.set_xticks([2**n for n in range(8)], [str(2**n) for n in range(8)])
    axes.set_ylim(0, 1)
    axes.set_xlabel("network calls")
    axes.set_ylabel("share grammatical")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    draw(ROOT / "docs/headline.png")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(TABLE.sub(lambda found: found[1] + table() + found[2], text), encoding="utf-8")
