"""Models on the Hugging Face Hub, which are named hub:NAME/MODEL[@REVISION] wherever a checkpoint is read.

A model there is what `flowlm push` wrote: a directory with a manifest (manifest.py). Its files, and no others of the repository,
are fetched into the cache of the Hub's own client, and are trusted only if each has the sha256 that the manifest says. Nothing is
unpickled. Who may read and write is settled by the client's own login, which is neither read nor shown here.
"""

import contextlib
import functools
import glob
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from flowlm.system import manifest

SCHEME = "hub:"


def is_named(place: str | os.PathLike) -> bool:
    """Whether a place is a model on the Hub."""
    return os.fspath(place).startswith(SCHEME)


def parts(place: str) -> tuple[str, str | None]:
    """("NAME/MODEL", revision or None) of a place on the Hub. Raises ValueError: it names none."""
    found = re.fullmatch(rf"{SCHEME}([\w.-]+/[\w.-]+)(?:@([^@\s]+))?", place)
    if found is None:
        raise ValueError(f"{place} is no name of a model on the Hub: write hub:NAME/MODEL or hub:NAME/MODEL@REVISION")
    return found[1], found[2]


def client() -> ModuleType:
    """The Hub's own client. Raises ImportError, which names the extra, where it is not installed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("models on the Hub need huggingface_hub: pip install -e .[hub]") from error
    return huggingface_hub


@contextlib.contextmanager
def telling(place: str) -> Iterator[None]:
    """Says in one line, with the mend, what the client says of a place on the Hub.

    Raises:
      FileNotFoundError: it is not there, or not for this login. ValueError: it is no model of flowlm, or no name for the client.
      PermissionError: this login may not do that. ConnectionError: the Hub cannot be reached, or its answer cannot be used.
    """
    from huggingface_hub import errors

    try:
        yield
    except (errors.RevisionNotFoundError, errors.RepositoryNotFoundError) as error:
        mend = "log in by `hf auth login` if it is private or gated, otherwise mend the name"
        if isinstance(error, errors.RevisionNotFoundError):
            mend = "give a branch, a tag or a commit that it has"
        raise FileNotFoundError(f"the Hub shows no {place} to this login: {mend}") from error
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(f"the Hub cannot be reached, and {place} is not in its cache: try again later") from error
    except errors.EntryNotFoundError as error:
        raise ValueError(
            f"{place} is no model of flowlm, because it has no {manifest.MANIFEST}: `flowlm push` makes one"
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise PermissionError(f"{place} needs a login: `hf auth login`") from error
    except errors.HFValidationError as error:
        raise ValueError(f"{place} is no name that the Hub takes: {_line(error)}") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise PermissionError(
                f"the Hub refuses {place} to this login ({status}): `hf auth login` with a token that may do this"
            ) from error
        raise ConnectionError(f"the Hub answers {status} for {place}: try again later") from error
    except Exception as error:  # those of the network, of which each version of the client has its own
        raise ConnectionError(f"{place} could not be exchanged with the Hub ({_line(error)}): try again") from error


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200].rstrip(".")


@functools.cache
def fetch(place: str) -> Path:
    """The directory of a model on this disk, one and the same in all of a process. Says in one line what it downloads, if anything.

    Raises:
      ImportError: as `client`. FileNotFoundError, PermissionError, ConnectionError: as `telling`.
      ValueError: `place` names no model, or its files are not those that its manifest names.
    """
    name, revision = parts(place)
    hub = client()
    with telling(place):
        folder = Path(hub.hf_hub_download(name, manifest.MANIFEST, revision=revision)).parent
    altered = f"{place} is not what was pushed there ({{}}): tell its owner, or remove {folder} if this disk changed it"
    try:
        facts = manifest.read(folder)
    except ValueError as error:
        raise ValueError(altered.format(manifest.MANIFEST)) from error
    if facts is None:
        raise ValueError(
            f"{place} is no model of flowlm, because its {manifest.MANIFEST} is of something else: `flowlm push` makes one"
        )
    if wanted := list(manifest.wrong(folder, facts)):
        whole = f"{SCHEME}{name}@{folder.name[:7]}"
        print(f"fetching {len(wanted)} files of {whole} from {hub.constants.ENDPOINT}", file=sys.stderr)
        patterns = [glob.escape(file) for file in wanted]
        with telling(place):
            hub.snapshot_download(name, revision=folder.name, allow_patterns=patterns, force_download=True)
        if wrong := list(manifest.wrong(folder, facts)):
            raise ValueError(altered.format(", ".join(wrong)))
    return folder


def pinned(place: str) -> str:
    """The place with its commit for a revision: what it names now, for ever."""
    return f"{SCHEME}{parts(place)[0]}@{fetch(place).name}"
