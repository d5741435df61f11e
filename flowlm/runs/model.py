"""A trained model as a user calls it: it writes texts and ids, and bounds the likelihood of texts. `flowlm.load` makes it."""

import operator
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from flowlm.data.corpora import is_padded
from flowlm.data.grammar import Grammar, shipped_names
from flowlm.data.packing import framed
from flowlm.data.tokenizers import Tokenizer
from flowlm.engine import sampling
from flowlm.engine.sampling import ROWS, named_sampler, on_rows
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.objectives import Family
from flowlm.objectives.prompts import check
from flowlm.runs import blocks
from flowlm.runs.prompts import given_rows, is_open
from flowlm.runs.trained import Trained, load_settings, load_trained

_SHOWN = 5  # texts that an error names
_FURTHER = 2**32  # a further block's key is numbered from here down, where no call of a sampler is


class Samples(NamedTuple):
    """What one call drew.

    Attributes:
      texts: num of them.
      ids: the same as int32 [num, L], each row with its start token; of texts of at most max_tokens [num, 1 + max_tokens], filled
        with the end token behind where they end.
      prompts: of each text the prompt that it goes on from; [] without one.
      sampler: the name of the sampler that drew them.
      steps: how many it took.
      seed: of the noise.
      seconds: what drawing took.
      compile_seconds: what came before it took, above all compilation; about 0 the next time.
    """

    texts: list[str]
    ids: np.ndarray
    prompts: list[str]
    sampler: str
    steps: int
    seed: int
    seconds: float
    compile_seconds: float


