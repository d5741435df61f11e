"""The script of a TPU's workers, with stand-ins for what it calls: what it fetches, runs, sends and reports, and when."""

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launch import tpu_vm

PATIENCE = 300  # seconds until a test gives up; on an idle machine none waits a tenth of it

FAKES = {
    # cp and cat of `gcloud storage`; every copy is written down with its size, and fails while there is a file "away".
    # Of Secret Manager it has one secret, of one project, and fails once where that is "away".
    "gcloud": 'if [ "$1" = secrets ]; then shift 3; echo "$@" >> "$BUCKETS/asked"\n'
    '[ "$*" = "latest --secret=WANDB_API_KEY --project=p" ] || { echo "PERMISSION_DENIED: no such secret" >&2; exit 1; }\n'
    'mv "$BUCKETS/vault-away" "$BUCKETS/vault" 2>/dev/null && exit 1; cat "$BUCKETS/vault"; exit; fi\n'
    'verb=$2; shift 2; [ "$1" = --quiet ] && shift; from=$1; to=${2:-/dev/stdout}\n'
    'case $from in gs://*) from="$BUCKETS/${from#gs://}";; esac\n'
    '[ "$verb" = cat ] && exec cat "$from"\n'
    '[ -e "$BUCKETS/away" ] && exit 1\n'
    'case $to in gs://*) to="$BUCKETS/${to#gs://}"; mkdir -p "$(dirname "$to")";; esac\n'
    'if [ "$from" = - ]; then cat > "$to.new"; else cp "$from" "$to.new"; fi\n'
    'mv "$to.new" "$to"; echo "$(stat -c %s "$to") $to" >> "$BUCKETS/copied"',
    "curl": "echo 2",  # the worker's number, of the metadata server
    "sleep": "echo $1 >> $BUCKETS/slept; exec /bin/sleep 0.05",
    # Fails as often as there are lines in a file.
    "apt-get": '[ ! -s "$BUCKETS/broken" ] || { sed -i 1d "$BUCKETS/broken"; echo "flowlm: mirror is down"; exit 100; }',
}
SETUP = """mkdir -p .venv/bin
echo "extras $1 for $PYTHON"
printf '#!/bin/bash\necho "$NOTE: $@ as $$ is $(cat ../flowlm.pid)"\neval "$DO"\n' > .venv/bin/python
chmod +x .venv/bin/python
"""


class Worker:
    """A machine with stand-ins for what it calls, and a bucket that is a folder."""

    def __init__(self, tmp_path):
        self.buckets, self.home = tmp_path / "buckets", tmp_path / "home"
        checkout = tmp_path / "checkout"
        for folder in (checkout / "launch", self.home, self.buckets / "b/launch", tmp_path / "bin"):
            folder.mkdir(parents=True)
        for name, body in FAKES.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        (checkout / "launch/setup.sh").write_text(SETUP)
        git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(checkout)]
        for words in (
            ["init", "-q"],
            ["add", "."],
            ["commit", "-qm", "m"],
            ["bundle", "create", "-q", str(self.buckets / "b/launch/flowlm.bundle"), "HEAD"],
        ):
            subprocess.run([*git, *words], check=True)
        self.environment = os.environ | {
            "HOME": str(self.home),
            "BUCKETS": str(self.buckets),
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        }
        self.turn(1)

    def turn(self, number):
        path = self.buckets / "b/launch/turn"
        path.with_suffix(".new").write_text(f"{number}\n")
        path.with_suffix(".new").rename(path)

    def job(self, do, **resources):
        """do: what the command does, in bash."""
        resources = tpu_vm.Resources(project="p", zone="us-central1-a", **resources)
        return tpu_vm.Job("flowlm-x", "a b", (), "gs://b", resources, {"NOTE": "it's a 'note'", "DO": do})

    def start(self, do, **resources):
        """The startup script of a job, running."""
        job = self.job(do, **resources)
        return subprocess.Popen(["bash", "-c", tpu_vm.script(job)], env=self.environment, start_new_session=True)

    def end(self, script):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
        script.wait()

    @property
    def exit(self):
        path = self.buckets / "b/logs/2.exit"
        return path.read_text() if path.exists() else ""

    @property
    def log(self):
        parts = sorted((self.buckets / "b/logs/2").glob("*.log"))
        return "".join(part.read_text() for part in parts)


@pytest.fixture
def worker(tmp_path):
    return Worker(tmp_path)


def wait_until(holds, *scripts):
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert all(script.poll() is None for script in scripts), "ended before its time"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("status", [0, 7])
def test_the_script_on_a_worker_that_is_there(worker, status):
    """It fetches, installs, runs, reports, and is gone, since nobody would ask it for another turn."""
    assert worker.start(f"exit {status}", existing="mine").wait(PATIENCE) == 0
    assert re.search(
        r"it's a 'note': -m flowlm train --config=a b --workdir=gs://b --distributed as (\d+) is \1\n",
        worker.log,
    )
    assert "extras tpu,gcp for python3.11" in worker.log
    assert worker.exit == f"1 {status}\n"


