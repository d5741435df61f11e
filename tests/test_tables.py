"""What evaluations look like at a terminal: what fits it, what it says, and what is left for --wide."""

import re

import pytest
from rich.console import Console

from flowlm.evaluation import results
from flowlm.evaluation.results import Evaluation
from flowlm.runs import tables
from flowlm.system import terminal

LONG = "and so we go on " * 12
MEANINGS = {
    "nats_per_char": "less is better",
    "entropy": "near real text's is best",
    "distinct_rows": "share of different samples",
}
# As evaluations have them: in the order of the judges, of which the first has not the main metrics.
METRICS = ("entropy", "distinct_1", "distinct_rows", "words_in_corpus", "longest_repeat", "nats_per_char", "self_bleu")


def evaluation(samplers=("map@1", "ancestral-temp0.55-noise0.8@64"), add=0.0, main=None, **more):
    """Metric i of row k is k + i / 8 + add, with an error of a thousandth."""
    metrics = {"held_out/cross_entropy@0.5": 1.25, "held_out/cross_entropy": 1.5}
    for k, name in enumerate((*samplers, "trigram", "held_out")):
        for i, metric in enumerate(METRICS):
            metrics[f"samples/{name}/{metric}"] = k + i / 8 + (add if "@" in name else 0)
            metrics[f"samples/{name}/{metric}_stderr"] = 0.001
    main = ("nats_per_char", "entropy", "distinct_rows") if main is None else main
    texts = {name: [LONG, f"{name} wrote this"] for name in (*samplers, "trigram", "held_out")}
    return Evaluation(3, metrics, texts, main=main, meanings=MEANINGS, **more)


def cells(printed):
    """The table's lines by their first cell, and its heads with each word once, in order."""
    lines = printed.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("───") and "sampler @ steps" in lines[i - 1])
    body = lines[rule + 1 : lines.index("", rule)]
    return {row[0]: row[1:] for row in (re.split(r"\s{2,}", line.strip()) for line in body)}, lines[rule - 3 : rule]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(results, "draw_evaluation", lambda directory: None)


@pytest.fixture
def columns(monkeypatch):
    """Sets the width of the terminal."""

    def set_width(width):
        monkeypatch.setattr(
            terminal, "Console", lambda **more: Console(**({"width": width, "force_terminal": True} | more))
        )

    return set_width


def test_a_table_fits_80_columns_and_begins_with_what_the_judges_call_main(capsys):
    evaluation().show()
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    table, head = cells(printed)
    # nats / char is metric 5 of each row, entropy metric 0 and distinct rows metric 2.
    assert table == {
        "map@1": ["0.625", "0.000", "0.250"],
        "ancestral-temp0.55-noise0.8@64": ["1.625", "1.000", "1.250"],
        "trigram": ["2.625", "2.000", "2.250"],
        "held out": ["3.625", "3.000", "3.250"],
    }
    assert [" ".join(line.split()) for line in head[1:]] == ["nats / distinct", "sampler @ steps char entropy rows"]
    for meaning in ("nats / char: less is better", "entropy: near real text's is best"):
        assert f"\n{meaning}\n" in printed
    assert "\ndistinct rows: share of different samples\n" in printed
    assert "4 more metrics are in evaluation.json, and shown by --wide" in printed


def test_held_out_cross_entropies_are_a_line_each(capsys):
    evaluation().show()
    printed = capsys.readouterr().out
    assert re.search(r"tau +cross entropy\n─+\n0\.5 +1\.250\nmean +1\.500\n", printed)


@pytest.mark.parametrize("main", [METRICS, ()])
def test_there_are_at_most_six_columns(main, capsys):
    """Of old evaluations too, which say nothing of what is main."""
    evaluation(main=main).show()
    table, _ = cells(capsys.readouterr().out)
    assert table["map@1"] == [f"{i / 8:.3f}" for i in range(5)]


