"""One process writes in a run directory: a second is refused while the first lives, and not after it is gone."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from toy import run_config, train_only

from flowlm.runs.checkpoint import Checkpoints
from flowlm.system import lock, storage

ROOT = Path(__file__).parents[1]
HOLDER = """
import sys
from flowlm.system import lock, storage
release = lock.take(storage.path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder():
    """start(place): another process that holds the lock until it is killed."""
    started = []

    def start(place):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(place)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_train_is_refused_while_the_first_is_alive(holder, data_dir, tmp_path):
    """It changes no checkpoint, what looks left over from a save included; killed, the first is in nobody's way."""
    workdir = tmp_path / "run"
    train_only(run_config(data_dir, steps=3), workdir)
    (workdir / "checkpoints/6.orbax-checkpoint-tmp").mkdir()
    other = holder(workdir / "checkpoints.lock")
    before = (
        sorted(p.stat().st_mtime_ns for p in workdir.rglob("checkpoints/**/*")),
        (workdir / "metrics.jsonl").read_text(),
    )
    with pytest.raises(
        ValueError, match=rf"run is being written by process {other.pid} on \S+: wait until it has ended"
    ):
        train_only(run_config(data_dir, steps=6), workdir)
    after = (
        sorted(p.stat().st_mtime_ns for p in workdir.rglob("checkpoints/**/*")),
        (workdir / "metrics.jsonl").read_text(),
    )
    assert before == after
    assert Checkpoints(workdir / "checkpoints", read_only=True).steps == [3]  # who only reads is not asked
    other.kill()
    other.wait()
    train_only(run_config(data_dir, steps=6), workdir)
    assert Checkpoints(workdir / "checkpoints", read_only=True).steps == [3, 6]
    assert not (workdir / "checkpoints.lock").exists()


def test_a_lock_goes_with_its_run(tmp_path):
    """When it is closed, and when there is nothing in it that can be read."""
    first = Checkpoints(tmp_path / "c")
    with pytest.raises(ValueError, match="is being written by process"):
        Checkpoints(tmp_path / "c")
    first.save(1, {"a": jnp.ones(3)})
    first.close()
    for other in ({"a": jnp.ones(4)}, {"b": jnp.ones(3)}):
        with pytest.raises(ValueError, match="another architecture"):
            Checkpoints(tmp_path / "c").restore(other)
    Checkpoints(tmp_path / "c").close()


def test_a_disk_without_locks_is_written_with_a_warning(tmp_path, monkeypatch, caplog):
    def flock(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    lock.take(storage.path(tmp_path / "x.lock"))()
    assert "nothing keeps another process from writing" in caplog.text


# --- buckets -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    for package in ("gcsfs", "gcp_storage_emulator"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -e .[dev]")
    from bucket_emulator import running

    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.05)
    with running(tmp_path / "mirror"):
        yield storage.path("gs://bucket/run")


def test_in_a_bucket_the_living_are_told_from_the_gone(bucket, monkeypatch):
    """The living write the lock anew, the gone do not; who releases it leaves nothing."""
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 60.0)
    release = lock.take(bucket / "checkpoints.lock")
    with pytest.raises(ValueError, match=r"gs://bucket/run is being written by process \d+ on \S+: wait until"):
        lock.take(bucket / "checkpoints.lock")
    release()
    assert not (bucket / "checkpoints.lock").exists()

    (bucket / "checkpoints.lock").write_text("process 7 on a-host-that-died 1234 5")
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.3)
    release = lock.take(bucket / "checkpoints.lock")
    assert "a-host-that-died" not in (bucket / "checkpoints.lock").read_text()
    release()
    release()
    assert not (bucket / "checkpoints.lock").exists()
