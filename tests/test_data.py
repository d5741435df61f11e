"""Data from documents to the training stream: nothing lost, nothing shared, order a function of (seed, index)."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import flowlm

from flowlm import data
from flowlm.data import builders, corpora, marginals, packing, tokenizers
from flowlm.data.grammar import Grammar


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def speeches(data_dir):
    return data.open_dataset("sotu", "sotu_bpe_4096", 128, data_dir)


# --- splits and packing ------------------------------------------------------------------------------------------


def test_splits_of_the_speeches():
    """Disjoint, together everything, 90/5/5 by characters, each over all eras."""
    documents = {split: dict(corpora.documents("sotu", split, "")) for split in corpora.SPLITS}
    assert len(set().union(*documents.values())) == sum(map(len, documents.values())) == 233
    sizes = {split: sum(map(len, texts.values())) for split, texts in documents.items()}
    for split, share in (("train", 0.9), ("validation", 0.05), ("test", 0.05)):
        assert abs(sizes[split] / sum(sizes.values()) - share) < 0.005
        years = sorted(int(name[:4]) for name in documents[split])
        assert years[0] < 1800 and years[-1] > 2010 and max(np.diff(years)) <= 20
    assert all(ord(c) in range(32, 127) for texts in documents.values() for text in texts.values() for c in text)


def test_packing_loses_no_token(speeches):
    """Rows without their frame, end to end, are the documents, each before a start token; the tail alone is cut."""
    for split in corpora.SPLITS:
        tokenizer = speeches.tokenizer
        stream = [
            np.append(tokenizer.encode(text), tokenizer.start) for _, text in corpora.documents("sotu", split, "")
        ]
        stream = np.concatenate(stream)
        rows = getattr(speeches, split)
        stored = rows.rows(0, len(rows))
        assert (stored[:, 0] == tokenizer.start).all()
        packed = stored[:, 1:].reshape(-1)
        assert 0 <= len(stream) - len(packed) < 127
        np.testing.assert_array_equal(packed, stream[: len(packed)])


def test_text_is_the_documents(speeches):
    truth = " ".join(text for _, text in corpora.documents("sotu", "validation", ""))
    text = speeches.validation.text()
    assert truth.startswith(text) and len(truth) - len(text) < 2000
    assert speeches.validation.text(1234) == truth[:1234]


def test_batches_of_documents_do_not_matter(tmp_path, monkeypatch):
    tokenizer = tokenizers.shipped("chars")
    documents = [("train", "abc"), ("test", "xy"), ("train", ""), ("train", "de"), ("test", "z"), ("train", "f")]
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 4)
    rows, _, record = packing.write_streams(lambda: iter(documents), tokenizer, True, tmp_path, 2)
    assert rows["train"].reshape(-1).tolist() == [0, 1, 2, 27, 27, 3, 4, 27, 5, 27]
    assert rows["test"].reshape(-1).tolist() == [23, 24, 27, 25] and len(rows["validation"]) == 0
    assert record.tokens == {"train": 10, "validation": 0, "test": 5}


# --- reading -----------------------------------------------------------------------------------------------------


def test_shuffled_stream(speeches):
    split = speeches.validation
    num = len(split)
    stored = split.rows(0, num)
    stream = split.shuffled(7)
    epochs = [stream(epoch * num, (epoch + 1) * num) for epoch in range(3)]

    def in_order(rows):
        return rows[np.lexsort(rows.T)]

    for epoch in epochs:
        np.testing.assert_array_equal(in_order(epoch), in_order(stored))
    moved = [(a != b).any(1).mean() for a, b in zip([stored, *epochs], epochs)]
    assert min(moved) > 0.9

    whole = np.concatenate(epochs)
    again = split.shuffled(7)
    for start, stop in ((0, 5), (num - 3, num + 4), (2 * num + 1, 2 * num + 1), (3 * num - 9, 3 * num)):
        np.testing.assert_array_equal(again(start, stop), whole[start:stop])
    assert (split.shuffled(8)(0, num) != epochs[0]).any(1).mean() > 0.9
    # One seed's second epoch must not be the next seed's first.
    assert (split.shuffled(8)(0, num) != epochs[1]).any(1).mean() > 0.9


def test_rows_are_read_in_stored_order(speeches):
    split = speeches.test
    np.testing.assert_array_equal(
        np.concatenate([split.rows(0, 3), split.rows(3, 3), split.rows(3, 10)]), split.rows(0, 10)
    )
    with pytest.raises(IndexError, match="split of"):
        split.rows(0, len(split) + 1)


def test_prepared_set_is_reused_and_keyed_by_tokenizer(speeches, data_dir, monkeypatch):
    def no_work(*arguments):
        raise AssertionError("prepared twice")

    monkeypatch.setattr(builders.PackedText, "_content", no_work)
    again = data.open_dataset("sotu", "sotu_bpe_4096", 128, data_dir)
    np.testing.assert_array_equal(again.test.rows(0, 5), speeches.test.rows(0, 5))
    with pytest.raises(AssertionError, match="prepared twice"):
        data.open_dataset("sotu", "sotu_bpe_512", 128, data_dir)


def test_the_data_of_an_experiment_are_made_by_one_command(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources/text8").write_text("the quick brown fox " * 5000)
    settings = f"--config.data.dir={tmp_path}", "--config.data.length=32"
    printed = flowlm("prepare", "data", "--config=experiments/text8.py", *settings, "--workers=1").out
    monkeypatch.setattr("flowlm.data.dataset._prepare", None)  # nothing is left to do
    dataset = data.open_dataset("text8", "chars", 32, tmp_path)
    assert printed.splitlines() == [
        f"{split}: {len(getattr(dataset, split))} rows of 32" for split in ("train", "validation", "test")
    ]


def test_interrupted_preparation_leaves_no_set(tmp_path, monkeypatch):
    genuine, written = builders._example, []

    def breaks_off(ids):
        written.append(ids)
        if len(written) == 4:
            raise KeyboardInterrupt
        return genuine(ids)

    monkeypatch.setattr(builders, "GRAMMAR_ROWS", {"train": 20, "validation": 5, "test": 5})
    monkeypatch.setattr(builders, "_example", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        data.open_dataset("grammar98", "grammar98", 19, tmp_path)
    monkeypatch.setattr(builders, "_example", genuine)
    assert len(data.open_dataset("grammar98", "grammar98", 19, tmp_path).train) == 20


def test_two_processes_prepare_at_once(tmp_path):
    """Each waits inside preparation for the other, so both write all shards."""
    program = f"""
