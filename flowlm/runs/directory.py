"""What a run leaves behind, so that any later command needs only its directory.

config.json      every setting, resolved          checkpoints/<step>   training state
inputs.json      digests of what it was made from
tokenizer.json   the tokenizer itself             metrics.jsonl        curves (curves.png draws them); in a bucket metrics/
versions.json    packages, commit and command     evaluation.json, samples.txt, trajectories.json
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from absl import logging
from ml_collections import ConfigDict

from flowlm.config import complete, defaults, flat
from flowlm.data import mixture, own_text
from flowlm.data.tokenizers import Tokenizer
from flowlm.runs import integrity, tensors
from flowlm.system import storage, terminal
from flowlm.system.processes import is_first

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
FREE = ("steps", "log_every", "tensorboard", "wandb", "mesh.", "checkpoint.", "evaluation.", "data.dir", "data.copy")
FREE += ("model.attention", "model.remat")


def settings_of(told: dict, source: str | os.PathLike) -> ConfigDict:
    """Saved settings, those that flowlm did not have yet at their defaults; locked.

    Raises:
      ValueError: they are not those of a run, or have some that this version does not know. source: their file, for that.
    """
    try:
        unknown = sorted(flat(told).keys() - flat(defaults(told["objective"]["family"]).to_dict()).keys())
        config = complete(ConfigDict(told))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source} has not the settings of a run ({error}): restore it from a copy") from error
    if unknown:
        shown = ", ".join(f"{key} = {flat(told)[key]!r}" for key in unknown[:4])
        raise ValueError(f"{source} has settings that this version of flowlm does not know ({shown}): use a newer one")
    return config


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def content_of_run(directory: str | os.PathLike) -> str | None:
    """Digest of a run, wherever it lies: settings, tokenizer, manifest (integrity.py) and newest step. None if there is none."""
    directory = storage.path(directory)
    files = [directory / name for name in ("config.json", "tokenizer.json", "manifest.json")]
    if not all(file.exists() for file in files[:2]):
        return None
    checkpoints = directory / "checkpoints"
    steps = [int(p.name) for p in checkpoints.iterdir() if p.name.isdigit()] if checkpoints.is_dir() else []
    return _digest(*(file.read_text() if file.exists() else "" for file in files), str(max(steps, default="")))


def _is_own(data: Mapping) -> bool:
    return data["name"] in own_text.NAMES.values()


def content_of_data(config: ConfigDict) -> str | None:
    """Digest of the user's own text, wherever it lies: its manifest but for where its sources were; None of other data."""
    return own_text.content(storage.path(config.data.dir)) if _is_own(config.data) else None


def data_name(directory: str | os.PathLike) -> str | None:
    """What the rows of a run are, wherever they lie: runs with one name were judged beside the same text. None: no run is here."""
    directory = storage.path(directory)
    told = storage.read_json(directory / "config.json") if (directory / "config.json").exists() else {}
    if "data" not in told:
        return None
    data = told["data"]
    name = f"{data['name']}, {data['tokenizer']}"
    if _is_own(data):  # its settings name places, which say nothing of the text
        content = known_content(directory, ConfigDict({"data": data}), "data.dir")
        name = f"{data['name']} {content[:8] if content else data['dir']}"
    return f"{name}, rows of {data['length']}"


INPUTS = ("teacher", "init_from", "data.dir", "data.mixture")  # settings that name places


def _content(config: ConfigDict, name: str) -> str | None:
    """Digest of what lies where a setting of INPUTS says, or None."""
    if name == "data.dir":
        return content_of_data(config)
    if name == "data.mixture":
        return mixture.content(config.data.mixture)
    return content_of_run(config[name]) if config[name] else None


def known_content(workdir: str | os.PathLike, config: ConfigDict, name: str) -> str | None:
    """`_content` as it was when the run began; of a run that did not record it, as it is where the run says that it lies."""
    record = storage.path(workdir) / "inputs.json"
    return json.loads(record.read_text()).get(name) if record.exists() else _content(config, name)


def _differences(workdir: str | os.PathLike, held: ConfigDict, wanted: ConfigDict) -> dict[str, tuple]:
    """{setting: (there, here)} of those that make another experiment. A place is what lies there, not how it is spelled."""
    old, new = (flat(json.loads(config.to_json())) for config in (held, wanted))
    # The tokenizer is compared by its own digest.
    free = (*FREE, "data.tokenizer")
    changed = {k: (old.get(k), new.get(k)) for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)}
    differ = {k: pair for k, pair in changed.items() if not k.startswith(free)}
    for name in changed.keys() & set(INPUTS):
        there, here = changed[name]
        if not there or not here:
            continue
        before, now = known_content(workdir, held, name), _content(wanted, name)
        if _absolute(there) == _absolute(here):
            differ.pop(name, None)
        elif None not in (before, now) and before == now:
            differ.pop(name, None)
            logging.warning("%s was %s and is %s now: the content is the same", name, there, here)
        elif None not in (before, now):
            differ[name] = there, here
    return differ