class Model:
    """A trained model. `flowlm.load` makes it of a run directory; it computes on all devices of this process.

    Each number of samples and each sampler is a program of its own, compiled at its first use and kept; so is each number of steps
    of a family that does not take any.

    Attributes:
      run: the trained run: settings, tokenizer, network, family, averaged parameters, and the step that they are from.
      layout: the devices, and how arrays are spread over them.
    """

    def __init__(self, run: Trained, layout: Layout) -> None:
        self.run, self.layout = run, layout
        self._drawing: dict[tuple, sampling.Sampler] = {}
        self._bound = None

    def __repr__(self) -> str:
        config = self.config
        return f"<{config.objective.family} of {config.data.name} at step {self.run.step}, samplers {', '.join(self.samplers)}>"

    @property
    def config(self) -> ConfigDict:
        """Every setting of the run."""
        return self.run.config

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer: `encode` and `decode` are of texts without a start token."""
        return self.run.tokenizer

    @property
    def samplers(self) -> tuple[str, ...]:
        """Names of its samplers; the last is set as the run says, and taken where none is named."""
        return tuple(self.run.experiment.family.samplers())

    @property
    def follows_prompts(self) -> str:
        """How it follows a prompt (docs/concepts/prompts.md).

        `trained` with prompts, and without them `shown` or `prefix`, which are exact, or `replacement`, an approximation.
        """
        family = self.run.experiment.family
        return "trained" if family.prompts > 0 else family.conditions

    def sample(
        self,
        num: int = 8,
        steps: int = 1,
        seed: int = 0,
        sampler: str | None = None,
        prompt: str | Sequence[str] | None = None,
        max_tokens: int | None = None,
        tail: int | None = None,
    ) -> list[str]:
        """Writes `num` texts by `steps` network calls each.

        The same seed writes the same texts on the same devices, and the first of them whatever `num` is, as long as no two tokens
        are so nearly equally likely that the last digits decide, which differ between batches of different sizes.

        Args:
          seed: from 0 to 2^32 - 1.
          sampler: one of `samplers`; the last of them by default.
          prompt: a text with gaps, as runs/prompts.py reads it, such as "the old ___ feeds ...", or several: `num` texts of each.
            What it gives is in every text; `follows_prompts` says how well the rest goes with it.
          max_tokens: most tokens of a text, which is then cut where it ends. More than the L - 1 of a row are written block by
            block, `steps` network calls each (runs/blocks.py); `follows_prompts` says how well a block goes on. None: a row.
          tail: tokens of the text so far that a further block goes on from, fewer than a row has; half of them by default.

        Raises:
          ValueError: there is no such sampler, the family does not sample in so many steps, a number is out of its range, or a
            prompt does not fit a row or max_tokens.
        """
        return self.draw(num, steps, seed, sampler, prompt, max_tokens, tail).texts

    def sample_ids(
        self,
        num: int = 8,
        steps: int = 1,
        seed: int = 0,
        sampler: str | None = None,
        prompt: str | Sequence[str] | None = None,
        max_tokens: int | None = None,
        tail: int | None = None,
    ) -> np.ndarray:
        """`sample` as ids, `Samples.ids`."""
        return self.draw(num, steps, seed, sampler, prompt, max_tokens, tail).ids

    def draw(
        self,
        num: int = 8,
        steps: int = 1,
        seed: int = 0,
        sampler: str | None = None,
        prompt: str | Sequence[str] | None = None,
        max_tokens: int | None = None,
        tail: int | None = None,
    ) -> Samples:
        """`sample`, with the ids, the sampler's name and the time.

        As many rows are computed as are asked for, rounded up to a multiple of the devices; above sampling.ROWS in calls of that
        many.
        """
        num, steps = _whole("num", num, 1), _whole("steps", steps, 1)
        seed = _whole("seed", seed, 0, 2**32 - 1)
        tail = _checked_tail(max_tokens, tail, self.config)
        name, family = named_sampler(self.run.experiment.family, sampler)
        prompts = [prompt] if isinstance(prompt, str) else [] if prompt is None else list(prompt)
        given = None
        if prompt is not None:
            given = np.repeat(self.given(prompts, max_tokens), num, 0)
            prompts, num = [each for each in prompts for _ in range(num)], len(given)
        key, took = jax.random.key(seed), np.zeros(2)

        def rows(block: int, given: np.ndarray | None) -> np.ndarray:
            drawing = self._sampler(name, family, num, given is not None)
            own = jax.random.fold_in(key, _FURTHER - block) if block else key
            ids = drawing(self.run.params, own, num, steps, given=given)
            took[:] += drawing.draw_seconds, drawing.compile_seconds
            return ids

        if max_tokens is None:
            found = ids = rows(0, given)
        else:
            start, ends = self.tokenizer.start, _ends(self.config, self.tokenizer)
            found = blocks.texts(rows, given, self._most(prompts, num, max_tokens), tail, start, ends)
            filled = np.full((num, max_tokens), ends[-1], np.int32)
            for row, text in zip(filled, found):
                row[: len(text)] = text
            ids = framed(filled, start)
        return Samples(self.tokenizer.decode_batch(found), ids, prompts, name, steps, seed, *took.tolist())

    def _most(self, prompts: list[str], num: int, max_tokens: int) -> np.ndarray:
        """Most tokens [num] of each text; one that ends with its prompt has no more than a row."""
        most = np.full(num, max_tokens)
        if self.pad is not None:
            ended = [i for i, prompt in enumerate(prompts) if not is_open(prompt)]
            most[ended] = np.minimum(most[ended], self.config.data.length - 1)
        return most

    def _sampler(self, name: str, family: Family, num: int, prompted: bool) -> sampling.Sampler:
        kind = name, min(num, ROWS), prompted
        if kind not in self._drawing:
            self._drawing[kind] = sampling.Sampler(self.run.experiment.net, family, self.layout, kind[1], prompted)
        return self._drawing[kind]

    @property
    def pad(self) -> int | None:
        """The token behind a text that is a row of its own; None where texts are laid end to end and rows are full."""
        return _pad(self.config, self.tokenizer)

    def given(self, prompts: Sequence[str], max_tokens: int | None = None) -> np.ndarray:
        """Rows of ids int32 [number of prompts, L] of prompts, with prompts.UNKNOWN where a token is to be written.

        Raises:
          ValueError: one does not fit a row or max_tokens, or is nothing that the family can go on from.
        """
        return _given(prompts, self.config, self.tokenizer, self.run.experiment.family, max_tokens)

    def log_prob_bound(self, texts: Sequence[str] | np.ndarray, seed: int = 0) -> np.ndarray:
        """An upper bound on -log p of each text, in nats, given the start token: float32 [num].

        It is exact for an autoregressive model. For the others it is an unbiased estimate from one draw of time and noise for each
        text, which varies much; the mean over a text given many times, `log_prob_bound([text] * 64).mean()`, varies less than
        64 draws would, because the times of a call are spread evenly.

        Args:
          texts: each fills a row: it has as many tokens as a row behind the start token, or fewer where the run's data is padded.
            Or rows of ids [num, L] as `sample_ids` returns them.
          seed: of the noise.

        Raises:
          ValueError: the family has no bound; or names the texts that do not fit a row or cannot be spelled.
        """
        family, net = self.run.experiment.family, self.run.experiment.net
        if "bound" not in family.likelihoods():
            raise ValueError(
                f"no bound on the likelihood is known of the family {self.config.objective.family!r} with the prior "
                f"{self.config.prior!r}: load a run of another"
            )
        rows = self._rows(texts)
        if self._bound is None:
            self._bound = on_rows(self.layout, net, family.likelihoods()["bound"])
        key = jax.random.key(_whole("seed", seed, 0, 2**32 - 1))
        return sampling.in_parts(self._bound, self.run.params, rows, ROWS, key)

    def _rows(self, texts: Sequence[str] | np.ndarray) -> np.ndarray:
        """Rows of ids int32 [num, L] of texts."""
        if isinstance(texts, str):
            raise ValueError("texts is one text: give a list of them")
        length, vocab = self.run.experiment.net.length, self.tokenizer.vocab_size
        if isinstance(texts, np.ndarray) and np.issubdtype(texts.dtype, np.integer):
            if texts.ndim != 2 or texts.shape[1] != length or not ((texts >= 0) & (texts < vocab)).all():
                raise ValueError(f"rows of ids have the shape [num, {length}] and lie below {vocab}, got {texts.shape}")
            return texts.astype(np.int32)
        texts = list(texts)
        if not texts:
            raise ValueError("texts is empty: give at least one")
        spelled = [self.tokenizer.encode_counted([text]) for text in texts]  # one by one, so that an error is of one
        found = [ids for (ids,), _ in spelled]
        if wrong := [i for i, (_, (count,)) in enumerate(spelled) if count]:
            parts = ", ".join(map(repr, self.tokenizer.unspelled(texts[wrong[0]])))
            raise ValueError(f"{_named(wrong)} cannot be spelled by the run's tokenizer, such as {parts}")
        pad, room = self.pad, length - 1
        if wrong := [i for i, ids in enumerate(found) if len(ids) > room or (len(ids) < room and pad is None)]:
            sizes = ", ".join(str(len(found[i])) for i in wrong[:_SHOWN])
            raise ValueError(
                f"{_named(wrong)} of {sizes} tokens: a row of this run has {'exactly' if pad is None else 'at most'} {room}"
            )
        rows = np.full((len(found), room), 0 if pad is None else pad, np.int32)
        for row, ids in zip(rows, found):
            row[: len(ids)] = ids
        return framed(rows, self.tokenizer.start)


def load_model(directory: str | os.PathLike, **objective: Any) -> Model:
    """Loads a trained run; see `flowlm.load`."""
    layout = Layout(make_mesh(), fsdp=True)
    return Model(load_trained(directory, layout, objective), layout)


def check_drawing(
    directory: str | os.PathLike,
    steps: Sequence[int],
    sampler: str | None = None,
    prompt: Sequence[str] | None = None,
    max_tokens: int | None = None,
    tail: int | None = None,
    **objective: Any,
) -> None:
    """Says of the settings of a run alone what `Model.draw` would say when all parameters are read, which may take minutes.

    Args:
      prompt: what texts are to go on from, or None.
      max_tokens: as `Model.sample` takes it.
      tail: likewise.
      objective: as `flowlm.load` takes them.

    Raises:
      ValueError: there is no such sampler, the family does not sample in one of these numbers of steps, a prompt does not fit a
        row or max_tokens, the tail is as long as a row, or as `flowlm.load`.
    """
    layout = Layout(make_mesh(), fsdp=True)
    config, tokenizer, (net, family, *_) = load_settings(directory, layout, objective)
    _, family = named_sampler(family, sampler)
    _checked_tail(max_tokens, tail, config)
    if prompt is not None:
        _given(prompt, config, tokenizer, family, max_tokens)
    key = jax.random.key(0)
    for count in steps:
        sampling.Sampler(net, family, layout, 1).check(jax.eval_shape(net.init, key), key, count)


def _pad(config: ConfigDict, tokenizer: Tokenizer) -> int | None:
    """The token behind a text that is a row of its own; None where texts are laid end to end and rows are full."""
    name = config.data.name
    if name in shipped_names():
        return Grammar.load(name).pad
    return tokenizer.pad if is_padded(name) else None


def _ends(config: ConfigDict, tokenizer: Tokenizer) -> list[int]:
    """The tokens that stand behind a text in the run's data, the usual one last."""
    pad = _pad(config, tokenizer)
    return [tokenizer.start] + ([] if pad is None else [pad])


