"""`flowlm prepare`: turns a user's own text into a folder; runs train on the folder and do not need the text.

manifest.json    sources with their sha256, counts, the cuts between the splits      tokenizer.json   the tokenizer
tfds/            rows, in array_record shards                                        tokens/          only while it is made
hosts/           only while several hosts make it: what each has to tell the others

The folder may be in a bucket. Then each shard is written on the disk, copied to the bucket and removed, and tokens lie below
`storage.MIRROR` until all shards are there.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence

from etils import epath

from flowlm.data import builders, own_text, round_trip, sources, tokenizers, train_tokenizers
from flowlm.data import dataset as reader
from flowlm.data.corpora import SPLITS
from flowlm.data.sources import SOURCES
from flowlm.data.tokenizers import Tokenizer
from flowlm.system import hosts as system_hosts
from flowlm.system import parallel, storage
from flowlm.system.hosts import Hosts

# What a folder was prepared from: it is reused only if these keys of its manifest agree.
_ASKED = ("kind", "path", "text_key", "sources", "length", "packing")
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
    host: str | None = None,
    packing: str = "concatenated",
) -> dict:
    """Packs text into rows of `length` ids under `out` and returns the manifest; resumes an interrupted call.

    Args:
      source: one of sources.forms().
      path: the file or folder of the text, which may be in a bucket; None if `source` says where it is.
      tokenizer: a name, a path, or `bpe:SIZE` or `words:SIZE`, which is trained on the train split.
      out: the folder to make, which may be in a bucket.
      data_dir: folder that holds fetched tokenizers.
      text_key: the name of the text in a document of several named parts.
      allow_lossy: whether to accept a tokenizer that changes or drops more than LOSSY of the characters.
      workers: processes that read and tokenise; by default one for each core. Any number makes the same bytes.
      host: which of several hosts that see `out` this is (`hosts.which`). Each reads its part of the files and writes its own
        shards; any number makes the same rows. The first writes the manifest at the end, others return one without numbers of rows.
      packing: "concatenated", documents laid end to end, or "documents": each begins a row, is filled up with pads, and has
        several rows if it is longer (packing.py). A tokenizer without a pad then gets one, as one more id.

    Raises:
      FileNotFoundError: the text or the tokenizer is missing.
      ValueError: the text is damaged or too short, `out` holds other text, or the tokenizer loses too much. Then `out` is left as
        it was before.
      RuntimeError: another host has failed.
    """
    if packing not in own_text.NAMES:
        raise ValueError(f"unknown --packing={packing}: choose one of {', '.join(own_text.NAMES)}")
    padded = packing == "documents"
    kind, place = _asked(source, path, text_key)
    workers = workers or parallel.cores()
    index, number = system_hosts.which(host)
    recipe = train_tokenizers.recipe(tokenizer, padded)
    vocabulary = None if recipe else _given(tokenizer, data_dir, padded)
    files, folder = SOURCES[kind].files(place), storage.path(out)
    held = own_text.load_manifest(folder) if (folder / own_text.MANIFEST).exists() else {}
    settings = {"kind": kind, "text_key": text_key, "length": length, "packing": {"rows": packing}}
    if number > 1 and held.get("rows"):
        _check_same(held, settings, [*settings], folder)
        return held
    asked = [kind, place, text_key, tokenizer, length, packing, [*map(SOURCES[kind].size, files[1])]]
    words = folder / "hosts" / hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    hosts = Hosts(index, number, words)
    hosts.begin()
    try:
        manifest = own_text.describe(kind, files, text_key, workers, hosts)
        manifest |= settings | {"recipe": tokenizer if recipe else None}
        _check_same(held, manifest, _ASKED, folder)
        if recipe:
            made = hosts.of_first("tokenizer", lambda: _made(recipe, manifest, held, folder).json)
            vocabulary = Tokenizer(made)
        manifest |= _of_tokenizer(vocabulary, packing) | {"rows": None}
        _check_same(held, manifest, ["tokenizer_sha256"], folder)
        if not held or held["rows"] is None:
            manifest["round_trip"] = held.get("round_trip") or _measure(vocabulary, manifest, hosts)
            _check_kept(manifest, tokenizer, allow_lossy)
            held = manifest
        return _pack(held, vocabulary, folder, workers, hosts)
    except Exception as error:
        with contextlib.suppress(OSError):
            hosts.leave("failed", str(error))
        raise


def _asked(source: str, path: str | None, text_key: str) -> tuple[str, str]:
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
    if text_key != "text" and not found.keyed:
        keyed = ", ".join(name for name, each in SOURCES.items() if each.keyed)
        raise ValueError(f"--text_key={text_key} is for --source={keyed}, not {kind}: leave it out")
    return kind, place or path


def _given(tokenizer: str, data_dir: str, padded: bool) -> Tokenizer:
    vocabulary = tokenizers.shipped(tokenizer, data_dir)
    return vocabulary.with_pad() if padded and vocabulary.pad is None else vocabulary


def _made(recipe: Callable[[Iterable[str]], Tokenizer], manifest: dict, held: dict, out: epath.Path) -> Tokenizer:
    """The folder's tokenizer if the same recipe made it (the text is known to be the same); otherwise trains a new one."""
    if held.get("recipe") == manifest["recipe"] and (out / "tokenizer.json").is_file():
        vocabulary = Tokenizer.load(out / "tokenizer.json")
        if vocabulary.sha256 == held["tokenizer_sha256"]:
            return vocabulary
    return recipe(text for split, _, text in own_text.described(manifest) if split == "train")


