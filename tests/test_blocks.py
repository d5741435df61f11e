"""Texts of a chosen length: where they are cut, and what a further block goes on from."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import error_of
from command_line import flowlm as command
from jax.tree_util import Partial
from test_trained import make_run
from toy import FunctionNetwork

import flowlm
from flowlm.data.grammar import Grammar
from flowlm.data.tokenizers import shipped
from flowlm.runs import blocks

VOCAB, LENGTH, ROOM = 50, 8, 7  # of the toy's rows, which begin with the start token 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of masked diffusion on texts that are laid end to end, whose tokens are numbers."""
    changes = {"model.vocab_size": VOCAB, "data.length": LENGTH, "data.name": "text8"}
    return make_run(tmp_path_factory.mktemp("masked") / "run", "masked", None, **changes)


def counting(ends=False):
    """A network that writes (17 x sum of all that is given + 3 x place) % 49 + 1 at each place, and anything where nothing is.

    Token 0 ends a text. It is written where that is divisible by 7 and `ends`, and never otherwise.
    """

    def apply(params, z, tau_s, tau_t=None, keys=None):
        wanted = jnp.zeros((*z.shape[:2], VOCAB)).at[..., 0].set(-1e9)
        if "known" not in params:
            return wanted
        total = jnp.where(params["known"], jnp.argmax(z, -1), 0).sum(-1, keepdims=True)
        return 1e3 * jax.nn.one_hot(rule(total, jnp.arange(z.shape[1]), ends, jnp), VOCAB)

    def head(params):
        return Partial(lambda hidden: hidden)

    return FunctionNetwork(apply, head, VOCAB, LENGTH, VOCAB + 1)


def rule(total, place, ends, numpy=np):
    value = (17 * total + 3 * place) % 49 + 1
    return numpy.where((value % 7 == 0) & ends, 0, value)


def toy_model(run, ends=False):
    model = flowlm.load(run)
    experiment = model.run.experiment._replace(net=counting(ends))
    return type(model)(
        model.run._replace(experiment=experiment, params={"embedding": jnp.eye(VOCAB + 1)}), model.layout
    )


def continued(row, num, tail, ends=False):
    """The first `num` tokens of a text that begins with `row`, by a plain loop over the blocks of `counting`."""
    row = [*map(int, row)]
    while len(row) < num:
        total = sum(row[-tail:])
        row += [int(rule(total, place, ends)) for place in range(1 + tail, LENGTH)]
    return row[:num]


