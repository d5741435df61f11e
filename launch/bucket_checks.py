"""What a job needs of buckets, looked at before its machines are paid for.

All is asked as whoever gives the command, who writes there too. The machines act as someone else, whose rights only they can try.
"""

import contextlib
import os
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from flowlm.data import corpora, dataset
from flowlm.system import storage
from launch.job import Job, settings

LOGIN = "log in by `gcloud auth application-default login`, or ask for roles/storage.objectAdmin on it"
# How buckets of several regions are called, by the continent that the names of these regions begin with.
SEVERAL = {"us": ("US", "NAM"), "europe": ("EU", "EUR"), "asia": ("ASIA",)}


def check_buckets(jobs: Sequence[Job], zone: str = "") -> None:
    """Looks at the buckets of jobs, and leaves nothing in them.

    Args:
      zone: where the machines will be; empty: not known, so that it is compared with nothing.

    Raises:
      FileNotFoundError: a tokenizer must be fetched first.
      ValueError: what a job reads lies where machines cannot see it or is not there, or a bucket is in another region.
      RuntimeError: a bucket cannot be reached, or not be written.
    """
    wanted = [settings(job) for job in jobs]
    settled = [(each.data.dir, each.teacher, each.init_from, *each.data.mixture) for each in wanted]
    read = {place for places in settled for place in places if place}
    for bucket in sorted(
        {_bucket(place) for place in [*read, *(job.workdir for job in jobs)] if storage.in_bucket(place)}
    ):
        _check_region(bucket, zone)
    for workdir in {_bucket(job.workdir): job.workdir for job in jobs}.values():
        _check_writable(workdir)
    for config in {repr(config.data): config for config in wanted}.values():
        _check_data(config.data)
    for name in ("teacher", "init_from"):
        for run in sorted({config[name] for config in wanted if config[name]}):
            _check_run(name, run)


def _bucket(place: str) -> str:
    return place.removeprefix(storage.SCHEME).partition("/")[0]


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Raises RuntimeError, in one line, for whatever a bucket and its login answer but that something is not there."""
    import aiohttp
    import gcsfs.retry
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except FileNotFoundError:
        raise
    except (gcsfs.retry.HttpError, aiohttp.ClientError, GoogleAuthError, OSError) as error:
        raise RuntimeError(f"{what} ({' '.join(str(error).split())}): {LOGIN}") from error


def _check_region(bucket: str, zone: str) -> None:
    name, region = storage.SCHEME + bucket, zone.rpartition("-")[0]
    with _told(f"{name} cannot be reached"):
        found = _described(name)
    if not region:
        return
    if "location" not in found:
        print(f"where {name} lies cannot be seen with these rights: it must be in {region}", file=sys.stderr)
    elif not _holds(found, region):
        raise ValueError(
            f"{name} is in {found['location'].lower()} and --zone={zone} in {region}, so that reading would be slow and cost: "
            f"`gcloud storage buckets create gs://NAME --location={region}` makes a bucket there"
        )


def _described(bucket: str) -> dict[str, Any]:
    """What the service says of a bucket: where it lies only to who may see that, and to others as if it were not there."""
    from etils.epath import backend

    with contextlib.suppress(FileNotFoundError):
        return backend.fsspec_backend.fs(storage.path(bucket)).info(bucket)
    return {}


def _holds(found: dict[str, Any], region: str) -> bool:
    """Whether what is in a bucket lies in a region."""
    location = found["location"].upper()
    if found.get("locationType", "region") == "region":
        return location == region.upper()
    if both := (found.get("customPlacementConfig") or {}).get("dataLocations"):
        return region.upper() in both
    return location.rstrip("0123456789") in SEVERAL.get(region.partition("-")[0], ())


def _check_writable(workdir: str) -> None:
    with _told(f"{workdir} cannot be written"):
        probe = storage.path(workdir) / "launch" / f"probe-{uuid.uuid4().hex}"
        try:
            probe.write_text("")
            probe.unlink()
        except FileNotFoundError as error:
            raise RuntimeError(
                f"there is no bucket {storage.SCHEME}{_bucket(workdir)}, or none to be seen: {LOGIN}"
            ) from error


def _check_data(data: ConfigDict) -> None:
    """Raises ValueError where each machine would prepare the whole of the data, or has nothing to prepare it from."""
    _check_seen("data.tokenizer", data.tokenizer)
    for each in data.mixture:
        _check_seen("data.mixture", each)
    if _comes_along(data.name):
        return
    if not storage.in_bucket(data.dir):
        raise ValueError(
            f"a new machine has no {data.name} in {data.dir}: prepare it in a bucket, and give --config.data.dir=gs://..."
        )
    with _told(f"{data.dir} cannot be read"):
        there = dataset.is_prepared(data.name, data.tokenizer, data.length, data.dir)
    if not there:
        asked = ", ".join(map(repr, (data.name, data.tokenizer, data.length, data.dir)))
        raise ValueError(
            f"{data.dir} has no prepared {data.name} in rows of {data.length}, and each machine would prepare all of it: do it "
            f'once, here or on any other, by `python -c "from flowlm.data import open_dataset; open_dataset({asked})"`'
        )


def _comes_along(name: str) -> bool:
    """Whether data is made in a moment from what comes with the package."""
    with tempfile.TemporaryDirectory() as nothing:
        try:
            if name in corpora.CORPORA:
                corpora.check_corpus(name, nothing)
        except FileNotFoundError:
            return False
    return True


def _check_run(setting: str, run: str) -> None:
    _check_seen(setting, run)
    with _told(f"{run} cannot be read") if storage.in_bucket(run) else contextlib.nullcontext():
        there = (storage.path(run) / "config.json").exists()
    if not there:
        raise ValueError(f"{setting}={run} is not the directory of a run: it has no config.json")


def _check_seen(setting: str, place: str) -> None:
    """A relative path is of the commit, which the machines have."""
    if not storage.in_bucket(place) and os.path.isabs(os.path.expanduser(place)):
        raise ValueError(f"the machines cannot see {setting}={place}: copy it to a bucket, and give its name there")
