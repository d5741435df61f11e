"""Checkpoints of the reference (2602.16813, PyTorch) and exported safetensors, made into run directories.

Nothing is unpickled but tensors, plain containers, and objects of a few packages as inert records; no code of theirs is
imported or run. The architecture is the checkpoint's own settings', the vocabulary its tensors'.
"""

import collections
import os
import pickle
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from flowlm import config as settings
from flowlm.data import tokenizers
from flowlm.data.tokenizers import Tokenizer
from flowlm.engine.build import build
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.models.reference import BARE, MODULES, OUTPUT, from_reference
from flowlm.runs import directory as run_directory
from flowlm.runs import integrity, tensors
from flowlm.runs.checkpoint import save_params
from flowlm.runs.trained import load_trained
from flowlm.system import storage

ROTARY = "rotary_emb.inv_freq"  # a buffer of the reference; here it is computed
FAMILIES = {"flm": "flow", "fmlm": "flow_map", "mdlm": "masked", "ar": "autoregressive"}
OWN = "tokenizer.json"  # data.tokenizer of a run whose tokenizer has no other name than its file in the run directory
# Parts of names that say how a network was wrapped: by the trainer, by torch.compile, for several devices (DDP, DeepSpeed, FSDP).
WRAPPERS = ("backbone", "_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module")
NEVER = -1e9  # the bias of a token that is not predicted
# Classes of a checkpoint's hyperparameters that are read as plain records: none of their code is imported or run.
RECORDS = ("omegaconf.", "transformers.", "tokenizers.")
PLAIN = {
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.int": int,
    "builtins.str": str,
    "builtins.float": float,
}
PLAIN |= {"builtins.bool": bool, "collections.defaultdict": collections.defaultdict, "typing.Any": typing.Any}


class Source(NamedTuple):
    """What a file holds.

    Attributes:
      settings: those of the reference, or a ConfigDict with all of ours.
      arrays: by their names in the reference.
      step: of training, from which the arrays are.
    """

    settings: Mapping[str, Any] | ConfigDict
    arrays: Mapping[str, np.ndarray]
    step: int


class Imported(NamedTuple):
    """A run without a directory: settings, tokenizer, parameters and the step they are of."""

    config: ConfigDict
    tokenizer: Tokenizer
    params: Any
    step: int


