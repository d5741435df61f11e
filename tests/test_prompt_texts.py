"""Prompts as users type them: which tokens they give, what is written of them, and what is said of one that cannot be followed."""

import json

import jax
import numpy as np
import pytest
from command_line import error_of
from command_line import flowlm as command
from test_trained import SMALL, make_run
from toy import run_config

import flowlm
from flowlm.data import open_dataset
from flowlm.data.grammar import Grammar
from flowlm.data.tokenizers import shipped
from flowlm.engine import build as assembly
from flowlm.engine import sampling
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.objectives.prompts import UNKNOWN
from flowlm.runs.prompts import given_rows
from flowlm.runs.trained import load_origin, load_teacher

GRAMMAR, EVERYDAY, CHARS, PIECES = map(shipped, ("grammar98", "everyday_1000", "chars", "sotu_bpe_512"))
PAD = Grammar.load("grammar98").pad
GAP = [UNKNOWN]


def row(prompt, tokenizer=GRAMMAR, length=19, pad=PAD):
    (ids,) = given_rows([prompt], tokenizer, length, pad)
    assert ids.dtype == np.int32 and len(ids) == length and ids[0] == tokenizer.start
    return ids[1:].tolist()


# --- which tokens are given --------------------------------------------------------------------------------------


def test_a_prompt_gives_its_words_and_where_rows_are_texts_their_end():
    """Written by hand: the ids of single words, gaps of one and of three, and a row that ends with the text."""

    def word(text):
        (i,) = GRAMMAR.encode(text)
        return [int(i)]

    assert row("the old ___ feeds the ___:3 .") == [
        *(word("the") + word("old") + GAP + word("feeds") + word("the") + 3 * GAP + word(".")),
        *[PAD] * 9,
    ]
    assert row("the old ...") == word("the") + word("old") + 16 * GAP
    assert row("...") == 18 * GAP and row("___:18") == 18 * GAP
    assert row("___ ___ cat .") == row("___:2 cat .") == row("______ ___ cat .")
    # Where texts are laid end to end, what lies behind is written too.
    assert row("the old", pad=None) == row("the old ...", pad=None) == row("the old ...")


def test_capitals_and_marks_are_read_as_in_a_whole_text():
    whole = EVERYDAY.encode("Tom told me to see his room.").tolist()
    assert len(whole) == 8
    gapped = row("Tom ___ me to see ___ room.", EVERYDAY, 9, EVERYDAY.pad)
    assert gapped == [UNKNOWN if i in (1, 5) else token for i, token in enumerate(whole)]
    the = EVERYDAY.encode("The room.").tolist()
    assert row("The ___.", EVERYDAY, 4, None) == [the[0], UNKNOWN, the[2]]


def test_a_blank_goes_with_the_word_behind_it_or_is_a_token_of_its_own():
    """Pieces of words carry the blank before them, so a gap does too; letters do not."""
    union, is_strong = PIECES.encode("the union").tolist(), PIECES.encode(" is strong").tolist()
    found = row("the union ___ is strong", PIECES, 32, None)
    size = len(union) + 1 + len(is_strong)
    assert found[:size] == union + GAP + is_strong and set(found[size:]) == {UNKNOWN}
    assert row("the union ...", PIECES, 32, None) == row("the union...", PIECES, 32, None)
    a, blank, b = CHARS.encode("a b").tolist()
    assert row("a ___:2 b ___ ...", CHARS, 12, None) == [
        a,
        blank,
        *2 * GAP,
        blank,
        b,
        blank,
        *GAP,
        blank,
        UNKNOWN,
        UNKNOWN,
    ]
    assert row("a___ ___ b", CHARS, 12, None) == [a, *GAP, blank, *GAP, blank, b, *[UNKNOWN] * 5]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            " ".join(["cat"] * 19),
            r"has 19 tokens, 0 of them to be written: a row of this run has 18, give a shorter prompt",
        ),
        ("the cat ___:17", r"has 19 tokens, 17 of them to be written: a row of this run has 18"),
        ("___:1000000 cat", r"has 1000001 tokens, 1000000 of them to be written: a row"),
        ("the zebra ___ .", "has what the run's tokenizer does not know: 'zebra'; write other words"),
        ("the ___:0 cat .", "has a gap of no token: write `___:N` with N of at least 1"),
        ("the ... cat .", r"has `\.\.\.` before its end, .*: write `___:N` for N"),
        ("the cat eats .", r"leaves nothing to write: put `___` where a token is wanted, or `\.\.\.` at the end"),
        ("", "leaves nothing to write"),
        (3, "a prompt is a text, got 3"),
    ],
)
def test_a_prompt_that_cannot_be_followed_is_named(prompt, message):
    with pytest.raises(ValueError, match=message) as error:
        row(prompt)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_words_that_become_the_unknown_token_are_named():
    with pytest.raises(ValueError, match="what the run's tokenizer does not know: 'zeppelin'; write other words"):
        row("Tom saw a zeppelin ...", EVERYDAY, 9, EVERYDAY.pad)
    with pytest.raises(ValueError, match="there is no prompt: give at least one"):
        given_rows([], EVERYDAY, 9, None)


