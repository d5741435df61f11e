"""What a model is worth: held-out cross-entropy and likelihood, and samples before judges. All on the averaged parameters.

Metrics are one flat dict:
    held_out/cross_entropy@TAU, held_out/context_free@TAU   nats per token at a fixed grid of warped time, and their means
    held_out/bound_nats_per_token, held_out/bound_bits_per_token   the likelihood bound, over the tokens after the start token
    samples/SAMPLER@STEPS/METRIC                            the judges' metrics of samples
    samples/held_out/METRIC                                 the same judges on held-out rows: the line to reach
    samples/unigram/METRIC, samples/trigram/METRIC          on tokens without a model (data/naive.py): what no judge should like
"""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from flowlm import storage
from flowlm.curves import draw_evaluation
from flowlm.data import Dataset, naive
from flowlm.experiment import Experiment, load_trained
from flowlm.judges import Judge, hugging_face, mauve, score_all, smollm2
from flowlm.judges.grammar import GrammarJudge
from flowlm.judges.kneser_ney import KneserNey
from flowlm.judges.language_model import LanguageModel, with_breaks
from flowlm.judges.ngrams import NGrams
from flowlm.judges.statistics import Statistics, words
from flowlm.objectives.autoregressive import Autoregressive
from flowlm.processes import gathered
from flowlm.sharding import Layout
from flowlm.train_state import EVALUATION, SAMPLE, purpose_key

ROWS = 256  # rows in one call of a jitted function
UNSHOWN = ("ngram_distance_1", "ngram_distance_3", "ngram_distance_5")  # in evaluation.json all the same
SHOWN = 16  # samples of each kind in samples.txt
FOLLOWED, FOLLOWED_STEPS = 2, 64  # samples in trajectories.json, and the most steps that they take
MAX_CHARS = 10_000_000  # of the train split that the character model is fitted on
MAX_ROWS = 20_000  # that counts are taken of


def make_language_models(
    names: Sequence[str], length: int, data_dir: str, layout: Layout, reference: Callable[[int], Sequence[str]]
) -> list[Judge]:
    """The judges of `evaluation.language_models`, which read `length` of their tokens of every text.

    Args:
      names: `smollm2`, `hf:NAME` (a Hugging Face model by name or path) or `run:DIRECTORY`; `mauve:smollm2` or `mauve:hf:NAME`.
      data_dir: where smollm2's file is.
      reference: num -> that many held-out texts, or all where there are fewer. Only mauve calls it, and at its first score.

    Raises:
      ValueError: another name. FileNotFoundError, ImportError: what a judge needs is not here, and how to get it.
    """
    judges = []
    for name in names:
        kind, _, rest = name.partition(":")
        if name == "smollm2":
            judges.append(smollm2.make_judge(data_dir, length))
        elif kind == "hf" and rest:
            judges.append(hugging_face.make_judge(rest, length))
        elif kind == "run" and rest:
            judges.append(run_judge(rest, length, layout))
        elif kind == "mauve" and re.fullmatch("smollm2|hf:.+", rest):
            judges.append(mauve.make_judge(rest, length, data_dir, reference))
        else:
            choices = "smollm2, hf:NAME, run:DIRECTORY, mauve:smollm2 or mauve:hf:NAME"
            raise ValueError(f"unknown evaluation.language_models {name!r}: choose {choices}")
    return judges


def run_judge(directory: str, length: int, layout: Layout) -> LanguageModel:
    """An autoregressive run of ours as a judge of text, under the name of its directory."""
    run = load_trained(directory, layout)
    family, net = run.experiment.family, run.experiment.net
    if not isinstance(family, Autoregressive):
        raise ValueError(
            f"{directory} is of the family {run.config.objective.family}: only an autoregressive run can judge"
        )
    nats = layout.jit(partial(family.nats, net))
    name = storage.path(directory).name
    score = lambda ids: gathered(nats(run.params, jnp.asarray(ids)))
    return LanguageModel(name, run.tokenizer.encode_batch, score, family.start, min(length, net.length - 1))


def reference_texts(dataset: Dataset, num: int) -> list[str]:
    """`num` rows of the validation split as pretrained judges read them, or all where there are fewer; drawn with one seed."""
    split = dataset.validation
    return with_breaks(dataset.tokenizer, split.shuffled(0)(0, min(num, len(split))))


