"""Evaluates a model: held-out cross-entropy and likelihood, and samples before judges. All of it uses the averaged parameters.

Metrics are one flat dict:
    held_out/cross_entropy@TAU, held_out/context_free@TAU   nats per token at a fixed grid of warped time, and their means
    held_out/bound_nats_per_token, held_out/bound_bits_per_token   the likelihood bound, over the tokens after the start token
    samples/SAMPLER@STEPS/METRIC                            the judges' metrics of samples
    samples/SAMPLER-prompted@STEPS/METRIC                   of samples that go on from parts of held-out rows, if asked for
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
from flowlm.data.dataset import marginal_rows
from flowlm.engine.build import Experiment
from flowlm.engine.sampling import Sampler, in_parts, on_rows
from flowlm.engine.sharding import Layout
from flowlm.engine.state import EVALUATION, PROMPTS, SAMPLE, purpose_key
from flowlm.evaluation import naive
from flowlm.evaluation.judging import FITTED, Panel, counted_rows
from flowlm.evaluation.results import Evaluation
from flowlm.judges.base import mean_with_stderr
from flowlm.objectives import Family
from flowlm.objectives.prompts import UNKNOWN, drawn
from flowlm.runs.metrics import held_out_key, parse_row, row_name, sample_key
from flowlm.system import progress
from flowlm.system.processes import check_stopped, gathered

MEANINGS = {"seconds_per_100": "what drawing 100 samples took, without compiling"}
OF_PROMPTS = {"recovered": "share of the tokens not given that are the held-out row's own"}
FOLLOWED, FOLLOWED_STEPS = 2, 64  # samples in trajectories.json, and the most steps that they take


def sampling_steps(settings: ConfigDict, family: Family, final: bool) -> tuple[int, ...]:
    """The numbers of steps that samples are drawn in: until the last one none above `loop_steps`, if the family can take fewer."""
    every = tuple(settings.steps)
    return every if final or not family.any_steps else tuple(n for n in every if n <= settings.loop_steps)


def followed_steps(steps: Sequence[int]) -> list[int]:
    """The number of steps in which samples are followed, if there is one among these."""
    return sorted(n for n in steps if n <= FOLLOWED_STEPS)[-1:]


def _prompted_name(family: Family) -> str:
    """What the name of a sampler that goes on from prompts ends in, with its guidance where there is any."""
    return "-prompted" + (f"-guided{family.prompt_guidance:g}" if family.prompt_guidance != 1 else "")


class Evaluator:
    """evaluator(params, step, num_samples) -> Evaluation.

    Whatever is wrong is found when it is made; programs compile in the first call. What no model wrote is judged in the first
    call of as many samples. Of several processes all must call, and they divide the work.

    Args:
      settings: the experiments' `evaluation` section.
      data_dir: `data.dir`.
      only_steps: numbers of sampling steps, whenever it is called, instead of `settings.steps`.
      samples_only: judge the sampler as it is set, and nothing else: no plain sampler, no likelihood, no rows of reference.
      prompted: the same of texts that go on from parts of held-out rows, drawn as for training with prompts; their sampler's
        name ends in "-prompted", with guidance in "-prompted-guided1.5", and `recovered` is among their metrics.

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
        prompted: bool = False,
    ):
        net, family = experiment.net, experiment.family
        self._net, self._dataset, self._seed = net, dataset, seed
        self._samples_only, self._prompted = samples_only or prompted, prompted
        self._settings = settings
        self._steps = {final: only_steps or sampling_steps(settings, family, final) for final in (False, True)}
        chosen = family.samplers()
        if self._samples_only:
            chosen = dict([*chosen.items()][-1:])
        self._samplers = {
            name + _prompted_name(variant) * prompted: Sampler(net, variant, layout, prompted=prompted)
            for name, variant in chosen.items()
        }
        key = jax.random.key(0)
        for sampler in self._samplers.values():
            for n in self._steps[True]:
                sampler.check(jax.eval_shape(net.init, key), key, n)
        self._panel = Panel(dataset, settings.language_models, data_dir, layout)
        more = OF_PROMPTS if prompted else {}
        self._told = (
            self._panel.notes,
            (*self._panel.main[:1], *more, *self._panel.main[1:]),
            self._panel.meanings | MEANINGS | more,
        )
        self._prefixes = family.conditions == "prefix"
        self._references: dict[int, tuple[dict, dict]] = {}
        if self._samples_only:
            return
        # One of each sampler is followed, the one with the most steps that a page can show.
        followed = followed_steps(self._steps[False])
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
            self._log_marginals = self._marginals()

    def _marginals(self) -> np.ndarray:
        vocab = self._dataset.tokenizer.vocab_size
        facts = {"fitted": FITTED, "rows": marginal_rows(self._dataset.length), "vocab": vocab}
        return self._dataset.fitted("marginals", facts, lambda: {"logs": self._dataset.train.log_marginals(vocab)})[
            "logs"
        ]

    def __call__(self, params, step: int, num_samples: int, final: bool = False) -> Evaluation:
        """Raises processes.Stopped, in all processes alike, between two calls of a sampler, two judges or two likelihoods.

        final: whether it comes after the last step, so that samples in more than `settings.loop_steps` steps belong to it.
        """
        with progress.parts(self._parts(num_samples, final)) as begin:
            return self._evaluate(params, step, num_samples, final, begin)

    def _parts(self, num_samples: int, final: bool) -> int:
        """In how many parts an evaluation is done."""
        steps = len(self._steps[final])
        count = steps * sum(sampler.calls(num_samples) for sampler in self._samplers.values())
        count += self._panel.parts(steps * len(self._samplers))
        if num_samples not in self._references:
            count += self._panel.parts(len(self._naives()) + self._refers_to_real)
        if self._samples_only:
            return count
        likelihoods = sum(1 if name == "bound" else len(self._settings.taus) for name in self._of_rows)
        return likelihoods + count + len(self._trajectories)

    @property
    def _refers_to_real(self) -> bool:
        """Whether held-out rows are judged beside the samples."""
        return self._prompted or not self._samples_only

    def _naives(self) -> dict[str, Callable]:
        if self._samples_only:
            return {}
        return naive.samplers(self._dataset.sentences, self._dataset.tokenizer.vocab_size)

    def _evaluate(self, params, step: int, num_samples: int, final: bool, begin: Callable[[str], None]) -> Evaluation:
        metrics = {} if self._samples_only else self._likelihood(params, begin)
        texts, found = self._sampled(params, step, num_samples, self._steps[final], begin)
        metrics |= found
        notes, *more = self._told
        if not self._refers_to_real:
            return Evaluation(step, metrics, texts, {}, notes, *more, num_samples)
        if num_samples not in self._references:
            self._references[num_samples] = self._referred(num_samples, begin)
        others, found = self._references[num_samples]
        texts |= others
        metrics |= found
        if (held_out := len(texts["held_out"])) < num_samples:
            notes = (
                *notes,
                f"held out has only {held_out:,} rows beside {num_samples:,} samples: distinct-n compares unfairly",
            )
        followed = {} if self._samples_only else self._follow(params, step, begin)
        return Evaluation(step, metrics, texts, followed, notes, *more, num_samples)

    def _sampled(
        self, params, step: int, num: int, steps: Sequence[int], begin: Callable[[str], None]
    ) -> tuple[dict[str, list[str]], dict[str, float]]:
        """({sampler@steps: texts}, metrics of them): all are drawn first, so that processes can divide the judging of all."""
        key, written, seconds = purpose_key(self._seed, step, SAMPLE), {}, {}
        rows, given = self._given(num) if self._prompted else (None, None)

        def about(taken: int) -> str:
            return f"{num:,} rows at {taken} step{'' if taken == 1 else 's'}"

        for taken in steps:
            for name, sampler in self._samplers.items():
                row = row_name(name, taken)
                written[row] = sampler(
                    params, key, num, taken, lambda what, taken=taken: begin(f"{about(taken)}: {what}"), given
                )
                seconds[row] = sampler.seconds
        texts, scores = self._panel.judge(written, lambda row, what: begin(f"{about(parse_row(row)[1])}: {what}"))
        metrics = {}
        for row, found in scores.items():
            found = found | {"seconds_per_100": seconds[row]}
            if self._prompted:
                asked = given == UNKNOWN
                found |= mean_with_stderr("recovered", ((written[row] == rows) & asked).sum(1), asked.sum(1))
            metrics |= {sample_key(*parse_row(row), k): v for k, v in found.items()}
        return texts, metrics

    def _referred(self, num: int, begin: Callable[[str], None]) -> tuple[dict[str, list[str]], dict[str, float]]:
        """The same of real text and, beside texts without a prompt, of what no model wrote.

        They are as many rows as the samples, for distinct-n depends on that.
        """
        train, sets = self._dataset.train, {}
        if naives := self._naives():
            rows = train.rows(0, min(counted_rows(self._dataset.length), len(train)))
            sets = {name: sampler(rows, num, self._seed) for name, sampler in naives.items()}
        sets["held_out"] = self._reference_rows(num)

        def judging(name: str, what: str) -> None:
            begin(f"{len(sets[name]):,} {name.replace('_', '-')} rows: {what}")

        texts, scores = self._panel.judge(sets, judging)
        return texts, {sample_key(name, None, k): v for name, found in scores.items() for k, v in found.items()}

    def _given(self, num: int) -> tuple[np.ndarray, np.ndarray]:
        """(held-out rows of ids [num, L], what a prompt gives of each); to autoregression as many tokens, as a prefix."""
        rows = np.resize(self._reference_rows(num), (num, self._net.length))
        given = np.asarray(drawn(purpose_key(self._seed, 0, PROMPTS), jnp.asarray(rows), 1.0))
        if self._prefixes:
            count = (given != UNKNOWN).sum(1, keepdims=True)
            given = np.where(np.arange(self._net.length) < count, rows, UNKNOWN).astype(np.int32)
        return rows, given

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
