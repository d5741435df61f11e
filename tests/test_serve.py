"""What the server answers is what the models write, whatever else is asked meanwhile, and what is wrong is one line."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from command_line import error_of

from flowlm.cli import serve
from flowlm.engine.sampling import Sampler
from flowlm.engine.sharding import make_mesh
from flowlm.runs import model as runs_model
from flowlm.serving.models import load_served, names_of

ROOT = Path(__file__).parents[1]
MATCHED, UNIFORM = "checkpoints/grammar_matched", "checkpoints/grammar_dcd"
needs_serve = pytest.mark.needs("serve")


# --- without the extra -------------------------------------------------------------------------------------------


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    told = "flowlm: flowlm serve needs fastapi and uvicorn and prometheus-client: pip install -e .[serve]"
    assert error_of("serve", ROOT / MATCHED) == told


def test_a_model_is_called_by_as_much_of_its_path_as_tells_it_from_the_others():
    assert names_of(["/runs/a"]) == ["a"]
    assert names_of(["/runs/a/seed0", "/runs/b/seed0", "/runs/c"]) == ["a/seed0", "b/seed0", "c"]
    assert names_of(["hub:NAME/MODEL@main", "/MODEL"]) == ["NAME/MODEL", "MODEL"]
    with pytest.raises(ValueError, match="/runs/a is named twice: name each checkpoint once"):
        names_of(["/runs/a", "/runs/b", "/runs/../runs/a"])


# --- a server ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(models, **limits):
    """A server on a free port of this machine, in threads of this process."""
    from flowlm.serving import server

    opened = server.listening("127.0.0.1", 0)
    here = server.Server(models, opened, **{"most_rows": 8, "most_waiting": 256, "timeout": 60.0} | limits)
    thread = threading.Thread(target=here.run)
    thread.start()
    here.port = opened.getsockname()[1]
    try:
        yield here
    finally:
        here.stop()
        thread.join()


@pytest.fixture(scope="module")
def models():
    """On one device, for which programs are compiled sooner than for the tests' eight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs_model, "make_mesh", lambda: make_mesh(devices=jax.devices()[:1]))
        return load_served([str(ROOT / MATCHED), str(ROOT / UNIFORM)])


@pytest.fixture(scope="module")
def server(models):
    with serving(models) as here:
        yield here


