"""`flowlm prepare`, and `flowlm prepare data`, `judge` and `qm9`."""

from absl.flags import FlagValues

from flowlm.cli.command import Command, choice, experiment, output, switch, text, whole
from flowlm.system.terminal import command

# The kinds of flowlm/data/sources.py, which is not imported here, because that takes a second.
SOURCES = "textfiles|jsonl|parquet|array_record|tfds:SET|hf:SET"
DATA_DIR = text("data_dir", "DIR", "the experiments' data.dir", "~/.cache/flowlm")
WORKERS = whole(
    "workers", "processes that read and tokenise; by default one a core, any number makes the same", None, 1
)


def _prepare(values: FlagValues) -> None:
    from flowlm.data.prepare import prepare_text
    from flowlm.data.round_trip import RoundTrip

    wanted = values.source, values.path, values.tokenizer, values.length, values.out
    how = values.text_key, values.allow_lossy, values.workers, values.host, values.packing
    manifest = prepare_text(*wanted, values.data_dir, *how)
    if manifest["rows"] is None:
        print(f"host {values.host} is done; the first host writes the manifest when all are")
        return
    if manifest.get("left_out", {}).get("files"):
        left_out = manifest["left_out"]
        print(f"left out: {left_out['files']} other files, such as {', '.join(left_out['such_as'])}")
    if manifest.get("duplicates"):
        total = sum(manifest["documents"].values())
        print(f"documents: {total}, of which {manifest['duplicates']} are copies of others")
    if "round_trip" in manifest:  # not in folders of older versions
        found = RoundTrip(**manifest["round_trip"])
        print(
            f"tokenizer: {manifest['vocab_size']} ids; {100 * found.share:.2g} % of the characters change or are dropped"
        )
    for split, rows in manifest["rows"].items():
        padding = f", {_padding(manifest, split)}" if "pads" in manifest else ""
        print(f"{split}: {manifest['documents'][split]} documents, {rows} rows of {manifest['length']}{padding}")
    print(f"{command()} train --config=experiments/my_text.py:{values.out} --workdir=DIR")


def _padding(manifest: dict, split: str) -> str:
    """What a split pays for rows that begin with documents."""
    ids = manifest["rows"][split] * (manifest["length"] - 1)
    cut = manifest["cut_documents"][split] / manifest["documents"][split]
    return f"{100 * manifest['pads'][split] / ids:.3g} % of their ids pads; {100 * cut:.3g} % of documents have several"


def _prepare_data(values: FlagValues) -> None:
    from flowlm.data.dataset import prepare_dataset
    from flowlm.system import parallel

    data = values.config.data
    workers = values.workers or parallel.cores()
    info = prepare_dataset(data.name, data.tokenizer, data.length, data.dir, workers=workers)
    for split in ("train", "validation", "test"):
        print(f"{split}: {info.splits[split].num_examples} rows of {data.length}")


def _prepare_judge(values: FlagValues) -> None:
    from flowlm.judges import smollm2

    print(smollm2.fetch_weights(values.data_dir))


def _prepare_qm9(values: FlagValues) -> None:
    from flowlm.data import qm9

    print(qm9.fetch_molecules(values.data_dir))


PREPARE = Command(
    "prepare",
    "makes data of your own text",
    [
        text(
            "source",
            SOURCES,
            "a document a file, a line, a row or a record; or a set of tfds or Hugging Face, by its folder or NAME[:SPLIT]",
        ),
        text("path", "PATH", "the file or the folder with the text, also in a bucket; not with tfds and hf"),
        text(
            "tokenizer",
            "NAME",
            "bpe:SIZE or words:SIZE to make one of the text, one that is shipped, or the path of its file",
        ),
        whole("length", "ids in a row", None, 2),
        output("out", "the folder to make, also in a bucket"),
        text(
            "text_key", "KEY", "the text's key in jsonl, its column in parquet or hf, its feature in a record", "text"
        ),
        choice(
            "packing",
            "documents laid end to end, or each in a row of its own with pads behind it; a longer one has several",
            "concatenated",
            ["concatenated", "documents"],
        ),
        WORKERS,
        text("host", "I/N", "this is host I of N that share the work and see DIR, the first being 0; or: cluster"),
        switch("allow_lossy", "take a tokenizer that changes or drops more than 1 % of the characters"),
        DATA_DIR,
    ],
    _prepare,
    needs=("source", "tokenizer", "length", "out"),
    again="the same command goes on from where it was",
)

PREPARE_DATA = Command(
    "prepare data",
    "makes the data of an experiment, as its first run would",
    [experiment("the experiment, with an argument of its own behind a colon"), WORKERS],
    _prepare_data,
    needs=("config",),
    again="the same command goes on from where it was",
)

PREPARE_JUDGE = Command("prepare judge", "fetches the pretrained judge smollm2", [DATA_DIR], _prepare_judge)

PREPARE_QM9 = Command("prepare qm9", "fetches the molecules of the corpus qm9", [DATA_DIR], _prepare_qm9)