def make_judges(dataset: Dataset) -> list[Judge]:
    """The judges that fit the data: counts always; the grammar's exact law, or a 5-gram character model and a word list."""
    start = dataset.tokenizer.start
    held_out = dataset.validation.rows(0, min(MAX_ROWS, len(dataset.validation)))
    if dataset.grammar is not None:
        return [Statistics(None, start), GrammarJudge(dataset.grammar, start), NGrams(held_out, start)]
    text = dataset.train.text(MAX_CHARS)
    return [Statistics(frozenset(words(text)), start), KneserNey.fit(text), NGrams(held_out, start)]


def samplers(family) -> dict[str, object]:
    """The family's samplers by name: the plain one (`euler`, `map`), and what it is set to where that differs."""
    if not hasattr(family, "sample"):
        return {}
    if hasattr(family, "sampler"):
        return {family.sampler: family}
    scale = f" noise {family.noise_scale:g}" if family.noise_scale != 1 else ""
    if not hasattr(family, "eta"):
        return {"map": replace(family, noise_scale=1.0)} | {f"map{scale}": family}
    out = {"euler": replace(family, eta=0.0, temperature=None, noise_scale=1.0)}
    name = "ancestral" if family.eta == 1 else f"eta {family.eta:g}" if family.eta else "euler"
    if family.temperature is not None:
        name += f" temperature {family.temperature:g}"
    return out | {name + scale: family}