class _Record(dict):
    """Stands in a checkpoint for an object of another package: keeps what it was made of and does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __setstate__(self, state):
        self.update(state if isinstance(state, dict) else {})


def _plain(value):
    """Nested dicts and lists of what may be nodes of OmegaConf."""
    if isinstance(value, _Record):
        return _plain(value["_content"]) if "_content" in value else value.get("_val")
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _bare_names(names: Iterable[str], source: str) -> dict[str, str]:
    """{name: the same without what the trainer, torch.compile and wrappers for several devices put before it or inside}."""
    bare = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names}
    if twice := [name for name, count in collections.Counter(bare.values()).items() if count > 1]:
        raise ValueError(f"{source} has {twice[0]} twice, under different prefixes: it cannot be imported")
    return bare


def _check_rotary(frequencies: np.ndarray, precision: float, source: str) -> None:
    """Raises ValueError where rotary frequencies are not those of base 10,000.

    Args:
      precision: relative precision of the type that they were saved in, because its rounding is no difference.
      source: where they are from, for the error.
    """
    expected = 1e4 ** (-np.arange(len(frequencies)) / len(frequencies))
    if not np.allclose(frequencies, expected, rtol=max(1e-4, precision), atol=0):
        raise ValueError(
            f"{source} has other rotary frequencies ({ROTARY}) than those of base 10,000: it cannot be imported"
        )


def read_ckpt(path: str | os.PathLike, weights: str) -> Source:
    """A Lightning checkpoint of the reference. Only tensors, plain containers and inert records are unpickled.

    Args:
      weights: `ema` for the averaged parameters, `live` for the others.

    Raises:
      ImportError: torch is not installed.
      ValueError: not such a checkpoint, damaged, or a pickle that asks for more than tensors; nothing of it has run then.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError("a .ckpt is read with PyTorch: pip install -e .[torch]") from error
    try:
        asked = set(torch.serialization.get_unsafe_globals_in_checkpoint(os.fspath(path)))
        records = {name for name in asked if name.startswith(RECORDS)}
        if refused := sorted(asked - records - PLAIN.keys()):
            raise ValueError(f"its pickle asks for {', '.join(refused)}, not only for tensors and plain containers")
        allowed = [(_Record, name) for name in records] + [(PLAIN[name], name) for name in asked & PLAIN.keys()]
        with torch.serialization.safe_globals(allowed):
            held = torch.load(os.fspath(path), map_location="cpu", weights_only=True)
        live, chosen = held["state_dict"], held["hyper_parameters"]["config"]
        average = held["ema"]["shadow_params"] if weights == "ema" and held.get("ema") else None
    except (
        RuntimeError,
        ValueError,
        pickle.UnpicklingError,
        EOFError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
        raise ValueError(f"{path} is no checkpoint that can be imported ({what}); nothing in it was run") from error

    def to_array(tensor):
        return tensor.detach().to(torch.float32).numpy()

    names = _bare_names(live, str(path))
    if average is None and weights == "ema":
        raise ValueError(f"{path} holds no averaged parameters: take the others with --weights=live")
    if average is not None:
        trained = [name for name in live if names[name] != ROTARY]
        if [a.shape for a in average] != [live[name].shape for name in trained]:
            raise ValueError(
                f"{path} has {len(average)} averaged arrays that do not go with its {len(trained)} parameters in order: "
                "take the others with --weights=live"
            )
        live = live | dict(zip(trained, average, strict=True))
    tensors = {names[name]: tensor for name, tensor in live.items()}
    if ROTARY in tensors:
        table = tensors.pop(ROTARY)
        _check_rotary(to_array(table), torch.finfo(table.dtype).eps, str(path))
    arrays = {name: to_array(tensor) for name, tensor in tensors.items()}
    return Source(_plain(chosen), arrays, int(held.get("global_step", 0)))


def read_safetensors(path: epath.Path) -> Source:
    """Arrays in the reference's names, with a config.json beside the file: ours (`flowlm export`), or of the reference.

    Raises:
      ImportError: safetensors is not installed. FileNotFoundError: no config.json. ValueError: damaged.
    """
    beside = path.parent / "config.json"
    if not beside.exists():
        raise FileNotFoundError(f"{path} has no config.json beside it, which says what network it is")
    chosen = storage.read_json(beside)
    held, step = tensors.read(path)
    names = _bare_names(held, str(path))
    arrays = {names[name]: np.asarray(array, np.float32) for name, array in held.items()}
    if ROTARY in arrays:
        precision = max(float(jnp.finfo(held[name].dtype).eps) for name in held if names[name] == ROTARY)
        _check_rotary(arrays.pop(ROTARY), precision, str(path))
    if "objective" in chosen:
        return Source(run_directory.settings_of(chosen, beside), arrays, step)
    return Source(chosen, arrays, step)


def load_imported(path: str | os.PathLike, weights: str = "ema", base: ConfigDict | None = None) -> Imported:
    """A `.ckpt` or `.safetensors` (or a directory with model.safetensors) as a run.

    Args:
      weights: of a .ckpt, `ema` or `live`.
      base: settings of an experiment, for all that a reference checkpoint does not tell: data, tokenizer, training (and its
        objective, if it is of the same family). Without it the tokenizer writes ids as numbers.

    Raises:
      FileNotFoundError, ImportError, ValueError: see read_ckpt, read_safetensors, from_reference; and where base has a tokenizer of
        another vocabulary.
    """
    path = storage.path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}: give a .ckpt or .safetensors of the reference, or an exported directory"
        )
    if path.suffix == ".ckpt":
        source = read_ckpt(path, weights)
    elif path.suffix != ".safetensors":
        raise ValueError(f"{path} is neither a .ckpt nor a .safetensors")
    elif weights == "live":
        raise ValueError(f"{path} holds one set of parameters: leave out --weights=live")
    else:
        integrity.check_files(path.parent)
        source = read_safetensors(path)
    if wrong := sorted(name for name, array in source.arrays.items() if not np.isfinite(array).all()):
        raise ValueError(
            f"{path} has numbers that are not finite in {len(wrong)} of its {len(source.arrays)} arrays "
            f"({', '.join(wrong[:4])}): its training diverged, take an earlier one"
        )
    if isinstance(source.settings, ConfigDict):
        if base is not None:
            raise ValueError(f"{path} brings all settings with it: leave out --config")
        config, tokenizer, arrays = source.settings, Tokenizer.load(path.parent / "tokenizer.json"), source.arrays
    else:
        config, tokenizer, arrays = _translate(source, base, path)
    net = build(config, tokenizer.vocab_size, tokenizer.start, trained=True).net
    return Imported(config, tokenizer, from_reference(arrays, net, str(path)), source.step)


