"""What docs/develop/adding.md says of each part, done from outside: one file (here a few lines) and one line make it work."""

import dataclasses
import json
import math
import re
import sys
import types
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import error_of
from command_line import flowlm as command
from toy import FIELDS, drawn, network

import flowlm
from flowlm import config as all_settings
from flowlm import main
from flowlm.cli.command import Command, text
from flowlm.cli.commands import COMMANDS
from flowlm.config import check_settings, declared, defaults
from flowlm.data import corpora, grammar, open_dataset, tokenizers, train_tokenizers
from flowlm.data.corpora import CORPORA, Corpus
from flowlm.data.sources import SOURCES, Source, ending
from flowlm.engine import build as assembly
from flowlm.engine.build import build
from flowlm.evaluation import judging
from flowlm.judges.base import mean_with_stderr
from flowlm.maths import vocab
from flowlm.maths.identities import Match
from flowlm.models.network import Transformer
from flowlm.objectives import FAMILIES
from flowlm.objectives.base import Auxiliary, Family, Teacher
from flowlm.objectives.targets import TARGETS, Target
from flowlm.runs.directory import settings_of
from flowlm.system.settings import setting
from launch import run as launcher

ROOT = Path(__file__).parents[1]
ADDED = {
    "a generative family": "test_a_family_is_a_class_and_a_line",
    "a target of the flow map": "test_a_target_is_one_record",
    "a setting": "test_a_setting_is_a_field",
    "a corpus": "test_a_corpus_is_a_generator_and_a_line",
    "a source of `flowlm prepare`": "test_a_source_is_a_function_and_a_line",
    "a grammar": "test_a_grammar_is_a_table",
    "a judge": "test_a_judge_is_a_class_and_a_line",
    "an experiment": "test_an_experiment_is_a_file",
    "a study": "test_a_study_is_a_file",
    "a command": "test_a_command_is_a_record_and_a_line",
    "a backend of `launch.run`": "test_a_backend_is_a_file_and_a_name",
}


def test_all_that_the_page_names_is_added_here():
    page = (ROOT / "docs/develop/adding.md").read_text()
    parts = re.findall(r"^\| ([^|]+?) \|", page.partition("## Pages")[0], re.MULTILINE)
    assert parts == ["to add", *ADDED]
    assert all(callable(globals()[test]) for test in ADDED.values())


@pytest.fixture
def page(monkeypatch):
    """What makes the pages of the reference: module of docs/hooks by name."""
    monkeypatch.syspath_prepend(ROOT / "docs/hooks")
    return lambda name: __import__(name)


@dataclasses.dataclass(frozen=True)
class Unigram(Family):
    """Learns every token by itself, from a state that shows none of them."""

    smoothing: float = setting(0.25, "share of the uniform law in what is learnt", "[0, 1)")
    kind: str = setting("soft", "soft, or hard", choices=("hard", "soft"))

    def draw(self, key, num):
        return {}

    def loss(self, net, params, aux, batch, keys):
        ids = batch["ids"]
        hidden = net.apply(params, jnp.zeros((*ids.shape, net.width)), jnp.zeros(ids.shape[0]), keys=keys)
        nats = vocab.cross_entropy(net.head(params), hidden, ids).mean(-1)
        return {"unigram": (1 - self.smoothing) * nats}, {}


def settings():
    config = defaults("unigram")
    config.model.update({**FIELDS, "vocab_size": 12})
    config.data.length = 6
    return config


