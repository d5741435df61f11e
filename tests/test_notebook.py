"""The notebook in examples/: it runs from top to bottom, and the outputs that it keeps are those that it makes."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "examples/flowlm_in_ten_minutes.ipynb"
BOOK = json.loads(PLACE.read_text(encoding="utf-8"))


def cells(book):
    """[(source, outputs)] of the cells of code; outputs are kinds and texts."""

    def output(each):
        if each["output_type"] == "stream":
            return each["name"], "".join(each["text"])
        return "+".join(sorted(each.get("data", {"error": 0}))), "".join(each.get("data", {}).get("text/plain", ""))

    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    return [("".join(cell["source"]), [output(each) for each in cell["outputs"]]) for cell in code]


def shares(book):
    """{steps: (share, error)} as the notebook prints them."""
    text = "\n".join(text for _, outputs in cells(book) for _, text in outputs)
    found = re.findall(r"(\d+) steps?: (\d\.\d+) ± (\d\.\d+) grammatical", text)
    return {int(steps): (float(share), float(error)) for steps, share, error in found}


def test_outputs_are_kept_of_one_run_from_top_to_bottom():
    counts = [cell["execution_count"] for cell in BOOK["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    kinds = {kind for _, outputs in cells(BOOK) for kind, _ in outputs}
    assert kinds & {"stdout", "text/html+text/plain"} and any("image/png" in kind for kind in kinds)
    assert "error" not in kinds and "stderr" not in kinds
    text = PLACE.read_text(encoding="utf-8")
    assert str(ROOT) not in text and str(Path.home()) + "/" not in text and len(text) < 200_000


@pytest.mark.needs("notebook")
def test_it_runs_and_makes_what_it_keeps():
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(PLACE, as_version=4)
    told = {
        name: value for name, value in os.environ.items() if name != "XLA_FLAGS"
    }  # of the tests, under which it would be slow
    client = NotebookClient(book, timeout=900, resources={"metadata": {"path": str(PLACE.parent)}})
    client.execute(env=told | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"})
    for (source, made), (_, kept) in zip(cells(book), cells(BOOK), strict=True):
        made, kept = ([kind for kind, _ in each if kind != "stderr"] for each in (made, kept))
        assert made == kept, source
    now, then = shares(book), shares(BOOK)
    assert now.keys() == then.keys() == {1, 8}
    for steps in now:
        assert abs(now[steps][0] - then[steps][0]) < 4 * np.hypot(now[steps][1], then[steps][1]) + 0.01
