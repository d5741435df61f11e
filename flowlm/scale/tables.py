"""Shows a plan as a table and a picture."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.table import Table

from flowlm.runs.curves import draw_panels
from flowlm.scale.ahead_of_time import total
from flowlm.scale.costs import EFFICIENCY
from flowlm.scale.evaluations import START_SECONDS, TRAINING_STEPS
from flowlm.system.terminal import console

GIB = 2**30


def rows_of(report: Mapping) -> list[tuple[str, list[str]]]:
    """The table: (quantity, one cell for each topology)."""
    points = report["points"]
    rows = []

    def row(label, number, show=None):
        def cell(point):
            try:
                value = number(point)
            except KeyError:  # of a program that does not fit nothing else is known
                return "-"
            if isinstance(value, str):
                return value
            return show.format(value) if show else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

        cells = [cell(point) for point in points]
        if set(cells) != {"-"}:
            rows.append((label, cells))

    train, sample, held_out = ((lambda p, name=name: p[name]) for name in ("train", "sample", "held_out"))
    row("chips", lambda p: train(p)["chips"], "{:,}")
    row("sequences per chip", lambda p: train(p)["per_chip"], "{:g}")
    row("HBM: state and batch, GiB", lambda p: train(p)["hbm"]["arguments"] / GIB)
    row("HBM: temporaries, GiB", lambda p: train(p)["hbm"]["temporaries"] / GIB)
    row("HBM: peak, GiB", lambda p: total(train(p)) / GIB)
    row("of GiB", lambda p: train(p)["hbm"]["limit"] / GIB)
    row("fits", lambda p: "yes" if train(p)["fits"] else "**no**")
    row("most sequences per chip that fit", lambda p: p["largest_per_chip"], "{:,}")
    row("FLOPs per token, G", lambda p: p["estimate"]["flops_per_token"] / 1e9)
    row("of those the network's (closed form), G", lambda p: p["estimate"]["network_flops_per_token"] / 1e9)
    row("FLOPs per chip and step, T", lambda p: train(p)["flops_per_chip"] / 1e12)
    row("HBM traffic per chip and step, GB", lambda p: train(p)["traffic"] / 1e9)
    row("sent per chip and step, GB", lambda p: train(p)["wire"] / 1e9)
    row("sent between slices, GB", lambda p: train(p)["dcn"] / 1e9 if any(train(q).get("dcn") for q in points) else "-")
    for kind in dict.fromkeys(kind for p in points for kind in train(p).get("collectives", {}) if kind != "dcn"):

        def get(p, key, kind=kind):
            return train(p)["collectives"].get(kind, {}).get(key, 0.0)

        row(f"{kind}: number, GB", lambda p, get=get: f"{get(p, 'count'):,.0f}, {get(p, 'wire') / 1e9:.3g}")
    for part in ("compute", "memory", "network"):
        row(f"roofline: {part}, ms", lambda p, part=part: 1e3 * train(p)["roofline"][part])
    row("estimate: step, ms", lambda p: 1e3 * train(p)["roofline"]["estimate"])
    row("estimate: MFU", lambda p: f"{p['estimate']['mfu']:.0%}")
    row("estimate: tokens per second and chip", lambda p: p["estimate"]["tokens_per_second_per_chip"], "{:,.0f}")
    row("written over the whole vocabulary: peak HBM, GiB", lambda p: total(p["dense"]) / GIB)
    row("fits so", lambda p: "yes" if p["dense"]["fits"] else "**no**")
    row("sampler: sequences per chip", lambda p: sample(p)["per_chip"], "{:g}")
    row("sampler: peak HBM, GiB", lambda p: total(sample(p)) / GIB)
    row("estimate: one call of the sampler, ms", lambda p: 1e3 * sample(p)["roofline"]["estimate"])
    row("held-out likelihood: sequences per chip", lambda p: held_out(p)["per_chip"], "{:g}")
    row("held-out likelihood: peak HBM, GiB", lambda p: total(held_out(p)) / GIB)
    row("held-out likelihood fits", lambda p: "yes" if held_out(p)["fits"] else "**no**")
    _evaluation_rows(row)
    return rows


def _evaluation_rows(row: Callable) -> None:
    """The rows of what evaluating takes, in its first lines what comes before the first step."""
    start, often, final = ((lambda p, name=name: p["evaluation"][name]) for name in ("start", "often", "final"))

    def within(share):
        return lambda p: "yes" if share(p) <= 1 else "**no**"

    row(
        "start: rows read",
        lambda p: start(p)["marginal_rows"] + start(p)["counted_rows"] + start(p)["held_out_rows"],
        "{:,}",
    )
    row("start: characters read, million", lambda p: start(p)["characters"] / 1e6)
    row("start: memory of a host at most, GiB", lambda p: start(p)["host_bytes"] / GIB)
    row(
        "estimate: start, s; where tables were kept",
        lambda p: f"{start(p)['seconds']:.3g}; {start(p)['again_seconds']:.2g}",
    )
    row(f"start within {START_SECONDS} s", within(lambda p: start(p)["seconds"] / START_SECONDS))
    row("evaluation: programs compiled; for the last one", lambda p: f"{often(p)['programs']}; {final(p)['programs']}")
    row("evaluation: peak HBM, GiB", lambda p: p["evaluation"]["hbm"] / GIB)
    for name, which in (("an evaluation", often), ("the last evaluation", final)):
        row(f"{name}: calls of the network to sample", lambda p, at=which: at(p)["network_calls"], "{:,}")
        row(f"{name}: rows judged", lambda p, at=which: at(p)["judged_rows"], "{:,}")
        row(f"estimate: {name} on the devices, s", lambda p, at=which: at(p)["device"])
        row(f"estimate: {name} on the hosts, s", lambda p, at=which: at(p)["host"])
        row(f"estimate: {name}, of {TRAINING_STEPS} training steps", lambda p, at=which: at(p)["share"], "{:.0%}")
    row(
        f"an evaluation within {TRAINING_STEPS} training steps",
        within(lambda p: max(often(p)["share"], final(p)["share"])),
    )


def print_plan(report: Mapping, out: str | None) -> None:
    """Prints the table; with `out` writes it, the numbers and a picture there."""
    points, rows = report["points"], rows_of(report)
    names = ["of one chip, unless it says otherwise", *(point["topology"] for point in points)]
    table = Table(title="Planned, not run")
    for name in names:
        table.add_column(name, justify="left" if name == names[0] else "right")
    for label, cells in rows:
        table.add_row(label, *(cell.strip("*") for cell in cells))
    screen = console(200)
    screen.print(table)
    screen.print(
        f"Times are an estimate: the largest of the three times at published peaks, divided by an efficiency of {EFFICIENCY}."
    )
    if out is None:
        return
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "plan.json").write_text(json.dumps(report, indent=2) + "\n")
    lines = [f"| {' | '.join(cells)} |" for cells in [names, *([label, *cells] for label, cells in rows)]]
    lines.insert(1, "|---" * len(names) + "|")
    (directory / "plan.md").write_text("\n".join(lines) + "\n")
    panels = {
        "HBM, peak, GiB": lambda p: total(p["train"]) / GIB,
        "sent per chip and step, GB": lambda p: p["train"]["wire"] / 1e9,
        "most sequences per chip that fit": lambda p: p["largest_per_chip"],
        "estimated tokens per second and chip": lambda p: p["estimate"]["tokens_per_second_per_chip"],
    }
    lines: dict[str, dict[str, list]] = {name: defaultdict(list) for name in panels}
    for point in points:
        for name, number in panels.items():
            try:
                place = point["train"]["chips"], number(point)
            except KeyError:  # it does not fit, or was not asked for
                continue
            lines[name][point["topology"].partition(":")[0]].append(place)

    def finish(axes, panel):
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)

    draw_panels(directory / "plan.png", {name: line for name, line in lines.items() if line}, "chips", finish)
