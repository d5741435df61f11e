"""`flowlm prepare`: a user's own text to a folder that any run can train on, without the text.

manifest.json    sources with their sha256, counts, the cuts between the splits      tokenizer.json   the tokenizer
tfds/            rows, in array_record shards                                        tokens/          only while it is made
"""

import json
from pathlib import Path

from flowlm import storage, tokenizers
from flowlm.data import own_text, reader
from flowlm.data.corpora import SPLITS

# What another folder is wanted for; the rest of a manifest follows from it.
_ASKED = ("kind", "path", "text_key", "sources", "tokenizer_sha256", "length")


def prepare(kind: str, path: str, tokenizer: str, length: int, out: str, data_dir: str, text_key: str = "text") -> dict:
    """Packs the text of `path` into rows of `length` ids under `out` and returns the manifest; taken up where it was cut.

    Args:
      kind: of own_text.KINDS. tokenizer: name or path; a fetched one lies under `data_dir`.
      text_key: under which the lines of jsonl have their text.

    Raises:
      FileNotFoundError: no text, or no tokenizer. ValueError: damaged or too little text, `out` holds other text, or a bucket.
    """
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
    vocabulary = tokenizers.shipped(tokenizer, data_dir)
    out, path = Path(out).expanduser(), Path(path).expanduser()
    manifest = own_text.describe(kind, path, text_key) | {"tokenizer_sha256": vocabulary.sha256, "length": length}
    manifest["rows"] = None
    if (out / own_text.MANIFEST).exists():
        held = own_text.load(out)
        if differ := sorted(name for name in _ASKED if held.get(name) != manifest[name]):
            raise ValueError(f"{out} was prepared from something else ({', '.join(differ)} differ): give another --out")
        if held["rows"] is not None:
            manifest = held
    out.mkdir(parents=True, exist_ok=True)
    vocabulary.save(out / "tokenizer.json")
    # Before the packing, which reads it; rows are counted last, so a manifest that has them is of a folder that is whole.
    _write(out, manifest)
    dataset = reader.open_dataset("own_text", str(out / "tokenizer.json"), length, out)
    manifest["rows"] = {split: len(getattr(dataset, split)) for split in SPLITS}
    manifest["unspelled"] = dataset.unspelled
    _write(out, manifest)
    return manifest


def _write(out: Path, manifest: dict) -> None:
    temporary = out / f"{own_text.MANIFEST}.tmp"
    temporary.write_text(json.dumps(manifest, indent=2) + "\n")
    temporary.replace(out / own_text.MANIFEST)
