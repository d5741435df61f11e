"""A run that is stopped, killed or damaged goes on from its last whole checkpoint as if nothing had happened, bit by bit."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint.experimental import v1 as ocp
from toy import run_config, train_only

from flowlm.engine import build as assembly
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.runs import integrity, trained
from flowlm.runs.checkpoint import Checkpoints
from flowlm.runs.metrics import read_metrics

STEPS = 12  # saved every 3


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data_dir):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    train_only(run_config(data_dir, steps=STEPS), workdir)
    return workdir


@pytest.fixture
def config(data_dir):
    return run_config(data_dir, steps=STEPS)


@pytest.fixture
def workdir(uninterrupted, tmp_path):
    """A copy of the uninterrupted run as it was at step 6."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    for step in (9, 12):
        shutil.rmtree(tmp_path / "run/checkpoints" / str(step))
    return tmp_path / "run"


def steps_in(directory):
    """Numbers of the complete checkpoints."""
    return sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit())


def assert_same_state(ours, theirs, step=STEPS):
    """Parameters, average and optimizer state, to the last bit."""
    ours, theirs = (ocp.load(workdir / "checkpoints" / str(step)) for workdir in (ours, theirs))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_same_metrics(ours, theirs):
    """Each logged step once, with the same loss."""
    ours, theirs = ([(m["step"], m["loss"]) for m in read_metrics(w) if "loss" in m] for w in (ours, theirs))
    assert [step for step, _ in theirs] == list(range(1, STEPS + 1))
    assert ours == theirs


def contents(directory):
    """Everything on disk under the directory: names, times and digests."""
    return {
        str(p.relative_to(directory)): (
            p.stat().st_mtime_ns,
            hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "",
        )
        for p in directory.rglob("*")
    }


def abstract_state(config):
    return assembly.abstract_state(assembly.build(config, 99), Layout(make_mesh(data=1)))


# --- stopped and killed ------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_uninterrupted_run(uninterrupted, tmp_path, data_dir):
    train_only(run_config(data_dir, steps=3), tmp_path)
    assert steps_in(tmp_path / "checkpoints") == [3]
    train_only(run_config(data_dir, steps=STEPS), tmp_path)
    assert_same_state(tmp_path, uninterrupted)
    assert_same_metrics(tmp_path, uninterrupted)
    # A finished run taken up again learns nothing more.
    train_only(run_config(data_dir, steps=STEPS), tmp_path)
    assert_same_metrics(tmp_path, uninterrupted)
    assert steps_in(tmp_path / "checkpoints") == [3, 6, 9, 12]


def test_a_run_beyond_the_steps_asked_for(workdir, data_dir):
    with pytest.raises(ValueError, match="at step 6 already"):
        train_only(run_config(data_dir, steps=5), workdir)


