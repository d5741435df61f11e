"""This machine: N processes that stand for N hosts, all started again when one of them fails.

The command stays until the jobs have ended, one after another. SIGTERM, SIGHUP and Ctrl-C are handed to the processes, which save
and end. A job's processes write to WORKDIR/logs/PROCESS.log; what the first says is shown too. logs/job.json says how it stands;
whoever has started it, and its processes, hold a lock on logs/job.lock.
"""

import contextlib
import fcntl
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.credentials import refuse_secrets
from launch.job import Handle, Job, error_in, help_of, tail

ROOT = Path(__file__).parents[1]
GRACE_SECONDS = 5  # for the others to say what they saw, when one process has failed


@dataclass(frozen=True)
class Resources:
    processes: int = help_of(1, "how many, each standing for a host")
    cpu_devices: int = help_of(0, "CPU devices that each process makes for itself; 0: whatever JAX finds")
    gpus: int = help_of(0, "GPUs of each process, none of which it shares; 0: whatever JAX finds")
    max_restarts: int = help_of(3, "how often all are started again after one has failed")


def check(jobs: Sequence[Job]) -> None:
    """Raises ValueError for resources that cannot be."""
    for job in jobs:
        wanted = job.resources
        if wanted.processes < 1 or min(wanted.cpu_devices, wanted.gpus, wanted.max_restarts) < 0:
            raise ValueError(
                f"processes is at least 1, and cpu_devices, gpus and max_restarts at least 0, got {wanted}"
            )
        if wanted.cpu_devices and wanted.gpus:
            raise ValueError("give cpu_devices or gpus, not both")
        refuse_secrets(job.environment, "export it before the command, whose processes have what the shell has")
        if "://" in job.workdir:
            raise ValueError(
                f"the backend local writes its logs beside the run: {job.workdir} must be a directory here"
            )


def command(job: Job) -> list[str]:
    return [sys.executable, *job.command]


def environment(job: Job, index: int, address: str) -> dict[str, str]:
    """What process `index` gets beside this process's own environment."""
    wanted = job.resources
    variables = dict(job.environment)
    if wanted.cpu_devices:
        flags = variables.get("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
        flags = f"{flags} --xla_force_host_platform_device_count={wanted.cpu_devices}".strip()
        variables |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    if wanted.gpus:
        first = index * wanted.gpus
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(str(first + i) for i in range(wanted.gpus))
    if wanted.processes > 1:
        variables |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(wanted.processes)}
        variables["JAX_PROCESS_ID"] = str(index)
    return variables


def describe(jobs: Sequence[Job]) -> str:
    """The commands as a shell would take them; the port is chosen at every start."""
    check(jobs)
    lines = [f"cd {shlex.quote(str(ROOT))}"]
    for job in jobs:
        for index in range(job.resources.processes):
            variables = environment(job, index, "localhost:PORT")
            words = [*(f"{key}={value}" for key, value in variables.items()), *command(job)]
            log = shlex.quote(f"{job.workdir}/logs/{index}.log")
            lines.append(f"{'env ' if variables else ''}{shlex.join(words)} >> {log} 2>&1 &")
        lines.append("wait")
    return "\n".join(lines)


def submit(jobs: Sequence[Job], record: Callable[[Job, Handle], None]) -> None:
    """Carries the jobs out. Raises RuntimeError naming those that failed, after all others were done."""
    failed = []
    for job in jobs:
        folder = Path(job.workdir).resolve() / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder) as lock, _Supervisor(job, folder, lock) as supervisor:
            record(job, {"logs": str(folder)})
            state = supervisor.run()
        print(f"{job.name} {state}", file=sys.stderr)
        if state.startswith("failed"):
            failed.append(f"{job.name} {state} (more in {folder})")
        if state == "stopped":
            break
    if failed:
        raise RuntimeError("; ".join(failed))


def status(handle: Handle) -> str:
    folder = Path(handle["logs"])
    state = json.loads((folder / "job.json").read_text())["state"]
    return state if state != "running" or _held(folder) else "lost: whatever had started it was killed"


