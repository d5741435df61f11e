"""Evaluates a model: held-out cross-entropy and likelihood, and samples before judges. All of it uses the averaged parameters.

Metrics are one flat dict:
    held_out/cross_entropy@TAU, held_out/context_free@TAU   nats per token at a fixed grid of warped time, and their means
    held_out/bound_nats_per_token, held_out/bound_bits_per_token   the likelihood bound, over the tokens after the start token
    samples/SAMPLER@STEPS/METRIC                            the judges' metrics of samples
    samples/held_out/METRIC                                 the same judges on held-out rows: the line to reach
    samples/unigram/METRIC, samples/trigram/METRIC          on tokens without a model (data/naive.py): what no judge should like
    samples/bigram/METRIC, samples/4-gram/METRIC            beside the trigram's where rows are sentences
    samples/6-gram/METRIC, samples/8-gram/METRIC            the same where they are of letters
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from flowlm.data import Dataset
from flowlm.engine.build import Experiment
from flowlm.engine.sampling import Sampler, in_parts, on_rows
from flowlm.engine.sharding import Layout
from flowlm.engine.state import EVALUATION, SAMPLE, purpose_key
from flowlm.evaluation import naive
from flowlm.evaluation.judging import MAX_ROWS, Panel
from flowlm.evaluation.results import Evaluation
from flowlm.runs.metrics import held_out_key, row_name, sample_key
from flowlm.system import progress
from flowlm.system.processes import check_stopped, gathered

MEANINGS = {"seconds_per_100": "what drawing 100 samples took, without compiling"}
FOLLOWED, FOLLOWED_STEPS = 2, 64  # samples in trajectories.json, and the most steps that they take


def _about(begin: Callable[[str], None], what: str) -> Callable[[str], None]:
    """`begin` for parts that are about the same thing."""
    return lambda part: begin(f"{what}: {part}")


class Evaluator:
    """evaluator(params, step, num_samples) -> Evaluation.

    Whatever is wrong is found when it is made; programs compile in the first call.

    Args:
      settings: the experiments' `evaluation` section.
      data_dir: `data.dir`.
      only_steps: numbers of sampling steps instead of `settings.steps`.
      samples_only: judge the sampler as it is set, and nothing else: no plain sampler, no likelihood, no rows of reference.

    Raises:
      ValueError, FileNotFoundError, ImportError: as `Panel`, of which nothing is left to the first call.
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
        samples_only: bool = False,
    ):
        net, family = experiment.net, experiment.family
        self._net, self._dataset, self._seed, self._samples_only = net, dataset, seed, samples_only
        self._settings = settings
        steps = settings.steps if only_steps is None else only_steps
        chosen = family.samplers()
        if samples_only:
            chosen = dict([*chosen.items()][-1:])
        self._samplers = {
            (name, n): Sampler(net, variant, n, layout) for n in steps for name, variant in chosen.items()
        }
        key = jax.random.key(0)
        for sampler in self._samplers.values():
            sampler.check(jax.eval_shape(net.init, key), key)
        self._panel = Panel(dataset, settings.language_models, data_dir, layout)
        self._told = self._panel.notes, self._panel.main, self._panel.meanings | MEANINGS
        if samples_only:
            return
        # One of each sampler is followed, the one with the most steps that a page can show.
        followed = sorted(n for n in steps if n <= FOLLOWED_STEPS)[-1:]
        self._trajectories = {
            (name, n): layout.jit(partial(variant.trajectory, net), static_argnums=(2, 3))
            for n in followed
            for name, variant in chosen.items()
            if variant.continuous
        }
        self._held_out = dataset.validation.rows(0, min(settings.held_out, len(dataset.validation)))
        self._of_rows = {name: on_rows(layout, net, fn) for name, fn in family.likelihoods().items()}
        if "context_free" in self._of_rows:
            # Kept on the host: between evaluations the devices have no room for [L, V].
            self._log_marginals = dataset.train.log_marginals(dataset.tokenizer.vocab_size)

    def __call__(self, params, step: int, num_samples: int) -> Evaluation:
        """Raises processes.Stopped, in all processes alike, between two calls of a sampler, two judges or two likelihoods."""
        with progress.parts(self._parts(num_samples)) as begin:
            return self._evaluate(params, step, num_samples, begin)

    def _parts(self, num_samples: int) -> int:
        """In how many parts an evaluation is done."""
        count = sum(sampler.calls(num_samples) + len(self._panel) for sampler in self._samplers.values())
        if self._samples_only:
            return count
        likelihoods = sum(1 if name == "bound" else len(self._settings.taus) for name in self._of_rows)
        return likelihoods + count + (len(self._naives()) + 1) * len(self._panel) + len(self._trajectories)

    def _naives(self) -> dict[str, Callable]:
        return naive.samplers(self._dataset.sentences, self._dataset.tokenizer.vocab_size)

    def _evaluate(self, params, step: int, num_samples: int, begin: Callable[[str], None]) -> Evaluation:
        metrics = {} if self._samples_only else self._likelihood(params, begin)
        texts = {}
        for (name, taken), sampler in self._samplers.items():
            about = _about(begin, f"{num_samples:,} rows at {taken} step{'' if taken == 1 else 's'}")
            ids = sampler(params, purpose_key(self._seed, step, SAMPLE), num_samples, about)
            texts[row_name(name, taken)], scores = self._panel.judge(ids, about)
            scores["seconds_per_100"] = sampler.seconds
            metrics |= {sample_key(name, taken, k): v for k, v in scores.items()}
        notes, *more = self._told
        if self._samples_only:
            return Evaluation(step, metrics, texts, {}, notes, *more, num_samples)
        # As many rows of reference as samples, because distinct-n depends on their number: real text, and what no model wrote.
        train = self._dataset.train
        rows = train.rows(0, min(MAX_ROWS, len(train)))
        others = {name: sampler(rows, num_samples, self._seed) for name, sampler in self._naives().items()}
        for name, ids in (others | {"held_out": self._reference_rows(num_samples)}).items():
            texts[name], scores = self._panel.judge(ids, _about(begin, f"{len(ids):,} {name.replace('_', '-')} rows"))
            metrics |= {sample_key(name, None, k): v for k, v in scores.items()}
        if (held_out := len(texts["held_out"])) < num_samples:
            notes = (
                *notes,
                f"held out has only {held_out:,} rows beside {num_samples:,} samples: distinct-n compares unfairly",
            )
        return Evaluation(step, metrics, texts, self._follow(params, step, begin), notes, *more, num_samples)

    def _follow(self, params, step: int, begin: Callable[[str], None]) -> dict[str, list]:
        key = purpose_key(self._seed, step, SAMPLE)
        out = {}
        for (sampler, steps), follow in self._trajectories.items():
            check_stopped()
            name = row_name(sampler, steps)
            begin(f"following {FOLLOWED} samples of {name}")
            ids = gathered(follow(params, key, FOLLOWED, steps)).swapaxes(0, 1)
            seen = np.unique(ids).tolist()
            pieces = dict(zip(seen, self._dataset.tokenizer.decode_tokens(seen)))
            out[name] = [[[pieces[i] for i in row] for row in sample] for sample in ids.tolist()]
        return out

    def _reference_rows(self, num: int) -> np.ndarray:
        split = self._dataset.test
        return split.shuffled(self._seed)(0, min(num, len(split)))

    def _likelihood(self, params, begin: Callable[[str], None]) -> dict[str, float]:
        """Cross-entropies on the grid of tau and the bound, over the held-out rows. The same noise at every call."""
        metrics: dict[str, float] = {}
        key = purpose_key(self._seed, 0, EVALUATION)
        count, size = len(self._held_out), self._settings.held_out_batch

        def of_rows(name: str, *args) -> np.ndarray:
            begin(f"{count:,} held-out rows: likelihood")
            return in_parts(self._of_rows[name], params, self._held_out, size, key, *args)

        for name, metric in (("denoising", "cross_entropy"), ("context_free", "context_free")):
            if name in self._of_rows:
                extra = (jnp.asarray(self._log_marginals),) if name == "context_free" else ()
                at = {tau: float(of_rows(name, tau, *extra).mean()) for tau in self._settings.taus}
                metrics |= {held_out_key(metric, tau): value for tau, value in at.items()}
                metrics[held_out_key(metric)] = float(np.mean(list(at.values())))
        if "bound" in self._of_rows:
            # The start token is the same in every row and carries nothing.
            nats = of_rows("bound") / (self._net.length - 1)
            for unit, scale in (("nats", 1.0), ("bits", 1 / np.log(2))):
                metrics[held_out_key(f"bound_{unit}_per_token")] = float(nats.mean() * scale)
                metrics[held_out_key(f"bound_{unit}_per_token_stderr")] = float(nats.std(ddof=1) / count**0.5 * scale)
        return metrics