def _start(workdir):
    command = [
        sys.executable,
        "-m",
        "flowlm",
        "train",
        f"--config={workdir}/experiment.py",
        f"--workdir={workdir}",
    ]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    root = Path(__file__).parents[1]
    return subprocess.Popen(command, cwd=root, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def _kill_when(process, seen):
    """SIGKILL as soon as seen() holds; True if it still held when the process was dead."""
    deadline = time.monotonic() + 120
    while not seen():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "never seen"
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    return seen()


def test_kill_9_loses_only_steps_since_the_last_checkpoint(uninterrupted, data_dir, tmp_path):
    """Killed between saves, killed within a save, and finished: the same state as without."""
    (tmp_path / "experiment.py").write_text(
        f"from toy import run_config\ndef get_config(arg=''): return run_config({str(data_dir)!r}, steps={STEPS})\n"
    )
    checkpoints = tmp_path / "checkpoints"

    def unfinished():
        return [p for p in checkpoints.glob("*") if not p.name.isdigit()]

    assert _kill_when(_start(tmp_path), lambda: 3 in steps_in(checkpoints))
    for _ in range(5):
        before = steps_in(checkpoints)
        if _kill_when(_start(tmp_path), unfinished):
            break
    else:
        raise AssertionError("five kills, and none within a save")
    survived = steps_in(checkpoints)
    assert survived[0] == 3 and set(before) <= set(survived) and STEPS not in survived

    last = _start(tmp_path)
    _, told = last.communicate(timeout=120)
    assert last.returncode == 0, told
    assert f"from step {survived[-1]} to {STEPS}" in told
    assert not unfinished()
    assert_same_state(tmp_path, uninterrupted)
    assert_same_metrics(tmp_path, uninterrupted)


# --- damaged -----------------------------------------------------------------------------------------------------


def _truncate(*names):
    def damage(checkpoint):
        files = [p for name in names for p in checkpoint.rglob(name) if p.is_file() and p.stat().st_size]
        assert files
        for path in files:
            os.truncate(path, path.stat().st_size // 2)

    return damage


def _remove(name):
    def damage(checkpoint):
        for path in checkpoint.rglob(name):
            path.unlink()

    return damage


DAMAGES = {
    "every file truncated": _truncate("*"),
    "arrays truncated": _truncate("d/*"),
    "metadata removed": _remove("_METADATA"),
    "arrays removed": _remove("d/*"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside(damage, uninterrupted, workdir, config, caplog):
    newest = workdir / "checkpoints/6"
    DAMAGES[damage](newest)
    damaged = contents(newest)
    train_only(config, workdir)
    assert "step 6" in caplog.text and "cannot be read" in caplog.text
    kept = contents(workdir / "unreadable_checkpoints/6")
    assert {name: digest for name, (_, digest) in kept.items()} == {n: digest for n, (_, digest) in damaged.items()}
    assert_same_state(workdir, uninterrupted)
    assert_same_state(workdir, uninterrupted, step=6)
    assert_same_metrics(workdir, uninterrupted)


def test_an_error_where_no_checkpoint_can_be_read(workdir, config):
    """At every attempt: nothing is moved, and no run starts anew where one has been."""
    for checkpoint in (workdir / "checkpoints").iterdir():
        _truncate("*")(checkpoint)
    before = contents(workdir / "checkpoints")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"none of the checkpoints \[3, 6\]"):
            train_only(config, workdir)
    assert contents(workdir / "checkpoints") == before
    assert [m["step"] for m in read_metrics(workdir) if "loss" in m] == list(range(1, STEPS + 1))


def test_a_checkpoint_of_another_architecture(workdir, data_dir):
    before = contents(workdir)
    wider = abstract_state(run_config(data_dir, **{"model.width": 64}))
    with pytest.raises(
        ValueError, match=r"another architecture .*ema/blocks/mlp_in/bias: saved \(2, 128\), wanted \(2, 256\)"
    ):
        Checkpoints(workdir / "checkpoints", every=3, keep_latest=2).restore(wider)
    assert contents(workdir) == before


def test_reading_a_run_changes_nothing_on_disk(workdir, config):
    _truncate("*")(workdir / "checkpoints/6")
    (workdir / "checkpoints/9.orbax-checkpoint-tmp").mkdir()
    before = contents(workdir)
    run = trained.load_trained(workdir, Layout(make_mesh(data=1)))
    assert run.step == 3
    assert contents(workdir) == before
    saved = ocp.load(workdir / "checkpoints/3")["ema"]
    np.testing.assert_array_equal(run.params["embedding"], saved["embedding"])


@pytest.mark.parametrize("name", ["run[1]", "sweep[lr=1e-3]", "run*", "run?", "run\\1"])
def test_a_path_that_is_a_pattern_is_refused_before_step_0(name, config, tmp_path):
    """In the directory's own name and above it. A run that was copied there is read."""
    for workdir in (tmp_path / name, tmp_path / name / "run"):
        with pytest.raises(ValueError, match=r"could be read: give a path without \* \? \[ and"):
            train_only(config, workdir)
    assert not list(tmp_path.iterdir())


def test_a_run_under_other_odd_names(config, tmp_path):
    config.steps = 3
    for name in ("lr=1e-3,b", "a b#{c}%20"):
        train_only(config, tmp_path / name)
        assert trained.load_trained(tmp_path / name, Layout(make_mesh(data=1))).step == 3


# --- changed -----------------------------------------------------------------------------------------------------


def state_of(step):
    """A state whose numbers zstd cannot make shorter, of several types."""
    rng = np.random.default_rng(step)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return {"w": draw(64, 48), "h": draw(40, 40).astype(jnp.bfloat16), "zero": jnp.zeros(100), "step": jnp.int32(step)}


def bytes_of(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def flip(path, rng, begin=0.0, end=1.0):
    """Turns over one bit of a file, between two shares of its length; returns what was there."""
    before = path.read_bytes()
    content = bytearray(before)
    content[int(len(content) * rng.uniform(begin, end))] ^= 1 << rng.integers(8)
    path.write_bytes(bytes(content))
    return before


def test_a_flipped_bit_is_found(tmp_path):
    """30 of 30 among the numbers. Elsewhere it is found too, or the state is what was saved: no other number is ever read."""
    writer = Checkpoints(tmp_path / "c", keep_latest=2)
    for step in (1, 2):
        writer.save(step, state_of(step))
    writer.close()
    one, two = bytes_of(state_of(1)), bytes_of(state_of(2))
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state_of(2))
    files = [p for p in (tmp_path / "c/2").rglob("*") if p.is_file() and p.stat().st_size]
    numbers = max(files, key=lambda p: p.stat().st_size)
    assert numbers.stat().st_size > 12_288  # w, at least, lies there as it is
    rng = np.random.default_rng(0)

    def read_with_a_flip(*place):
        before = flip(*place)
        checkpoints = Checkpoints(tmp_path / "c", read_only=True)
        held = bytes_of(checkpoints.restore(abstract))
        checkpoints.close()
        place[0].write_bytes(before)
        return held

    assert [read_with_a_flip(numbers, rng, 0.1, 0.9) == one for _ in range(30)] == [True] * 30
    for path in rng.choice(files, 30):
        assert read_with_a_flip(path, rng) in (one, two), path


def test_sums_see_a_bit_and_a_place_on_any_mesh():
    rng = np.random.default_rng(0)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8, bool):
        array = jnp.asarray(rng.integers(0, 2, (16, 8)) if dtype is bool else rng.integers(-99, 99, (16, 8)), dtype)
        bits = np.asarray(array).view(np.uint8).copy()
        seen = {int(integrity.sums([array])[0])}
        for _ in range(50):
            other = bits.copy()
            place = rng.integers(other.shape[0]), rng.integers(other.shape[1])
            other[place] ^= 1 if dtype is bool else 1 << rng.integers(8)
            assert integrity.changed([jnp.asarray(other.view(array.dtype))], integrity.sums([array])) == ["0"]
        assert integrity.sums([array[::-1]])[0] not in seen
        layout = jax.sharding.NamedSharding(make_mesh(data=8), jax.sharding.PartitionSpec(("replica", "data")))
        spread = jax.device_put(array, layout)
        assert len(spread.sharding.device_set) == 8 and integrity.sums([spread])[0] in seen


def test_the_first_save_is_read_back(tmp_path, monkeypatch):
    """A disk that gives back something else than it was given; the one after a good first is not waited for."""
    genuine = ocp.training.Checkpointer.save_checkpointables_async

    def damaging(self, step, *arguments, **settings):
        saving = genuine(self, step, *arguments, **settings)
        saving.result()
        files = [p for p in (Path(self.directory) / str(step)).rglob("*") if p.is_file()]
        flip(max(files, key=lambda p: p.stat().st_size), np.random.default_rng(0), 0.1, 0.9)
        return saving

    good, bad = Checkpoints(tmp_path / "good", keep_latest=2), Checkpoints(tmp_path / "bad")
    good.save(1, state_of(1))
    assert good.should_save(2)
    monkeypatch.setattr(ocp.training.Checkpointer, "save_checkpointables_async", damaging)
    good.save(2, state_of(2))
    good.close()
    bad.save(1, state_of(1))
    with pytest.raises(RuntimeError, match="the first checkpoint of this run, step 1 in .*bad, cannot be read back"):
        bad.should_save(2)
    bad.close()
    bad = Checkpoints(tmp_path / "worse")
    bad.save(1, state_of(1))
    with pytest.raises(RuntimeError, match="cannot be read back"):
        bad.close()


def test_old_checkpoints_go_and_milestones_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=2, keep_latest=2, keep_every=6)
    saves = [step for step in range(1, 17) if checkpoints.should_save(step)]
    assert saves == [2, 4, 6, 8, 10, 12, 14, 16]
    for step in saves:
        checkpoints.save(step, {"a": jnp.full(3, step)})
    checkpoints.close()
    assert steps_in(tmp_path) == [6, 12, 14, 16]


# --- not a number ------------------------------------------------------------------------------------------------


def test_parameters_that_diverge_are_never_saved(uninterrupted, workdir, config, monkeypatch):
    """The update to state 6 ruins it, while the loss and the gradient of that step are still finite."""
    shutil.rmtree(workdir / "checkpoints/6")
    make_schedule = assembly.make_schedule

    def ruinous(*arguments):
        schedule = make_schedule(*arguments)
        return lambda count: jnp.where(count == 5, 1e30, schedule(count))

    with monkeypatch.context() as patch:
        patch.setattr(assembly, "make_schedule", ruinous)
        with pytest.raises(FloatingPointError, match="at step 6: the last good checkpoint is step 3"):
            train_only(config, workdir)
    assert steps_in(workdir / "checkpoints") == [3]
    train_only(config, workdir)
    assert_same_state(workdir, uninterrupted)
    assert_same_metrics(workdir, uninterrupted)


def test_a_loss_that_is_not_a_number_stops_the_run(workdir, data_dir):
    """Even where it is not logged: it is read before the next save."""
    reader = Checkpoints(workdir / "checkpoints", read_only=True)
    state = reader.restore(abstract_state(run_config(data_dir)))
    shutil.rmtree(workdir / "checkpoints/6")
    writer = Checkpoints(workdir / "checkpoints", keep_latest=100)
    params = state.params | {"unembed_bias": state.params["unembed_bias"].at[7].set(jnp.nan)}
    writer.save(6, state._replace(params=params))
    writer.close()
    with pytest.raises(FloatingPointError, match="loss nan"):
        train_only(run_config(data_dir, steps=STEPS, log_every=1000), workdir)
    assert steps_in(workdir / "checkpoints") == [3, 6]


def test_a_relative_directory(data_dir, tmp_path, monkeypatch):
    """Saved where it says, by a run that is started and taken up from inside."""
    monkeypatch.chdir(tmp_path)
    for steps in (3, 6):
        train_only(run_config(data_dir, steps=steps), Path("here/run"))
    assert steps_in(tmp_path / "here/run/checkpoints") == [3, 6]
