"""Judges of Hugging Face: a random GPT-2 of our own read one text at a time, and SmolLM2 in both libraries."""

import numpy as np
import pytest

from flowlm.judges import hugging_face, mauve, smollm2

TEXTS = [
    "the dog sees the cat .",
    "she writes",
    "",
    "one<|endoftext|>two",
    "a dog , a cat and a longer line than that .",
]
LENGTH = 12
PREPARED = smollm2.path_in("~/.cache/flowlm")

pytestmark = pytest.mark.needs("hf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 of two layers and random weights with a byte-level tokenizer, saved as transformers saves one."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("hub") / "tiny-gpt2"
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXTS, vocab_size=280, special_tokens=["<|endoftext|>"])
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>").save_pretrained(path)
    torch.manual_seed(0)
    # Large weights, so that every token before the last one is seen in it.
    sizes = GPT2Config(
        vocab_size=280,
        n_positions=LENGTH,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(sizes).save_pretrained(path)
    return path


def loaded(folder):
    """(model, texts -> ids cut to LENGTH) by transformers alone."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return GPT2LMHeadModel.from_pretrained(folder).eval(), lambda text: tokenizer(text)["input_ids"][:LENGTH]


def test_the_nats_are_those_of_one_text_at_a_time(folder):
    """Read from END, which is 0; one text has as many tokens as the model has positions."""
    import torch

    judge = hugging_face.make_judge(str(folder), LENGTH)
    model, encode = loaded(folder)
    totals, counts = [], []
    for text in TEXTS:
        ids = torch.tensor([[0, *encode(text)]])
        counts.append(ids.shape[1] - 1)
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0] if counts[-1] else torch.zeros(0, 280)
        totals.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")))
    assert max(counts) == LENGTH and 0 in counts  # one text was cut, one is empty
    scores = judge.score(None, TEXTS)
    np.testing.assert_allclose(scores["tiny_gpt2_nats_per_token"], sum(totals) / sum(counts), rtol=1e-5)
    assert scores["tiny_gpt2_nats_per_token"] > 2


@pytest.mark.needs("mauve")
def test_the_features_are_those_of_the_mauve_library(folder):
    """Its own reading of the same tokens by the same model, one text at a time (it drops empty texts)."""
    import torch
    from mauve.utils import featurize_tokens_from_model

    name, encode, states, end = hugging_face.reader(str(folder), LENGTH)
    model, theirs = loaded(folder)
    texts = [text for text in TEXTS if text] * 9  # more than one batch
    ours = mauve.last_states(states, encode, texts, end, LENGTH)
    expected = featurize_tokens_from_model(model, [torch.tensor([theirs(text)]) for text in texts], 1)
    assert (name, end) == ("tiny_gpt2", 0)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_a_model_that_cannot_read_the_rows_is_refused(folder):
    with pytest.raises(ValueError, match="reads 12 tokens at most, and rows here have 13"):
        hugging_face.make_judge(str(folder), LENGTH + 1)


@pytest.mark.parametrize("name", ["/nowhere/gpt2", "nobody/no-such-model", "no-such-model"])
def test_a_model_that_is_not_here_is_not_fetched(name):
    with pytest.raises(FileNotFoundError, match=f"{name}' is not here: fetch it with `hf download"):
        hugging_face.make_judge(name, LENGTH)


@pytest.mark.skipif(not PREPARED.exists(), reason="SmolLM2 is not here: flowlm prepare judge")
def test_smollm2_in_jax_is_that_of_transformers():
    """The same file read by transformers: tokens, log-probabilities and the state behind the last norm."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate")
    source = {"pretrained_model_name_or_path": str(PREPARED.parent), "gguf_file": PREPARED.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    text = "In 1912, the little girl who lived near the forest didn't go out: it was 3 degrees, and the café was shut."
    encode, params, config = smollm2.read_weights(PREPARED)
    (ids,) = encode([text])
    assert ids == AutoTokenizer.from_pretrained(**source)(text, add_special_tokens=False)["input_ids"]
    ids = np.array([[smollm2.END, *ids]])
    with torch.no_grad():
        out = model(torch.as_tensor(ids), output_hidden_states=True)
    log_p = out.logits.log_softmax(-1)[0, :-1].numpy()
    expected = -log_p[np.arange(len(log_p)), ids[0, 1:]]
    nats = np.asarray(smollm2.make_nats(params, config)(ids))[0]
    _, _, states, _ = smollm2.reader("~/.cache/flowlm")
    state = np.asarray(states(ids, np.array([ids.shape[1] - 1])))[0]
    theirs = out.hidden_states[-1][0, -1].numpy()
    print(f"largest difference: {abs(nats - expected).max():.2e} nats of {expected.max():.2f},")
    print(f"{abs(state - theirs).max():.2e} in the state of {abs(theirs).max():.2f}")
    np.testing.assert_allclose(nats, expected, atol=1e-3)
    np.testing.assert_allclose(state, theirs, atol=1e-3 * abs(theirs).max())