def _check_same(held: dict, manifest: dict, names: Sequence[str], out: epath.Path) -> None:
    def said(told: dict, name: str):
        return told["packing"]["rows"] if name == "packing" else told.get(name)

    if held and (differ := sorted(name for name in names if said(held, name) != said(manifest, name))):
        raise ValueError(f"{out} was prepared from something else ({', '.join(differ)} differ): give another --out")


def _measure(vocabulary: Tokenizer, manifest: dict, hosts: Hosts) -> dict:
    """What the tokenizer loses, each host having measured its own part."""
    texts = (text for _, _, text in own_text.described(manifest, _part(manifest, hosts)))
    mine = round_trip.measure(vocabulary, texts, -(-manifest["characters"] // _MEASURED))
    told = hosts.all("measured", dataclasses.asdict(mine))
    such_as = next((each["such_as"] for each in told if each["such_as"]), [])
    sums = {name: sum(each[name] for each in told) for name in ("characters", "changed")}
    return sums | {"such_as": such_as}


def _part(manifest: dict, hosts: Hosts) -> slice:
    return hosts.part([source["bytes"] for source in manifest["sources"]])


def _of_tokenizer(vocabulary: Tokenizer, packing: str) -> dict:
    """What a manifest says of the tokenizer, and of how rows are made of the documents (packing.py)."""
    if packing == "documents":
        how = {"longer_documents": "cut", "behind_documents": vocabulary.pieces[vocabulary.pad]}
    else:
        how = {"last_incomplete_row": "dropped", "between_documents": vocabulary.pieces[vocabulary.start]}
    told = {"tokenizer_sha256": vocabulary.sha256, "vocab_size": vocabulary.vocab_size}
    return told | {"packing": {"rows": packing} | how}


def _check_kept(manifest: dict, tokenizer: str, allow_lossy: bool) -> None:
    found = round_trip.RoundTrip(**manifest["round_trip"])
    if found.share > LOSSY and not allow_lossy:
        before, after = found.such_as
        raise ValueError(
            f"--tokenizer={tokenizer} changes or drops {100 * found.share:.1f} % of the characters, such as {before!r}, which "
            f"comes back as {after!r}: give --allow_lossy to have it so, or --tokenizer=bpe:4096, which keeps every character"
        )


def _pack(manifest: dict, vocabulary: Tokenizer, out: epath.Path, workers: int, hosts: Hosts) -> dict:
    """Writes the rows that are missing, and the manifest with their number."""
    held, empty = (out / own_text.MANIFEST).exists(), not out.exists() or not any(out.iterdir())
    hosts.of_first("begun", lambda: _begin(manifest, vocabulary, out))
    try:
        info = reader.prepare_dataset(
            own_text.data_name(manifest),
            os.fspath(out / "tokenizer.json"),
            manifest["length"],
            out,
            workers=workers,
            hosts=hosts,
            documents=lambda: own_text.described(manifest, _part(manifest, hosts)),
        )
    except ValueError:  # these settings can never work, so no later call could go on with the files begun here
        if hosts.number == 1 and not held:
            (out / own_text.MANIFEST).unlink()
        if hosts.number == 1 and empty:
            out.rmtree()
        raise
    if info is None:
        return manifest
    unspelled = dict(info.metadata or {})
    padded = unspelled.pop(builders.PADDED, {})
    rows = {split: info.splits[split].num_examples for split in SPLITS}
    manifest = manifest | {"rows": rows, "unspelled": unspelled} | padded
    _write(out, manifest)
    if (out / "hosts").exists():
        (out / "hosts").rmtree()
    return manifest


def _begin(manifest: dict, vocabulary: Tokenizer, out: epath.Path) -> None:
    """Writes what a call that goes on with this one must know; the manifest counts rows only when the folder is whole."""
    out.mkdir(parents=True, exist_ok=True)
    storage.write_text(out / "tokenizer.json", vocabulary.json)
    _write(out, manifest)


def _write(out: epath.Path, manifest: dict) -> None:
    storage.write_text(out / own_text.MANIFEST, json.dumps(manifest, indent=2) + "\n")