def _given(
    prompts: Sequence[str], config: ConfigDict, tokenizer: Tokenizer, family: Family, max_tokens: int | None
) -> np.ndarray:
    """Rows of ids int32 [number of prompts, L] that texts of this run go on from."""
    given = given_rows(prompts, tokenizer, config.data.length, _pad(config, tokenizer))
    check(family, given)
    if max_tokens is not None:
        blocks.check_prompts(prompts, given, max_tokens, _ends(config, tokenizer))
    return given


def _checked_tail(max_tokens: int | None, tail: int | None, config: ConfigDict) -> int:
    """How many tokens of a text a further block goes on from. Raises ValueError for numbers that cannot be."""
    room = config.data.length - 1
    if max_tokens is None:
        if tail is not None:
            raise ValueError(
                f"a tail is of texts longer than the {room} tokens of a row: give max_tokens too, or leave it out"
            )
        return 0
    goes_on = _whole("max_tokens", max_tokens, 1) > room
    if tail is None and not goes_on:
        return 0
    return _whole("tail", room // 2 if tail is None else tail, 1, room - 1)


def _named(numbers: Sequence[int]) -> str:
    """texts[0], texts[3] and 2 more."""
    named = ", ".join(f"texts[{i}]" for i in numbers[:_SHOWN])
    return named + (f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else "")


def _whole(name: str, value: int, low: int, high: int | None = None) -> int:
    try:
        found = operator.index(value)
    except TypeError:
        found = None
    if found is None or found < low or (high is not None and found > high):
        span = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be a whole number, {span}, got {value!r}")
    return found