def logs(handle: Handle) -> str:
    paths = sorted(Path(handle["logs"]).glob("*.log"), key=lambda path: int(path.stem))
    return "\n".join(f"==> {path} <==\n{tail(path)}" for path in paths)


def stop(handle: Handle) -> None:
    """SIGTERM to the one who started the processes, or to them where that one is gone. They save, and end."""
    folder = Path(handle["logs"])
    if not _held(folder):
        return
    supervisor, *processes = json.loads((folder / "job.json").read_text())["pids"]
    if not _signal(supervisor):
        for process in processes:
            _signal(process)


def _signal(pid: int) -> bool:
    """Whether there was such a process to send SIGTERM to."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        return True
    return False


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[int]:
    """A descriptor whose lock lasts as long as any process holds it. Raises RuntimeError if one does already."""
    with (folder / "job.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(f"a job is running in {folder.parent} already: stop it first") from error
        yield file.fileno()


def _held(folder: Path) -> bool:
    try:
        with _lock(folder):
            return False
    except RuntimeError:
        return True


class _Supervisor:
    """Starts a job's processes and sees to their end. As a context it has the signals that ask for it."""

    def __init__(self, job: Job, logs: Path, lock: int):
        self._job, self._logs, self._lock = job, logs, lock
        self._processes: list[subprocess.Popen] = []
        self._stopping = False

    def __enter__(self):
        # SIGHUP, of a closed terminal, unless it is ignored, as under nohup.
        numbers = [signal.SIGTERM, signal.SIGINT] + [signal.SIGHUP] * (
            signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
        )
        self._before = {number: signal.signal(number, self._stop) for number in numbers}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number, frame) -> None:
        self._stopping = True
        for process in self._processes:
            process.terminate()

    def run(self) -> str:
        """How the job has ended: `ended` by itself, `stopped`, or `failed` with what was said."""
        state = ""
        for attempt in range(self._job.resources.max_restarts + 1):
            if attempt:
                print(f"{self._job.name} {state}; started again ({attempt})", file=sys.stderr, flush=True)
            failed = self._attempt()
            state = "stopped" if self._stopping else "ended"
            if failed is None or self._stopping:
                break
            status = self._processes[failed].returncode
            state = f"failed: process {failed} ended with {status}: {error_in(tail(self._logs / f'{failed}.log'))}"
        self._write(state)
        return state

    def _write(self, state: str) -> None:
        entry = {"state": state, "pids": [os.getpid(), *(process.pid for process in self._processes)]}
        temporary = self._logs / "job.tmp"
        temporary.write_text(json.dumps(entry) + "\n")
        temporary.replace(self._logs / "job.json")

    def _attempt(self) -> int | None:
        """Runs all processes to their end. The first that failed, if one did."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        shown = self._logs / "0.log"
        seen = shown.stat().st_size if shown.exists() else 0
        self._processes = []
        for index in range(self._job.resources.processes):
            with (self._logs / f"{index}.log").open("ab") as log:
                # Of another session, so that Ctrl-C comes to the supervisor alone, which asks them to save.
                process = subprocess.Popen(
                    command(self._job), cwd=ROOT, env=os.environ | environment(self._job, index, address),
                    stdout=log, stderr=log, pass_fds=[self._lock], start_new_session=True,
                )  # fmt: skip
            self._processes.append(process)
        self._write("running")
        if self._stopping:
            self._stop(None, None)
        failed, since = None, None
        while any(process.poll() is None for process in self._processes):
            if failed is None:
                failed = self._first_failed()
                since = time.monotonic()
            elif time.monotonic() - since > GRACE_SECONDS:
                for process in self._processes:
                    process.kill()
            seen = _show(shown, seen)
            time.sleep(0.1)
        _show(shown, seen)
        return self._first_failed() if failed is None else failed

    def _first_failed(self) -> int | None:
        return next((index for index, process in enumerate(self._processes) if process.poll()), None)


def _show(log: Path, seen: int) -> int:
    """Prints what a log has beyond `seen` bytes; how many it has now."""
    with log.open("rb") as file:
        file.seek(seen)
        sys.stdout.buffer.write(file.read())
        sys.stdout.flush()
        return file.tell()
