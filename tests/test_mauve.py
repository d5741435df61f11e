"""MAUVE: the library's number on laws whose answer is known, and the features against one text at a time."""

import sys
from functools import partial
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from test_language_model import CONFIG, VOCAB, weights
from toy import run_config

from flowlm.data import open_dataset
from flowlm.evaluation import judging as panel
from flowlm.judges import mauve, smollm2


def judge_of(points, reference):
    """Texts are the keys of {text: feature}; the first of `reference` are the held-out ones."""
    return mauve.Mauve("x", lambda texts: np.array([points[text] for text in texts]), lambda num: reference[:num])


def gaussian(name, mean, count=500, width=16):
    """{text: feature} of `count` draws, a mean `mean` away along the first axis."""
    draws = np.random.default_rng(len(name)).standard_normal((count, width)) + mean * np.eye(width)[0]
    return {f"{name}{i}": draw for i, draw in enumerate(draws)}


@pytest.mark.needs("mauve")
def test_the_same_law_has_one_and_disjoint_ones_nothing():
    laws = [gaussian("s" * i, mean) for i, mean in enumerate((0, 0, 1.5, 3, 30), 1)]
    judge = judge_of({text: draw for law in laws for text, draw in law.items()}, list(laws[0]))
    same, near, far, disjoint = (judge.score(None, list(law))["mauve_x"] for law in laws[1:])
    assert same > 0.9  # with ten texts to a cluster, chance costs the rest
    assert same > near + 0.1 > far + 0.2
    assert disjoint < 0.01
    assert judge.score(None, list(laws[3])) == {"mauve_x": far}  # one seed


@pytest.mark.needs("mauve")
def test_two_clusters_have_the_area_of_the_paper():
    """20 texts make two clusters, here two points: the histograms are given, and the area is an integral by hand."""
    p, q = np.array([10, 10]) / 20, np.array([17, 3]) / 20
    points = {"a": np.eye(4)[0], "b": np.eye(4)[1]}
    judge = judge_of(points, ["a"] * 10 + ["b"] * 10)
    w = np.linspace(1e-6, 1 - 1e-6, 20_001)[:, None]
    r = w * p + (1 - w) * q
    x, y = (np.exp(-5 * (law * np.log(law / r)).sum(1)) for law in (q, p))
    x, y = np.r_[1, x, 0][::-1], np.r_[0, y, 1][::-1]
    # The library has 25 points on the curve, hence a tolerance.
    np.testing.assert_allclose(judge.score(None, ["a"] * 17 + ["b"] * 3)["mauve_x"], np.trapezoid(y, x), atol=2e-3)


@pytest.fixture
def library(monkeypatch):
    """A stand-in for the library, which returns what it was given."""
    calls = []

    def stand_in(p_features, q_features):
        return calls.append((p_features, q_features)) or SimpleNamespace(mauve=0.5)

    monkeypatch.setitem(sys.modules, "mauve", SimpleNamespace(compute_mauve=stand_in))
    return calls


def test_as_many_samples_as_held_out_texts(library):
    read = []

    def features(texts):
        return read.append(list(texts)) or np.array([[float(text)] for text in texts])

    judge = mauve.Mauve("x", features, lambda num: ["7", "8", "9"][:num])
    for texts in (["1", "2"], ["3", "4"], ["1", "2", "3", "4"]):
        assert judge.score(None, texts) == {"mauve_x": 0.5}
    # The same two held-out texts are read once.
    assert read == [["7", "8"], ["1", "2"], ["3", "4"], ["7", "8", "9"], ["1", "2", "3"]]
    for (p, q), given in zip(library, ([[1], [2]], [[3], [4]], [[1], [2], [3]]), strict=True):
        np.testing.assert_array_equal(p, [[7], [8], [9]][: len(given)])
        np.testing.assert_array_equal(q, given)


def test_the_held_out_texts_are_rows_of_the_validation_split(data_dir):
    data = run_config(data_dir).data
    dataset = open_dataset(data.name, data.tokenizer, data.length, data.dir)
    texts = panel.reference_texts(dataset, 40)
    split = dataset.validation
    every = [dataset.tokenizer.decode(row) for row in split.rows(0, len(split))]
    assert len(texts) == 40 and set(texts) <= set(every) and texts != every[:40]
    assert panel.reference_texts(dataset, 50)[:40] == texts
    assert sorted(panel.reference_texts(dataset, len(split) + 1)) == sorted(every)


@pytest.fixture
def tiny(monkeypatch):
    """A Llama of random weights for SmolLM2, whose tokens are the letters of a text. Returns (params, config)."""
    embedding, norm, layers = weights()
    blocks = {name: jnp.asarray(np.stack([layer[name] for layer in layers]), jnp.float32) for name in layers[0]}
    params = {"embedding": jnp.float32(embedding), "norm": jnp.float32(norm), "blocks": blocks}

    def encode(texts):
        return [[ord(letter) % VOCAB for letter in text] for text in texts]

    monkeypatch.setattr(smollm2, "read_weights", lambda path: (encode, params, CONFIG))
    return params, CONFIG


def test_the_features_are_those_of_one_text_at_a_time(tiny, library):
    """Of uneven texts in several batches: cut to the length, and an empty one is the end-of-text token."""
    texts = ["the dog", "", "a", "one of more than nine letters"] * 20
    judge = mauve.make_judge("smollm2", 9, "", lambda num: texts[:num])
    assert judge.score(None, texts) == {"mauve_smollm2": 0.5}
    for text, feature in zip(texts[:4], library[0][1], strict=False):
        ids = [[ord(letter) % VOCAB for letter in text[:9]] or [smollm2.END]]
        alone = smollm2.hidden_states(*tiny, jnp.asarray(ids))[0, -1]
        np.testing.assert_allclose(feature, alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(library[0][1], np.tile(library[0][1][:4], (20, 1)), rtol=1e-5, atol=1e-6)


def test_a_missing_library_is_named(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    make = partial(panel.make_language_models, length=9, data_dir="", layout=None, dataset=None)
    with pytest.raises(ImportError, match=r"needs the package mauve-text: pip install -e .\[mauve\]"):
        make(["mauve:smollm2"])
