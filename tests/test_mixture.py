"""Mixtures of prepared sets: every set in its share and in its own order, and which row is which depends on its number alone."""

import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from command_line import error_of
from test_own_text import texts
from toy import run_config, train_only

from flowlm.data import mixture, open_dataset, own_text
from flowlm.data.prepare import prepare_text
from flowlm.engine import sharding
from flowlm.engine.sharding import Layout, global_rows, make_mesh
from flowlm.runs import directory as run_directory

ROOT = Path(__file__).parents[1]
LENGTH = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three prepared sets of different text and size, with one tokenizer."""
    out = {}
    for number, name in enumerate(("own", "more", "other")):
        place = tmp_path_factory.mktemp(name)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(24 + 8 * number, seed=10 + number))
        (place / "a.jsonl").write_text(lines)
        prepare_text("jsonl", str(place / "a.jsonl"), "sotu_bpe_512", LENGTH, str(place / "data"), "")
        out[name] = str(place / "data")
    return out


def opened(folder):
    return open_dataset("own_text", f"{folder}/tokenizer.json", LENGTH, folder)


SHARES = [
    [Fraction(1, 2), Fraction(1, 2)],
    [Fraction("0.7"), Fraction("0.3")],
    [Fraction("0.001"), Fraction("0.989"), Fraction("0.01")],
    [Fraction("0.123456789"), Fraction(1, 3), Fraction("0.2"), 1 - Fraction("0.323456789") - Fraction(1, 3)],
]


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_every_set_has_its_share_and_no_row_is_left_out(shares):
    num = 3000
    sets, numbers = mixture.places(0, num, shares)
    for number, share in enumerate(shares):
        mine = sets == number
        assert numbers[mine].tolist() == [*range(mine.sum())]  # one after the other, from the first on
        taken = np.cumsum(mine)
        assert max(abs(count - share * (i + 1)) for i, count in enumerate(taken.tolist())) < len(shares)


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_a_place_depends_on_the_number_of_the_row_alone(shares):
    whole = mixture.places(0, 500, shares)
    for start, stop in ((0, 1), (17, 17), (250, 499)):
        for found, truth in zip(mixture.places(start, stop, shares), whole):
            np.testing.assert_array_equal(found, truth[start:stop])
    far = 10**15  # where floating-point numbers would be wrong
    sets, numbers = mixture.places(far, far + 40, shares)
    for number, share in enumerate(shares):
        mine = numbers[sets == number]
        assert (np.diff(mine) == 1).all() and all(abs(each - far * share) < 50 for each in mine.tolist())


def test_rows_of_a_mixture(folders):
    """Its own rows come as they do without others, an epoch of a set holds each row once, and parts are parts of the whole."""
    own, more = opened(folders["own"]), opened(folders["more"])
    alone = own.train.shuffled(3)
    np.testing.assert_array_equal(mixture.shuffled(own, (), 3)(5, 60), alone(5, 60))

    told = (f"{folders['more']}:0.5", f"{folders['other']}:0.125")
    rows = mixture.shuffled(own, told, 3)
    num = 2 * len(more.train)
    stream = rows(0, num)
    sets, _ = mixture.places(0, num, [Fraction(3, 8), Fraction(1, 2), Fraction(1, 8)])
    np.testing.assert_array_equal(stream[sets == 0], alone(0, (sets == 0).sum()))
    found, truth = stream[sets == 1], more.train.rows(0, len(more.train))
    assert len(found) == len(truth) and sorted(map(bytes, found)) == sorted(map(bytes, truth))
    for start, stop in ((0, 7), (11, 11), (num - 9, num)):
        np.testing.assert_array_equal(rows(start, stop), stream[start:stop])
    assert (mixture.shuffled(own, told, 4)(0, num) != stream).any(1).mean() > 0.9


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_batch_is_the_same_on_any_mesh(folders, devices):
    own = opened(folders["own"])
    rows = mixture.shuffled(own, (f"{folders['more']}:0.3",), 0)
    batch = global_rows(rows, 40, 16, LENGTH, Layout(make_mesh(data=devices)))
    np.testing.assert_array_equal(np.asarray(batch), rows(40, 56))


def config_on(folders, *told, **changes):
    small = {"data.name": "own_text", "data.length": LENGTH, "data.dir": folders["own"], "data.mixture": told}
    small |= {"data.tokenizer": f"{folders['own']}/tokenizer.json", "model.vocab_size": 512, "steps": 4}
    return run_config("", **{"model.width": 16, "model.blocks": 1, "model.heads": 2} | small | changes)


def test_a_run_on_a_mixture_is_taken_up_in_the_same_order_and_knows_its_folders(folders, tmp_path, monkeypatch):
    """A relative path or a moved folder is the same one; other shares or other text are another experiment."""
    told, asked, global_rows_of = f"{folders['more']}:0.4", [], sharding.global_rows
    monkeypatch.setattr(sharding, "global_rows", lambda *given: asked.append(global_rows_of(*given)) or asked[-1])
    train_only(config_on(folders, told, steps=2), tmp_path / "run")
    shutil.copytree(folders["more"], tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    train_only(config_on(folders, "moved:0.4"), tmp_path / "run")
    rows = mixture.shuffled(opened(folders["own"]), (told,), 0)
    assert len(asked) == 4
    for step, batch in enumerate(asked):
        np.testing.assert_array_equal(batch, rows(16 * step, 16 * step + 16))

    held, _ = run_directory.load_workdir(tmp_path / "run")
    assert held.data.mixture == (f"{tmp_path}/moved:0.4",)
    tokenizer = opened(folders["own"]).tokenizer
    for other in (f"{folders['more']}:0.5", f"{folders['other']}:0.4"):
        with pytest.raises(ValueError, match="holds a run of another experiment .*data.mixture"):
            run_directory.check_workdir(tmp_path / "run", config_on(folders, other), tokenizer)


def test_what_is_wrong_with_a_mixture_is_one_line(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)

    def wrong(*told):
        line = "train", f"--config=experiments/my_text.py:{folders['own']}", f"--workdir={tmp_path / 'run'}"
        said = error_of(*line, f"--config.data.mixture={','.join(told)}")
        assert "\n" not in said and not (tmp_path / "run").exists()
        return said

    more = folders["more"]
    for told in (more, f"{more}:", f"{more}:0", f"{more}:1", f"{more}:-0.5", f"{more}:half", ":0.5"):
        assert f"data.mixture {told!r} is not FOLDER:SHARE" in wrong(told)
    assert "add up to 1.1: leave some to the set of data.dir" in wrong(f"{more}:0.6", f"{folders['other']}:0.5")
    assert f"names {more} twice" in wrong(f"{more}:0.1", f"{more}:0.2")
    assert f"{tmp_path} has no manifest.json: make it with `flowlm prepare" in wrong(f"{tmp_path}:0.5")

    manifest = own_text.load_manifest(Path(more))
    for change, said in (
        ({"rows": None}, "was cut: run the same `flowlm prepare` again"),
        ({"tokenizer_sha256": "0" * 64}, "has another tokenizer than data.dir (sha256 000000000000, here "),
        ({"length": 9}, "has rows of 9, data.length is 8: prepare it anew"),
        (
            {"packing": {"rows": "documents"}},
            "has other rows than data.dir (documents, here concatenated): prepare it with --packing=concatenated",
        ),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
        assert (told := wrong(f"{tmp_path}:0.5")) and str(tmp_path) in told and said in told
