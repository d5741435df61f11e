"""What the supervisor of a TPU and its workers tell each other: files in the run's bucket, since they share nothing else.

launch/turn               which turn is asked for; every worker runs the command once a turn
logs/WORKER.exit          "TURN STATUS": how the command ended on that worker
logs/WORKER/PART.log      what it said, in parts whose names are in order, since a bucket has no appending
"""

from flowlm.system import storage
from launch.job import last_lines


def turn(workdir: str) -> int:
    """The turn that is asked for; 0 before the first."""
    path = storage.path(workdir) / "launch/turn"
    return int(path.read_text()) if path.exists() else 0


def next_turn(workdir: str) -> None:
    """Asks every worker to run the command anew; how the turns before ended counts no more."""
    folder = storage.path(workdir) / "launch"
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_text(folder / "turn", f"{turn(workdir) + 1}\n")


def exits(workdir: str) -> dict[str, str]:
    """{worker: exit status} of the workers on which this turn has ended."""
    folder, now = storage.path(workdir) / "logs", str(turn(workdir))
    notes = {path.stem: path.read_text().split() for path in _inside(folder) if path.suffix == ".exit"}
    return {worker: note[-1] for worker, note in sorted(notes.items()) if note[:-1] == [now]}


def workers(workdir: str) -> list[str]:
    """Those that have said something, in order."""
    names = {path.name for path in _inside(storage.path(workdir) / "logs") if path.name.isdigit()}
    return sorted(names, key=int)


def said(workdir: str, worker: str, lines: int = 40) -> str:
    """The last lines of what a worker said, joined from the last of its parts."""
    text = b""
    for part in sorted(_inside(storage.path(workdir) / "logs" / worker), key=lambda path: path.name, reverse=True):
        text = part.read_bytes() + text
        if text.count(b"\n") > lines:
            break
    return last_lines(text, lines)


def newest_checkpoint(workdir: str) -> int:
    """The step of the last checkpoint; -1 where there is none."""
    names = (path.name for path in _inside(storage.path(workdir) / "checkpoints"))
    return max((int(name) for name in names if name.isdigit()), default=-1)


def _inside(folder) -> list:
    return list(folder.iterdir()) if folder.exists() else []