def test_what_fails_for_a_moment_is_installed_again(worker):
    (worker.buckets / "broken").write_text("once\ntwice\n")
    worker.start("echo fine", existing="mine").wait(PATIENCE)
    assert worker.exit == "1 0\n" and worker.log.count("flowlm: mirror is down") == 2
    pauses = (worker.buckets / "slept").read_text().split()
    assert [pause for pause in pauses if pause != "20"] == ["10", "30"]


def test_what_cannot_be_installed_is_told(worker):
    (worker.buckets / "broken").write_text("again\n" * 100)
    worker.start("echo fine", existing="mine").wait(PATIENCE)
    assert worker.exit == "1 100\n" and worker.log.count("flowlm: mirror is down") == 6
    assert "fine" not in worker.log


def test_a_bucket_that_is_away_is_told_later(worker):
    away = worker.buckets / "away"
    script = worker.start(f"touch {away}; exit 3", existing="mine")
    wait_until(
        lambda: worker.home.joinpath("flowlm.log").read_text().count("report failed") >= 2 if away.exists() else False
    )
    away.unlink()
    script.wait(PATIENCE)
    assert worker.exit == "1 3\n"


def test_a_worker_runs_once_a_turn(worker):
    """It fails and waits; asked for another turn it runs again, without its peers it is ended, and ends well with the machine."""
    turns = worker.buckets / "b/launch/turn"
    stay = "trap 'echo saved; exit 0' TERM; echo up; while :; do /bin/sleep 0.1; done"
    do = f"case $(cat {turns}) in 1) exit 7;; 2) exec /bin/sleep 1000;; *) {stay};; esac"
    script = worker.start(do, accelerator="v5litepod-16")
    try:
        wait_until(lambda: worker.exit == "1 7\n", script)
        worker.turn(2)
        wait_until(lambda: worker.log.count("--distributed as") == 2, script)
        assert worker.exit == "1 7\n"
        worker.turn(3)
        wait_until(lambda: "up" in worker.log, script)
        assert worker.log.count("--distributed as") == 3 and worker.exit == "1 7\n"
        os.killpg(script.pid, signal.SIGTERM)
        assert script.wait(PATIENCE) == 0
        assert worker.log.endswith("saved\n") and worker.exit == "1 7\n"  # it is no end of the turn
    finally:
        worker.end(script)
    script = worker.start(do, accelerator="v5litepod-16")  # with the machine
    try:
        wait_until(lambda: worker.log.count("up\n") == 2, script)
        assert worker.log.count("saved") == 1
    finally:
        worker.end(script)


def test_a_long_log_is_sent_in_parts(worker):
    """Every byte arrives once, and of what is there no more than the last part is sent again."""
    lines = 3000
    script = worker.start(
        f"for i in $(seq {lines}); do echo $i {'x' * 100}; [ $((i % 100)) != 0 ] || /bin/sleep 0.02; done",
        existing="mine",
    )
    script.wait(PATIENCE)
    local = worker.home.joinpath("flowlm.log").read_text()
    assert worker.log == local and f"\n{lines} x" in local
    copies = [line.split() for line in (worker.buckets / "copied").read_text().splitlines()]
    copies = [(int(size), Path(path).name) for size, path in copies if "/logs/2/" in path]
    names = [name for _, name in copies]
    assert names == sorted(names) and len(set(names)) == len(local) // 65536 + 1
    assert max(size for size, _ in copies) == 65536


def test_a_secret_is_a_variable_of_the_command_and_nowhere_else(worker):
    """Not in what was sent, said or written, nor among the words that all users of a machine see."""
    (worker.buckets / "vault-away").write_text("a key that nobody may see")
    look = f'[ "$WANDB_API_KEY" = "$(cat {worker.buckets}/vault)" ] && echo it is there; ps -o args= -p $$'
    job = worker.job(look, existing="mine", secrets="WANDB_API_KEY")
    assert "secrets=(WANDB_API_KEY)" in tpu_vm.script(job)
    assert worker.start(look, existing="mine", secrets="WANDB_API_KEY").wait(PATIENCE) == 0
    assert worker.exit == "1 0\n" and "it is there" in worker.log and worker.log.count("fetch failed") == 1
    (worker.buckets / "vault").unlink()
    files = [path for place in (worker.buckets, worker.home) for path in place.rglob("*") if path.is_file()]
    assert files and not [path for path in files if b"nobody may see" in path.read_bytes()]


def test_a_secret_that_may_not_be_read_ends_the_turn_before_the_command(worker):
    worker.start("echo fine", existing="mine", secrets="HF_TOKEN").wait(PATIENCE)
    assert worker.exit == "1 1\n" and "PERMISSION_DENIED" in worker.log and "fine" not in worker.log
