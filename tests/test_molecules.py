"""Molecules: how their list is fetched and read, and what RDKit says of rows. Nothing here is downloaded."""

import csv
import hashlib
import io
import itertools
import json
import shutil
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from command_line import error_of, flowlm
from toy import run_config

from flowlm import data
from flowlm.data import corpora, qm9, tokenizers, train_tokenizers
from flowlm.evaluation import judging, naive
from flowlm.judges.molecules import Molecules, total_variation
from flowlm.judges.sentences import Sentences
from flowlm.system import packages
from flowlm.training import train

PARTS = ("C", "N", "CC", "C1CC1", "C=C", "C#C", "C(F)O")
MADE = ["".join(parts) for parts in itertools.product(PARTS, repeat=3)]
TOO_LONG = "C" * 24
TABLE = ("XYZ_file", "Index", "SMILES", "InChi", "XYZ_Ang")  # the first columns of the package's tables


def table(smiles):
    """As the package writes it: strings are quoted, and have commas in them."""
    content = io.StringIO()
    writer = csv.writer(content, quoting=csv.QUOTE_NONNUMERIC)
    writer.writerows([TABLE, *([f"{i}.xyz", i, text, "InChI=1S", "[[0.1,-0.2]]"] for i, text in enumerate(smiles))])
    return content.getvalue()


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package of our own in place of the one on PyPI, of which pip's command makes a copy."""
    path = tmp_path / "qm9pack-1.0.3-py3-none-any.whl"
    molecules = [*MADE, TOO_LONG]
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(qm9.TABLES):
            archive.writestr(name, table(molecules[number::3]))
    listed = "".join(f"{smiles}\n" for number in range(3) for smiles in molecules[number::3])
    monkeypatch.setattr(qm9, "WHEEL_SHA256", packages.sha256(path))
    monkeypatch.setattr(qm9, "SHA256", hashlib.sha256(listed.encode()).hexdigest())
    asked = []

    def pip(line, check):
        asked.append(line)
        shutil.copy(path, line[line.index("--dest") + 1])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(packages, "subprocess", SimpleNamespace(run=pip))
    return SimpleNamespace(path=path, asked=asked, listed=listed)


@pytest.fixture
def dataset(wheel, tmp_path):
    qm9.fetch_molecules(tmp_path / "data")
    return data.open_dataset("qm9", "qm9", 24, tmp_path / "data")


# --- the list ----------------------------------------------------------------------------------------------------


def test_the_command_fetches_the_named_package_once_and_keeps_the_list(wheel, tmp_path):
    ended = flowlm("prepare", "qm9", f"--data_dir={tmp_path / 'data'}")
    path = tmp_path / "data" / "sources" / "qm9.smi"
    assert (ended.status, ended.out.strip()) == (0, str(path))
    assert path.read_text() == wheel.listed
    assert [path.name for path in path.parent.iterdir()] == ["qm9.smi"]
    ((python, *line),) = wheel.asked
    assert python == sys.executable and line[-1] == "qm9pack==1.0.3"
    assert line[:4] == ["-m", "pip", "download", "--no-deps"]
    qm9.fetch_molecules(tmp_path / "data")
    assert len(wheel.asked) == 1
    path.write_text("C\n")
    qm9.fetch_molecules(tmp_path / "data")
    assert len(wheel.asked) == 2 and path.read_text() == wheel.listed