import pathlib, time
from flowlm import data
from flowlm.data import builders
builders.GRAMMAR_ROWS = {{"train": 20, "validation": 5, "test": 5}}
genuine = builders.GrammarRows._rows
def meet(self):
    parent = pathlib.Path({str(tmp_path)!r}) / "tokens"
    while len(list(parent.iterdir())) < 2 and time.time() < begin + 20:
        time.sleep(0.01)
    time.sleep(0.1)
    return genuine(self)
builders.GrammarRows._rows = meet
begin = time.time()
dataset = data.open_dataset("grammar98", "grammar98", 19, {str(tmp_path)!r})
print(dataset.train.rows(0, 20).sum(), time.time() - begin < 20)
"""
    both = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=60)[0].splitlines()[-1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert printed[0] == printed[1] and printed[0].endswith("True")
    assert not list((tmp_path / "tokens").iterdir())


MANY_SHARDS = """
import resource, sys
soft, hard, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
import numpy as np
from flowlm import data
from flowlm.data import builders
builders.GRAMMAR_ROWS = {"train": 1100, "validation": 60, "test": 60}
builders.SHARD_ROWS = 1
dataset = data.open_dataset("grammar98", "grammar98", 19, out)
everything = dataset.train.rows(0, 1100)
stream = dataset.train.shuffled(0)
for step in range(3):
    stream(512 * step, 512 * step + 512)
    dataset.validation.rows(0, 60), dataset.test.rows(0, 60)
