"""What sees a run on a TPU to its end, before a Cloud TPU of our own: failures, preemptions, and what must not be forgotten."""

import signal

import cloud_tpu_emulator
import pytest
from cloud_tpu_emulator import BUCKET, State, after, error_of, finishing, grpc, launch, tpu_v2
from google.auth.exceptions import RefreshError
from google.rpc import code_pb2, status_pb2

from flowlm.system import storage
from launch import cloud_tpu, run, tpu_supervisor, tpu_workers

bucket, cloud = cloud_tpu_emulator.bucket, cloud_tpu_emulator.cloud  # fixtures


def test_a_preempted_run_is_created_again(cloud, capsys):
    """The workers of the first were told to stop and ended well; that is not the end of the run."""
    workdir = f"{BUCKET}/runs/spot"

    saved = after(workdir, {"config.json": '{"steps": 40}'}, w0=0)

    def anew():
        assert not tpu_workers.exits(workdir)
        return State.ACTIVE

    cloud.lives = [[State.ACTIVE, saved, saved, State.SUSPENDING], [State.PROVISIONING, anew, finishing(workdir)]]
    launch(f"--workdir={workdir}", "--spot")
    first, second = cloud.created
    assert first == second and "spot" in first.queued_resource
    assert len(cloud.deleted) == 2 and not cloud.resources
    assert "flowlm-spot preempted: started again (1)" in capsys.readouterr().err


def test_preempted_for_ever(cloud):
    cloud.lives = [[State.ACTIVE, State.SUSPENDED]] * 3
    said = error_of(f"--workdir={BUCKET}/runs/unlucky", "--spot", "--max_restarts=2")
    assert "flowlm-unlucky: preempted, after 2 restarts: run the same command again to go on" in said
    assert len(cloud.created) == len(cloud.deleted) == 3


def test_a_command_that_was_cut_short_is_taken_up(cloud, monkeypatch, capsys):
    workdir = f"{BUCKET}/runs/cut"

    def cut(seconds):
        raise KeyboardInterrupt

    cloud.lives = [[State.ACTIVE, finishing(workdir)]]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(tpu_supervisor.time, "sleep", cut)
        launch(f"--workdir={workdir}")
    assert cloud.resources
    launch(f"--workdir={workdir}")
    assert len(cloud.created) == 1 and not cloud.resources
    assert "taken up" in capsys.readouterr().err


def test_a_run_that_fails_says_why_and_costs_no_more(cloud, capsys):
    workdir = f"{BUCKET}/runs/failing"
    failed = after(workdir, {"logs/3/a.log": "100%\nflowlm: loss nan at step 3\nTraceback\n"}, w3=1)
    cloud.lives = [[State.ACTIVE, failed]]
    why = "worker 3 ended with 1: flowlm: loss nan at step 3"
    assert f"{why}, after 0 restarts" in error_of(f"--workdir={workdir}", "--max_restarts=0")
    assert not cloud.resources and "BILLS" not in capsys.readouterr().err
    run.main(["logs", f"--workdir={workdir}"])
    assert capsys.readouterr().out.startswith(f"==> {workdir}/logs/3 <==\n100%\n")
    run.main(["status", f"--workdir={workdir}"])
    assert capsys.readouterr().out == "deleted; worker 3 ended with 1\n"


def failing_in_turns(workdir, *steps):
    """An answer: in each turn a worker fails, after a checkpoint at the turn's step, if it has one; then the run ends."""
    turns = iter(steps)
    seen = set()

    def answer():
        now = tpu_workers.turn(workdir)
        if now in seen:
            return State.ACTIVE
        seen.add(now)
        step = next(turns, "end")
        if step == "end":
            return finishing(workdir)()
        made = {f"checkpoints/{step}/commit_success.txt": ""} if step else {}
        return after(workdir, made | {f"logs/1/{now:03}.log": f"flowlm: turn {now}\n"}, w1=1)()

    return answer


def test_a_failed_worker_does_not_cost_the_slice(cloud, capsys):
    """The run is started again on the machines that are there, which are asked for one more turn."""
    workdir = f"{BUCKET}/runs/again"
    cloud.lives = [[State.ACTIVE, failing_in_turns(workdir, None, 10, 20, None, 30)]]
    launch(f"--workdir={workdir}")
    assert len(cloud.created) == len(cloud.deleted) == 1
    assert tpu_workers.turn(workdir) == 6
    told = capsys.readouterr().err
    assert [f"flowlm-again worker 1 ended with 1: flowlm: turn {n}: started again ({n})" in told for n in range(1, 7)] == [
        True, True, True, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "steps", "expected", "turns"),
    [
        (["--max_restarts=2"], [10, 20, 30, 40], "turn 3, after 2 restarts: run the same command again", 3),
        ([], [None] * 9, "turn 3, 3 times without a new checkpoint", 3),
        ([], [None, 10, None, None, None], "turn 5, 3 times without a new checkpoint", 5),
    ],
    ids=["max_restarts", "in vain", "in vain at last"],
)
def test_failures_come_to_an_end(cloud, flags, steps, expected, turns):
    workdir = f"{BUCKET}/runs/end-{turns}-{len(steps)}"
    cloud.lives = [[State.ACTIVE, failing_in_turns(workdir, *steps)]]
    assert expected in error_of(f"--workdir={workdir}", *flags)
    assert tpu_workers.turn(workdir) == turns
    assert len(cloud.created) == len(cloud.deleted) == 1