def test_a_family_is_a_class_and_a_line(monkeypatch):
    monkeypatch.setitem(FAMILIES, "unigram", Unigram)
    config = settings()
    assert config.objective.smoothing == 0.25
    assert declared("unigram")["objective.smoothing"].doc == "share of the uniform law in what is learnt"
    config.objective.smoothing = 1.0
    with pytest.raises(ValueError, match=r"objective.smoothing must be in \[0, 1\), got 1.0"):
        check_settings(config)
    config.objective.update(smoothing=0.5, kind="softly")
    with pytest.raises(ValueError, match=r"unknown objective.kind 'softly': choose one of \['hard', 'soft'\]"):
        build(config, 12)
    config.objective.kind = "hard"
    experiment = build(config, 12)
    net, family = experiment.net, experiment.family
    assert (family.samplers(), family.likelihoods(), family.group, family.continuous) == ({}, {}, 1, False)
    # Muted logits are all zero, and so the loss is half of log 12.
    batch = {"ids": jnp.zeros((4, 6), jnp.int32), **family.draw(jax.random.key(0), 4)}
    losses, _ = jax.jit(lambda params: family.loss(net, params, None, batch, None))(net.mute(drawn(net)))
    assert losses["unigram"].tolist() == pytest.approx([0.5 * math.log(12.0)] * 4, rel=1e-6)


def test_a_target_is_one_record(monkeypatch):
    """One that only asks the student to be its teacher at the start of the jump; it says itself that it follows one."""

    def match(logits, teacher):
        p = jax.nn.softmax(teacher)
        loss = -jnp.sum(p * jax.nn.log_softmax(logits), -1)
        return Match(loss, loss, jnp.zeros_like(loss))

    def target(family, nets, z, rows, keys):
        live = nets.live.see(z, rows["tau_s"], rows["tau_t"], keys)
        return vocab.over_logits(match, (live, nets.flow.see(z, rows["tau_s"], rows["tau_s"])))

    monkeypatch.setitem(TARGETS, "copy", Target(target, follows=True))
    config = defaults("flow_map")
    config.model.update({**FIELDS, "vocab_size": 12, "time_embeddings": 2, "input": "both"})
    config.data.length, config.objective.target = 6, "copy"
    with pytest.raises(ValueError, match="objective.target copy follows a teacher"):
        build(config, 12)
    config.teacher = "its run directory"
    family = build(config, 12).family
    assert not family.differentiates
    net = network(time_embeddings=2, input="both")
    params = drawn(net)
    batch = {"ids": jnp.zeros((4, 6), jnp.int32), **family.draw(jax.random.key(0), 4)}
    silent = net.mute(params)
    aux = Auxiliary(Teacher(silent), silent)
    losses, _ = jax.jit(lambda params: family.loss(net, params, aux, batch, None))(silent)
    # Both laws are uniform over 12 tokens.
    assert losses["copy"].shape == (2,)
    assert losses["copy"].tolist() == pytest.approx([math.log(12.0)] * 2, rel=1e-6)


@dataclasses.dataclass(frozen=True)
class PatientRun(all_settings.Run):
    """The loop's settings with one more."""

    patience: int = setting(3, "evaluations without progress", "[1, inf)")


@dataclasses.dataclass(frozen=True)
class Swaying(Transformer):
    """The network with one more setting."""

    sway: float = setting(0.5, "how far it sways", "[0, 1)")


@pytest.mark.parametrize(
    ("path", "default", "other", "wrong", "must"),
    [
        ("patience", 3, 5, 0, "patience must be at least 1, got 0: set --config.patience=3"),
        ("model.sway", 0.5, 0.25, 1.0, "model.sway must be in [0, 1), got 1.0: set --config.model.sway=0.5"),
    ],
)
def test_a_setting_is_a_field(path, default, other, wrong, must, monkeypatch, page, tmp_path):
    """Of the loop, or of the network, which has it then: default, command line, checks, page, and runs of before."""
    before = json.loads(defaults().to_json())
    monkeypatch.setattr(all_settings, "Run", PatientRun)
    monkeypatch.setitem(all_settings.SECTIONS, "model", Swaying)
    monkeypatch.setattr(assembly, "Transformer", Swaying)
    config = flowlm.experiment("experiments/test.py")
    assert all_settings.flat(config.to_dict())[path] == default
    assert all_settings.flat(flowlm.experiment("experiments/test.py", **{path: other}).to_dict())[path] == other
    line = "train", "--config=experiments/test.py", f"--workdir={tmp_path}", f"--config.{path}={wrong}"
    assert must in error_of(*line)
    assert build(config, 99).net.sway == 0.5
    assert all_settings.flat(settings_of(before, "config.json").to_dict())[path] == default
    table = page("settings_table").table(path.rpartition(".")[0] or "run")
    assert f"`{path}` | `{default}` |" in table