class Sampler:
    """Draws samples of one (family, number of steps), ROWS at a time, sharded over the mesh.

    `rows` are what one call draws, `trace`(prepared params, key) its program. `seconds` is what the last draw of 100 samples
    took, compilation apart.
    """

    def __init__(self, net, family, steps: int, layout: Layout):
        rows = -(-ROWS // layout.devices) * layout.devices
        self.rows = rows
        sample = lambda params, key: family.sample(net, params, key, rows, steps)
        self.trace = layout.jit(sample, out_shardings=layout.rows).trace
        self._prepare = jax.jit(net.prepared) if hasattr(family, "prior") else lambda params: params
        self._compiled = None

    def __call__(self, params, key: jax.Array, num: int) -> np.ndarray:
        """ids int32 [num, L]; the first rows do not depend on num."""
        params = self._prepare(params)
        if self._compiled is None:
            self._compiled = self.trace(params, key).lower().compile()
        calls = -(-num // self.rows)
        start = time.perf_counter()
        parts = [gathered(self._compiled(params, jax.random.fold_in(key, i))) for i in range(calls)]
        self.seconds = 100 * (time.perf_counter() - start) / (calls * self.rows)
        return np.concatenate(parts)[:num]


def judged_table(
    runs: Mapping[str, Mapping[str, float]], samples: Mapping[str, Mapping[str, str]] | None = None
) -> Table:
    """One line for each sampler of each run, tokens without a model and held-out rows last; with one sample of each if given.

    Args:
      runs: {name of the run: metrics of an evaluation}. samples: {name of the run: {sampler: text}}.
    """
    lines: dict[tuple[str, str], dict[str, float]] = {}
    for run, metrics in runs.items():
        for key, value in metrics.items():
            if key.startswith("samples/"):
                _, name, metric = key.split("/")
                lines.setdefault((run if "@" in name else "", name), {})[metric] = value
    columns = [m for m in next(iter(lines.values()), {}) if not m.endswith("_stderr") and m not in UNSHOWN]
    table = Table(title="Samples before the judges")
    table.add_column("sampler @ steps")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    if samples is not None:
        table.add_column("one sample", overflow="fold")
    for (run, name), row in sorted(lines.items(), key=lambda line: "@" not in line[0][1]):
        show = lambda v: "" if v is None else f"{v:.3f}"
        text = [] if samples is None else [samples[run or next(iter(samples))].get(name, "")]
        table.add_row(f"{run} {name}".strip().replace("_", " "), *(show(row.get(c)) for c in columns), *text)
    return table


def compare(directories: Sequence[str]) -> None:
    """Prints one table of the samples of several evaluated runs. Raises FileNotFoundError where there is no evaluation."""
    metrics, samples = {}, {}
    for directory in map(storage.path, directories):
        if not (directory / "evaluation.json").exists():
            raise FileNotFoundError(
                f"{directory} has no evaluation.json: run `flowlm evaluate --checkpoint={directory}`"
            )
        report = json.loads((directory / "evaluation.json").read_text())
        metrics[directory.name], samples[directory.name] = report["metrics"], report["samples"]
    Console(width=200 if not Console().is_terminal else None).print(judged_table(metrics, samples))


@dataclass(frozen=True)
class Evaluation:
    """metrics as above; texts: {sampler@steps: samples as text}; trajectories: {sampler@steps: the likeliest token of every
    position at every step, as text [sample][step][position]}."""

    step: int
    metrics: dict[str, float]
    texts: dict[str, list[str]]
    trajectories: dict[str, list] = field(default_factory=dict)

    def save(self, directory) -> None:
        """Writes evaluation.json, evaluation.png, samples.txt and trajectories.json."""
        directory = storage.path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        finite = {k: v if np.isfinite(v) else None for k, v in self.metrics.items()}
        report = {
            "step": self.step,
            "metrics": finite,
            "samples": {name: texts[0] for name, texts in self.texts.items()},
        }
        (directory / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
        (directory / "trajectories.json").write_text(json.dumps(self.trajectories) + "\n")
        draw_evaluation(directory)
        blocks = [f"== {name}\n" + "\n".join(texts[:SHOWN]) + "\n" for name, texts in self.texts.items()]
        (directory / "samples.txt").write_text("\n".join(blocks))

    def show(self) -> None:
        """Prints three tables: time grid, likelihood, samples; and two samples of each kind."""
        console = Console(width=200 if not Console().is_terminal else None)
        for table in self._tables():
            console.print(table)
        for name, texts in self.texts.items():
            console.print(f"[bold]{name}[/bold]", *(f"  {t}" for t in texts[:2]), sep="\n", highlight=False)

    def _tables(self) -> list[Table]:
        held = {k.removeprefix("held_out/"): v for k, v in self.metrics.items() if k.startswith("held_out/")}
        grid = Table(title=f"Held-out nats per token at step {self.step}")
        taus = sorted({k.split("@")[1] for k in held if "@" in k}, key=float)
        for column in ("tau", *taus, "mean"):
            grid.add_column(column, justify="right")
        for row in ("cross_entropy", "context_free"):
            if row in held:
                grid.add_row(row.replace("_", " "), *(f"{held[f'{row}@{t}']:.3f}" for t in taus), f"{held[row]:.3f}")
        tables = [grid] if taus else []
        if "bound_nats_per_token" in held:
            bound = Table(title="Likelihood bound")
            bound.add_column("nats per token", justify="right")
            bound.add_column("bits per token", justify="right")
            nats, bits = ("bound_nats_per_token", "bound_bits_per_token")
            bound.add_row(*(f"{held[k]:.3f} ± {held[f'{k}_stderr']:.3f}" for k in (nats, bits)))
            tables.append(bound)
        return [*tables, judged_table({"": self.metrics})]


class Evaluator:
    """evaluator(params, step, num_samples) -> Evaluation; everything slow is compiled or fitted once, on the first call.

    Args:
      settings: the experiments' `evaluation` section. data_dir: `data.dir`.
      only_steps: numbers of sampling steps instead of `settings.steps`.
    """

    def __init__(
        self,
        experiment: Experiment,
        dataset: Dataset,
        layout: Layout,
        seed: int,
        settings: ConfigDict,
        data_dir: str,
        only_steps: Sequence[int] | None = None,
    ):
        net, family = experiment.net, experiment.family
        self._net, self._family, self._dataset, self._seed = net, family, dataset, seed
        self._settings = settings
        steps = settings.steps if only_steps is None else only_steps
        self._samplers = {
            f"{name}@{n}": Sampler(net, variant, n, layout) for n in steps for name, variant in samplers(family).items()
        }
        # One of each sampler is followed, the one with the most steps that a page can show.
        followed = sorted(n for n in steps if n <= FOLLOWED_STEPS)[-1:]
        self._trajectories = {
            f"{name}@{n}": layout.jit(partial(variant.trajectory, net), static_argnums=(2, 3))
            for n in followed
            for name, variant in samplers(family).items()
            if hasattr(variant, "trajectory")
        }
        self._held_out = self._reference = self._judges = None
        # At once, unlike all else that is slow: a judge that is not here is an error before the training, not after it.
        self._language_models = make_language_models(
            settings.language_models, dataset.length, data_dir, layout, partial(reference_texts, dataset)
        )
        of_net = lambda fn: layout.jit(partial(fn, net))
        self._bound = of_net(family.bound) if self._has_bound() else None
        self._denoising = of_net(family.denoising) if hasattr(family, "denoising") else None
        context_free = hasattr(family, "context_free") and self._has_bound()
        self._context_free = of_net(family.context_free) if context_free else None

    def _has_bound(self) -> bool:
        prior = getattr(self._family, "prior", None)
        return hasattr(self._family, "bound") and (prior is None or prior.name == "gaussian")

    def __call__(self, params, step: int, num_samples: int, samples_only: bool = False) -> Evaluation:
        """samples_only: of the sampler as it is set; no plain one beside it, no likelihood, no rows of reference."""
        if self._judges is None:
            self._prepare()
        metrics = {} if samples_only else self._likelihood(params)
        texts = {}
        own = list(samplers(self._family))[-1]
        for name, sampler in self._samplers.items():
            if samples_only and name.rpartition("@")[0] != own:
                continue
            ids = sampler(params, purpose_key(self._seed, step, SAMPLE), num_samples)
            texts[name], scores = self._judged(ids)
            scores["seconds_per_100"] = sampler.seconds
            metrics |= {f"samples/{name}/{k}": v for k, v in scores.items()}
        if samples_only:
            return Evaluation(step, metrics, texts)
        # As many rows of real text as samples, where there are (distinct-n depends on the number), and of what no model wrote.
        train = self._dataset.train
        rows = train.rows(0, min(MAX_ROWS, len(train)))
        others = {name: sampler(rows, num_samples, self._seed) for name, sampler in naive.SAMPLERS.items()}
        for name, ids in (others | {"held_out": self._reference_rows(num_samples)}).items():
            texts[name], scores = self._judged(ids)
            metrics |= {f"samples/{name}/{k}": v for k, v in scores.items()}
        return Evaluation(step, metrics, texts, self._follow(params, step))

    def _judged(self, ids: np.ndarray) -> tuple[list[str], dict[str, float]]:
        """The rows as text, and what all judges say of them; only the pretrained ones read where a document ends."""
        texts = self._dataset.tokenizer.decode_batch(ids)
        scores = score_all(self._judges, ids, texts)
        return texts, scores | score_all(self._language_models, ids, with_breaks(self._dataset.tokenizer, ids))

    def _follow(self, params, step: int) -> dict[str, list]:
        key, decode = purpose_key(self._seed, step, SAMPLE), self._dataset.tokenizer.decode_batch
        out = {}
        for name, follow in self._trajectories.items():
            ids = gathered(follow(params, key, FOLLOWED, int(name.rpartition("@")[2]))).swapaxes(0, 1)
            pieces = {i: decode([[i]])[0] for i in np.unique(ids).tolist()}
            out[name] = [[[pieces[i] for i in row] for row in sample] for sample in ids.tolist()]
        return out

    def _prepare(self) -> None:
        split = self._dataset.validation
        self._held_out = split.rows(0, min(self._settings.held_out, len(split)))
        if self._context_free is not None:
            self._log_marginals = jnp.asarray(self._dataset.train.log_marginals(self._dataset.tokenizer.vocab_size))
        self._judges = make_judges(self._dataset)

    def _reference_rows(self, num: int) -> np.ndarray:
        split = self._dataset.test
        if len(split) < num:
            logging.warning(
                "%d samples are judged beside only %d held-out rows: distinct-n compares unfairly", num, len(split)
            )
        return split.shuffled(self._seed)(0, min(num, len(split)))

    def _likelihood(self, params) -> dict[str, float]:
        """Cross-entropies on the grid of tau and the bound, over the held-out rows. The same noise at every call."""
        metrics: dict[str, float] = {}
        key = purpose_key(self._seed, 0, EVALUATION)
        count = len(self._held_out)
        parts = [{"ids": jnp.asarray(self._held_out[i : i + ROWS])} for i in range(0, count, ROWS)]

        def mean(fn, *args) -> np.ndarray:
            values = [fn(params, part, jax.random.fold_in(key, i), *args) for i, part in enumerate(parts)]
            return np.concatenate([gathered(v) for v in values])

        for name, fn, extra in (
            ("cross_entropy", self._denoising, ()),
            ("context_free", self._context_free, (getattr(self, "_log_marginals", None),)),
        ):
            if fn is not None:
                at = {tau: float(mean(fn, tau, *extra).mean()) for tau in self._settings.taus}
                metrics |= {f"held_out/{name}@{tau}": value for tau, value in at.items()}
                metrics[f"held_out/{name}"] = float(np.mean(list(at.values())))
        if self._bound is not None:
            # The start token is the same in every row and carries nothing.
            nats = mean(self._bound) / (self._net.length - 1)
            for unit, scale in (("nats", 1.0), ("bits", 1 / np.log(2))):
                metrics[f"held_out/bound_{unit}_per_token"] = float(nats.mean() * scale)
                metrics[f"held_out/bound_{unit}_per_token_stderr"] = float(nats.std(ddof=1) / count**0.5 * scale)
        return metrics
