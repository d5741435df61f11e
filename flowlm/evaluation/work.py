"""How much work evaluating is, counted from the settings alone; `flowlm plan` says what each part of it takes.

Where a split has fewer rows than are counted here, all of them are read.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from flowlm.data import corpora
from flowlm.data.dataset import marginal_rows
from flowlm.engine.build import build
from flowlm.engine.sampling import ROWS
from flowlm.evaluation import naive
from flowlm.evaluation.evaluator import FOLLOWED, followed_steps, sampling_steps
from flowlm.evaluation.judging import MAX_CHARS, counted_rows
from flowlm.judges.ngrams import ORDERS


class Start(NamedTuple):
    """What is read and held before the first step; what is fitted is read again only where nothing was kept (data/fitted.py).

    Attributes:
      marginal_rows: rows of the train split whose tokens are counted by position; 0 where the family has no use for them.
      counted_rows: rows of the validation split whose n-grams are counted.
      characters: of the train split, which a model of characters is fitted on and words are counted in.
      held_out_rows: rows of the validation split whose likelihood is measured.
      table_bytes: of the tables that each host holds, at most.
      fitting_bytes: what fitting the largest of them takes beside that, at most.
    """

    marginal_rows: int
    counted_rows: int
    characters: int
    held_out_rows: int
    table_bytes: int
    fitting_bytes: int


class Work(NamedTuple):
    """One evaluation, the first of its kind, in which what no model wrote is judged too.

    Attributes:
      samples: for each sampler and number of steps.
      sets: of samples.
      draws: calls of samplers.
      network_calls: of the network by samplers, each of a whole batch of rows.
      followed_calls: of the network, of FOLLOWED rows each.
      likelihoods: {name: calls} of the likelihoods of held-out rows.
      programs: that are compiled, each once in a run.
      judged_rows: rows that judges read, those of reference included.
    """

    samples: int
    sets: int
    draws: int
    network_calls: int
    followed_calls: int
    likelihoods: dict[str, int]
    programs: int
    judged_rows: int


def start(config: ConfigDict) -> Start:
    """What the start of a run reads for its evaluations."""
    length, vocab, settings = config.data.length, config.model.vocab_size, config.evaluation
    likelihoods = build(config, vocab).family.likelihoods()
    by_position = marginal_rows(length) if "context_free" in likelihoods else 0
    text = MAX_CHARS if config.data.name in corpora.CORPORA else 0
    grams = len(ORDERS) * 16 * counted_rows(length) * length  # each may be seen once: 8 bytes of it, 8 of its share
    marginals = 4 * length * vocab if by_position else 0
    fitting = max(grams // len(ORDERS) * 3, marginals, 40 * text)  # sorting n-grams; counts; n-grams of characters
    return Start(by_position, counted_rows(length), text, settings.held_out, grams + marginals + 16 * text, fitting)


def work(config: ConfigDict, final: bool, rows: int = ROWS) -> Work:
    """What one evaluation does.

    Args:
      final: whether it is the one after the last step.
      rows: samples of one call, over all devices.
    """
    settings, data = config.evaluation, config.data
    family = build(config, config.model.vocab_size).family
    samplers = family.samplers().values()
    steps = sampling_steps(settings, family, final)
    num = settings.final_samples if final else settings.samples
    runs, sets = -(-num // rows), len(steps) * len(samplers)
    often = followed_steps(sampling_steps(settings, family, False))
    followed = sum(each.continuous for each in samplers) * sum(often)
    calls = -(-settings.held_out // settings.held_out_batch)
    likelihoods = {name: calls * (1 if name == "bound" else len(settings.taus)) for name in family.likelihoods()}
    programs = sum(1 if each.any_steps else len(steps) for each in samplers) + len(likelihoods)
    programs += sum(each.continuous for each in samplers) * len(often)
    sentences = data.name in corpora.CORPORA and corpora.CORPORA[data.name].rows is not None
    references = len(naive.samplers(sentences, config.model.vocab_size)) + 1
    network_calls = runs * sum(steps) * len(samplers)
    return Work(num, sets, runs * sets, network_calls, followed, likelihoods, programs, num * (sets + references))


def every(config: ConfigDict, rows: int = ROWS) -> dict[str, Any]:
    """{start, often, final, followed: rows that are followed}: what `flowlm.scale.evaluations` multiplies. rows: as in `work`."""
    evaluations = {"often": work(config, False, rows)._asdict(), "final": work(config, True, rows)._asdict()}
    return {"start": start(config)._asdict(), **evaluations, "followed": FOLLOWED}
