"""How much work an evaluation is: one program for all numbers of steps, work that devices divide, tables that are fitted once.

And what a plan says of it.
"""

import json
import runpy
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_samplers import built
from toy import run_config

from flowlm.data import dataset as data
from flowlm.data import fitted, marginals, open_dataset
from flowlm.engine import sampling
from flowlm.engine.build import build
from flowlm.engine.sampling import Sampler, in_parts
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.evaluation import judging
from flowlm.evaluation.evaluator import Evaluator
from flowlm.evaluation.work import every, start, work
from flowlm.judges import mauve
from flowlm.judges.language_model import ROWS, LanguageModel
from flowlm.judges.ngrams import NGrams
from flowlm.objectives.guidance import Predictor
from flowlm.scale import ahead_of_time, evaluations, tables
from flowlm.scale.costs import forward_flops
from flowlm.system import processes

ROOT = Path(__file__).parents[1]
ONE = Layout(make_mesh(data=1))
KEY = jax.random.key(5)


# --- one program for all numbers of steps ------------------------------------------------------------------------


def on_a_grid(family, net, params, key, num, steps):
    """ids of a walk along a grid of times, each step with a key of its own, written out."""
    params = net.prepared(params)
    begin, rest = jax.random.split(key)
    z, keys = family.fresh(net, params, begin, num, family.noise_scale), jax.random.split(rest, steps)
    predict, tau = Predictor(net, params, family.guidance), jnp.linspace(0.0, 1.0, steps + 1)
    step = family.step(net, params, predict, num)
    for i in range(steps - 1):
        z, _ = step(z, (tau[i], tau[i + 1], keys[i]))
    return family.end(predict, z, jnp.full((num,), tau[steps - 1]), keys[steps - 1])