def asked(port, body, path="/v1/completions"):
    """(status, headers, content) of the answer to a body, or without one to a GET."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    sent = json.dumps(body) if isinstance(body, dict | list) else body
    line.request("GET" if body is None else "POST", path, sent)
    answer = line.getresponse()
    content = answer.read()
    line.close()
    return answer.status, dict(answer.getheaders()), content


def complete(port, **body):
    status, _, content = asked(port, body)
    assert status == 200, content
    return json.loads(content)


def texts(answer):
    return [choice["text"] for choice in answer["choices"]]


def events(port, **body):
    """What a stream says, without its end."""
    status, headers, content = asked(port, {**body, "stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    *told, end, nothing = content.decode().split("\n\n")
    assert end == "data: [DONE]" and nothing == ""
    return [json.loads(each.removeprefix("data: ")) for each in told]


def drawn(served, seed, number, steps, prompt=None):
    """The text of row `number` of a seed, by the sampler that `flowlm sample` uses."""
    run, given = served.model.run, None if prompt is None else np.repeat(served.model.given([prompt]), number + 1, 0)
    family = run.experiment.family
    sampler = Sampler(run.experiment.net, family, served.model.layout, 1, prompt is not None)
    ids = sampler(run.params, jax.random.key(seed), number + 1, steps, given=given)
    return served.model.tokenizer.decode(ids[number])


@needs_serve
def test_an_answer_depends_on_its_seed_alone_whatever_it_shares_a_batch_with(server, models):
    questions = [
        {"seed": seed, "n": 1 + seed % 3, "steps": (1, 2)[seed % 2], "model": "grammar_matched"} for seed in range(16)
    ]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = [*pool.map(lambda question: complete(server.port, **question), questions)]
    for question, answer in zip(questions, together):
        alone = complete(server.port, **question)
        assert texts(answer) == texts(alone) and len(texts(answer)) == question["n"]
        assert (answer["seed"], answer["steps"]) == (question["seed"], question["steps"])
    for number in range(3):
        assert texts(together[5])[number] == drawn(models[0], 5, number, 2)
    # Some did share one.
    figures = asked(server.port, None, "/metrics")[2].decode()
    rows, batches = (
        float(line.split()[1])
        for line in figures.splitlines()
        if line.startswith(("flowlm_batch_rows_sum", "flowlm_batch_rows_count")) and "matched" in line
    )
    assert max(rows, batches) > 1.2 * min(rows, batches)


@needs_serve
def test_the_first_text_is_that_of_the_command_line(server, models):
    assert texts(complete(server.port, seed=0, steps=1)) == models[0].model.sample(num=1, steps=1, seed=0)


@needs_serve
def test_prompts_are_in_the_texts_and_a_beginning_is_left_out_unless_echoed(server, models):
    question = {"seed": 4, "steps": 2, "n": 2}
    beginning = complete(server.port, prompt="these tired cats", **question)
    echoed = complete(server.port, prompt="these tired cats ...", echo=True, **question)
    assert [f"these tired cats{text}" for text in texts(beginning)] == texts(echoed)
    assert texts(echoed)[1] == drawn(models[0], 4, 1, 2, "these tired cats ...")
    assert beginning["usage"]["prompt_tokens"] == 3
    gaps = complete(server.port, prompt=["the old ___ feeds the ___ .", "a ___:2 feeds the cat ."], **question)
    assert all(text.startswith("the old ") and text.endswith(" .") for text in texts(gaps)[:2])
    assert all(text.split()[0] == "a" and text.split()[3:] == ["feeds", "the", "cat", "."] for text in texts(gaps)[2:])
    assert gaps["usage"] == {"prompt_tokens": 10, "completion_tokens": 8, "total_tokens": 18}


@needs_serve
def test_max_tokens_cuts_what_is_open(server):
    whole = complete(server.port, seed=0, steps=1)
    cut = complete(server.port, seed=0, steps=1, max_tokens=3)
    assert texts(cut)[0].split() == texts(whole)[0].split()[:3]
    assert cut["choices"][0]["finish_reason"] == "length" and cut["usage"]["completion_tokens"] == 3
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert texts(complete(server.port, seed=0, steps=1, max_tokens=999)) == texts(whole)


@needs_serve
def test_a_stream_tells_the_states_and_its_texts_put_together_are_the_answer(server, models):
    question = {"seed": 7, "steps": 4, "n": 2, "model": "grammar_matched"}
    told = events(server.port, **question)
    assert [event["call"] for event in told] == [1, 2, 3, 4]
    family, net = models[0].model.run.experiment.family, models[0].model.run.experiment.net
    follow = jax.jit(lambda params, key: family.trajectory(net, params, key, 1, 4))
    for number in range(2):
        mine = [next(choice for choice in event["choices"] if choice["index"] == number) for event in told]
        assert "".join(choice["text"] for choice in mine) == texts(complete(server.port, **question))[number]
        assert [choice["finish_reason"] for choice in mine] == [None, None, None, "stop"]
        key = jax.random.fold_in(jax.random.key(7), number)
        followed = follow(models[0].model.run.params, key)
        assert [choice.get("state") or choice["text"] for choice in mine] == models[0].model.tokenizer.decode_batch(
            np.asarray(followed[:, 0])
        )
    assert told[0]["milliseconds"] < told[-1]["milliseconds"]


@needs_serve
def test_a_temperature_of_zero_is_the_likeliest_and_seeds_differ_at_one(server):
    cold = {texts(complete(server.port, model="grammar_dcd", steps=1, seed=3, temperature=0.0))[0] for _ in range(2)}
    assert len(cold) == 1
    hot = {
        texts(complete(server.port, model="grammar_dcd", steps=1, seed=seed, temperature=2.0))[0] for seed in range(3)
    }
    assert len(hot) == 3
    usual = {"model": "grammar_dcd", "steps": 1, "seed": 3}
    assert texts(complete(server.port, temperature=1.0, **usual)) == texts(complete(server.port, **usual))


@needs_serve
@pytest.mark.parametrize(
    ("body", "status", "param", "told"),
    [
        ({"prompt": "the zebra drinks"}, 400, "prompt", "does not know: 'zebra'; write other words"),
        ({"prompt": "the " * 19}, 400, "prompt", "has 19 tokens, 0 of them to be written: a row of this run has 18"),
        ({"prompt": "___:19"}, 400, "prompt", "has 19 tokens, 19 of them to be written: a row of this run has 18"),
        ({"prompt": "___:" + "9" * 5000}, 400, "prompt", "a row of this run has 18"),
        ({"prompt": "the cat sleeps . ... the"}, 400, "prompt", "`...` before its end"),
        ({"prompt": "the ___:4 .", "max_tokens": 3}, 400, "max_tokens", "4 tokens to be written, max_tokens is 3"),
        ({"steps": 0}, 400, "steps", "steps of grammar_matched must be from 1 to 1024, got 0"),
        ({"steps": 10**30}, 400, "steps", "must be from 1 to 1024"),
        ({"steps": "8"}, 400, "steps", "steps: Input should be a valid integer, got '8'"),
        ({"model": "grammar_macthed"}, 404, "model", "did you mean grammar_matched?"),
        ({"model": 3}, 400, "model", "model: Input should be a valid string, got 3"),
        ({"n": 0}, 400, "n", "n: Input should be greater than or equal to 1, got 0"),
        ({"n": 100, "prompt": ["the", "a"]}, 400, "n", "n is 100 texts for each of 2 prompts: 128 in all at most"),
        ({"prompt": ["the", 3]}, 400, "prompt", "prompt must be a text, or a list of 1 to 128 texts"),
        ({"prompt": []}, 400, "prompt", "prompt must be a text, or a list of 1 to 128 texts"),
        ({"seed": 2**32}, 400, "seed", "seed: Input should be less than 4294967296, got 4294967296"),
        ({"temperature": 3}, 400, "temperature", "less than or equal to 2, got 3"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1, got 0"),
        ({"top_p": 0.5}, 400, "top_p", "'top_p' is nothing that can be asked for: there are model, prompt"),
        ([], 400, None, "the body: Input should be an object, got []"),
        ('{"prompt"', 400, None, "Invalid JSON"),
        (b"\xff\xfe", 400, None, "Invalid JSON"),
        ("", 400, None, "Invalid JSON"),
        ("[" * 60000, 400, None, "Invalid JSON"),
        ('{"prompt": "\\ud800"}', 400, None, "Invalid JSON"),
        ("x" * 70000, 413, None, "the request has more than 65,536 bytes: give shorter prompts"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_in_one_line(server, body, status, param, told):
    found, _, content = asked(server.port, body)
    error = json.loads(content)["error"]
    assert (found, error["param"], error["type"]) == (status, param, "invalid_request_error"), error
    assert told in error["message"] and "\n" not in error["message"] and len(error["message"]) < 500


@needs_serve
def test_a_beginning_that_a_row_has_no_room_behind_is_refused(server):
    status, _, content = asked(server.port, {"prompt": "the " * 18})
    assert status == 400 and "leaves nothing to write" in json.loads(content)["error"]["message"]


@needs_serve
def test_models_health_and_other_paths(server):
    told = json.loads(asked(server.port, None, "/v1/models")[2])["data"]
    assert [model["id"] for model in told] == ["grammar_matched", "grammar_dcd"]
    assert (
        told[0]["steps"] == {"least": 1, "most": 1024, "usual": 1, "shown": [1, 2, 4, 8, 64]}
        and told[0]["judged"] is None
    )
    assert json.loads(asked(server.port, None, "/health")[2]) == {
        "status": "ok",
        "models": ["grammar_matched", "grammar_dcd"],
    }
    for body, path, status in ((None, "/nothing", 404), (None, "/v1/completions", 405), ({}, "/health", 405)):
        found, _, content = asked(server.port, body, path)
        assert found == status and path in json.loads(content)["error"]["message"]
    schema = json.loads(asked(server.port, None, "/openapi.json")[2])
    assert "requestBody" in schema["paths"]["/v1/completions"]["post"]
    figures = asked(server.port, None, "/metrics")[2].decode()
    assert 'flowlm_requests_total{status="404"}' in figures and "flowlm_rows_waiting 0.0" in figures


@needs_serve
def test_the_client_of_openai_reads_it(server, models):
    import openai

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["grammar_matched", "grammar_dcd"]
    question = {"model": "grammar_matched", "prompt": "", "seed": 7, "n": 2}
    answer = client.completions.create(**question, extra_body={"steps": 4})
    assert answer.choices[1].text == drawn(models[0], 7, 1, 4) and answer.usage.completion_tokens > 2
    parts = ["", ""]
    for chunk in client.completions.create(**question, stream=True, extra_body={"steps": 4}):
        for choice in chunk.choices:
            parts[choice.index] += choice.text
    assert parts == [choice.text for choice in answer.choices]
    with pytest.raises(openai.BadRequestError, match="does not know: 'zebra'"):
        client.completions.create(model="grammar_matched", prompt="zebra")
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.completions.create(model="gpt", prompt="")


# --- limits ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def waiting(models, **limits):
    """A server whose worker does nothing, with what waits there."""
    from flowlm.serving.worker import Worker

    with pytest.MonkeyPatch.context() as patch:
        done = threading.Event()
        patch.setattr(Worker, "run", lambda worker: done.wait())
        with serving(models, **limits) as here:
            try:
                yield here
            finally:
                done.set()


@needs_serve
def test_a_request_that_finds_no_room_is_answered_429_and_one_that_waits_too_long_504(models):
    with waiting(models, most_waiting=3, timeout=1.5) as here, concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(asked, here.port, {"n": 2})
        while len(here.worker._waiting) < 2:
            time.sleep(0.01)
        status, headers, content = asked(here.port, {"n": 2})
        assert status == 429 and headers["retry-after"] == "1"
        assert json.loads(content)["error"]["message"] == "too many texts are asked for at once: ask later"
        status, _, content = first.result()
        assert status == 504 and "too busy" in json.loads(content)["error"]["message"]
        assert all(row.job.cancelled for row in here.worker._waiting)
        streamed = asked(here.port, {"stream": True})
        assert streamed[0] == 504
        here.worker.close()
        status, headers, content = asked(here.port, {})
        assert status == 503 and json.loads(content)["error"]["message"].startswith("the server stops")


@needs_serve
def test_nothing_is_written_for_a_client_that_has_gone_and_a_request_that_does_not_come_is_dropped(models):
    with waiting(models, timeout=1.5) as here:
        for stream in (b"false", b"true"):
            body = b'{"stream": %s}' % stream
            line = socket.create_connection(("127.0.0.1", here.port))
            line.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            while not here.worker._waiting:
                time.sleep(0.01)
            (row,) = here.worker._waiting
            line.close()
            while not row.job.cancelled:
                time.sleep(0.01)
            here.worker._waiting.clear()
        slow = socket.create_connection(("127.0.0.1", here.port))
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        assert slow.recv(100).startswith(b"HTTP/1.1 408 ")


@needs_serve
def test_a_batch_that_fails_is_answered_and_the_next_is_written(server, models, monkeypatch):
    def broken(*args):
        raise RuntimeError("out of memory")

    complete(server.port, steps=1)  # so that what follows need not be compiled
    with monkeypatch.context() as patch:
        patch.setattr(models[0].rows, "end", broken)
        status, _, content = asked(server.port, {"steps": 1})
        assert status == 500 and json.loads(content)["error"]["type"] == "server_error"
        told = events(server.port, steps=2)
        assert [*told[-1]] == ["error"] and told[0]["choices"][0]["state"]
    assert complete(server.port, steps=1)["choices"]


# --- the worker --------------------------------------------------------------------------------------------------


class Counting:
    """Programs whose state is how many calls were made, and whose ids are the seed and that number."""

    at_once = False

    def size(self, num):
        return num

    def compile(self, asked):
        return None

    def begin(self, asked, steps):
        return 0

    def move(self, asked, state, i, steps):
        return state + 1, np.stack([asked["seed"], np.full(len(asked["seed"]), state + 1)], 1)

    def end(self, asked, state, steps):
        assert state == steps - 1
        return self.move(asked, state, 0, steps)[1]

    def read(self, ids, asked):
        return ids


def written(jobs, most_rows):
    """(what was told, in order, as (job, event); rows of each batch) of jobs (seed, rows, steps, watched) that wait at once."""
    from flowlm.serving.metrics import Metrics
    from flowlm.serving.worker import Job, Worker

    told, metrics = [], Metrics()
    worker, model = Worker(most_rows, 1000, metrics), SimpleNamespace(name="m", rows=Counting())
    for name, (seed, rows, steps, watched) in enumerate(jobs):
        asked = {"seed": np.full(rows, seed), "number": np.arange(rows), "given": np.zeros((rows, 2))}
        worker.submit(Job(model, steps, asked, watched, lambda event, name=name: told.append((name, event))))
    worker.close()
    worker.run()
    batches = [
        sample
        for metric in metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "flowlm_batch_rows_count"
    ]
    return told, int(batches[0].value)


@needs_serve
def test_rows_of_one_kind_share_batches_and_each_is_told_once():
    from flowlm.serving.worker import Written

    told, batches = written([(seed, 1 + seed % 3, 4, False) for seed in range(10)], most_rows=8)
    assert batches == 3  # 19 rows
    for seed in range(10):
        mine = [event for name, event in told if name == seed]
        assert all(isinstance(event, Written) and (event.ids == [seed, 4]).all() for event in mine)
        assert sorted(number for event in mine for number in event.numbers) == [*range(1 + seed % 3)]


@needs_serve
def test_one_step_does_not_wait_for_many_and_who_watches_is_told_every_call():
    from flowlm.serving.worker import Seen

    told, _ = written([(0, 1, 64, True), (1, 1, 1, False), (2, 1, 2, True)], most_rows=8)
    assert [name for name, _ in told][:4] == [0, 1, 2, 0]
    seen = [event for name, event in told if name == 0 and isinstance(event, Seen)]
    assert [event.call for event in seen] == [*range(1, 64)]


# --- as a process ------------------------------------------------------------------------------------------------


@needs_serve
def test_a_process_answers_what_it_accepted_before_it_ends_and_its_port_is_its_own(models, tmp_path):
    """And serves the checkpoint that another server has already."""
    line = [sys.executable, "-m", "flowlm.main", "serve", str(ROOT / MATCHED), "--port=0", "--most_rows=1"]
    with (tmp_path / "said").open("w") as said:
        one_device = {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")}
        process = subprocess.Popen(line, cwd=ROOT, env=os.environ | one_device | {"PYTHONPATH": str(ROOT)}, stderr=said)
    try:
        while "serves grammar_matched" not in (told := (tmp_path / "said").read_text()):
            assert process.poll() is None, told
            time.sleep(0.1)
        port = int(told.split(" serves")[0].rpartition(":")[2])
        wrong = f"port {port} of 127.0.0.1 is taken by another program: give another, or --port=0 for any"
        assert error_of("serve", ROOT / MATCHED, f"--port={port}") == f"flowlm: {wrong}"
        with concurrent.futures.ThreadPoolExecutor() as pool:
            slow = pool.submit(complete, port, seed=5, steps=400)
            while b'steps="512"' not in asked(port, None, "/metrics")[2] and not slow.done():
                if b"flowlm_compile_seconds_total" in asked(port, None, "/metrics")[2]:
                    break
            process.send_signal(signal.SIGTERM)
            answer = slow.result()
        assert process.wait(60) == 0
        assert len(texts(answer)) == 1 and answer["steps"] == 400
        assert "stopped: all that was accepted is answered" in (tmp_path / "said").read_text()
        with pytest.raises(ConnectionRefusedError):
            asked(port, None, "/health")
    finally:
        process.kill()


# --- the page ----------------------------------------------------------------------------------------------------


@needs_serve
@pytest.mark.needs("browser")
def test_the_page_is_used_by_keyboard_and_fits_small_and_large_dark_and_light(server, models, tmp_path, monkeypatch):
    from browser import Browser

    rows = [["`map@1`", "0.58 ± 0.01"], ["`map@8`", "0.90 ± 0.01"]]
    monkeypatch.setattr(
        models[0],
        "judged",
        {"columns": ["grammatical"], "rows": rows, "lines": ["`more` is better"], "step": 1, "command": ""},
    )
    with Browser(tmp_path / "profile") as browser:
        browser.look(1400, 1000)
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.wait(
            "document.querySelectorAll('#cards > li').length === 5 && document.hasFocus() && document.activeElement.id === 'prompt'"
        )
        assert "0.90 ± 0.01" in browser.value("document.querySelector('#judged table').textContent")
        browser.type("the old ___ feeds ...")
        browser.press("Tab")
        browser.type("3")
        browser.press("Enter", "\r")
        browser.wait("document.body.dataset.state === 'done'")
        shown = browser.value(
            "[...document.querySelectorAll('#cards > li')].map(e => [+e.dataset.steps, e.querySelector('.text').textContent])"
        )
        assert [steps for steps, _ in shown] == [1, 2, 4, 8, 64]
        for steps, text in shown[:4]:
            assert [text] == texts(complete(server.port, prompt="the old ___ feeds ...", seed=3, steps=steps))
        assert browser.value("[...document.querySelectorAll('#cards output')].every(e => / ms$/.test(e.textContent))")
        assert browser.value("document.querySelector('[data-steps=\"64\"] progress').value") == 64
        assert browser.value("document.querySelectorAll('[data-steps=\"8\"] .states mark').length") > 0
        for width in (1400, 400):
            grounds = []
            for dark in (False, True):
                browser.look(width, 1000, dark)
                assert browser.value("document.documentElement.scrollWidth") == width
                grounds.append(browser.value("getComputedStyle(document.body).backgroundColor"))
            assert grounds == ["rgb(251, 251, 250)", "rgb(21, 23, 26)"]
        # What is wrong is said, and nothing that a model or a user writes is read as markup.
        browser.value(
            "document.getElementById('prompt').value = '<b id=nasty>'; document.getElementById('prompt').focus()"
        )
        browser.press("Enter", "\r")
        browser.wait("document.getElementById('error').textContent !== ''")
        assert "does not know" in browser.value("document.getElementById('error').textContent")
        assert not browser.value("document.getElementById('nasty') !== null")
        assert browser.console == []
        assert browser.value("performance.getEntriesByType('resource').every(e => e.name.startsWith(location.origin))")
