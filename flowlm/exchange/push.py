"""A trained run sent to the Hugging Face Hub, from where `hub:NAME/MODEL` reads it (system/hub.py)."""

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from flowlm.engine.sharding import Layout
from flowlm.exchange.export import export
from flowlm.system import hub


class Pushed(NamedTuple):
    """Where a run is on the Hub.

    Attributes:
      place: hub:NAME/MODEL@COMMIT.
      address: of its page.
    """

    place: str
    address: str


def push(directory: str | os.PathLike, repo: str, layout: Layout, private: bool = False) -> Pushed:
    """Exports what `load_trained` reads in `directory` as safetensors with a card, and sends that to the model `repo`.

    The repository is made if it is not there. Files of the same names are replaced, others are left.

    Args:
      repo: NAME/MODEL.
      private: only who is allowed to can read it. A repository that is there and public is refused then, before anything is sent.

    Raises:
      ImportError: names the extra. PermissionError: there is no login, or it may not write there. Others: as `export`, hub.telling.
    """
    place = f"{hub.SCHEME}{repo}"
    name, revision = hub.parts(place)
    if revision is not None:
        raise ValueError(f"--repo={repo} names a revision, and what is pushed makes a new one: leave out @{revision}")
    client = hub.client()
    api = client.HfApi()
    with hub.telling(place):
        api.whoami()  # because an export may take minutes
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "export"
        export(directory, out, layout, format="safetensors", published=place)
        with hub.telling(place):
            address = api.create_repo(name, private=private or None, exist_ok=True)
            shown = not api.model_info(name).private
        if private and shown:
            raise ValueError(f"{place} is public already: make it private on its page, or leave out --private")
        files = sorted(file for file in out.rglob("*") if file.is_file())
        added = [client.CommitOperationAdd(file.relative_to(out).as_posix(), file) for file in files]
        with hub.telling(place):
            # One commit, so that nobody finds files beside the manifest of others.
            commit = api.create_commit(name, added, commit_message="flowlm push")
    return Pushed(f"{place}@{commit.oid}", str(address))