def test_another_package_is_refused_and_nothing_is_left(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(qm9, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match=f"qm9pack==1.0.3 is another file: sha256 .*, expected {'0' * 64}"):
        qm9.fetch_molecules(tmp_path / "data")
    monkeypatch.setattr(qm9, "WHEEL_SHA256", packages.sha256(wheel.path))
    monkeypatch.setattr(qm9, "SHA256", "1" * 64)
    with pytest.raises(RuntimeError, match=f"qm9pack==1.0.3 holds another qm9.smi: sha256 .*, expected {'1' * 64}"):
        qm9.fetch_molecules(tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_without_a_network_one_line_says_so(tmp_path, monkeypatch):
    offline = SimpleNamespace(run=lambda line, check: SimpleNamespace(returncode=1))
    monkeypatch.setattr(packages, "subprocess", offline)
    said = error_of("prepare", "qm9", f"--data_dir={tmp_path / 'data'}")
    assert "pip could not download qm9pack==1.0.3: see its error above" in said


def test_a_missing_and_a_damaged_list_are_named(wheel, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sources/qm9.smi is missing: run `flowlm prepare qm9`"):
        data.open_dataset("qm9", "qm9", 24, tmp_path / "data")
    path = qm9.fetch_molecules(tmp_path / "data")
    path.write_text("C\n")
    with pytest.raises(ValueError, match="qm9.smi is damaged: delete it and run `flowlm prepare qm9`"):
        next(corpora.read_corpus("qm9", tmp_path / "data"))


def test_a_molecule_is_a_row_of_characters(dataset):
    """Each is in one split, whole, with pads behind it; one that is longer than a row is left out."""
    tokenizer, read = dataset.tokenizer, []
    assert tokenizer.pieces == (*qm9.CHARACTERS, "<|start|>", "[PAD]")
    for split in corpora.SPLITS:
        rows = getattr(dataset, split).rows(0, len(getattr(dataset, split)))
        texts = tokenizer.decode_batch(rows)
        assert {qm9.split(text) for text in texts} == {split}
        for row, text in zip(rows.tolist(), texts, strict=True):
            letters = [qm9.CHARACTERS.index(letter) for letter in text]
            assert row == [tokenizer.start, *letters] + [tokenizer.pad] * (23 - len(text))
        read += texts
    assert sorted(read) == sorted(MADE)
    assert 5 <= len(dataset.validation) <= 40 and 5 <= len(dataset.test) <= 40


def test_which_split_a_molecule_is_in_depends_on_its_text_alone():
    """The first 64 bits of its sha256, by twentieths; written down for three."""
    for smiles in ("C", "CCO", "C1CC1N"):
        twentieth = int(hashlib.sha256(smiles.encode()).hexdigest()[:16], 16) % 20
        assert qm9.split(smiles) == {0: "validation", 1: "test"}.get(twentieth, "train")


def test_the_shipped_tokenizer_is_what_the_script_makes():
    made = train_tokenizers.molecules()
    assert json.loads(made.to_str()) == json.loads(tokenizers.shipped("qm9").json)
    assert tokenizers.shipped("qm9").decode(made.encode("C[NH3+]").ids + [19, 19]) == "C[NH3+]"


def test_a_tokenizer_without_a_pad_is_refused(wheel, tmp_path):
    with pytest.raises(ValueError, match=r"no \[PAD\] .* --config.data.tokenizer=qm9"):
        data.open_dataset("qm9", "chars", 24, tmp_path)


def test_chains_of_letters_are_longer(dataset):
    rows = dataset.train.rows(0, len(dataset.train))
    assert list(naive.samplers(True, 20)) == ["trigram", "6-gram", "8-gram"]
    assert list(naive.samplers(True, 1009)) == ["bigram", "trigram", "4-gram"]
    assert list(naive.samplers(False, 20)) == ["unigram", "trigram"]
    seen = {tuple(row[i : i + 8]) for row in rows.tolist() for i in range(17)}
    out = naive.samplers(True, 20)["8-gram"](rows, 200, 0)
    assert sum(tuple(row[i : i + 8]) in seen for row in out.tolist() for i in range(17)) / (200 * 17) > 0.99


# --- the judge ---------------------------------------------------------------------------------------------------


def test_without_rdkit_a_run_ends_before_training_and_the_usual_judges_go_on(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    monkeypatch.setattr("flowlm.training.MetricWriter", None)
    config = run_config(tmp_path / "data")
    config.data.update(name="qm9", tokenizer="qm9", length=24)
    config.model.vocab_size = 20
    config.evaluation.language_models = ("rdkit",)
    with pytest.raises(ImportError, match=r"the judge rdkit needs the package rdkit: pip install -e .\[molecules\]"):
        train(config, str(tmp_path / "run"))
    panel = judging.Panel(dataset, (), "", None)
    assert isinstance(judging.make_judges(dataset)[0], Sentences)
    scores = panel.judge({"rows": dataset.validation.rows(0, 5)})[1]["rows"]
    assert scores["found"] == 1 and scores["copied"] == 0


def rows_of(tokenizer, texts):
    ids = [[tokenizer.start, *tokenizer.encode(text)] for text in texts]
    return np.array([row + [tokenizer.pad] * (24 - len(row)) for row in ids])


HELD_OUT = ("CCN", "C1CC1", "C1CC1C", "OCC")


@pytest.fixture
def judged():
    """(score of texts, ids of texts) before a judge that was shown few molecules."""
    tokenizer = tokenizers.shipped("qm9")
    shown = {"train": ["CCO", "CCC"], "validation": HELD_OUT, "test": ["C#N"]}
    judge = Molecules(shown.get, tokenizer.start, tokenizer.pad)

    def score(ids):
        return judge.score(ids, tokenizer.decode_batch(ids))

    return score, lambda *texts: rows_of(tokenizer, texts)


@pytest.mark.needs("molecules")
def test_what_rdkit_cannot_read_is_no_molecule_and_it_says_nothing(judged, capfd):
    score, rows = judged
    capfd.readouterr()
    no = ("C1CC", "C(C", "C)C", "FCF=C", "C(C)(C)(C)(C)C", "1CC", "C==C", "[NH", "(", "")
    yes = ("C", "[NH4+]", "C1CC1", "OC(=O)C#N")
    assert score(rows(*no))["valid"] == 0
    assert score(rows(*no, *yes))["valid"] == pytest.approx(4 / 14)
    assert score(rows(*yes))["valid"] == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.needs("molecules")
def test_a_row_with_text_behind_a_pad_or_without_a_start_is_no_molecule(judged):
    score, rows = judged
    ids = rows("CCO", "CCO", "CCO", "CCO")
    ids[1, 4:6] = ids[1, 4], ids[1, 1]  # CCO, a pad, C
    ids[2, 0] = ids[2, 1]
    ids[3, 4] = ids[3, 0]  # a second start
    assert score(ids)["valid"] == 1 / 4
    assert score(ids)["valid_stderr"] == pytest.approx((3 / 16 / 3) ** 0.5)


@pytest.mark.needs("molecules")
def test_molecules_are_compared_whatever_their_spelling(judged):
    """OCC is the CCO of training, though a held-out row spells it so; N#C and C#N are one, held out; CCCC is new."""
    score, rows = judged
    scores = score(rows("OCC", "C(O)C", "N#C", "C#N", "CCCC", "C1C"))
    assert scores["valid"] == pytest.approx(5 / 6)
    assert scores["unique"] == pytest.approx(3 / 5)
    assert scores["molecules_found"] == pytest.approx(2 / 6)
    assert scores["molecules_copied"] == pytest.approx(2 / 6)


@pytest.mark.needs("molecules")
def test_distances_are_those_counted_by_hand(judged):
    """Held-out lengths are 3, 5, 6, 3 and rings 0, 1, 1, 0. With as many of both Wasserstein-1 is the mean gap of sorted values."""
    from rdkit import Chem
    from rdkit.Chem import Crippen

    score, rows = judged
    texts = ("CCN", "CCCCC", "C1CC1", "CCF")
    scores = score(rows(*texts, "C1"))
    assert scores["length_distance"] == pytest.approx(1 / 4)  # 3 and 5 twice each, beside 3 twice, 5 and 6
    assert scores["rings_distance"] == pytest.approx(1 / 4)
    logp = [sorted(Crippen.MolLogP(Chem.MolFromSmiles(text)) for text in side) for side in (texts, HELD_OUT)]
    assert scores["logp_distance"] == pytest.approx(np.abs(np.subtract(*logp)).mean())
    assert logp[0][0] < 0.1 < 1 < logp[0][-1]
    same = score(rows(*HELD_OUT))
    assert [same[f"{law}_distance"] for law in ("length", "rings", "logp")] == [0, 0, 0]


@pytest.mark.needs("molecules")
def test_what_cannot_be_computed_is_nan(judged):
    score, rows = judged
    scores = score(rows("C1", "(("))
    nan = {"unique", "length_distance", "rings_distance", "logp_distance"}
    assert {name for name, value in scores.items() if np.isnan(value)} == nan
    assert scores["valid"] == scores["molecules_found"] == scores["molecules_copied"] == 0


@pytest.mark.needs("molecules")
def test_the_panel_reads_what_is_valid_first(dataset):
    panel = judging.Panel(dataset, ("rdkit",), "", None)
    assert panel.main[:2] == ("valid", "unique")
    scores = panel.judge({"rows": dataset.test.rows(0, len(dataset.test))})[1]["rows"]
    assert scores["valid"] == 1 and scores["molecules_found"] == pytest.approx(scores["found"], abs=0.5)
    assert set(panel.meanings) >= {"valid", "unique", "found", "molecules_found", "logp_distance"}


@pytest.mark.needs("molecules")
def test_rows_that_are_no_molecules_are_refused():
    with pytest.raises(ValueError, match="the judge rdkit reads molecules, and rows here are none, such as 'the dog'"):
        Molecules(lambda split: ["the dog", "a cat"], 0, 1)


@pytest.mark.parametrize(
    ("a", "b", "distance"), [([1, 1], [1], 0), ([0], [5], 1), ([0, 1, 2, 3], [0, 0, 2, 2], 0.5), ([], [1], np.nan)]
)
def test_total_variation_by_hand(a, b, distance):
    found = total_variation(np.array(a, int), np.array(b, int)), total_variation(np.array(b, int), np.array(a, int))
    np.testing.assert_equal(found, (distance, distance))
