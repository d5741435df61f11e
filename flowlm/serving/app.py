"""The HTTP interface: texts as OpenAI's clients ask for them, the models, health, figures, and the page.

POST /v1/completions    texts; with stream=true as server-sent events: `state` of a choice is its text as the sampler's state reads
                        now, and `text` is empty until the last event, so that texts put together are the answer
GET /v1/models, /health, /metrics, /
"""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from flowlm.serving import requests
from flowlm.serving.metrics import Metrics
from flowlm.serving.models import Served
from flowlm.serving.requests import Completion, Question, Refused
from flowlm.serving.worker import Closed, Failed, Full, Job, Seen, Worker, Written

# The page may load nothing but itself.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


T = TypeVar("T")


class Answer:
    """A question on its way through the worker, as seen by the event loop that serves HTTP."""

    def __init__(self, question: Question, served: Served, watched: bool, timeout: float) -> None:
        self.question, self._served = question, served
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue()
        self._until = self._loop.time() + timeout
        self.job = Job(served, question.steps, question.asked, watched, self._tell)
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }

    def _tell(self, event: Seen | Written | Failed) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, so nobody waits any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[Seen | Written]:
        """What the worker tells, up to the last row. Raises Refused: it takes too long, or fails. Then the job is cancelled."""
        left = self.job.size
        try:
            while left:
                async with asyncio.timeout_at(self._until):
                    event = await self._events.get()
                if isinstance(event, Failed):
                    raise Refused(500, event.told)
                left -= len(event.numbers) if isinstance(event, Written) else 0
                yield event
        except TimeoutError:
            raise Refused(
                504, "the models are too busy to answer in time: ask later, or for fewer steps or texts"
            ) from None
        finally:
            self.job.cancelled = True

    def choices(self, event: Seen | Written) -> list[dict[str, Any]]:
        """The choices that an event tells of."""
        told = []
        for number, ids in zip(event.numbers, event.ids):
            text, why, count = self.question.choice(number, ids)
            choice = {"index": number, "text": text, "logprobs": None, "finish_reason": why}
            if isinstance(event, Seen):
                choice |= {"text": "", "state": text, "finish_reason": None}
            told.append((choice, count))
        return told

    async def whole(self) -> dict[str, Any]:
        """The answer as one object. Raises Refused as `events`."""
        choices, count, spent = [], 0, 0.0
        async for event in self.events():
            found = self.choices(event)
            choices += [choice for choice, _ in found]
            count, spent = count + sum(number for _, number in found), spent + event.seconds
        given = self.question.prompt_tokens
        usage = {"prompt_tokens": given, "completion_tokens": count, "total_tokens": given + count}
        choices.sort(key=lambda choice: choice["index"])
        return self._head | {"choices": choices, "usage": usage} | self._how(spent)

    def told(self, event: Seen | Written) -> dict[str, Any]:
        """An event as a stream tells it."""
        choices = [choice for choice, _ in self.choices(event)]
        call = event.call if isinstance(event, Seen) else self.question.steps
        return self._head | {"choices": choices, "call": call} | self._how(event.seconds)

    async def streamed(self, first: Seen | Written, events: AsyncIterator[Seen | Written]) -> AsyncIterator[str]:
        """Server-sent events. An error on the way is one of them."""
        yield _event(self.told(first))
        try:
            async for event in events:
                yield _event(self.told(event))
        except Refused as refused:
            yield _event(refused.body())
        yield "data: [DONE]\n\n"

    def _how(self, seconds: float) -> dict[str, Any]:
        return {"seed": self.question.seed, "steps": self.question.steps, "milliseconds": round(1000 * seconds, 2)}


def _event(told: dict[str, Any]) -> str:
    return f"data: {json.dumps(told)}\n\n"


class Interface:
    """The answers to requests.

    Args:
      timeout: seconds that an answer may take, and so may a request.
    """

    def __init__(self, models: Sequence[Served], worker: Worker, metrics: Metrics, timeout: float) -> None:
        self._models = {model.name: model for model in models}
        self._worker, self._metrics, self._timeout = worker, metrics, timeout

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        start = time.monotonic()
        asked = requests.read(await self._body(request))
        served = requests.find(self._models, asked.model)
        question = await asyncio.to_thread(Question, asked, served)  # because a long prompt would hold up the others
        answer = Answer(question, served, asked.stream, self._timeout)
        try:
            self._worker.submit(answer.job)
        except Full:
            raise Refused(429, "too many texts are asked for at once: ask later") from None
        except Closed:
            raise Refused(503, "the server stops: ask another, or later") from None

        def observe() -> None:
            self._metrics.observe(served.name, question.steps, time.monotonic() - start)

        if not asked.stream:
            told = await _unless_gone(request, answer.whole())
            observe()
            return JSONResponse(told)

        events = answer.events()
        first = await _unless_gone(request, anext(events))  # before the status is sent, because it may be an error's

        async def stream() -> AsyncIterator[str]:
            async with contextlib.aclosing(events):
                async for event in answer.streamed(first, events):
                    yield event
            observe()

        return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _body(self, request: Request) -> bytes:
        """The request's body. Raises Refused: it is too long, or takes too long."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._timeout):
                async for part in request.stream():
                    size += len(part)
                    if size > requests.MOST_BYTES:
                        raise Refused(
                            413, f"the request has more than {requests.MOST_BYTES:,} bytes: give shorter prompts"
                        )
                    parts.append(part)
        except TimeoutError:
            raise Refused(408, "the request did not come in time: send it at once") from None
        return b"".join(parts)

    async def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        return {"object": "list", "data": [model.facts() for model in self._models.values()]}

    async def health(self) -> dict[str, Any]:
        """GET /health: that requests are taken."""
        return {"status": "ok", "models": [*self._models]}

    async def metrics(self) -> Response:
        """GET /metrics."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self) -> Response:
        """GET /."""
        page = resources.files("flowlm.serving").joinpath("templates/page.html").read_text("utf-8")
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})


async def _unless_gone(request: Request, asked: Awaitable[T]) -> T:
    """What is asked. It is cancelled when the client goes away, because then nobody reads it."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    found, left = asyncio.ensure_future(asked), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((found, left), return_when=asyncio.FIRST_COMPLETED)
        if not found.done():
            raise Refused(499, "the client has gone")
        return found.result()
    finally:
        found.cancel()
        left.cancel()


class Counted:
    """An application whose answers are counted by their status."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI has it."""

        async def counting(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counting)


def make_app(models: Sequence[Served], worker: Worker, metrics: Metrics, timeout: float) -> Counted:
    """The application; `worker.run` must be called by another thread."""
    app = FastAPI(title="flowlm", docs_url=None, redoc_url=None)  # whose pages would load from elsewhere
    interface = Interface(models, worker, metrics, timeout)
    schema = {
        "requestBody": {"content": {"application/json": {"schema": Completion.model_json_schema()}}, "required": True}
    }
    app.post("/v1/completions", openapi_extra=schema)(interface.complete)
    app.get("/v1/models")(interface.models)
    app.get("/health")(interface.health)
    app.get("/metrics", include_in_schema=False)(interface.metrics)
    app.get("/", include_in_schema=False)(interface.page)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        more = {"Retry-After": "1"} if error.status in (429, 503) else {}
        return JSONResponse(error.body(), error.status, headers=more)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        told = f"{request.method} {request.url.path[:100]}: {str(error.detail).lower()}"
        return JSONResponse(Refused(error.status_code, told).body(), error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse(Refused(500, f"the server has an error: {type(error).__name__}").body(), 500)

    return Counted(app, metrics)