def _architecture(told: Mapping[str, Any], path) -> tuple[str, int, dict[str, Any]]:
    """(family, length, fields of the `model` section) of the reference's settings."""
    try:
        algo, model = told["algo"], told["model"]
        name, backbone, causal = algo["name"], algo["backbone"], bool(algo["causal_attention"])
        fields = dict(
            width=int(model["hidden_size"]),
            blocks=int(model["n_blocks"]),
            heads=int(model["n_heads"]),
            cond=int(model["cond_dim"]),
            dropout=float(model["dropout"]),
            causal=causal,
            time_embeddings=0 if causal else 2 if algo["double_temb"] else 1,
            attention_cap=0.0 if causal else 50.0,
            logit_cap=0.0 if causal else 30.0,
            mask_token=name == "mdlm",
        )
        length = int(model["length"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the settings in {path} are not those of a reference run: {error!r}") from error
    if name not in FAMILIES or backbone != "dit":
        known = ", ".join(FAMILIES)
        raise ValueError(f"{path} is of {name!r} on {backbone!r}: only {known} on 'dit' can be imported")
    shown = algo.get("time_conditioning", told.get("time_conditioning"))  # MDLM's own code has it at the top
    if not causal and shown is not None and bool(shown) != (name != "mdlm"):
        here = "shown no time" if name == "mdlm" else "always shown the time"
        raise ValueError(
            f"{path} says time_conditioning: {bool(shown)}, but the family {FAMILIES[name]!r} is {here}: it cannot be imported, "
            "since it would compute something else here"
        )
    return FAMILIES[name], length, fields | BARE


def _translate(source: Source, base: ConfigDict | None, path) -> tuple[ConfigDict, Tokenizer, Mapping[str, np.ndarray]]:
    """Settings of ours, a tokenizer, and arrays whose mask, if there is one, is behind all tokens."""
    family, length, fields = _architecture(source.settings, path)
    config, arrays = settings.defaults(family), source.arrays
    if base is not None:
        ours = base.to_dict()
        config.update({k: v for k, v in ours.items() if k not in ("model", "objective", "teacher")})
        config.model.update(dtype=base.model.dtype, remat=base.model.remat)
        if base.objective.family == family:
            config.objective.update(ours["objective"])
    embedding = MODULES["embedding"]
    if embedding not in arrays:
        raise ValueError(f"{path} has no {embedding}")
    size = len(arrays[embedding])
    if base is None:
        config.data.update(name="none", tokenizer="none")
        tokenizer = tokenizers.numbers(size - (family == "masked"))
    else:
        tokenizer = tokenizers.shipped(config.data.tokenizer, config.data.dir)
    if family == "masked" and tokenizer.vocab_size == size and "[MASK]" in tokenizer.pieces:
        arrays = _mask_behind(arrays, tokenizer.pieces.index("[MASK]"))
        size += 1
    vocab = size - (family == "masked")
    if tokenizer.vocab_size == vocab - 1:  # the reference adds [PAD] to GPT-2's
        tokenizer, config.data.tokenizer = tokenizer.with_pad(), OWN
    if tokenizer.vocab_size != vocab:
        raise ValueError(
            f"{path} has {vocab} tokens, but the tokenizer {config.data.tokenizer!r} {tokenizer.vocab_size}: "
            "set --config.data.tokenizer"
        )
    config.prior, config.time_warp, config.data.length = "gaussian", "ambient", length
    config.model.update(fields, vocab_size=vocab)
    if family == "autoregressive":
        config.objective.start = tokenizer.start
        config.evaluation.steps = (config.data.length - 1,)
    return config.lock(), tokenizer, arrays


def _mask_behind(arrays: Mapping[str, np.ndarray], mask: int) -> dict[str, np.ndarray]:
    """arrays of a network whose mask is one of its tokens, with a copy behind all tokens; the token itself is not predicted."""
    arrays = {name: np.array(a) for name, a in arrays.items()}
    embedding, (kernel, bias) = MODULES["embedding"], OUTPUT
    arrays[kernel][mask], arrays[bias][mask] = 0, NEVER
    arrays[embedding] = np.concatenate([arrays[embedding], arrays[embedding][mask : mask + 1]])
    return arrays | {name: np.concatenate([arrays[name], np.zeros_like(arrays[name][:1])]) for name in OUTPUT}


def import_run(path: str | os.PathLike, to: str | os.PathLike, weights: str, base: ConfigDict | None) -> Imported:
    """Writes what `load_imported` reads to the new directory `to`, where sample, evaluate and a student's `teacher` find it.

    Raises:
      ValueError: `to` is not empty; and as `load_imported` does. RuntimeError: it cannot be read back.
    """
    run_directory.check_empty(to)
    run = load_imported(path, weights, base)
    if run.config.data.tokenizer == OWN:
        run.config.data.tokenizer = str(storage.path(to) / OWN)
    integrity.begin(to)
    run_directory.prepare_workdir(to, run.config, run.tokenizer)
    save_params(to, run.params, run.step, jnp.float32)
    facts = {"format": "params", "from": str(path), "step": run.step, "checksum": integrity.checksum(run.params)}
    integrity.seal(to, facts, lambda: load_trained(to, Layout(make_mesh(data=1))).params)
    return run
