"""`flowlm prepare`: a user's own text to a folder that any run can train on, without the text.

manifest.json    sources with their sha256, counts, the cuts between the splits      tokenizer.json   the tokenizer
tfds/            rows, in array_record shards                                        tokens/          only while it is made
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from flowlm.data import dataset as reader
from flowlm.data import own_text, round_trip, tokenizers, train_tokenizers
from flowlm.data.corpora import SPLITS
from flowlm.data.tokenizers import Tokenizer
from flowlm.system import storage

# What another folder is wanted for; the rest of a manifest follows from it.
_ASKED = ("kind", "path", "text_key", "sources", "length")
# The share of characters that a tokenizer may change or drop unasked.
LOSSY = 0.01
# Characters that are taken through the tokenizer and back: all of a small text, as many pieces of a large one, evenly spaced.
_MEASURED = 20_000_000


def prepare_text(
    kind: str,
    path: str,
    tokenizer: str,
    length: int,
    out: str,
    data_dir: str,
    text_key: str = "text",
    allow_lossy: bool = False,
) -> dict:
    """Packs the text of `path` into rows of `length` ids under `out` and returns the manifest; taken up where it was cut.

    Args:
      kind: of own_text.KINDS.
      text_key: under which the lines of jsonl have their text.
      tokenizer: name or path (a fetched one lies under `data_dir`), or `bpe:SIZE` or `words:SIZE`, made of the train split.
      allow_lossy: take a tokenizer that changes or drops more than LOSSY of the characters.

    Raises:
      FileNotFoundError: no text, or no tokenizer.
      ValueError: damaged or too little text, `out` holds other text or is in a bucket, or the tokenizer loses too much.
        Nothing is left in `out` then that was not there before.
    """
    _check(kind, path, out, text_key)
    recipe = train_tokenizers.recipe(tokenizer)
    vocabulary = None if recipe else tokenizers.shipped(tokenizer, data_dir)
    out, path = Path(out).expanduser(), Path(path).expanduser()
    manifest = own_text.describe(kind, path, text_key) | {"length": length, "recipe": tokenizer if recipe else None}
    held = own_text.load_manifest(out) if (out / own_text.MANIFEST).exists() else {}
    _check_same(held, manifest, _ASKED, out)
    vocabulary = vocabulary or _made(recipe, manifest, held, out)
    manifest |= {"tokenizer_sha256": vocabulary.sha256, "vocab_size": vocabulary.vocab_size, "rows": None}
    _check_same(held, manifest, ["tokenizer_sha256"], out)
    if not held or held["rows"] is None:
        manifest["round_trip"] = held.get("round_trip") or _measure(vocabulary, manifest)
        _check_kept(manifest, tokenizer, allow_lossy)
        held = manifest
    return _pack(held, vocabulary, out)


def _check(kind: str, path: str, out: str, text_key: str) -> None:
    for name, place in (("--path", path), ("--out", out)):
        if str(place).startswith(storage.SCHEME):
            raise ValueError(
                f"{name}={place}: text is prepared on a disk; prepare it there and copy the folder, "
                f"`gcloud storage cp -r DATA {storage.SCHEME}...`, which training reads"
            )
    if kind not in own_text.KINDS:
        raise ValueError(f"unknown --source {kind!r}: choose one of {list(own_text.KINDS)}")
    if text_key != "text" and kind != "jsonl":
        raise ValueError(f"--text_key={text_key} is for --source=jsonl, not {kind}")


def _made(recipe: Callable[[Iterable[str]], Tokenizer], manifest: dict, held: dict, out: Path) -> Tokenizer:
    """The tokenizer of the folder, which holds the same text, if it was made so; else one that is made now."""
    if held.get("recipe") == manifest["recipe"] and (out / "tokenizer.json").is_file():
        vocabulary = Tokenizer.load(out / "tokenizer.json")
        if vocabulary.sha256 == held["tokenizer_sha256"]:
            return vocabulary
    return recipe(text for split, _, text in own_text.described(manifest) if split == "train")


def _check_same(held: dict, manifest: dict, names: Sequence[str], out: Path) -> None:
    if held and (differ := sorted(name for name in names if held.get(name) != manifest[name])):
        raise ValueError(f"{out} was prepared from something else ({', '.join(differ)} differ): give another --out")


def _measure(vocabulary: Tokenizer, manifest: dict) -> dict:
    texts = (text for _, _, text in own_text.described(manifest))
    return dataclasses.asdict(round_trip.measure(vocabulary, texts, -(-manifest["characters"] // _MEASURED)))


def _check_kept(manifest: dict, tokenizer: str, allow_lossy: bool) -> None:
    found = round_trip.RoundTrip(**manifest["round_trip"])
    if found.share > LOSSY and not allow_lossy:
        before, after = found.such_as
        raise ValueError(
            f"--tokenizer={tokenizer} changes or drops {100 * found.share:.1f} % of the characters, such as {before!r}, which "
            f"comes back as {after!r}: give --allow_lossy to have it so, or --tokenizer=bpe:4096, which keeps every character"
        )


def _pack(manifest: dict, vocabulary: Tokenizer, out: Path) -> dict:
    """The rows, and the manifest with their number; what is whole is left as it is."""
    held, empty = (out / own_text.MANIFEST).exists(), not out.exists() or not any(out.iterdir())
    out.mkdir(parents=True, exist_ok=True)
    storage.write_text(out / "tokenizer.json", vocabulary.json)
    # Before the packing, which reads it; rows are counted last, so a manifest that has them is of a folder that is whole.
    _write(out, manifest)
    try:
        dataset = reader.open_dataset("own_text", str(out / "tokenizer.json"), manifest["length"], out)
    except ValueError:  # it cannot be had as it is asked for, so nobody goes on with what was begun
        if not held:
            (out / own_text.MANIFEST).unlink()
        if empty:
            shutil.rmtree(out)
        raise
    manifest = manifest | {
        "rows": {split: len(getattr(dataset, split)) for split in SPLITS},
        "unspelled": dataset.unspelled,
    }
    _write(out, manifest)
    return manifest


def _write(out: Path, manifest: dict) -> None:
    storage.write_text(out / own_text.MANIFEST, json.dumps(manifest, indent=2) + "\n")
