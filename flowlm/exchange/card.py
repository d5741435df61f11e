"""The model card of a run that is given to others: what it is, how it was made, what judges say of it, what it cost."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from flowlm.data.corpora import licence
from flowlm.engine.flops import network_evaluations
from flowlm.judges.base import shown
from flowlm.models.reference import BARE
from flowlm.runs.metrics import by_row, of_held_out, parse_row, read_metrics
from flowlm.runs.tables import cell
from flowlm.runs.trained import Trained
from flowlm.system import storage


def make_card(run: Trained, facts: Mapping[str, Any], place: str, directory: str | os.PathLike | None = None) -> str:
    """The card in Markdown.

    Args:
      facts: of the manifest, and `count`, how many parameters there are.
      place: what `flowlm sample` is given to read it.
      directory: of the run; with it the card tells how it was trained, what it cost, and how it was judged.
    """
    config = run.config
    steps = config.data.length - 1 if config.model.causal else 1 if config.model.time_embeddings == 2 else 64
    told = dict(facts) | {"place": place, "sampling_steps": steps, "data": config.data.name}
    told |= {"tokenizer": config.data.tokenizer, "licence": licence(config.data.name)}
    differs = [f"`{key}: {config.model[key]}`" for key, bare in BARE.items() if config.model[key] != bare]
    differs += ["a mark of given tokens"] * ("mark" in run.params)
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("flowlm.exchange", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    record = None if directory is None else _record(run, place, directory)
    card = templates.get_template("card.md").render(told, differs=", ".join(differs), record=record)
    return card.replace(f"{Path.home()}/", "~/")  # whose home it was says nothing to others


def _record(run: Trained, place: str, directory: str | os.PathLike) -> dict[str, Any]:
    config, lines = run.config.copy_and_resolve_references(), read_metrics(directory)
    config.model.vocab_size = run.tokenizer.vocab_size
    # Without metrics it is no run that was trained here, and its versions are of what exported or imported it.
    versions = storage.read_json(storage.path(directory) / "versions.json") if lines else {}
    tokens = run.step * config.batch_size * config.data.length
    speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
    return {
        "command": versions.get("command"),
        "origins": {name: config[name] for name in ("teacher", "init_from") if config[name]},
        "batch": config.batch_size,
        "tokens": tokens,
        "passes": network_evaluations(config),
        "teacher": bool(config.teacher),
        "minutes": round(tokens / float(np.median(speeds)) / 60, 1) if speeds else None,
        "device": versions.get("device"),
        "judged": judged(directory, place),
    }


def judged(directory: str | os.PathLike, place: str) -> dict[str, Any] | None:
    """What evaluation.json says of samples and held-out rows, as cells of a table; None where there is none.

    Args:
      place: what `flowlm evaluate` is given to judge it again.
    """
    path = storage.path(directory) / "evaluation.json"
    if not path.exists():
        return None
    found = storage.read_json(path)
    rows = by_row(found["metrics"])
    measured = dict.fromkeys(metric for values in rows.values() for metric in values if not metric.endswith("_stderr"))
    columns = [metric for metric in found.get("main", ()) if metric in measured] or [*measured]
    steps = sorted({parse_row(row)[1] for row in rows} - {None})
    command = f"flowlm evaluate {place} --steps={','.join(map(str, steps))}"
    held, _ = of_held_out(found["metrics"])
    bound = cell(held, "bound_nats_per_token", wide=True)
    return {
        "command": command + (f" --num={found['num']}" if "num" in found else "") + " --results=DIR",
        "bound": bound and f"Upper bound on the negative log-likelihood of held-out rows: {bound} nats a token.",
        "columns": [shown(metric) for metric in columns],
        "rows": [
            [f"`{name}`", *(cell(values, metric, wide=True) for metric in columns)] for name, values in rows.items()
        ],
        "step": found["step"],
        "lines": [
            *(f"{shown(m)}: {text}" for m, text in found.get("meanings", {}).items() if m in columns),
            *found.get("notes", ()),
        ],
    }
