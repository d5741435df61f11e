"""Judges the checkpoints of a run one after another, beside its training or after it, by the files of both alone.

What is judged of step N lies in PLACE/N, as another evaluation leaves it in a run directory. The newest checkpoint that nobody has
judged comes first, because training removes old ones; the others follow while there is nothing newer.
"""

import os
import time
from collections.abc import Callable, Iterator

from absl import logging
from etils import epath

from flowlm.evaluation.results import Evaluation
from flowlm.runs import directory as run_directory
from flowlm.runs.checkpoint import Checkpoints, has_params
from flowlm.runs.metrics import is_evaluated, read_metrics
from flowlm.runs.trained import Trained
from flowlm.system import lock, signals, storage

POLL_SECONDS = 15.0  # between two looks at the run
FOLDER = "evaluations"  # of a run directory, where nothing else is written


def follow(
    directory: str | os.PathLike,
    place: str | os.PathLike,
    load: Callable[[int], Trained],
    judge: Callable[[Trained], Evaluation],
    show: Callable[[Evaluation], None],
) -> None:
    """Judges every checkpoint of a run that its training does not judge itself, until the run is finished and all are judged.

    A signal ends it at once, but for a result that is being written; what is judged stays, and the same call judges the rest.

    Args:
      load: step -> what its checkpoint holds; RuntimeError or FileNotFoundError where it cannot be read, or is there no more.

    Raises:
      FileNotFoundError: there is no run. ValueError: what is there holds no training, or another process follows it to that place.
    """
    run_directory.check_is_run(directory)
    if has_params(directory):
        raise ValueError(f"{directory} holds parameters alone, which no training follows: leave out --follow")
    place = storage.path(place)
    signals.resumable("what is judged stays, and the same command judges the rest")
    release = lock.take(place / "follow.lock", "give another --results")
    try:
        count = 0
        for run in _unjudged(directory, place, load):
            result = judge(run)
            with signals.held():  # all of its files or none
                result.save(place / str(run.step), directory)
            if signals.told():
                signals.say_stopped(f"step {run.step} is judged, and the same command judges the rest")
                return
            show(result)
            count += 1
        print(f"{directory} is finished and judged: {count} evaluations are new in {place}")
    finally:
        release()


def _unjudged(directory: str | os.PathLike, place: epath.Path, load: Callable[[int], Trained]) -> Iterator[Trained]:
    """The checkpoints to judge, one at a time; ends when the run is finished and none is left."""
    unreadable: set[int] = set()
    while True:
        steps, finished = _left(directory, place)
        steps = [step for step in steps if step not in unreadable]
        if steps:
            try:
                run = load(steps[-1])
            except (FileNotFoundError, RuntimeError) as error:
                if steps[-1] in _left(directory, place)[0]:  # otherwise training has removed it meanwhile
                    logging.warning("step %d is not judged: %s", steps[-1], error)
                    unreadable.add(steps[-1])
                continue
            yield run
        elif finished:
            return
        else:
            time.sleep(POLL_SECONDS)


def _left(directory: str | os.PathLike, place: epath.Path) -> tuple[list[int], bool]:
    """(steps of checkpoints that are to be judged, ascending; whether there will be no more)."""
    settings, _ = run_directory.load_workdir(
        directory
    )  # anew, because a run that is taken up again may have more steps
    every, last = settings.evaluation.every, settings.steps
    if not (storage.path(directory) / "checkpoints").is_dir():
        return [], False
    checkpoints = Checkpoints(storage.path(directory) / "checkpoints", read_only=True)
    steps = checkpoints.steps
    checkpoints.close()
    theirs = {line["step"] for line in read_metrics(directory) if any(map(is_evaluated, line))}
    theirs |= {step for step in steps if step == last or (every and step % every == 0)}
    left = [step for step in steps if step not in theirs and not (place / str(step) / "evaluation.json").exists()]
    return left, bool(steps) and steps[-1] >= last