def test_a_narrower_terminal_has_fewer_columns_and_whole_lines(columns, capsys):
    columns(44)
    evaluation().show()
    printed = capsys.readouterr().out
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", printed).splitlines())) <= 44
    table, _ = cells(re.sub(r"\x1b\[[0-9;]*m", "", printed))
    assert table["ancestral-temp0.55-noise0.8@64"] == ["1.625"]


def test_wide_shows_all_metrics_with_their_errors(capsys):
    evaluation().show(wide=True)
    printed = capsys.readouterr().out
    table, _ = cells(printed)
    order = (5, 0, 2, 1, 3, 4, 6)
    assert table["map@1"] == [f"{i / 8:.3f} ± 0.001" for i in order]
    assert table["held out"] == [f"{3 + i / 8:.3f} ± 0.001" for i in order]
    assert "--wide" not in printed


def test_samples_are_whole_lines_under_the_table_named_by_sampler_and_steps(capsys):
    evaluation().show()
    printed = capsys.readouterr().out
    below = printed[printed.index("\nmap@1\n") :]
    assert [line for line in below.splitlines() if line and line[0] != " "] == [
        "map@1",
        "ancestral-temp0.55-noise0.8@64",
        "trigram",
        "held out",
    ]
    block = below.split("\n\n")[0]
    assert " ".join(block.split()) == f"map@1 {LONG.strip()} map@1 wrote this"
    assert all(line.startswith("  ") for line in block.splitlines()[1:] if line != "map@1")


def test_two_runs_of_one_name_are_both_compared(tmp_path, capsys):
    for name, add in (("a/seed0", 0.0), ("b/seed0", 10.0)):
        evaluation(("map@1",), add).save(tmp_path / name)
    results.compare([str(tmp_path / "a/seed0"), str(tmp_path / "b/seed0"), f"{tmp_path}/a/../a/seed0/"])
    printed = capsys.readouterr().out
    rows = [re.split(r"\s{2,}", line.strip()) for line in printed[: printed.index("nats / char:")].splitlines()]
    start = rows.index(["a/seed0"])
    assert rows[start : start + 6] == [
        ["a/seed0"],
        ["map@1", "0.625", "0.000", "0.250"],
        ["b/seed0"],
        ["map@1", "10.625", "10.000", "10.250"],
        ["trigram", "1.625", "1.000", "1.250"],
        ["held out", "2.625", "2.000", "2.250"],
    ]
    assert "\na/seed0 map@1\n" in printed and "\nb/seed0 map@1\n" in printed


def test_runs_on_different_data_are_compared_in_tables_of_their_own(tmp_path, capsys):
    for name, data in (("a", "sotu"), ("b", "grammar98"), ("c", "sotu")):
        (tmp_path / name).mkdir()
        told = {"name": data, "tokenizer": data, "length": 32, "dir": f"/data/{name}"}
        (tmp_path / name / "config.json").write_text(results.json.dumps({"data": told}))
        evaluation(("map@1",)).save(tmp_path / name)
    evaluation(("map@2",)).save(tmp_path / "d", tmp_path / "a")  # of run a, elsewhere
    results.compare([str(tmp_path / name) for name in "abcd"])
    one, other = capsys.readouterr().out.split("Samples before the judges: ")[1:]
    assert one.startswith("sotu, sotu, rows of 32\n") and other.startswith("grammar98, grammar98, rows of 32\n")

    def names(table):
        return [line for line in table.splitlines() if re.fullmatch("[abcd]", line.strip())]

    assert [name.strip() for name in names(one)] == ["a", "c", "d"] and [name.strip() for name in names(other)] == ["b"]
    assert one.count("held out  ") == other.count("held out  ") == 1


def test_what_the_first_run_did_not_ask_of_real_text_is_of_another():
    first, second = ({"metrics": {f"samples/held_out/{m}": v}} for m, v in (("entropy", 1.0), ("nats", 2.0)))
    assert tables._lines({"a": first, "b": second}) == [("", "held_out", {"entropy": 1.0, "nats": 2.0})]