def test_a_corpus_is_a_generator_and_a_line(monkeypatch, tmp_path):
    def read(sources):
        for i in range(30):
            yield {8: "validation", 9: "test"}.get(i % 10, "train"), str(i), "abc" if i % 10 < 8 else "cba"

    monkeypatch.setitem(CORPORA, "toy", Corpus(lambda sources: None, read, separated=True))
    assert [number for number, _ in corpora.documents("toy", "test", "")] == ["9", "19", "29"]
    dataset = open_dataset("toy", "chars", 5, tmp_path)
    tokenizer, start = dataset.tokenizer, dataset.tokenizer.start
    a, b, c = tokenizer.encode("abc").tolist()
    # Documents are laid end to end, the start token between them and in front of every row.
    assert dataset.train.rows(0, 2).tolist() == [[start, a, b, c, start], [start, a, b, c, start]]
    assert dataset.validation.text().startswith("cba")


def test_a_source_is_a_function_and_a_line(monkeypatch, tmp_path):
    def paragraphs(file, key):
        yield from enumerate(file.read_text().split("\n\n"), 1)

    monkeypatch.setitem(SOURCES, "paragraphs", Source("a document a paragraph", ending(".md"), paragraphs, keyed=False))
    written = [f"paragraph {'abcdefghij'[i]}" for i in range(10)]
    (tmp_path / "a.md").write_text("\n\n".join(written))
    line = "--source=paragraphs", f"--path={tmp_path}", "--tokenizer=chars", "--length=6", f"--out={tmp_path / 'out'}"
    assert "train: 8 documents" in command("prepare", *line).out
    assert sorted(text for _, _, text in corpora.read_corpus("own_text", tmp_path / "out")) == written


def test_a_grammar_is_a_table(monkeypatch, tmp_path):
    """And the tokenizer of its words, which the script of all tokenizers makes of it."""
    table = {"words": ["_ one two ."], "pad": "_", "length": 3, "start": "S", "parameters": {}}
    table["rules"] = {"S": {"N .": 0.75, "N N .": 0.25}, "N": ["one", "two"]}
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/toy.json").write_text(json.dumps(table))
    monkeypatch.setattr(grammar, "_SHIPPED", tmp_path / "tables")
    assert [*train_tokenizers.of_grammars()] == ["toy"]
    tokenizer = tokenizers.Tokenizer(train_tokenizers.of_grammars()["toy"].to_str())
    (tmp_path / "tokenizers").mkdir()
    tokenizer.save(tmp_path / "tokenizers/toy.json")
    monkeypatch.setattr(tokenizers, "_SHIPPED", tmp_path / "tokenizers")
    dataset = open_dataset("toy", "toy", 4, tmp_path / "data")
    assert dataset.grammar.entropy == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25) + 1.25 * math.log(2))
    assert set(tokenizer.decode_batch(dataset.train.rows(0, 200))) == {
        *("one .", "two ."),
        *("one one .", "one two .", "two one .", "two two ."),
    }


class Blanks:
    """A judge: the blanks of a text."""

    main = ("blanks",)
    meanings: ClassVar = {"blanks": "blanks of a text; near held-out text's is best"}

    def score(self, ids, texts):
        return mean_with_stderr("blanks", np.array([written.count(" ") for written in texts]))