# --- blocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num", "tail"), [(23, 3), (15, None), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((24, 6), (8, 1)))]
)
def test_a_further_block_goes_on_from_exactly_the_last_tokens(num, tail, run):
    """Nothing ends such a text, so it has exactly as many tokens as are asked for, and each row goes on from its own."""
    model = toy_model(run)
    ids = model.sample_ids(5, 3, seed=1, max_tokens=num, tail=tail)
    first = model.sample_ids(5, 3, seed=1)
    assert ids.shape == (5, 1 + num) and not ids[:, 0].any() and len(np.unique(first, axis=0)) == 5
    np.testing.assert_array_equal(ids[:, 1:LENGTH], first[:, 1:])
    for row in ids[:, 1:]:
        assert row.tolist() == continued(row[:ROOM], num, tail or ROOM // 2)
    # A text of more tokens begins with it, and what a row is does not depend on how many there are.
    longer = model.sample_ids(300, 3, seed=1, max_tokens=num + 9, tail=tail)
    np.testing.assert_array_equal(longer[:5, : 1 + num], ids)
    assert len(model.sample(2, 3, max_tokens=num)[0].split()) == num


def test_a_prompt_is_in_the_first_block_and_its_text_goes_on(run):
    model, prompt = toy_model(run), "5 6 ___ 9 ..."
    drawn = model.draw(2, 3, prompt=[prompt, "8 ..."], max_tokens=16, tail=4)
    assert drawn.prompts == [prompt] * 2 + ["8 ..."] * 2
    told = rule(20, np.arange(LENGTH), False)
    first = [5, 6, told[3], 9, *told[5:]]
    assert drawn.ids[:2, 1:].tolist() == [continued(first, 16, 4)] * 2
    assert drawn.ids[2:, 1:].tolist() == [continued([8, *rule(8, np.arange(2, LENGTH), False)], 16, 4)] * 2
    assert drawn.texts == [" ".join(map(str, row)) for row in drawn.ids[:, 1:]]


def test_a_text_ends_at_its_end_and_the_others_go_on(run):
    model = toy_model(run, ends=True)
    num, tail = 60, 2
    drawn = model.draw(40, 3, max_tokens=num, tail=tail)
    sizes = set()
    for row, text in zip(drawn.ids[:, 1:], drawn.texts):
        wanted = continued(row[:ROOM], num, tail, ends=True)
        wanted = wanted[: wanted.index(0)] if 0 in wanted else wanted
        assert row[: len(wanted)].tolist() == wanted and not row[len(wanted) :].any()
        assert text == " ".join(map(str, wanted))
        sizes.add(len(wanted))
    assert len(sizes) > 4 and min(sizes) < 2 * ROOM


def test_blocks_and_seeds_have_noise_of_their_own(run):
    """With a network that writes anything everywhere, no part of any text is found again."""
    model = toy_model(run)
    free = dataclasses.replace(
        counting(), apply=lambda p, z, *_, **__: jnp.zeros((*z.shape[:2], VOCAB)).at[..., 0].set(-1e9)
    )
    model = type(model)(model.run._replace(experiment=model.run.experiment._replace(net=free)), model.layout)
    ids = np.concatenate([model.sample_ids(20, 2, seed, max_tokens=31, tail=1)[:, 1:] for seed in (0, 1)])
    parts = np.concatenate([ids[:, first : first + 6] for first in (1, 7, 13, 19, 25)])
    assert len(np.unique(parts, axis=0)) == len(parts) == 200


def test_all_texts_of_a_block_are_drawn_until_none_goes_on():
    calls = []

    def draw(block, given):
        calls.append(block)
        return np.array([[9, 1, 2, 3], [9, 4, 0, 5]]) if block == 0 else np.array([[9, 3, 6, 0], [9, 5, 7, 8]])

    found = blocks.texts(draw, None, np.array([100, 100]), 1, 9, [9, 0])
    assert [text.tolist() for text in found] == [[1, 2, 3, 6], [4]] and calls == [0, 1]


def test_what_is_given_is_in_the_text_whatever_ends_before_it():
    """The model writes an end, 0, into a gap; the text ends at the first one behind the prompt."""
    given = np.array([[9, -1, 4, -1, -1], [9, 5, 0, 0, 0], [9, -1, -1, -1, -1]])
    rows = np.array([[9, 0, 4, 6, 0], [9, 5, 0, 0, 0], [9, 0, 1, 1, 1]])
    found = blocks.texts(lambda block, given: rows, given, np.full(3, 4), 0, 9, [9, 0])
    assert [text.tolist() for text in found] == [[0, 4, 6], [5], []]


# --- runs --------------------------------------------------------------------------------------------------------


def test_an_autoregressive_run_goes_on_by_its_own_prefix(tmp_path):
    """At temperature 0, against the network's likeliest token behind each prefix, without a cache."""
    run = make_run(tmp_path / "run", "autoregressive", **{"data.name": "text8", "objective.temperature": 0.0})
    model = flowlm.load(run)
    net, params, tail = model.run.experiment.net, model.run.params, 6
    likeliest = jax.jit(
        lambda row: jnp.argmax(
            net.unembed(params, net.apply(params, net.embed(params, row[None]), jnp.zeros(1)))[0], -1
        )
    )
    ids = model.sample_ids(2, 18, prompt=["the ...", "a ..."], max_tokens=25, tail=tail)
    for row in ids:
        block = np.zeros(19, np.int32)
        block[0], block[1 : 1 + tail] = model.tokenizer.start, row[19 - tail : 19]
        for place in range(1 + tail, 19):
            block[place] = likeliest(block)[place - 1]
        assert model.tokenizer.start not in row[1:]
        np.testing.assert_array_equal(row[19:], block[1 + tail :][: 25 - 18])


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("flow") / "run", "flow")