# --- what is written ---------------------------------------------------------------------------------------------

PROMPT = "the old ___ feeds the ___ ."


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: directory of a run of untrained parameters}."""
    folder = tmp_path_factory.mktemp("runs")
    flow = {"objective.prompts": 0.5}
    made = {
        "trained": ("flow", flow),
        "flow": ("flow", {}),
        "masked": ("masked", {}),
        "autoregressive": ("autoregressive", {}),
    }
    return {name: make_run(folder / name, family, **changes) for name, (family, changes) in made.items()}


@pytest.mark.parametrize(
    ("name", "steps", "prompt", "how"),
    [
        ("trained", 2, PROMPT, "trained"),
        pytest.param("flow", 2, PROMPT, "replacement", marks=pytest.mark.slow),
        pytest.param("masked", 2, PROMPT, "shown", marks=pytest.mark.slow),
        ("autoregressive", 18, "the old ...", "prefix"),
    ],
)
def test_a_model_writes_texts_of_each_prompt(name, steps, prompt, how, runs):
    model = flowlm.load(runs[name])
    assert model.follows_prompts == how
    given = row(prompt)
    ids = model.sample_ids(5, steps, seed=1, prompt=prompt)
    known = np.array([GRAMMAR.start, *given])
    assert ids.shape == (5, 19) and (ids[:, known != UNKNOWN] == known[known != UNKNOWN]).all()
    assert len(np.unique(ids, axis=0)) > 1
    drawn = model.draw(3, steps, seed=1, prompt=[prompt, "a ..."])
    assert drawn.prompts == [prompt] * 3 + ["a ..."] * 3 and len(drawn.texts) == 6
    np.testing.assert_array_equal(drawn.ids[:3], ids[:3])
    assert all(text.startswith("a") for text in drawn.texts[3:])
    # Without a prompt it writes what it wrote, and says that there was none.
    assert model.draw(2, steps).prompts == []


def test_only_a_prefix_is_taken_by_an_autoregressive_run(runs):
    assert "goes on from a prefix" in error_of("sample", runs["autoregressive"], "--steps=18", f"--prompt={PROMPT}")


def test_the_command_takes_a_prompt_or_a_file_of_them(runs, tmp_path):
    ended = command("sample", runs["trained"], "--steps=2", "--num=2", f"--prompt={PROMPT}")
    texts = ended.out.splitlines()
    model = flowlm.load(runs["trained"])
    assert texts == model.sample(2, 2, prompt=PROMPT) and "replacement" not in ended.err
    assert all(text.startswith("the old ") and text.endswith(".") for text in texts)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in (PROMPT, "a ...")))
    ended = command("sample", runs["flow"], "--steps=2", "--num=2", f"--prompts={file}", "--json")
    lines = [json.loads(line) for line in ended.out.splitlines()]
    assert [line["prompt"] for line in lines] == [PROMPT, PROMPT, "a ...", "a ..."]
    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    assert "by replacement, an approximation" in ended.err and "4 texts in " in ended.err
    assert "prompt" not in json.loads(command("sample", runs["flow"], "--steps=2", "--num=1", "--json").out)


def test_what_is_wrong_is_said_before_parameters_are_read(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("flowlm.load", None)
    run = runs["flow"]
    assert "give --prompt or --prompts, not both" in error_of("sample", run, "--prompt=a", "--prompts=b")
    assert f"there is no file {tmp_path / 'no'}: --prompts takes" in error_of(
        "sample", run, f"--prompts={tmp_path / 'no'}"
    )
    (tmp_path / "bad").write_text('{"text": "a"}\n')
    assert 'is not a JSON object with text under "prompt"' in error_of("sample", run, f"--prompts={tmp_path / 'bad'}")
    (tmp_path / "none").write_text("")
    assert "there is no prompt" in error_of("sample", run, f"--prompts={tmp_path / 'none'}")
    assert "has 19 tokens, 17 of them" in error_of("sample", run, "--prompt=the cat ___:17")
    assert "objective.prompts is of the training" in error_of("sample", run, "--objective=prompts=0.5")


# --- teachers ----------------------------------------------------------------------------------------------------


def test_a_teacher_without_prompts_cannot_teach_them(runs, data_dir):
    changes = SMALL | {"model.input": "raw"}
    layout, tokenizer = Layout(make_mesh(data=1)), shipped("grammar98")

    def experiment(family, share, **more):
        config = run_config(data_dir, family, **changes, **{"objective.prompts": share}, **more)
        return config, tokenizer, assembly.build(config, tokenizer.vocab_size, tokenizer.start), layout

    with pytest.raises(ValueError, match=r"was trained without prompts, .* or set --config.objective.prompts=0"):
        load_teacher(*experiment("flow_map", 0.5, teacher=str(runs["flow"])))
    # One that was can; and it can teach a student that is not to learn them.
    assert "mark" in load_teacher(*experiment("flow_map", 0.5, teacher=str(runs["trained"]))).flow
    assert "mark" not in load_teacher(*experiment("flow_map", 0.0, teacher=str(runs["trained"]))).flow
    # A run without prompts can be taught them: the mark begins at zero, and so as the same function of clean tokens.
    _, _, made, _ = arguments = experiment("flow", 0.5, init_from=str(runs["flow"]))
    origin = load_origin(*arguments)
    begun = made.family.start(made.net, made.net.init(jax.random.key(0)), None, origin)
    assert not begun["mark"].any() and {name for name in begun if name not in origin} == {"mark"}


# --- evaluation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "steps", "sampler"),
    [
        pytest.param("trained", 2, "ancestral-prompted-guided1.5", marks=pytest.mark.slow),
        ("masked", 2, "ancestral-prompted-guided1.5"),
        ("autoregressive", 18, "draws-prompted"),
    ],
)
def test_an_evaluation_with_prompts_gives_parts_of_held_out_rows(
    name, steps, sampler, runs, tmp_path, data_dir, monkeypatch
):
    """What is drawn is put in place of by the held-out rows, but for every second one: half of what was asked is recovered."""
    test = open_dataset("grammar98", "grammar98", 19, data_dir).test
    held_out, seen = test.rows(0, len(test)), []

    def draw(self, params, key, num, steps, begin, given):
        fits = [((held_out == gift) | (gift == UNKNOWN)).all(1) for gift in given]
        assert all(each.any() for each in fits)
        rows = held_out[[each.argmax() for each in fits]]
        seen.append(given)
        self.draw_seconds = self.seconds = 0.0
        return np.where((np.arange(num) % 2 == 0)[:, None] | (given != UNKNOWN), rows, 0)

    monkeypatch.setattr(sampling.Sampler, "__call__", draw)
    where = [f"--results={tmp_path / 'out'}", f"--data_dir={data_dir}"]
    where += ["--objective=prompt_guidance=1.5"] * ("guided" in sampler)
    ended = command("evaluate", runs[name], "--prompted", f"--steps={steps}", "--num=64", *where)
    assert ended.status == 0, ended.err
    (given,) = seen
    known = given != UNKNOWN
    assert known[:, 0].all() and not known.all(1).any() and len({tuple(row) for row in known.tolist()}) > 15
    if name == "autoregressive":
        assert (known[:, 1:] <= known[:, :-1]).all()
    metrics = json.loads((tmp_path / "out/evaluation.json").read_text())["metrics"]
    # The rows themselves are judged beside: what is given is the same, so the difference of nats is that of what was written.
    assert {key.split("/")[1] for key in metrics} == {f"{sampler}@{steps}", "held_out"}
    assert {"entropy", "distinct_rows", "distinct_2"} < {key.split("/")[2] for key in metrics}
    assert metrics["samples/held_out/grammatical"] == 1
    recovered = next(value for key, value in metrics.items() if key.endswith("/recovered"))
    # Several rows may hold what is given, so the one that was drawn is not always the one that it was taken from.
    assert 0.2 < recovered < 0.7
