"""A server under load: `python tests/load.py` asks from many clients at once, then nonsense, then stops it while it is asked.

Every answer is compared with what the server wrote when it was asked alone: nothing may be lost, and nothing mixed up. It prints
how many texts a second were written and how long answers took, and ends with an error where anything was wrong.
"""

import argparse
import collections
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
PATH = "/v1/completions"
PROMPTS = (None, "the old ___ feeds ...")
SEEDS = 16
PATIENCE = 300  # seconds that an answer may take
# What is put into a request in place of something sensible.
NONSENSE = (
    None, True, 0, -1, 1.5, 10**40, 1e308, "", "___", "___:0", "___:99999", "...", "the ... old", "\x00", "the \u0301\U0001f600",
    "the " * 500,
    [], {}, [[]], ["the", None], {"a": {"b": []}}, "grammar_matched", float("nan"), "[PAD]", "<s>",
)  # fmt: skip
KEYS = (
    "model",
    "prompt",
    "max_tokens",
    "n",
    "seed",
    "steps",
    "temperature",
    "stream",
    "echo",
    "user",
    "stop",
    "logprobs",
)


class Client:
    """A connection that is opened anew where it was closed."""

    def __init__(self, port):
        self.port, self.line = port, None

    def ask(self, body, raw=None):
        """(status, content) of a body as JSON, or of raw bytes."""
        sent = json.dumps(body).encode() if raw is None else raw
        for again in (True, False):
            self.line = self.line or http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
            try:
                self.line.request("POST", PATH, sent, {"Content-Type": "application/json"})
                answer = self.line.getresponse()
                return answer.status, answer.read()
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                self.line.close()
                self.line = None  # because a server may close a connection that was idle
                if not again:
                    raise


def started(checkpoint, flags, said):
    """(process, port) of a server."""
    line = [sys.executable, "-m", "flowlm.main", "serve", checkpoint, "--port=0", *flags]
    with open(said, "w") as file:
        process = subprocess.Popen(line, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=file)
    while " serves " not in (told := Path(said).read_text()):
        if process.poll() is not None:
            sys.exit(f"the server has not started: {told}")
        time.sleep(0.2)
    return process, int(told.split(" serves ")[0].rpartition(":")[2])


def questions(steps):
    """Requests with seeds of their own, with and without a prompt."""
    return [
        {"seed": seed, "steps": count, "prompt": prompt}
        for seed in range(SEEDS)
        for count in steps
        for prompt in PROMPTS
    ]


def texts(content):
    return [choice["text"] for choice in json.loads(content)["choices"]]


def load(port, known, clients, seconds):
    """({steps: seconds of each answer}, faults) of so many clients, each of which asks again when it was answered."""
    took, faults, lock = collections.defaultdict(list), [], threading.Lock()
    until = time.monotonic() + seconds

    def run(number):
        client, chosen = Client(port), random.Random(number)
        while time.monotonic() < until:
            question, expected = chosen.choice(known)
            start = time.monotonic()
            try:
                status, content = client.ask(question)
                fault = (
                    None if status == 200 and texts(content) == expected else f"{question}: {status} {content[:300]}"
                )
            except OSError as error:
                fault = f"{question}: {error!r}"
            with lock:
                took[question["steps"]].append(time.monotonic() - start)
                faults.extend([fault] if fault else [])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return took, faults


def nonsense(chosen):
    """(body, raw bytes or None) of a request that may be wrong in any way."""
    kind = chosen.random()
    if kind < 0.1:
        return None, chosen.randbytes(chosen.randrange(200))
    good = {"seed": chosen.randrange(100), "steps": chosen.choice((1, 2)), "prompt": chosen.choice(PROMPTS)}
    if kind < 0.2:
        text = json.dumps(good).encode()
        return None, text[: chosen.randrange(len(text))]
    for key in chosen.sample(KEYS, chosen.randrange(1, 4)):
        good[key] = chosen.choice(NONSENSE)
    return good, None


def fuzz(port, num):
    """(answers by status, faults) of nonsense: none is answered 5xx, and each in the shape of an error or an answer."""
    statuses, faults = collections.Counter(), []
    client, chosen = Client(port), random.Random(0)
    for number in range(num):
        body, raw = nonsense(chosen)
        if number % 100 == 0:  # and some who do not wait, or do not speak HTTP
            with socket.create_connection(("127.0.0.1", port)) as line:
                line.sendall(
                    chosen.choice(
                        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 9\r\n\r\n{", chosen.randbytes(100))
                    )
                )
        try:
            status, content = client.ask(body, raw)
        except (OSError, http.client.HTTPException) as error:
            faults.append(f"{body or raw}: {error!r}")
            continue
        statuses[status] += 1
        shaped = b"data: " in content or ("choices" if status == 200 else "error") in json.loads(content)
        if status >= 500 or not shaped:
            faults.append(f"{body or raw}: {status} {content[:300]}")
    return statuses, faults


def stopped(process, port, known):
    """Faults of a server that is told to stop while 20 clients wait: what it took is answered, and its exit status is 0."""
    faults, asked = [], threading.Barrier(21)

    def run(number):
        question, expected = known[number % len(known)]
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        line.request("POST", PATH, json.dumps(question))
        asked.wait()
        try:
            answer = line.getresponse()
            content = answer.read()
            if answer.status != 200 or texts(content) != expected:
                faults.append(f"{question}: {answer.status} {content[:300]}")
        except OSError as error:
            faults.append(f"{question}: {error!r}")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    asked.wait()
    time.sleep(0.05)  # in which they are accepted
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    status = process.wait(PATIENCE)
    return faults + ([f"exit status {status}"] if status else [])


def numbers(text):
    return [int(part) for part in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="checkpoints/grammar_matched")
    parser.add_argument("--clients", type=numbers, default=[1, 10, 50, 200], help="numbers of them, one after another")
    parser.add_argument("--seconds", type=float, default=120, help="of each number of clients")
    parser.add_argument("--steps", type=numbers, default=[1, 8], help="that they ask for, at random")
    parser.add_argument("--fuzz", type=int, default=2000, help="requests of nonsense")
    asked, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        process, port = started(asked.checkpoint, flags, f"{folder}/said")
        faults = []
        try:
            alone = Client(port)
            known = [(question, texts(alone.ask(question)[1])) for question in questions(asked.steps)]
            load(port, known, max(asked.clients), 5)  # compiles what is not compiled yet
            print(
                "| clients | steps | answers | answers a second | median ms | 95 % ms | worst ms |\n|--:|--:|--:|--:|--:|--:|--:|"
            )
            for clients in asked.clients:
                took, wrong = load(port, known, clients, asked.seconds)
                faults += wrong
                for steps, each in sorted(took.items()):
                    middle, most, worst = 1000 * np.quantile(each, (0.5, 0.95, 1))
                    rate = len(each) / asked.seconds
                    print(
                        f"| {clients} | {steps} | {len(each):,} | {rate:.1f} | {middle:.0f} | {most:.0f} | {worst:.0f} |",
                        flush=True,
                    )
            statuses, wrong = fuzz(port, asked.fuzz)
            faults += wrong
            print(
                f"\n{asked.fuzz:,} requests of nonsense: "
                + ", ".join(f"{n} x {status}" for status, n in sorted(statuses.items()))
            )
            question, expected = known[0]
            if texts(alone.ask(question)[1]) != expected:
                faults.append("after the nonsense another answer")
            faults += stopped(process, port, known)
        finally:
            process.kill()
        print(f"{len(faults)} faults")
        print(*faults[:20], sep="\n")
        print(Path(f"{folder}/said").read_text())
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
