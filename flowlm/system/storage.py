"""Where files lie: the local disk, a bucket, or a model on the Hub (hub.py), behind one kind of path.

A bucket (`gs://NAME/...`) is reached by gcsfs, and by tensorstore for the arrays of checkpoints. Objects appear whole when
their writer closes them; there is no directory, no appending and no renaming, which is copying and deleting.
"""

import bz2
import contextlib
import errno
import gzip
import importlib.util
import io
import json
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from etils import epath

from flowlm.system import hub

SCHEME = "gs://"
MIRROR = "~/.cache/flowlm/buckets"
# Bytes of one request to a bucket. A request takes as long as some megabytes, so many small ones would be slow.
READ = 1 << 25
# What the operating system says where a disk, a user's share of it or a file takes no more.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def path(name: str | os.PathLike) -> epath.Path:
    """`name` as an absolute path, `~` expanded; of a model on the Hub the directory that it is fetched to, which is only read.

    Raises:
      ImportError: it is in a bucket or on the Hub, and what reads those is not installed. Others: as hub.fetch.
    """
    if hub.is_named(name):
        return epath.Path(hub.fetch(os.fspath(name)))
    found = epath.Path(name)
    if not in_bucket(found):
        return found.expanduser().resolve()
    if importlib.util.find_spec("gcsfs") is None:
        raise ImportError(f"{SCHEME} paths need gcsfs: `pip install -e .[gcp]` in the checkout")
    import fsspec.config

    os.environ["EPATH_USE_TF"] = "false"  # so that buckets are read the same way with and without TensorFlow
    # gcsfs caches listings, in which files that tensorstore or other hosts have just written would stay invisible.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return found


def spelled(name: str | os.PathLike) -> str:
    """`name` so that it means the same wherever and whenever it is read: absolute, or with the commit of a model on the Hub."""
    return hub.pinned(os.fspath(name)) if hub.is_named(name) else os.fspath(path(name))


def last_name(name: str | os.PathLike) -> str:
    """What a place is called by itself: the last part of its path, or the name of a model on the Hub."""
    return hub.parts(os.fspath(name))[0].rpartition("/")[2] if hub.is_named(name) else path(name).name


def renew() -> None:
    """Makes gcsfs read the credentials anew, because a process may run longer than a login lasts."""
    import gcsfs
    from etils.epath import backend

    gcsfs.GCSFileSystem.clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()


def in_bucket(place: str | os.PathLike) -> bool:
    return os.fspath(place).startswith(SCHEME)


def _unpack_zst(file: BinaryIO) -> BinaryIO:
    import pyarrow  # here, because few files are packed so

    return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"), 1 << 20)


# {a file's ending: what unpacks the file}
_UNPACK = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _unpack_zst}


def kind_of_file(name: str) -> str:
    """A file's name in small letters and without the ending that tells how it is packed: what lies in it is seen by its end."""
    name = name.lower()
    return next((name.removesuffix(ending) for ending in _UNPACK if name.endswith(ending)), name)


@contextlib.contextmanager
def open_bytes(place: os.PathLike) -> Iterator[BinaryIO]:
    """A file opened to be read from its beginning on, a little at a time; unpacked if it ends in .gz, .bz2, .xz or .zst.

    Raises:
      ValueError: what unpacks the file finds it cut or damaged.
    """
    place = epath.Path(place)
    unpack = _UNPACK.get(place.suffix.lower())
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(place.open("rb"))
        if in_bucket(place):
            file = stack.enter_context(io.BufferedReader(file, READ))
        if unpack is None:
            yield file
        else:
            stack.enter_context(telling_damage(place))
            yield stack.enter_context(unpack(file))


