"""The judges of a run: which there are, what each is shown of a sample, and that they work before anything is trained."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial

import jax
import numpy as np

from flowlm.data import Dataset
from flowlm.engine.sampling import on_rows
from flowlm.engine.sharding import Layout
from flowlm.judges import hugging_face, mauve, smollm2
from flowlm.judges.base import Judge, score_all
from flowlm.judges.exact import GrammarJudge
from flowlm.judges.kneser_ney import ORDER, KneserNey
from flowlm.judges.language_model import LanguageModel, with_breaks
from flowlm.judges.mauve import Mauve
from flowlm.judges.molecules import Molecules
from flowlm.judges.ngrams import NGrams, Table
from flowlm.judges.sentences import Sentences
from flowlm.judges.statistics import Statistics, words
from flowlm.objectives.autoregressive import Autoregressive
from flowlm.runs.trained import load_trained
from flowlm.system import processes, storage

WRITTEN = "surrogatepass"  # how a text is kept that has half of a pair
MAX_CHARS = 10_000_000  # of the train split that the character model is fitted on
MAX_ROWS, MAX_TOKENS = 20_000, 5_120_000  # that counts are taken of: of rows above 256 tokens fewer are read
FITTED = 1  # to be raised where a judge counts otherwise than before, because what was counted is kept beside the data
TRIED = 8  # ids of a row that pretrained judges are tried on


def make_language_models(
    names: Sequence[str], length: int, data_dir: str, layout: Layout, dataset: Dataset
) -> list[LanguageModel | Mauve | Molecules]:
    """The judges of `evaluation.language_models`; language models read `length` of their tokens of every text.

    Args:
      names: `smollm2`, `hf:NAME` (a Hugging Face model by name or path) or `run:DIRECTORY`; `mauve:smollm2` or `mauve:hf:NAME`;
        `rdkit`, of molecules.
      data_dir: where smollm2's file is.
      dataset: that of the run. Mauve and rdkit read its rows beside the samples.

    Raises:
      ValueError: another name, or two judges whose metrics would have one name. FileNotFoundError, ImportError: what a judge
        needs is not here, and how to get it.
    """
    judges: dict[tuple[type, str], tuple[str, LanguageModel | Mauve | Molecules]] = {}
    for name in names:
        kind, _, rest = name.partition(":")
        if name == "smollm2":
            judge = smollm2.make_judge(data_dir, length)
        elif kind == "hf" and rest:
            judge = hugging_face.make_judge(rest, length)
        elif kind == "run" and rest:
            judge = run_judge(rest, length, layout)
        elif kind == "mauve" and re.fullmatch("smollm2|hf:.+", rest):
            judge = mauve.make_judge(rest, length, data_dir, partial(reference_texts, dataset))
        elif name == Molecules.name:
            judge = Molecules(partial(rows_as_text, dataset), dataset.tokenizer.start, dataset.tokenizer.pad)
        else:
            choices = "smollm2, hf:NAME, run:DIRECTORY, mauve:smollm2, mauve:hf:NAME or rdkit"
            raise ValueError(f"unknown evaluation.language_models {name!r}: choose {choices}")
        other, _ = judges.setdefault((type(judge), judge.name), (name, judge))
        if other != name or names.count(name) > 1:
            raise ValueError(
                f"evaluation.language_models {other!r} and {name!r} are both called {judge.name!r} in the metrics: "
                "name each judge once, and give one of two directories another name"
            )
    return [judge for _, judge in judges.values()]


def run_judge(directory: str, length: int, layout: Layout) -> LanguageModel:
    """An autoregressive run of ours as a judge of text, under the name of its directory."""
    run = load_trained(directory, layout)
    family, net = run.experiment.family, run.experiment.net
    if not isinstance(family, Autoregressive):
        raise ValueError(
            f"{directory} is of the family {run.config.objective.family}: only an autoregressive run can judge"
        )
    nats = on_rows(layout, net, lambda net, params, batch, key: family.nats(net, params, batch["ids"]))
    key, length = jax.random.key(0), min(length, net.length - 1)  # nothing is random

    def score(ids):
        return processes.gathered(nats(run.params, ids, key))

    return LanguageModel(
        storage.last_name(directory), run.tokenizer.encode_batch, score, family.start_token, length, together=True
    )


def reference_texts(dataset: Dataset, num: int) -> list[str]:
    """`num` rows of the validation split as pretrained judges read them, or all where there are fewer; drawn with one seed."""
    split = dataset.validation
    return with_breaks(dataset.tokenizer, split.shuffled(0)(0, min(num, len(split))))


def rows_as_text(dataset: Dataset, name: str) -> list[str]:
    """The rows of the split of that name as text."""
    split = getattr(dataset, name)
    return dataset.tokenizer.decode_batch(split.rows(0, len(split)))


def counted_rows(length: int) -> int:
    """The most rows of `length` ids that n-grams are counted in, and that chains are drawn from."""
    return max(2, min(MAX_ROWS, MAX_TOKENS // length))


class Material:
    """What judges are made of; each part is read once, when the first judge asks for it.

    Attributes:
      dataset: the run's data.
      start: id of the start token.
      pad: id of the token behind a text that is a row of its own; None of other data.
    """

    def __init__(self, dataset: Dataset):
        self.dataset, self.start, self.pad = dataset, dataset.tokenizer.start, dataset.pad

    @cached_property
    def held_out(self) -> np.ndarray:
        """Rows of ids [N, L] of the validation split."""
        split = self.dataset.validation
        return split.rows(0, min(counted_rows(self.dataset.length), len(split)))

    @cached_property
    def text(self) -> str:
        """The train split as text, or its beginning."""
        return self.dataset.train.text(MAX_CHARS)


def _grammar(made_of: Material) -> Judge | None:
    grammar = made_of.dataset.grammar
    return None if grammar is None else GrammarJudge(grammar, made_of.start)


def _sentences(made_of: Material) -> Judge | None:
    data = made_of.dataset
    if not data.sentences:
        return None
    train, *unseen = (split.rows(0, len(split)) for split in (data.train, data.validation, data.test))
    return Sentences(train, np.concatenate(unseen), made_of.start, made_of.pad)


def _characters(made_of: Material) -> Judge | None:
    if made_of.dataset.grammar is not None:
        return None

    def fit():
        model = KneserNey.fit(made_of.text)
        return {"order": np.asarray(model.order)} | {k: getattr(model, k) for k in ("alphabet", "grams", "counts")}

    facts = {"fitted": FITTED, "characters": MAX_CHARS, "order": ORDER}
    tables = made_of.dataset.fitted("characters", facts, fit)
    return KneserNey(int(tables["order"]), *(tables[name] for name in ("alphabet", "grams", "counts")))


def _statistics(made_of: Material) -> Judge:
    if made_of.dataset.grammar is not None or made_of.dataset.sentences:
        return Statistics(None, made_of.start, made_of.pad)

    # Of a row that is cut out of a text, words that the text has not are mistakes; the others are of known words anyway.
    def fit():
        return {"words": np.frombuffer("\n".join(sorted(set(words(made_of.text)))).encode("utf-8", WRITTEN), np.uint8)}

    held = made_of.dataset.fitted("words", {"fitted": FITTED, "characters": MAX_CHARS}, fit)["words"]
    return Statistics(frozenset(held.tobytes().decode("utf-8", WRITTEN).split("\n")), made_of.start, made_of.pad)


def _ngrams(made_of: Material) -> Judge:
    def fit():
        tables = NGrams.fit(made_of.held_out, made_of.start, made_of.pad).reference
        return {f"{name}_{n}": array for n, table in enumerate(tables, 1) for name, array in table._asdict().items()}

    asked = {"rows": counted_rows(made_of.dataset.length), "start": made_of.start, "pad": made_of.pad}
    held = made_of.dataset.fitted("ngrams", {"fitted": FITTED} | asked, fit)
    tables = [Table(*(held[f"{name}_{n}"] for name in Table._fields)) for n in range(1, len(held) // 2 + 1)]
    return NGrams(tables, made_of.start, made_of.pad)


# Makes each judge, or nothing where it has nothing to say of the data. The first that is made is the data's own: what it calls main
# is what tables show first.
JUDGES: dict[str, Callable[[Material], Judge | None]] = {
    "grammar": _grammar,
    "sentences": _sentences,
    "characters": _characters,
    "statistics": _statistics,
    "ngrams": _ngrams,
}


def make_judges(dataset: Dataset) -> list[Judge]:
    """Those of JUDGES that fit the data, in their order."""
    made_of = Material(dataset)
    return [judge for make in JUDGES.values() if (judge := make(made_of)) is not None]


class Panel:
    """All judges of a run's samples, each fitted or loaded, and tried on two held-out rows, when it is made.

    Attributes:
      notes: what a reader of their metrics must know, a sentence each.
      main: the metrics to read first: of RDKit, of the data's own judge, of the pretrained ones, and of those that count.
      meanings: {metric: what it is}.

    Raises:
      ValueError, FileNotFoundError, ImportError: a judge cannot be made (`make_language_models`), or cannot read the data.
    """

    def __init__(self, dataset: Dataset, language_models: Sequence[str], data_dir: str, layout: Layout):
        for name, split in (("validation", dataset.validation), ("test", dataset.test)):
            if not len(split):
                raise ValueError(
                    f"the {name} split has no row, and evaluations read it: prepare more text, or shorter rows"
                )
        self._tokenizer = dataset.tokenizer
        # Pretrained judges come first, because their files may be missing and fitting the others takes long.
        self._pretrained = make_language_models(language_models, dataset.length, data_dir, layout, dataset)
        rows = dataset.validation.rows(0, min(2, len(dataset.validation)))
        for name, judge in zip(language_models, self._pretrained, strict=True):
            try:
                judge.read(with_breaks(self._tokenizer, rows[:, :TRIED]))
            except Exception as error:  # whatever library it is of
                raise ValueError(f"the judge {name!r} cannot read this run's text: {error}") from error
        self._counting = make_judges(dataset)
        score_all(self._counting, rows, self._tokenizer.decode_batch(rows))
        # RDKit knows what a row of molecules is worth, before all that compares it with others.
        exact = [judge for judge in self._pretrained if isinstance(judge, Molecules)]
        pretrained = [judge for judge in self._pretrained if judge not in exact]
        ordered = [*exact, *self._counting[:1], *pretrained, *self._counting[1:]]
        self.main = tuple(metric for judge in ordered for metric in getattr(judge, "main", ()))
        self.meanings = {k: v for judge in ordered for k, v in getattr(judge, "meanings", {}).items()}
        self.notes = tuple(filter(None, (getattr(judge, "note", None) for judge in self._counting)))

    def parts(self, num: int) -> int:
        """How often `judge` tells this process what comes next, of `num` sets of rows."""
        return len([*processes.turns(range(num * len(self._counting)))]) + num * len(self._pretrained)

    def judge(
        self, sets: Mapping[str, np.ndarray], begin: Callable[[str, str], None] = lambda name, what: None
    ) -> tuple[dict[str, list[str]], dict[str, dict[str, float]]]:
        """({name: texts}, {name: what all judges say of them}) of sets of rows, ids [N, L].

        Of several processes all must call. They divide the judges that count, each of which reads a set in one process alone; of
        each set they divide the texts that pretrained judges read. Only these read where a document ends.

        Args:
          begin: is told of which set, and which judge comes next.

        Raises processes.Stopped between two judges.
        """
        texts = {name: self._tokenizer.decode_batch(ids) for name, ids in sets.items()}
        count = len(self._counting) + len(self._pretrained)
        mine = []
        for turn in processes.turns([(name, i) for name in sets for i in range(len(self._counting))]):
            processes.check_stopped()
            if turn is not None:
                name, i = turn
                begin(name, f"judge {i + 1} of {count}")
                mine.append([name, i, score_all(self._counting[i : i + 1], sets[name], texts[name])])
        said = {(name, i): scores for each in processes.shared(mine) for name, i, scores in each}
        found: dict[str, dict[str, float]] = {name: {} for name in sets}
        for name, ids in sets.items():
            for i in range(len(self._counting)):
                found[name] |= said[name, i]
            read = with_breaks(self._tokenizer, ids) if self._pretrained else []
            for i, judge in enumerate(self._pretrained, len(self._counting) + 1):
                processes.check_stopped()
                begin(name, f"judge {i} of {count}")
                found[name] |= score_all([judge], ids, read)
        return texts, found