@pytest.mark.parametrize(
    ("family", "objective"),
    [
        ("flow", {"eta": 1.0}),
        pytest.param("flow_map", {"gamma": 0.5, "guidance": 2.0}, marks=pytest.mark.slow),
        ("masked", {"greedy": True}),
        pytest.param("uniform", {"greedy": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_one_program_draws_in_any_number_of_steps(family, objective):
    """What a program made for that number draws, and for a path the walk written out; so is what was drawn before."""
    net, family, params = built(family, **objective)
    sampler = Sampler(net, family, ONE, 8)
    for steps in (1, 3):
        ids = sampler(params, KEY, 8, steps)
        key = jax.random.fold_in(KEY, 0)
        alone = jax.jit(lambda params, key, n=steps: family.sample(net, params, key, 8, n))(params, key)
        np.testing.assert_array_equal(ids, alone)
        if family.continuous and steps > 1:
            walk = jax.jit(lambda params, key, n=steps: on_a_grid(family, net, params, key, 8, n))(params, key)
            np.testing.assert_array_equal(ids, walk)
    assert len(sampler._compiled) == 1
    assert len(np.unique(ids)) > 2


def test_a_family_that_takes_one_number_of_steps_says_so_of_others():
    net, family, params = built("autoregressive")
    sampler = Sampler(net, family, ONE, 8)
    assert sampler(params, KEY, 8, 5).shape == (8, 6)
    with pytest.raises(ValueError, match="takes 5 steps, got 4"):
        sampler(params, KEY, 8, 4)


# --- devices and processes divide the work ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["flow", "autoregressive"])
def test_each_device_draws_its_own_rows(family):
    """An eighth of the products on each of eight devices."""
    net, family, params = built(family)
    steps = 5 if family.__class__.__name__ == "Autoregressive" else 1

    def flops(devices):
        sampler = Sampler(net, family, Layout(make_mesh(data=devices)), 64)
        return sampler.trace(params, KEY, steps).lower().compile().cost_analysis()["flops"]

    assert flops(8) == pytest.approx(flops(1) / 8, rel=0.15)


@pytest.fixture
def two(monkeypatch):
    """two(work): what `work` gives in each of two processes, which run one after the other; what they exchange is known by then."""

    def run(work):
        notes = []
        for known in (False, True):
            results = []
            for mine in (0, 1):
                sent = iter(range(10**6))

                def total(values, mine=mine, sent=sent, known=known):
                    number = next(sent)
                    if not known:
                        notes.append((mine, number, values))
                        return values
                    return sum(values for _, n, values in notes if n == number)

                monkeypatch.setattr(jax, "process_count", lambda: 2)
                monkeypatch.setattr(jax, "process_index", lambda mine=mine: mine)
                monkeypatch.setattr(processes, "total", total)
                monkeypatch.setattr(processes, "all_agree", lambda holds: holds)
                results.append(work())
            monkeypatch.undo()
        return results

    return run


def test_processes_divide_the_texts_of_a_pretrained_judge(two):
    """Each reads half of the batches, both know the numbers of one; of five batches the second process reads two."""
    texts = [("ab" * (i % 7 + 1)) for i in range(4 * ROWS + 3)]
    read = []

    def encode(texts):
        return [[ord(c) for c in text] for text in texts]

    def nats(ids):
        read.append(len(ids))
        return ids[:, 1:] / 7 + 0.1

    judge = LanguageModel("x", encode, nats, 0, 20)
    alone = judge.score(None, texts)
    assert len(read) == 5
    read.clear()
    assert two(lambda: judge.score(None, texts)) == [alone, alone]
    assert len(read) == 2 * 5  # in both passes of the fixture: 3 + 2

    def states(ids, last):
        read.append(len(ids))
        return np.stack([last, ids[:, 0]], 1)

    read.clear()
    features = mauve.last_states(states, encode, texts, 0, 20)
    assert len(read) == 5
    for each in two(lambda: mauve.last_states(states, encode, texts, 0, 20)):
        np.testing.assert_array_equal(each, features)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("items", [0, 1, 4, 7])
def test_turns_divide_all_items_in_as_many_rounds(count, items, monkeypatch):
    every = []
    for index in range(count):
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        every.append([*processes.turns(range(items))])
    assert {len(each) for each in every} == {-(-items // count)}
    assert sorted(i for each in every for i in each if i is not None) == [*range(items)]


# --- told to stop ------------------------------------------------------------------------------------------------


def test_likelihoods_and_judges_ask_between_two_calls(monkeypatch):
    """Whether to stop: nothing is called once one was told, and before that no more than one call."""
    calls, asked = [], []

    def ask():
        asked.append(len(calls))
        if len(asked) == 3:
            raise processes.Stopped

    for module in (sampling, processes):
        monkeypatch.setattr(module, "check_stopped", ask)
    rows = np.zeros((10, 3), np.int32)
    with pytest.raises(processes.Stopped):
        in_parts(lambda params, ids, key: calls.append(1) or jnp.zeros(len(ids)), None, rows, 2, KEY)
    assert asked == [0, 1, 2] and len(calls) == 2
    calls.clear(), asked.clear()
    judge = LanguageModel("x", lambda texts: [[1]] * len(texts), lambda ids: calls.append(1) or ids[:, 1:] + 0.0, 0, 9)
    with pytest.raises(processes.Stopped):
        judge.read(["a"] * (5 * ROWS))
    assert asked == [0, 1, 2] and len(calls) == 2


# --- tables are fitted once ---------------------------------------------------------------------------------------


@pytest.fixture
def speeches(data_dir, monkeypatch):
    """Opens a set on which nothing was fitted yet."""
    monkeypatch.setattr(judging, "MAX_CHARS", 100_000)
    shutil.rmtree(open_dataset("sotu", "sotu_bpe_512", 32, data_dir).place / "fitted", ignore_errors=True)
    return lambda: open_dataset("sotu", "sotu_bpe_512", 32, data_dir)


def scores(dataset):
    ids = dataset.test.rows(0, 20)
    _, found = judging.Panel(dataset, (), "", None).judge({"rows": ids})
    return found["rows"]


def test_judges_are_fitted_once_and_read_the_same_from_then_on(speeches, monkeypatch):
    """Without a row of text being read; and fitted again where a file is damaged, by other settings, or for another set."""
    first, counted = scores(speeches()), []
    assert {"nats_per_char", "words_in_corpus", "ngram_distance_3"} <= first.keys()
    fit, text = NGrams.fit, data.Split.text
    monkeypatch.setattr(NGrams, "fit", classmethod(lambda cls, *given: counted.append("ngrams") or fit(*given)))
    monkeypatch.setattr(data.Split, "text", lambda self, *given: counted.append("text") or text(self, *given))
    assert scores(speeches()) == first and counted == []

    place = speeches().place / "fitted"
    manifest = json.loads((place / "ngrams/manifest.json").read_text())
    assert set(manifest["sha256"]) == {f"{part}_{n}" for part in ("grams", "shares") for n in range(1, 6)}
    damaged = place / "ngrams/shares_2.npy"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert scores(speeches()) == first and counted == ["ngrams"]
    assert scores(speeches()) == first and counted == ["ngrams"]

    counted.clear()
    monkeypatch.setattr(judging, "MAX_CHARS", 10_000)
    assert scores(speeches())["nats_per_char"] > first["nats_per_char"]
    assert counted == ["text"]  # read once for both
    monkeypatch.setattr(judging, "MAX_TOKENS", 32 * 50)
    assert scores(speeches())["ngram_distance_1"] > first["ngram_distance_1"] and counted == ["text", "ngrams"]


def opened(data_dir):
    return open_dataset("grammar98", "grammar98", 19, data_dir)


def test_marginals_are_counted_once(data_dir, monkeypatch):
    monkeypatch.setattr(data, "_MARGINAL_TOKENS", 19 * 500)
    config = run_config(data_dir)
    shutil.rmtree(opened(data_dir).place / "fitted", ignore_errors=True)
    experiment, counted = build(config, 99), []
    count = data.Split.log_marginals
    monkeypatch.setattr(data.Split, "log_marginals", lambda self, size: counted.append(1) or count(self, size))

    def marginal():
        dataset = opened(data_dir)
        evaluator = Evaluator(experiment, dataset, ONE, 0, config.evaluation, "")
        np.testing.assert_array_equal(evaluator._log_marginals, count(dataset.train, 99))

    marginal(), marginal()
    assert counted == [1]


def test_a_set_that_cannot_be_written_is_judged_all_the_same(speeches, monkeypatch, caplog):
    def refuse(*given):
        raise PermissionError("read-only")

    first = scores(speeches())
    monkeypatch.setattr(fitted, "_read", lambda *given: None)
    monkeypatch.setattr(fitted, "_keep", refuse)
    assert scores(speeches()) == first
    assert "is not kept, so the next start fits it again (read-only)" in caplog.text


# --- and bounded --------------------------------------------------------------------------------------------------


def test_of_long_rows_fewer_are_counted(speeches, monkeypatch):
    """The same tokens by position as counting these rows by hand, every so-manieth of all."""
    split = speeches().train
    read, rows_of = [], data.Split._read
    monkeypatch.setattr(data.Split, "_read", lambda self, numbers: read.extend(numbers) or rows_of(self, numbers))
    monkeypatch.setattr(data, "_MARGINAL_TOKENS", 32 * 100)
    law = split.log_marginals(512)
    step = -(-len(split) // 100)
    assert read == [*range(0, len(split), step)] and len(read) <= 100
    rows = split._read(read[:])
    counts = np.stack([np.bincount(column, minlength=512) for column in rows.T])
    np.testing.assert_array_equal(law, marginals.log_marginals(counts))
    monkeypatch.setattr(data, "_MARGINAL_TOKENS", 2**26)
    assert [data.marginal_rows(length) for length in (19, 128, 256, 1024)] == [262_144] * 3 + [65_536]
    assert [judging.counted_rows(length) for length in (19, 128, 256, 1024)] == [20_000] * 3 + [5_000]


def test_marginals_take_little_more_memory_than_their_counts():
    counts = np.random.default_rng(0).poisson(0.4, (64, 20_000)).astype(np.int32)
    tracemalloc.start()
    marginals.log_marginals(counts)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * counts.nbytes  # a float for each count, and some of one position's size


def test_a_text_of_so_many_characters_reads_little_more_than_it(speeches, monkeypatch):
    split = speeches().validation
    whole = split.text()
    read, rows_of = [], data.Split._read
    monkeypatch.setattr(data.Split, "_read", lambda self, numbers: read.append(len(numbers)) or rows_of(self, numbers))
    for num in (1, 5_000, len(whole) // 2):
        read.clear()
        assert split.text(num) == whole[:num]
        tokens = sum(read) * 31
        assert tokens < max(1.3 * len(split) * 31 * num / len(whole), 2 * 256 * 31)
    assert split.text(len(whole) + 5) == whole


# --- what is judged when, and how much that is --------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(data_dir):
    """(settings, evaluator, what it called, evaluations) of two evaluations in a run and one at its end."""
    changes = {"evaluation.steps": (1, 3, 5), "evaluation.loop_steps": 4, "evaluation.taus": (0.2, 0.8)}
    changes |= {"evaluation.samples": 24}  # else as other tests have it, whose programs are kept
    config = run_config(data_dir, **changes)
    config.evaluation.final_samples = 300
    dataset, experiment = opened(data_dir), build(config, 99)
    evaluator = Evaluator(experiment, dataset, ONE, 0, config.evaluation, "")
    judged, score = [], NGrams.score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NGrams, "score", lambda self, ids, texts: judged.append(len(ids)) or score(self, ids, texts))
        params = experiment.net.init(jax.random.key(0))
        results, rows = [], []
        for step, num, final in ((1, 24, False), (2, 24, False), (6, 300, True)):
            results.append(evaluator(params, step, num, final))
            rows.append(sum(judged))
            judged.clear()
    return config, evaluator, rows, results


def test_many_steps_are_taken_after_the_last_step_alone(evaluated):
    _, _, _, (first, second, last) = evaluated

    def counted(result):
        return {name for name in result.texts if name.startswith(("euler@", "ancestral@"))}

    often = {f"{name}@{n}" for name in ("euler", "ancestral") for n in (1, 3)}
    assert counted(first) == counted(second) == often
    assert counted(last) == often | {"euler@5", "ancestral@5"}
    assert len(last.texts["euler@5"]) == 300


def test_what_no_model_wrote_is_judged_once_for_each_number_of_rows(evaluated):
    """And is what every evaluation says of it."""
    _, _, rows, (first, second, last) = evaluated
    sets = 4
    assert rows[0] == 24 * (sets + 3) and rows[1] == 24 * sets and rows[2] == 300 * (6 + 3)
    for result in (first, second):
        assert {"unigram", "trigram", "held_out"} <= result.texts.keys()
    references = [name for name in first.metrics if name.startswith(("samples/trigram", "samples/held_out"))]
    assert references and all(first.metrics[name] == second.metrics[name] for name in references)
    assert last.metrics["samples/held_out/distinct_2"] < first.metrics["samples/held_out/distinct_2"]


def test_the_work_that_is_counted_is_the_work_that_is_done(evaluated):
    config, evaluator, rows, _ = evaluated
    often, final = work(config, False), work(config, True)
    assert (often.judged_rows, final.judged_rows) == (rows[0], rows[2])
    assert (often.sets, often.draws, often.network_calls) == (4, 4, 2 * (1 + 3))
    assert (final.sets, final.draws, final.network_calls) == (6, 12, 2 * 2 * (1 + 3 + 5))
    assert often.likelihoods == {"denoising": 2, "context_free": 2, "bound": 1}
    assert often.followed_calls == 2 * 3
    compiled = sum(len(sampler._compiled) for sampler in evaluator._samplers.values())
    compiled += sum(each._cache_size() for each in (*evaluator._of_rows.values(), *evaluator._trajectories.values()))
    assert final.programs == often.programs == compiled == 2 + 2 + 3
    asked = start(config)
    assert (asked.held_out_rows, asked.characters, asked.marginal_rows) == (16, 0, 262_144)


@pytest.mark.parametrize("name", ["lm1b", "openwebtext"])
@pytest.mark.parametrize("argument", ["", "flow_map"])
def test_an_evaluation_of_the_papers_sizes_is_a_small_share_of_the_training(name, argument):
    """By products alone, as the closed form has them: less than a third of 500 training steps; and little is held on a host."""
    config = runpy.run_path(str(ROOT / f"experiments/{name}.py"))["get_config"](argument)
    if argument:
        config.teacher = "its run directory"
    done, model = work(config, False), config.model
    fields = {name: model[name] for name in ("width", "blocks", "cond", "time_embeddings")}
    row = config.data.length * forward_flops(**fields, vocab=model.vocab_size, length=config.data.length)
    passes = done.network_calls * 256 + done.followed_calls * 2 * 16  # followed rows are on each of 16 devices
    passes += (done.likelihoods["denoising"] + 2 * done.likelihoods["bound"]) * 256
    assert passes * row < 500 * 3 * config.batch_size * row / 3
    before = start(config)
    assert before.table_bytes + before.fitting_bytes < 2 * 2**30
    assert before.marginal_rows * config.data.length <= 2**26 and before.counted_rows * config.data.length <= 5_120_000


def test_the_estimate_of_a_plan_is_the_sum_of_its_parts(data_dir):
    """At one second for a program, and with work and rates as they stand."""
    config = run_config(data_dir, **{"evaluation.steps": (1, 3), "evaluation.taus": (0.2, 0.8)})
    program = {
        "roofline": {"estimate": 1.0},
        "hbm": {"total": 3.0, "reserved": 1.0},
        "rows": 256,
        "chips": 8,
        "per_chip": 32,
    }
    names = ("train", "sample", "held_out", "denoising", "context_free")
    point = {name: program | {"roofline": {"estimate": seconds}} for seconds, name in enumerate(names, 1)}
    costs = evaluations.evaluation_costs(config, point, lambda rows: every(config, rows))
    followed = 2 * 3 * 2 / 32
    assert costs["often"]["device"] == pytest.approx(2 * (8 + followed) + 3 * 1 + 4 * 2 + 5 * 2)
    judged = 16 * (4 + 3) * 19 * evaluations.JUDGED
    assert costs["often"]["host"] == pytest.approx(judged / 2)  # four chips to a host
    assert costs["often"]["share"] == pytest.approx((costs["often"]["device"] + costs["often"]["host"]) / 500)
    assert costs["hbm"] == 4.0
    point["context_free"].pop("roofline")
    assert "share" not in evaluations.evaluation_costs(config, point, lambda rows: every(config, rows))["often"]
    assert ahead_of_time.planned_steps(config) == 1


@pytest.mark.parametrize("which", ["often", "final"])
def test_a_plan_says_no_where_either_evaluation_exceeds_its_budget(which):
    report = json.loads((ROOT / "results/plan/openwebtext_evaluation/plan.json").read_text())
    assert dict(tables.rows_of(report))["an evaluation within 500 training steps"] == ["yes"]
    report["points"][0]["evaluation"][which]["share"] = 1.2
    assert dict(tables.rows_of(report))["an evaluation within 500 training steps"] == ["**no**"]