assert (dataset.train.rows(3, 1090) == everything[3:1090]).all()
np.save(out + "/rows.npy", everything)
"""


def test_more_shards_than_files_that_may_be_open(tmp_path):
    """1,100 shards and 256 files: what is written and read is what the grammar drew."""
    done = subprocess.run(
        [sys.executable, "-c", MANY_SHARDS, "256", "256", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(tmp_path.glob("tfds/**/*train.array_record*"))) == 1100
    rows = np.load(tmp_path / "rows.npy")
    drawn = Grammar.load("grammar98").sample(np.random.default_rng(0), 1100)
    np.testing.assert_array_equal(rows[:, 1:], drawn)


def test_the_command_may_open_as_many_files_as_the_system_lets_it():
    program = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 300))
from absl import app
from flowlm import main
app.run = lambda *arguments, **named: print(resource.getrlimit(resource.RLIMIT_NOFILE))
main.run()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["(300, 300)"], done.stderr[-2000:]


# --- grammar rows ------------------------------------------------------------------------------------------------


def test_grammar_rows(data_dir, monkeypatch):
    monkeypatch.setattr(builders, "GRAMMAR_ROWS", {"train": 20_000, "validation": 500, "test": 500})
    monkeypatch.setattr(builders, "SHARD_ROWS", 3000)
    dataset = data.open_dataset("grammar98", "grammar98", 19, data_dir)
    rows = dataset.train.rows(0, 20_000)
    assert (rows[:, 0] == 98).all()
    surprise = -dataset.grammar.log_prob(rows[:, 1:])
    assert abs(surprise.mean() - dataset.grammar.entropy) < 5 * surprise.std() / np.sqrt(20_000)
    # Draws with other seeds: validation is not the head of train.
    assert (dataset.validation.rows(0, 500) != rows[:500]).any(1).mean() > 0.99
    law = np.exp(dataset.train.log_marginals(99))
    frequencies = np.stack([np.bincount(column, minlength=99) for column in rows.T]) / 20_000
    np.testing.assert_allclose(law, frequencies, atol=2e-3)
    assert (law > 0).all()


@pytest.mark.parametrize(
    ("name", "tokenizer", "length", "message"),
    [
        (
            "grammar97",
            "grammar98",
            19,
            "known are sotu, everyday, qm9, text8, lm1b, openwebtext, own_text, own_documents, grammar1k, grammar98",
        ),
        ("grammar98", "chars", 19, "its tokenizer is 'grammar98'"),
        ("grammar98", "grammar98", 18, "have 19 ids"),
        ("sotu", "chars", 1, "length 1"),
        ("sotu", "chars", 10_000_000, "shorter than one row"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, name, tokenizer, length, message):
    with pytest.raises(ValueError, match=message):
        data.open_dataset(name, tokenizer, length, tmp_path)


# --- marginals ---------------------------------------------------------------------------------------------------


def test_marginals_of_a_law_without_positions_are_near_its_unigrams():
    rng = np.random.default_rng(0)
    draws = rng.multinomial(300, [0.5, 0.3, 0.15, 0.05], 40)
    counts = np.stack([[0, 0, 0, 0, 300], *np.c_[draws, np.zeros(40, int)]])
    law = np.exp(marginals.log_marginals(counts))
    unigrams = (counts[1:].sum(0) + 0.5) / (counts[1:].sum() + 2.5)
    # All differences of positions are noise, and most of it must go.
    assert np.std(law[1:] - unigrams) < 0.4 * np.std(counts[1:] / 300 - unigrams)
    assert law[0, 4] > 0.99
    np.testing.assert_allclose(law.sum(1), 1, atol=1e-6)


def test_marginals_choose_the_leave_one_out_strength():
    """Against brute force: each token taken out of the rows in turn, under laws near to and far from the unigrams."""
    rng = np.random.default_rng(0)
    chosen = set()
    for tilt in (0.0, 0.3, 0.9):
        rows = np.full((12, 4), 3)
        for position in (1, 2, 3):
            law = (1 - tilt) * np.ones(3) / 3 + tilt * np.eye(3)[position - 1]
            rows[:, position] = rng.choice(3, size=12, p=law)
        counts = np.stack([np.bincount(column, minlength=4) for column in rows.T])

        def law_of(position_tokens, all_tokens, strength):
            unigrams = (np.bincount(all_tokens, minlength=4) + 0.5) / (len(all_tokens) + 2)
            if np.isinf(strength):
                return unigrams
            smoothed = np.bincount(position_tokens, minlength=4) + strength * unigrams
            return smoothed / (len(position_tokens) + strength)

        def left_out(strength, rows=rows):
            total = 0.0
            for row in range(12):
                for position in (1, 2, 3):
                    keep = np.ones_like(rows, bool)
                    keep[:, 0] = keep[row, position] = False
                    others = rows[keep[:, position], position]
                    total += np.log(law_of(others, rows[keep], strength)[rows[row, position]])
            return total

        best = max(marginals.STRENGTHS, key=left_out)
        chosen.add(best)
        truth = [law_of(rows[:, position], rows[:, 1:].reshape(-1), best) for position in (1, 2, 3)]
        np.testing.assert_allclose(np.exp(marginals.log_marginals(counts)[1:]), truth, rtol=1e-6)
    assert len(chosen) > 1


def test_marginals_refuse_a_small_vocabulary(speeches):
    with pytest.raises(ValueError, match="vocab_size 512 is less than the tokenizer's 4096"):
        speeches.test.log_marginals(512)