@contextlib.contextmanager
def telling_damage(place: os.PathLike) -> Iterator[None]:
    """Raises ValueError that names the file where those who unpack it, each in their own way, find it cut or damaged."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's own trouble, which has a number
            raise
        raise ValueError(f"{place} is cut or damaged ({_line(error)}): fetch it again") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def objects_below(place: epath.Path) -> Iterator[epath.Path]:
    """All objects below a place in a bucket, by one request for each folder, where asking of each path what it is takes long."""
    for folder, _, names in place.walk():
        whole = SCHEME + os.fspath(folder).removeprefix(SCHEME)  # gcsfs leaves the scheme out
        yield from (epath.Path(whole) / name for name in names)


def lines(place: os.PathLike) -> Iterator[tuple[int, bytes]]:
    """(number, line) of each line of a file that is not blank, counted from 1."""
    with open_bytes(place) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def check_literal(place: epath.Path) -> None:
    """Raises ValueError where Orbax would take the path of a save for a pattern, and not find again what it wrote there."""
    if odd := sorted(set("*?[\\") & set(os.fspath(place))):
        raise ValueError(
            f"{place} has {' '.join(odd)} in it, and nothing that is saved there could be read: give a path without * ? [ and \\"
        )


def check_writable(directory: str | os.PathLike) -> None:
    """Raises ValueError where nothing can be written to a directory that may not be there yet; makes nothing. Not of buckets."""
    if hub.is_named(directory):
        raise ValueError(f"{directory} is on the Hub, where only `flowlm push` writes: give a directory of your own")
    place = path(directory)
    if in_bucket(place):
        return
    above = next(above for above in (place, *place.parents) if above.exists())
    if not above.is_dir():
        raise ValueError(f"{above} is a file, where a directory is wanted: give another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"nothing can be written to {above}: give another place")


def check_writable_file(file: epath.Path) -> None:
    """Raises ValueError where a file cannot be written: it is a directory, or its directory is not there or cannot be written."""
    if in_bucket(file):
        return
    if file.is_dir():
        raise ValueError(f"{file} is a directory, where a file is wanted: give the path of a file")
    if not file.parent.exists():
        raise ValueError(f"there is no directory {file.parent} for {file.name}: make it first")
    check_writable(file.parent)
    if file.exists() and not os.access(file, os.W_OK):
        raise ValueError(f"{file} cannot be written: give another place")


@contextlib.contextmanager
def writing(place: os.PathLike) -> Iterator[None]:
    """Raises OSError, one line that names the place, where a disk is full or a bucket refuses what is written to it."""
    try:
        yield
    except Exception as error:  # writers of records and of buckets raise their own
        full = isinstance(error, OSError) and error.errno in _FULL
        if not (full or in_bucket(place) or isinstance(error, RuntimeError)):
            raise
        told = _line(error.strerror if full else error)
        mend = "get the right to write there" if in_bucket(place) else "make room there"
        raise OSError(f"{os.fspath(place)} cannot be written ({told}): {mend}, and do the same again") from error


def write_text(place: epath.Path, text: str) -> None:
    """Replaces a file at once: whoever reads it sees the old text or the new one, never a part."""
    with writing(place):
        if in_bucket(place):
            place.write_text(text, encoding="utf-8")
        else:
            temporary = place.with_suffix(".tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(place)


def read_json(place: epath.Path) -> Any:
    """What a JSON file holds. Raises ValueError: it is cut or damaged."""
    try:
        return json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{place} is cut or damaged ({error}): restore it from a copy, or make it again") from error


def mirror(place: epath.Path) -> epath.Path:
    """Where the copy of a place in a bucket lies on the local disk; a local place is its own."""
    if not in_bucket(place):
        return place
    return path(MIRROR) / os.fspath(place).removeprefix(SCHEME)


def fetch(place: epath.Path) -> epath.Path:
    """The file or directory on the local disk, for programs that read nothing else; copied from its bucket on first use.

    The copy appears whole or not at all. It is never made anew, so only what does not change may be fetched.
    """
    local = mirror(place)
    if in_bucket(place) and not local.exists() and place.exists():
        local.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=local.parent) as folder:
            part = epath.Path(folder) / local.name
            copy(place, part)
            try:
                os.replace(part, local)
            except OSError:  # a directory that another process brought first is the same
                if not local.is_dir():
                    raise
    return local


def move(source: epath.Path, target: epath.Path) -> None:
    """Renames a directory. A bucket has no renaming: a move cut short leaves the rest at its old place, and loses nothing."""
    if in_bucket(source):
        copy(source, target)
        source.rmtree()
    else:
        source.rename(target)


def put(file: str | os.PathLike, target: epath.Path) -> None:
    """Moves a local file to its place, where it appears whole or not at all; it stays where it was if that fails."""
    if in_bucket(target):
        import gcsfs

        gcsfs.GCSFileSystem().put_file(os.fspath(file), os.fspath(target))  # unlike a file object it leaves no part
        os.unlink(file)
        return
    with open(file, "rb") as content:
        os.fsync(
            content.fileno()
        )  # now, because after a crash of the machine the name could be there and the content not
    os.replace(file, target)


def copy(source: epath.Path, target: epath.Path, last: str = "") -> None:
    """Copies a file, or a directory with all in it; the file called `last` after all others, so that where it is all others are."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for inside in sorted(source.iterdir(), key=lambda inside: (inside.name == last, inside.name)):
            copy(inside, target / inside.name)
    else:
        with source.open("rb") as read, target.open("wb") as written:
            shutil.copyfileobj(read, written, 1 << 22)
