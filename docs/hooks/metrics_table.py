"""The table of samples' metrics: what each judge says of its own."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping

from flowlm import judges
from flowlm.evaluation.evaluator import MEANINGS, OF_PROMPTS
from tables import markdown


def meanings() -> Iterator[tuple[str, str]]:
    """(metric, what it is) of the judges that need no other model, and of evaluation itself."""
    for found in pkgutil.iter_modules(judges.__path__):
        module = importlib.import_module(f"{judges.__name__}.{found.name}")
        for _, judge in inspect.getmembers(module, inspect.isclass):
            if judge.__module__ == module.__name__ and isinstance(getattr(judge, "meanings", None), Mapping):
                yield from judge.meanings.items()
    yield from (MEANINGS | OF_PROMPTS).items()


def table(of: str) -> str:
    """The metrics of samples. Raises ValueError: `of` is not `samples`."""
    if of != "samples":
        raise ValueError(f"metrics are told of samples, not of {of!r}")
    rows = [[f"`{metric}`", told] for metric, told in meanings()]
    return markdown(["metric", "what it is"], rows, figures=False)
