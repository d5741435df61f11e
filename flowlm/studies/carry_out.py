"""Carries out a study: its runs one after another or several at a time, their evaluations kept, its tables written anew after each.

Seed 0 of all comes before seed 1 of any, so a study that is cut short is whole as far as it went. A run that is finished is left
alone, one that was cut is taken up where it was, and one that fails is reported at the end while the others go on; a student waits
for its teacher and is skipped without it. Told to stop, it lets the runs that are under way save and end.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import IO

from ml_collections import ConfigDict

from flowlm import config as settings
from flowlm.engine.flops import network_evaluations
from flowlm.studies.study import (
    Run,
    Study,
    before,
    command,
    complete,
    directory,
    finished,
    flags_of,
    in_order,
    is_kept,
    kept_file,
    left,
    setting_name,
    swept,
)
from flowlm.studies.tables import write_tables
from flowlm.system import signals, storage


def keep(path: Path, place: Path, run: Run) -> None:
    """Writes into one file what the tables are made of, the evaluations of the run in `path`, and what says how it was made."""

    def read(name):
        return storage.read_json(path / name)

    places = {"": path} | {setting_name(setting): swept(path, setting) for setting in run.sweep}
    evaluations = {name: read((each / "evaluation.json").relative_to(path)) for name, each in places.items()}
    config = read("config.json")
    record = {"config": config, "versions": read("versions.json"), "passes": passes(config), "evaluations": evaluations}
    place.parent.mkdir(parents=True, exist_ok=True)
    storage.write_text(storage.path(place), json.dumps(record, indent=1) + "\n")


def passes(config: dict) -> float:
    """What a row costs in a step of training with these settings, as passes forward of the network."""
    return round(network_evaluations(settings.complete(ConfigDict(config))), 3)


class Commands:
    """Carries out command lines as processes. When this process is told to stop they are told too, and no other is begun."""

    def __init__(self):
        self._running: set[subprocess.Popen] = set()

    def stop(self) -> None:
        for process in [*self._running]:
            process.terminate()

    def __call__(self, line: Sequence[str], log: IO | None = None) -> bool:
        """Whether a line was carried out to its end; it prints to `log`, if it has one."""
        if signals.told():
            return False
        process = subprocess.Popen(line, stdout=log, stderr=log and subprocess.STDOUT)
        self._running.add(process)
        if signals.told():  # the signal may have come between the two lines above
            process.terminate()
        try:
            return process.wait() == 0
        finally:
            self._running.discard(process)


def _take_cores(shares: SimpleQueue) -> None:
    """Keeps this thread, and the processes that it starts, to its share of the cores."""
    os.sched_setaffinity(0, shares.get())


def shares_of_cores(parallel: int) -> list[set[int]]:
    """The cores of this machine in `parallel` parts. Raises ValueError: there are not as many, or no saying which."""
    if not hasattr(os, "sched_getaffinity"):
        raise ValueError("runs cannot be kept to cores of their own on this system: use --parallel=1")
    cores = sorted(os.sched_getaffinity(0))
    if parallel > len(cores):
        raise ValueError(f"--parallel={parallel} runs need as many cores, and here are {len(cores)}")
    return [set(cores[i::parallel]) for i in range(parallel)]


def carry_out(study: Study, workdir: Path, results: Path, extra: Sequence[str] = (), parallel: int = 1) -> None:
    """Runs what is left of the study and writes `results`/study*.{csv,md,png}, anew after every run.

    The evaluations are kept in `results`/runs. A run that is kept there is done, even if its run directory is gone: it is made
    again only where a run that is left needs it, for example as its teacher. So a study can be carried out in pieces, on several
    machines.

    Args:
      extra: further flags of every run, such as --config.steps=10.
      parallel: runs at a time, each on its own share of the cores and with a log of its own in `workdir`/logs. Small networks
        are faster so than one by one on all cores.

    Raises:
      ValueError: as `in_order` and `shares_of_cores`; or nothing can be written to `results`.
      RuntimeError: runs that failed, by name, after all others were done.
    """
    runs, kept, failed, commands = in_order(study)[1], results / "runs", [], Commands()
    waiting, running, tried = left(study, workdir, kept), {}, set()
    storage.check_writable(results)

    def call(line: Sequence[str], name: str) -> bool:
        """Runs one command; what runs at the same time prints to files of its own."""
        if parallel == 1:
            return commands(line)
        (workdir / "logs").mkdir(parents=True, exist_ok=True)
        with (workdir / "logs" / f"{name}.log").open("a") as log:
            return commands(line, log)

    def make(run: Run, seed: int) -> list[str]:
        """Trains and evaluates one run: what failed of it."""
        path, name, wrong = directory(workdir, run, seed), f"{run.name}-seed{seed}", []
        if not finished(path):
            # With its end in one piece, because runs side by side would share a line.
            print(f"== {path}\n", end="", file=sys.stderr, flush=True)
            line = command(run.config, flags_of(run, seed, workdir, runs, extra), path)
            if not call(line, name) or not finished(path):
                return [str(path)]
        if not is_kept(kept, run, seed):
            for place in (swept(path, setting) for setting in run.sweep):
                line = [sys.executable, "-m", "flowlm", "evaluate", f"--checkpoint={path}"]
                line += [f"--objective={place.name}", "--samples_only", f"--results={place}"]
                if not (place / "evaluation.json").exists() and not call(line, name):
                    wrong.append(str(place))
        return wrong

    shares: SimpleQueue = SimpleQueue()
    for share in shares_of_cores(parallel) if parallel > 1 else ():
        shares.put(share)
    cores = {"initializer": _take_cores, "initargs": (shares,)} if parallel > 1 else {}
    with signals.held(commands.stop), ThreadPoolExecutor(parallel, **cores) as pool:
        while waiting or running:
            if signals.told():
                waiting.clear()
            for run, seed in list(waiting):
                needed = before(run, seed, runs)
                if any(other in running.values() for other in needed):
                    continue  # what lies in their directories may be half written
                others = [directory(workdir, *other) for other in needed]
                path = directory(workdir, run, seed)
                if not finished(path) and any(other in tried and not finished(other) for other in others):
                    waiting.remove((run, seed))
                    tried.add(path)
                    failed.append(f"{path} (without its teacher)")
                elif len(running) < parallel and (finished(path) or all(map(finished, others))):
                    waiting.remove((run, seed))
                    running[pool.submit(make, run, seed)] = run, seed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run, seed = running.pop(future)
                path = directory(workdir, run, seed)
                tried.add(path)
                failed += future.result()
                if complete(path, run) and not is_kept(kept, run, seed):
                    keep(path, kept_file(kept, run, seed), run)
                write_tables(study, kept, results)
    write_tables(study, kept, results)
    if signals.told():
        signals.say_stopped("the runs under way are saved, and the same command goes on with the study")
    elif failed:
        where = "above" if parallel == 1 else f"in {workdir}/logs"
        raise RuntimeError(f"these runs failed, their own errors are {where}: {', '.join(failed)}")