def test_the_command_cuts_texts_and_writes_longer_ones(flow, tmp_path):
    """Rows of the grammar end with pads, which no text has."""
    model, pad = flowlm.load(flow), Grammar.load("grammar98").pad
    ended = command("sample", flow, "--steps=2", "--num=3", "--max_tokens=5", "--json")
    texts = [json.loads(line)["text"] for line in ended.out.splitlines()]
    assert "replacement" not in ended.err
    wanted = []
    for row in model.sample_ids(3, 2)[:, 1:].tolist():
        row = row[: row.index(pad)] if pad in row else row
        wanted.append(shipped("grammar98").decode(row[:5]))
    assert texts == wanted
    out = tmp_path / "texts"
    words = "sample", flow, "--steps=2", "--num=2", "--max_tokens=30", "--prompt=the old ...", "--seed=3"
    ended = command(*words, "--tail=5", f"--out={out}", "--delimiter=##")
    assert ended.status == 0 and "prompts: followed by replacement" in ended.err
    lines = out.read_text().splitlines()
    assert (
        lines[::2] == model.sample(2, 2, 3, prompt="the old ...", max_tokens=30, tail=5) and lines[1::2] == ["##"] * 2
    )
    assert all(line.startswith("the old") for line in lines[::2])
    ended = command("sample", flow, "--steps=1", "--num=1", "--max_tokens=19")
    assert "prompts: a further block goes on by replacement, an approximation that one step knows nothing" in ended.err


def test_a_text_that_ends_with_its_prompt_does_not_go_on(flow):
    """Even where the prompt fills the row, so that no pad ends it; one that is left open does, if no pad comes."""
    model = flowlm.load(flow)
    prompts = ["the ___:16 .", "the old ___ ."]
    closed = model.draw(2, 1, prompt=prompts, max_tokens=30)
    assert [text.split()[-1] for text in closed.texts] == ["."] * 4
    pad = Grammar.load("grammar98").pad
    assert (closed.ids[:, 19:] == pad).all() and (closed.ids[:, 18] != pad).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_tokens=0"], "--max_tokens=0"),
        (["--max_tokens=30", "--tail=18"], "tail must be a whole number, from 1 to 17, got 18"),
        (["--max_tokens=5", "--tail=18"], "tail must be a whole number, from 1 to 17, got 18"),
        (["--tail=5"], "a tail is of texts longer than the 18 tokens of a row: give max_tokens too, or leave it out"),
        (
            ["--max_tokens=3", "--prompt=the old ___ feeds ..."],
            "the prompt 'the old ___ feeds ...' takes 4 tokens, and max_tokens is 3: set it to 4 or more",
        ),
    ],
)
def test_lengths_that_cannot_be_are_refused_before_parameters_are_read(flags, message, flow, monkeypatch):
    monkeypatch.setattr("flowlm.load", None)
    error = error_of("sample", flow, "--steps=1", *flags)
    assert message in error and "\n" not in error


def test_python_refuses_them_too(flow):
    model = flowlm.load(flow)
    for max_tokens in (0, -3, 2.5, "5"):
        with pytest.raises(ValueError, match=r"max_tokens must be a whole number, at least 1, got "):
            model.sample(1, max_tokens=max_tokens)
    with pytest.raises(ValueError, match="tail must be a whole number, from 1 to 17, got 0"):
        model.sample(1, max_tokens=30, tail=0)
