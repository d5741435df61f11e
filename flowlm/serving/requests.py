"""What a request may ask for, read with one clear error for whatever is wrong, and its answer as text."""

import difflib
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from flowlm.engine.rows import Asked
from flowlm.objectives.prompts import UNKNOWN
from flowlm.serving.models import Served

MOST_BYTES = 2**16  # of the body of a request
MOST_ROWS = 128  # of one request
MOST_WORDS = 400  # characters of an error
OPEN, GAP = "...", re.compile("_{3,}")


class Refused(Exception):
    """A request that is answered with an error.

    Attributes:
      status: of HTTP.
      told: what is wrong, and the mend.
      param: the name of what is wrong in the request, or None.
    """

    def __init__(self, status: int, told: str, param: str | None = None) -> None:
        super().__init__(told)
        self.status, self.param = status, param
        self.told = told if len(told) <= MOST_WORDS else f"{told[:MOST_WORDS]}..."

    def body(self) -> dict[str, Any]:
        """The error as clients of this interface read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.told, "type": kind, "param": self.param, "code": None}}


class Completion(BaseModel):
    """The body of a request for texts.

    Attributes:
      model: one of those that are served; the first of them where none is named.
      prompt: what texts go on from, as `flowlm sample --prompt` has it; one without a gap is a beginning. Or several.
      max_tokens: how many tokens are written at most; a row of the model holds no more than its own number.
      n: texts of each prompt.
      seed: of the noise; drawn where none is given, and told in the answer.
      steps: network calls.
      temperature: of tokens that are drawn, where the model's sampler draws any; as the run says where none is given.
      stream: whether the sampler's states are told while it goes on, as server-sent events.
      echo: whether the answer begins with the prompt where that is a beginning.
      user: is not read.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MOST_ROWS)] | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=MOST_ROWS)
    seed: int | None = Field(None, ge=0, lt=2**32)
    steps: int | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    stream: bool = False
    echo: bool = False
    user: str | None = None

    @field_validator("n", "stream", "echo", mode="before")
    @classmethod
    def _usual(cls, value: Any, told: Any) -> Any:
        return cls.model_fields[told.field_name].default if value is None else value  # because clients send null for it


def read(body: bytes) -> Completion:
    """The request that a body holds. Raises Refused: names the first thing that is wrong with it."""
    try:
        return Completion.model_validate_json(body)
    except ValidationError as error:
        first, *_ = error.errors(include_url=False, include_context=False)
        param = str(first["loc"][0]) if first["loc"] else None
        if first["type"] == "extra_forbidden":
            known = ", ".join(Completion.model_fields)
            raise Refused(
                400, f"{param[:40]!r} is nothing that can be asked for: there are {known}", param[:40]
            ) from error
        if param == "prompt":
            told = f"prompt must be a text, or a list of 1 to {MOST_ROWS} texts"
        else:
            told = f"{param or 'the body'}: {first['msg']}, got {repr(first['input'])[:60]}"
        raise Refused(400, told, param) from error


def find(served: Mapping[str, Served], name: str | None) -> Served:
    """The model of a name, and the first where there is none. Raises Refused: it is not served."""
    if name is None:
        return next(iter(served.values()))
    if name not in served:
        near = difflib.get_close_matches(name[:200], served, 1, 0.5)
        raise Refused(
            404,
            f"there is no model {name[:60]!r}: here are {', '.join(served)}"
            + (f"; did you mean {near[0]}?" if near else ""),
            "model",
        )
    return served[name]


class Question:
    """A request that was found good: the rows that it asks for, and how their texts are told.

    Attributes:
      asked: of all rows, n for each prompt.
      seed: of them all.
      steps: network calls.
    """

    def __init__(self, request: Completion, served: Served) -> None:
        self._model, self._request = served.model, request
        self.steps = _steps(request, served)
        self.seed = secrets.randbits(32) if request.seed is None else request.seed
        prompts = _prompts(request)
        num = request.n * max(1, len(prompts))
        if num > MOST_ROWS:
            raise Refused(
                400, f"n is {request.n} texts for each of {len(prompts)} prompts: {MOST_ROWS} in all at most", "n"
            )
        self._whole = [request.echo or GAP.search(prompt) is not None for prompt in prompts] or [True]
        given = _given(prompts, served) if prompts else np.full((1, served.model.config.data.length), UNKNOWN, np.int32)
        self.asked: Asked = {
            "seed": np.full(num, self.seed, np.uint32),
            "number": np.arange(num, dtype=np.int32),
            "given": np.repeat(given, request.n, 0),
        }
        self._check_room()
        if request.temperature is not None:
            if not served.takes_temperature:
                told = f"the sampler of {served.name} draws no tokens, so it has no temperature: leave it out"
                raise Refused(400, told, "temperature")
            self.asked["temperature"] = np.full(num, request.temperature, np.float32)

    def _check_room(self) -> None:
        most = self._request.max_tokens
        for given in self.asked["given"]:
            gaps = int((given == UNKNOWN).sum())
            if most is not None and gaps > most and not self._is_open(given):
                told = f"the prompt has {gaps} tokens to be written, max_tokens is {most}: give at least {gaps}"
                raise Refused(400, told, "max_tokens")

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompts give."""
        rows = self.asked["given"][:: self._request.n, 1:]
        return int(((rows != UNKNOWN) & (rows != _or_none(self._model.pad))).sum())

    def choice(self, number: int, ids: np.ndarray) -> tuple[str, str, int]:
        """(text, why it ends there: "stop" or "length", how many tokens were written) of row `number`, ids [L]."""
        given = self.asked["given"][number]
        written = np.flatnonzero((given == UNKNOWN) & (np.arange(len(ids)) > 0))
        most, end, why = self._request.max_tokens, len(ids), "stop"
        if most is not None and most < len(written) and self._is_open(given):
            end = written[most]
            rest = ids[end:]
            why = "stop" if (rest == _or_none(self._model.pad)).all() else "length"
        count = int((ids[written[written < end]] != _or_none(self._model.pad)).sum())
        text = self._model.tokenizer.decode(ids[:end])
        if not self._whole[number // self._request.n % len(self._whole)]:
            begun = self._model.tokenizer.decode(ids[: written[0]])
            text = text.removeprefix(begun)
        return text, why, count

    @staticmethod
    def _is_open(given: np.ndarray) -> bool:
        return given[-1] == UNKNOWN


def _or_none(pad: int | None) -> int:
    return UNKNOWN - 1 if pad is None else pad  # which no token is


def _steps(request: Completion, served: Served) -> int:
    if request.steps is None:
        return served.usual_steps
    if request.steps not in served.steps:
        first, last = served.steps[0], served.steps[-1]
        span = f"{first}" if first == last else f"from {first} to {last}"
        raise Refused(400, f"steps of {served.name} must be {span}, got {str(request.steps)[:20]}", "steps")
    return request.steps


def _prompts(request: Completion) -> list[str]:
    """The prompts as `flowlm sample` reads them, [] where there is none: one without a gap is a beginning."""
    if request.prompt in (None, ""):
        return []
    prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    return [prompt if GAP.search(prompt) or prompt.rstrip().endswith(OPEN) else prompt + OPEN for prompt in prompts]


def _given(prompts: Sequence[str], served: Served) -> np.ndarray:
    try:
        return served.model.given(prompts)
    except ValueError as error:
        raise Refused(400, str(error), "prompt") from error