def test_workers_that_end_well_before_the_last_step_are_asked_again(cloud):
    """As when a machine is restarted: all save and end, no preemption follows, and nobody may wait for ever."""
    workdir = f"{BUCKET}/runs/told"

    def answer():
        if tpu_workers.turn(workdir) == 1:
            return after(workdir, {"config.json": '{"steps": 40}', "checkpoints/7/x": ""}, w0=0, w1=0)()
        return finishing(workdir)()

    cloud.lives = [[State.ACTIVE, answer]]
    launch(f"--workdir={workdir}")
    assert tpu_workers.turn(workdir) == 2 and len(cloud.created) == 1


def test_what_passes_does_not_end_the_supervisor(cloud, monkeypatch, capsys):
    """The service, the login and the bucket are out of reach for a while; then the credentials are read anew."""
    workdir = f"{BUCKET}/runs/blind"
    client, asked = cloud_tpu.client(), []
    monkeypatch.setattr(cloud_tpu, "client", lambda: asked.append(1) or client)
    exits, wrong = tpu_workers.exits, [OSError("Forbidden"), RefreshError("Reauthentication is needed")]

    def broken(where):
        if wrong:
            raise wrong.pop()
        return exits(where)

    monkeypatch.setattr(tpu_workers, "exits", broken)
    away = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INTERNAL]
    cloud.lives = [[State.ACTIVE, *away, finishing(workdir)]]
    launch(f"--workdir={workdir}")
    assert (
        len(cloud.created) == len(cloud.deleted) == 1 and len(asked) == 2 + 5
    )  # to see that it is here, and to work with
    told = capsys.readouterr().err
    assert told.count("is out of sight and may bill") == told.count("is in sight again") == 2
    assert "Reauthentication is needed" in told


def test_renewed_buckets_are_reached_anew():
    from etils.epath import backend

    place = storage.path(f"{BUCKET}/renewed")
    place.write_text("one")
    before = backend.fsspec_backend.fs(place)
    assert backend.fsspec_backend.fs(place) is before
    storage.renew()
    assert backend.fsspec_backend.fs(place) is not before
    assert place.read_text() == "one"


@pytest.mark.parametrize("how", ["refused", "interrupted", "SIGTERM", "SIGHUP", "a fault"])
def test_the_last_words_are_what_still_bills(cloud, capsys, how):
    name = how.split()[-1].lower()
    workdir = f"{BUCKET}/runs/{name}"

    told = []

    def interrupted():
        # Once, because the thread that supervises may go on a little after the process no longer listens.
        if not told:
            told.append(how)
            signal.raise_signal(getattr(signal, "SIGINT" if how == "interrupted" else how))

    end = grpc.StatusCode.PERMISSION_DENIED if how == "refused" else State.ACTIVE
    cloud.lives = [[State.ACTIVE, end]]
    with pytest.MonkeyPatch.context() as patch, pytest.raises((SystemExit, ZeroDivisionError)):
        if how == "a fault":
            patch.setattr(tpu_workers, "exits", lambda workdir: 1 / 0)
        elif how != "refused":
            patch.setattr(tpu_supervisor.time, "sleep", lambda seconds: interrupted())
        launch(f"--workdir={workdir}")
    assert cloud.resources and not cloud.deleted
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == (
        f"flowlm-{name} IS NOT DELETED AND BILLS. Delete it by `gcloud compute tpus queued-resources delete flowlm-{name} "
        f"--project=p --zone=us-central1-a --force --quiet` or `python -m launch.run stop --workdir={workdir}`; "
        "the same command as before takes it up"
    )
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run.main(["stop", f"--workdir={workdir}"])
    assert not cloud.resources


@pytest.mark.parametrize("when", ["at once", "by the operation", "in the queue"])
def test_no_quota(cloud, when):
    said = "Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded."
    error = status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message=said)
    data = tpu_v2.QueuedResourceState.FailedData(error=error)
    queued = tpu_v2.QueuedResourceState(state=State.FAILED, failed_data=data)
    cloud.lives = [
        {
            "at once": grpc.StatusCode.RESOURCE_EXHAUSTED,
            "by the operation": error,
            "in the queue": [State.ACCEPTED, queued],
        }[when]
    ]
    assert said in error_of(f"--workdir={BUCKET}/runs/quota")
    assert len(cloud.created) == 1 and not cloud.resources


def test_stop_deletes_it(cloud, capsys):
    workdir = f"{BUCKET}/runs/stopped"

    def stopped():
        run.main(["stop", f"--workdir={workdir}"])
        return State.ACTIVE

    cloud.lives = [[State.ACTIVE, stopped]]
    launch(f"--workdir={workdir}")
    assert len(cloud.deleted) == 1
    assert "flowlm-stopped stopped" in capsys.readouterr().err
