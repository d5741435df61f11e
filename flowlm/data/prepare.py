"""`flowlm prepare`: turns a user's own text into a folder; runs train on the folder and do not need the text.

manifest.json    sources with their sha256, counts, the cuts between the splits      tokenizer.json   the tokenizer
tfds/            rows, in array_record shards                                        tokens/          only while it is made
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from flowlm.data import dataset as reader
from flowlm.data import own_text, round_trip, sources, tokenizers, train_tokenizers
from flowlm.data.corpora import SPLITS
from flowlm.data.sources import SOURCES
from flowlm.data.tokenizers import Tokenizer
from flowlm.system import parallel, storage

# What a folder was prepared from: it is reused only if these keys of its manifest agree.
_ASKED = ("kind", "path", "text_key", "sources", "length")
# The share of characters that a tokenizer may change or drop without --allow_lossy.
LOSSY = 0.01
# About how many characters are encoded and decoded to measure the loss; of a larger text, evenly spaced pieces are.
_MEASURED = 20_000_000


def prepare_text(
    source: str,
    path: str | None,
    tokenizer: str,
    length: int,
    out: str,
    data_dir: str,
    text_key: str = "text",
    allow_lossy: bool = False,
    workers: int | None = None,
) -> dict:
    """Packs text into rows of `length` ids under `out` and returns the manifest; resumes an interrupted call.

    Args:
      source: one of sources.forms().
      path: the file or folder of the text, which may be in a bucket; None if `source` says where it is.
      tokenizer: a name, a path, or `bpe:SIZE` or `words:SIZE`, which is trained on the train split.
      data_dir: folder that holds fetched tokenizers.
      text_key: the name of the text in a document of several named parts.
      allow_lossy: whether to accept a tokenizer that changes or drops more than LOSSY of the characters.
      workers: processes that read and tokenise; by default one for each core. Any number makes the same bytes.

    Raises:
      FileNotFoundError: the text or the tokenizer is missing.
      ValueError: the text is damaged or too short, `out` holds other text or is in a bucket, or the tokenizer loses too much.
        Then `out` is left as it was before.
    """
    kind, place = _asked(source, path, out, text_key)
    workers = workers or parallel.cores()
    recipe = train_tokenizers.recipe(tokenizer)
    vocabulary = None if recipe else tokenizers.shipped(tokenizer, data_dir)
    out = Path(out).expanduser()
    manifest = own_text.describe(kind, place, text_key, workers) | {
        "length": length,
        "recipe": tokenizer if recipe else None,
    }
    held = own_text.load_manifest(out) if (out / own_text.MANIFEST).exists() else {}
    _check_same(held, manifest, _ASKED, out)
    vocabulary = vocabulary or _made(recipe, manifest, held, out)
    manifest |= {"tokenizer_sha256": vocabulary.sha256, "vocab_size": vocabulary.vocab_size, "rows": None}
    _check_same(held, manifest, ["tokenizer_sha256"], out)
    if not held or held["rows"] is None:
        manifest["round_trip"] = held.get("round_trip") or _measure(vocabulary, manifest)
        _check_kept(manifest, tokenizer, allow_lossy)
        held = manifest
    return _pack(held, vocabulary, out, workers)


def _asked(source: str, path: str | None, out: str, text_key: str) -> tuple[str, str]:
    """(kind, place) of the text. Raises ValueError: what was asked for does not fit together."""
    kind, colon, place = source.partition(":")
    found = SOURCES.get(kind)
    if found is None or (colon and not found.place):
        raise ValueError(f"unknown --source={source}: choose one of {', '.join(sources.forms())}")
    if found.place and not place:
        raise ValueError(f"--source={source} does not say where the text is: give --source={kind}:{found.place}")
    if found.place and path:
        raise ValueError(
            f"--path={path} is not for --source={source}, which says itself where the text is: leave it out"
        )
    if not found.place and not path:
        raise ValueError(f"prepare needs --path=PATH with --source={source}: give the file or folder of the text")
    if storage.in_bucket(out):
        raise ValueError(
            f"--out={out}: text is prepared on a disk; prepare it there and copy the folder, "
            f"`gcloud storage cp -r DATA {storage.SCHEME}...`, which training reads"
        )
    if text_key != "text" and not found.keyed:
        keyed = ", ".join(name for name, each in SOURCES.items() if each.keyed)
        raise ValueError(f"--text_key={text_key} is for --source={keyed}, not {kind}: leave it out")
    return kind, place or path


def _made(recipe: Callable[[Iterable[str]], Tokenizer], manifest: dict, held: dict, out: Path) -> Tokenizer:
    """The folder's tokenizer if the same recipe made it (the text is known to be the same); otherwise trains a new one."""
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


def _pack(manifest: dict, vocabulary: Tokenizer, out: Path, workers: int) -> dict:
    """Writes the rows that are missing, and the manifest with their number."""
    held, empty = (out / own_text.MANIFEST).exists(), not out.exists() or not any(out.iterdir())
    out.mkdir(parents=True, exist_ok=True)
    storage.write_text(out / "tokenizer.json", vocabulary.json)
    # The manifest is written first because the packing reads it. It counts the rows only at the end, when the folder is whole.
    _write(out, manifest)
    try:
        dataset = reader.open_dataset("own_text", str(out / "tokenizer.json"), manifest["length"], out, workers)
    except ValueError:  # these settings can never work, so no later call could go on with the files begun here
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