def _absolute(told: str | Sequence[str]) -> str | list[str]:
    """A setting that names one place, or the folders of `data.mixture`, so that it holds wherever it is read."""
    return storage.spelled(told) if isinstance(told, str) else [str(part) for part in mixture.parts(told)]


def _git_commit() -> str:
    """The commit of the checkout that runs; in an image, which has no .git, the one that its build recorded in FLOWLM_COMMIT."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():  # git itself would answer for a repository that the package lies in
        return os.environ.get("FLOWLM_COMMIT") or "unknown"
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


PROGRAM = "sampler.jax"  # the file that makes a directory one of programs


def is_importable(path: str | os.PathLike) -> bool:
    """Whether a path looks like what importing.load_imported reads: a .ckpt, a .safetensors, or a directory with safetensors."""
    path = storage.path(path)
    return path.suffix in (".ckpt", ".safetensors") or (path / tensors.FILE).exists()


def check_is_run(path: str | os.PathLike) -> None:
    """Raises ValueError where a run is wanted and there is what another command reads, or what was not written to its end."""
    integrity.check_finished(path)
    if is_importable(path) and not tensors.has_run(path):
        raise ValueError(
            f"{path} is a checkpoint in another format: make a run of it by `flowlm import {path} --to=DIR`"
        )
    if (storage.path(path) / PROGRAM).exists():
        raise ValueError(f"{path} holds programs, no run: `python examples/run_exported.py {path} 8 0` runs them")


def check_empty(directory: str | os.PathLike) -> None:
    """Raises ValueError where a new directory is wanted and there is something in this one, or nothing can be saved in it."""
    storage.check_literal(storage.path(directory))
    storage.check_writable(storage.path(directory))
    if storage.path(directory).exists() and any(storage.path(directory).iterdir()):
        raise ValueError(f"{directory} is not empty: give a new directory, or remove it first")


def check_workdir(workdir: str | os.PathLike, config: ConfigDict, tokenizer: Tokenizer) -> None:
    """Raises ValueError where `workdir` holds a run with other settings, which it names, or another tokenizer; or is read-only."""
    storage.check_writable(workdir)
    workdir = storage.path(workdir)
    storage.check_literal(workdir)
    if (workdir / "config.json").exists():
        integrity.check_finished(workdir)
        held, held_tokenizer = load_workdir(workdir)
        if changed := _differences(workdir, held, config):
            shown = ", ".join(f"{k} = {there!r} there, {here!r} here" for k, (there, here) in list(changed.items())[:4])
            raise ValueError(
                f"workdir {workdir} holds a run of another experiment ({len(changed)} settings differ: {shown}): "
                "give another --workdir, or the settings it was started with"
            )
        if held_tokenizer.sha256 != tokenizer.sha256:
            raise ValueError(f"workdir {workdir} holds a run with another tokenizer: give another --workdir")


def prepare_workdir(workdir: str | os.PathLike, config: ConfigDict, tokenizer: Tokenizer, copied: bool = False) -> None:
    """Makes `workdir` this experiment's, or checks that it already is. Of several processes all check and the first writes.

    Args:
      copied: the settings are of another run directory, whose inputs need not be here, so no digests of them are recorded.

    Raises:
      ValueError: as `check_workdir`.
    """
    check_workdir(workdir, config, tokenizer)
    workdir = storage.path(workdir)
    if not is_first():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    versions = {
        "python": platform.python_version(),
        "git_commit": _git_commit(),
        "device": jax.devices()[0].device_kind,
    }
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    if (line := terminal.line()) and not copied:
        versions["command"] = line
    if not (workdir / "tokenizer.json").exists():
        tokenizer.save(workdir / "tokenizer.json")
    storage.write_text(workdir / "versions.json", json.dumps(versions, indent=2) + "\n")
    wanted = json.loads(config.to_json())
    if not copied:
        inputs = {name: known_content(workdir, config, name) or _content(config, name) for name in INPUTS}
        storage.write_text(workdir / "inputs.json", json.dumps(inputs, indent=2) + "\n")
        # Places are written so that they hold whatever directory the next command is given in.
        wanted |= {name: _absolute(wanted[name]) for name in ("teacher", "init_from") if wanted[name]}
        wanted["data"]["mixture"] = _absolute(wanted["data"]["mixture"])
    # The config.json is written last, so that a directory that has one is whole.
    storage.write_text(workdir / "config.json", json.dumps(wanted, indent=2) + "\n")


def load_workdir(workdir: str | os.PathLike) -> tuple[ConfigDict, Tokenizer]:
    """Settings of a run (those that flowlm did not have yet at their defaults), locked, and its tokenizer.

    Raises:
      FileNotFoundError: `workdir` is not a run directory. ValueError: its settings are damaged or not known here (settings_of).
    """
    workdir = storage.path(workdir)
    if not (workdir / "config.json").exists():
        raise FileNotFoundError(
            f"{workdir} is not a run directory (no config.json): give the --workdir of a `flowlm train`"
        )
    try:
        told = json.loads((workdir / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{workdir / 'config.json'} is damaged ({error}): restore it from a copy") from error
    return settings_of(told, workdir / "config.json"), Tokenizer.load(workdir / "tokenizer.json")
