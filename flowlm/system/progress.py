"""A bar for work that has a known number of parts, on standard error where that is a terminal, and nothing elsewhere."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from flowlm.system import processes


@contextmanager
def parts(total: int) -> Iterator[Callable[[str], None]]:
    """Gives begin(what), to be called when a part begins: it says what, and counts the part before it as done.

    Of several processes the first shows the bar, which disappears when the work is done.
    """
    shown = None if processes.is_first() else True  # tqdm itself asks whether standard error is a terminal
    form = "{desc} |{bar}| {n_fmt}/{total_fmt} [{elapsed}]"
    with tqdm(total=total, leave=False, disable=shown, dynamic_ncols=True, bar_format=form) as bar:
        done = itertools.count()

        def begin(what: str) -> None:
            bar.n = next(done)
            bar.set_description_str(what)

        yield begin
