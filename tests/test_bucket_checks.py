"""What is looked at before machines are paid for: buckets, regions, prepared data, and what machines could not see."""

import json
import re
import shlex
from pathlib import Path

import pytest

from flowlm.system import storage
from launch import bucket_checks, job, run
from launch.bucket_checks import check_buckets

bucket_emulator = pytest.importorskip(
    "bucket_emulator",
    reason="gcsfs or gcp_storage_emulator is not installed: pip install -e .[dev]",
    exc_type=ImportError,
)
pytest.importorskip("gcsfs", reason="gcsfs is not installed: pip install -e .[dev]")

ROOT = Path(__file__).parents[1]
BUCKET = "gs://bucket"
ROWS = ("--config.data.name=openwebtext", "--config.data.tokenizer=sotu_bpe_512", "--config.data.length=8")
ZONE = "us-central1-a"


@pytest.fixture(scope="module", autouse=True)
def bucket(tmp_path_factory):
    """A bucket in the multi-region US, which is where the emulator says that it is."""
    with bucket_emulator.running(tmp_path_factory.mktemp("mirror")):
        yield


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def checked(*flags, workdir=f"{BUCKET}/runs/one", zone=ZONE):
    check_buckets([job.training_job("experiments/test.py", flags, workdir, None, {})], zone)


def objects():
    return sorted(map(str, storage.objects_below(storage.path(BUCKET))))


def test_nothing_is_left_behind():
    before = objects()
    checked()
    assert objects() == before and not storage.path(f"{BUCKET}/runs/one").exists()


US = {"location": "US", "locationType": "multi-region"}
TWO = {"location": "US", "locationType": "dual-region"}


@pytest.mark.parametrize(
    ("found", "zone", "holds"),
    [
        ({"location": "US-CENTRAL1", "locationType": "region"}, ZONE, True),
        ({"location": "US-CENTRAL1", "locationType": "region"}, "us-central2-b", False),
        ({"location": "EUROPE-WEST4"}, "europe-west4-a", True),
        (US, ZONE, True),
        (US, "europe-west4-a", False),
        (US, "northamerica-northeast1-a", False),
        ({"location": "EUR4", "locationType": "dual-region"}, "europe-west4-a", True),
        ({"location": "EUR4", "locationType": "dual-region"}, "asia-east1-a", False),
        (TWO | {"customPlacementConfig": {"dataLocations": ["US-EAST1", "US-WEST1"]}}, "us-east1-d", True),
        (TWO | {"customPlacementConfig": {"dataLocations": ["US-EAST1", "US-WEST1"]}}, ZONE, False),
        ({}, ZONE, True),
        (US, "", True),
    ],
    ids=str,
)
def test_a_bucket_holds_the_region_of_the_zone_or_is_refused(found, zone, holds, monkeypatch, capsys):
    """As far as both are known; who may not see where a bucket lies is told so."""
    monkeypatch.setattr(bucket_checks, "_described", lambda bucket: found)
    if holds:
        checked(zone=zone)
    else:
        region = zone.rpartition("-")[0]
        with pytest.raises(ValueError, match=f"is in .* and --zone={zone} in {region}, .*--location={region}` makes"):
            checked(zone=zone)
    assert ("cannot be seen with these rights" in capsys.readouterr().err) == (found == {})


def test_a_bucket_elsewhere_is_refused_by_the_command_before_any_request(monkeypatch):
    """As the service itself says where it lies."""
    tpu_vm = pytest.importorskip("launch.tpu_vm")
    monkeypatch.setattr(tpu_vm, "_git", lambda *words: "")
    monkeypatch.setattr(tpu_vm.cloud_tpu, "client", lambda: None)
    line = f"--backend=tpu_vm --config=experiments/test.py --workdir={BUCKET}/runs/far --project=p --accelerator=v6e-8"
    with pytest.raises(SystemExit, match="launch: gs://bucket is in us and --zone=europe-west4-a in europe-west4"):
        run.main([*line.split(), "--zone=europe-west4-a"])
    assert not storage.path(f"{BUCKET}/runs/far").exists()


def test_a_bucket_that_is_not_there():
    with pytest.raises(RuntimeError, match="^there is no bucket gs://nowhere, or none to be seen: log in by `gcloud"):
        checked(workdir="gs://nowhere/runs/one")


def test_a_bucket_that_refuses_writes(monkeypatch):
    answer = bucket_emulator._Handler._answer_body

    def refuse(self):
        if self.command != "POST":
            return answer(self)
        self.send_response(403)
        self.send_header("Content-Length", "0")
        return super(bucket_emulator._Handler, self).end_headers()

    monkeypatch.setattr(bucket_emulator._Handler, "_answer_body", refuse)
    with pytest.raises(RuntimeError, match=r"^gs://bucket/runs/one cannot be written \(.*\): log in by") as refused:
        checked()
    assert "\n" not in str(refused.value)


def test_data_is_prepared_in_the_bucket_and_the_line_that_is_told_does_it(capsys):
    text = "\n".join(json.dumps({"text": f"text number {n} of thirty in all, and more"}) for n in range(30))
    (storage.path(BUCKET) / "data/sources/openwebtext/a.jsonl").write_text(text)
    flags = (*ROWS, f"--config.data.dir={BUCKET}/data")
    with pytest.raises(ValueError, match="gs://bucket/data has no prepared openwebtext in rows of 8, and each") as told:
        checked(*flags)
    _, _, code = shlex.split(re.search("`(python -c .*)`", str(told.value))[1])
    exec(code)
    checked(*flags)
    with pytest.raises(ValueError, match="in rows of 9"):
        checked(*flags, "--config.data.length=9")


@pytest.mark.parametrize("place", ["~/.cache/flowlm", "/data"])
def test_a_new_machine_has_only_what_comes_with_the_package(place):
    checked("--config.data.name=sotu", "--config.data.tokenizer=sotu_bpe_512", f"--config.data.dir={place}")
    with pytest.raises(
        ValueError, match=f"a new machine has no openwebtext in {place}: prepare it in a bucket, and give"
    ):
        checked(*ROWS, f"--config.data.dir={place}")


@pytest.mark.parametrize("setting", ["data.tokenizer", "data.mixture", "teacher", "init_from"])
def test_what_is_on_this_disk_alone_is_not_seen_by_machines(setting, tmp_path):
    with pytest.raises(ValueError, match=f"the machines cannot see {setting}={tmp_path}/a[:1]*: copy it to a bucket"):
        checked(
            f"--config.{setting}=('{tmp_path}/a:1',)"
            if setting == "data.mixture"
            else f"--config.{setting}={tmp_path}/a"
        )


def test_a_teacher_is_a_run_in_a_bucket_or_of_the_commit():
    with pytest.raises(ValueError, match="teacher=gs://bucket/runs/none is not the directory of a run: it has no"):
        checked(f"--config.teacher={BUCKET}/runs/none")
    (storage.path(BUCKET) / "runs/taught/config.json").write_text("{}")
    checked(f"--config.teacher={BUCKET}/runs/taught")
    checked(f"--config.init_from={next((ROOT / 'checkpoints').glob('*/config.json')).parent.relative_to(ROOT)}")
