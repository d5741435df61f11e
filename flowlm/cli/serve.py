"""`flowlm serve`: trained models behind HTTP, and a page that shows them."""

import importlib.util
import sys

from absl.flags import FlagValues

from flowlm.cli.command import Command, number, text, whole, words
from flowlm.cli.sampler_flags import OBJECTIVE, changed_objective

NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}


def _serve(values: FlagValues) -> None:
    objective = changed_objective(values)
    if missing := [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]:
        raise ImportError(f"flowlm serve needs {' and '.join(missing)}: pip install -e .[serve]")

    from flowlm.serving import models, server
    from flowlm.system import signals

    models.names_of(values.checkpoints)
    with server.listening(values.address, values.port) as opened:  # before parameters are read, which may take minutes
        served = models.load_served(values.checkpoints, **objective)
        models.warm(served, values.most_rows)
        print(
            f"{server.address(opened)} serves {', '.join(model.name for model in served)}", file=sys.stderr, flush=True
        )
        here = server.Server(served, opened, values.most_rows, values.queue, values.timeout)
        with signals.held(here.stop):
            here.run()
    print("stopped: all that was accepted is answered", file=sys.stderr)


SERVE = Command(
    "serve",
    "answers requests for texts by HTTP, and shows a page",
    [
        words("checkpoints", "DIR,DIR,...", "trained runs, what was exported of one, or hub:NAME/MODEL[@REVISION]"),
        text("address", "ADDRESS", "where it listens; 0.0.0.0 is everywhere, to anyone", "127.0.0.1"),
        whole("port", "of that address; 0 is any that is free", 8000, 0, 65535),
        whole("most_rows", "texts of a batch at most; every power of two up to it is compiled first", 32, 1),
        whole("queue", "texts that may wait; one more request is answered 429", 1024, 1),
        number("timeout", "seconds that an answer may take", 60.0, 0.001),
        OBJECTIVE,
    ],
    _serve,
    needs=("checkpoints",),
    place="checkpoints",
    notes="POST /v1/completions as OpenAI's clients do; /v1/models, /health, /metrics; a page at /. SIGTERM and Ctrl-C end it when "
    "all that was accepted is answered.",
    again="nothing was lost, and the same command serves again",
)