def test_a_judge_is_a_class_and_a_line(monkeypatch, data_dir):
    monkeypatch.setitem(judging.JUDGES, "blanks", lambda made_of: Blanks() if made_of.pad is None else None)
    dataset = open_dataset("grammar98", "grammar98", 19, data_dir)
    panel = judging.Panel(dataset, (), str(data_dir), None)
    ids = np.full((2, 19), dataset.tokenizer.start)
    ids[:, 1:8] = dataset.grammar.words.index("goat"), *[dataset.grammar.words.index("_")] * 6
    ids[1, 2:4] = dataset.grammar.words.index("eats"), dataset.grammar.words.index(".")
    texts, scores = panel.judge({"rows": ids})
    assert texts == {"rows": ["goat", "goat eats ."]}
    assert scores["rows"]["blanks"] == 1.0 and scores["rows"]["blanks_stderr"] == 1.0
    # The data's own judge is read first, and the new one is known to tables.
    assert panel.main[0] == "grammatical" and panel.main[-1] == "blanks" and panel.meanings["blanks"]
    assert panel.parts(2) == 2 * 4


def test_an_experiment_is_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from flowlm import config as settings\n"
        "def get_config(arg=''):\n"
        "    config = settings.defaults('masked')\n"
        "    config.steps = int(arg or 7)\n"
        "    return config\n"
    )
    assert flowlm.experiment(f"{tmp_path}/mine.py").steps == 7
    config = flowlm.experiment(f"{tmp_path}/mine.py:9", seed=3)
    assert (config.steps, config.seed, config.objective.family) == (9, 3, "masked")


def test_a_study_is_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from flowlm.studies.study import Study\n"
        "from flowlm.studies.sweeps import runs, sweep\n"
        "def get_study(arg=''):\n"
        "    return Study(runs(sweep('steps', (1, 2)), 'experiments/test.py'), ['entropy'])\n"
    )
    where = f"--study={tmp_path}/mine.py", f"--workdir={tmp_path}/w", f"--results={tmp_path}/r"
    ended = command("study", *where, "--dry_run")
    assert ended.status == 0
    lines = [line for line in ended.out.splitlines() if " train " in line]
    assert [re.search(r"--config.steps=(\d)", line)[1] for line in lines] == ["1", "2"]
    assert all("--config=experiments/test.py" in line for line in lines)


def test_a_command_is_a_record_and_a_line(monkeypatch, page):
    greet = Command(
        "greet", "says hello", [text("whom", "NAME", "who is greeted", "all")], lambda values: print(values.whom)
    )
    monkeypatch.setattr(main, "COMMANDS", (*COMMANDS, greet))
    assert command("greet", "--whom=you").out == "you\n" and command("greet").out == "all\n"
    assert "greet" in command("--help").out
    told = command("greet", "--help")
    assert told.status == 0 and "--whom=NAME" in told.out and "who is greeted (default: all)" in told.out
    assert "did you mean greet?" in error_of("gret")
    hook = page("commands_table")
    monkeypatch.setattr(hook, "COMMANDS", main.COMMANDS)
    assert "| `--whom=NAME` | who is greeted (default: all) |" in hook.table("greet")


def test_a_backend_is_a_file_and_a_name(monkeypatch, capsys, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Resources:
        pages: int = dataclasses.field(default=2, metadata={"help": "sheets of paper"})

    sent = []
    paper = types.ModuleType("launch.paper")
    paper.Resources, paper.check = Resources, lambda jobs: None
    paper.describe = lambda jobs: f"{jobs[0].resources.pages} pages for {jobs[0].name}"
    paper.submit = lambda jobs, record: [sent.append(job) or record(job, {"shelf": 3}) for job in jobs]
    paper.status = lambda handle: f"on shelf {handle['shelf']}"
    monkeypatch.setitem(sys.modules, "launch.paper", paper)
    monkeypatch.setattr(launcher, "BACKENDS", (*launcher.BACKENDS, "paper"))
    line = ["--backend=paper", "--config=experiments/test.py", f"--workdir={tmp_path}/run", "--pages=5"]
    launcher.main([*line, "--dry_run"])
    assert "5 pages for flowlm-run" in capsys.readouterr().out and not sent
    launcher.main(line)
    assert [job.resources for job in sent] == [Resources(5)]
    launcher.main(["status", f"--workdir={tmp_path}/run"])
    assert "on shelf 3" in capsys.readouterr().out
    launcher.main(["--backend=paper", "--help"])
    assert "sheets of paper (default: 2)" in capsys.readouterr().out
