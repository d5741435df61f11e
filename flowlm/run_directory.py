"""What a run leaves behind, so that any later command needs only its directory.

config.json      every setting, resolved          checkpoints/<step>   training state
tokenizer.json   the tokenizer itself             metrics.jsonl        curves (curves.png draws them)
versions.json    packages and git commit          evaluation.json, samples.txt, trajectories.json
"""

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

from ml_collections import ConfigDict

from flowlm import storage
from flowlm.config import complete, flat
from flowlm.processes import is_first
from flowlm.tokenizers import Tokenizer

PACKAGES = (
    "flowlm",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "tensorflow-datasets",
    "grain",
    "tokenizers",
)
# Settings that may change when a run is taken up again: they do not change what has been learnt so far.
FREE = ("steps", "log_every", "tensorboard", "mesh.", "checkpoint.", "evaluation.", "data.dir")
FREE += ("model.attention", "model.remat")


def _git_commit() -> str:
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return commit.stdout.strip() or "unknown"


def check_empty(directory) -> None:
    """Raises ValueError where a new directory is wanted and there is something in this one."""
    if storage.path(directory).exists() and any(storage.path(directory).iterdir()):
        raise ValueError(f"{directory} is not empty: give a new directory, or remove it first")


def prepare(workdir, config: ConfigDict, tokenizer: Tokenizer) -> None:
    """Makes `workdir` this experiment's, or checks that it already is. Of several processes all check and the first writes.

    Raises:
      ValueError: it holds a run with other settings or another tokenizer; names them.
    """
    workdir = storage.path(workdir)
    wanted = json.loads(config.to_json())
    if (workdir / "config.json").exists():
        held, held_tokenizer = load(workdir)
        held = json.loads(held.to_json())
        old, new = flat(held), flat(wanted)
        changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and not k.startswith(FREE)]
        if changed:
            shown = ", ".join(f"{k} = {old.get(k)!r} there, {new.get(k)!r} here" for k in changed[:4])
            raise ValueError(
                f"workdir {workdir} holds a run of another experiment ({len(changed)} settings differ: {shown}): "
                "give another --workdir, or the settings it was started with"
            )
        if held_tokenizer.sha256 != tokenizer.sha256:
            raise ValueError(f"workdir {workdir} holds a run with another tokenizer: give another --workdir")
    if not is_first():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "git_commit": _git_commit()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    if not (workdir / "tokenizer.json").exists():
        tokenizer.save(workdir / "tokenizer.json")
    storage.write(workdir / "versions.json", json.dumps(versions, indent=2) + "\n")
    # Last, so that a directory with a config.json is whole.
    storage.write(workdir / "config.json", json.dumps(wanted, indent=2) + "\n")


def load(workdir) -> tuple[ConfigDict, Tokenizer]:
    """Settings of a run (those that flowlm did not have yet at their defaults), locked, and its tokenizer.

    Raises:
      FileNotFoundError: `workdir` is not a run directory.
    """
    workdir = storage.path(workdir)
    if not (workdir / "config.json").exists():
        raise FileNotFoundError(
            f"{workdir} is not a run directory (no config.json): give the --workdir of a `flowlm train`"
        )
    config = complete(ConfigDict(json.loads((workdir / "config.json").read_text())))
    return config, Tokenizer.load(workdir / "tokenizer.json")
