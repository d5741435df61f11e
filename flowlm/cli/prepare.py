"""`flowlm prepare` and `flowlm prepare judge`."""

from absl.flags import FlagValues

from flowlm.cli.command import Command, choice, output, text, whole
from flowlm.terminal import command

DATA_DIR = text("data_dir", "DIR", "the experiments' data.dir", "~/.cache/flowlm")


def _prepare(values: FlagValues) -> None:
    from flowlm.data.prepare import prepare

    wanted = values.source, values.path, values.tokenizer, values.length, values.out
    manifest = prepare(*wanted, values.data_dir, values.text_key)
    if manifest.get("left_out", {}).get("files"):
        left_out = manifest["left_out"]
        print(f"left out: {left_out['files']} other files, such as {', '.join(left_out['such_as'])}")
    for split, rows in manifest["rows"].items():
        print(f"{split}: {manifest['documents'][split]} documents, {rows} rows of {manifest['length']}")
    print(f"{command()} train --config=experiments/own_text.py:{values.out} --workdir=DIR")


def _prepare_judge(values: FlagValues) -> None:
    from flowlm.judges import smollm2

    print(smollm2.prepare(values.data_dir))


PREPARE = Command(
    "prepare",
    "makes data of your own text",
    [
        choice("source", "a document a file, or a document a line", None, ["textfiles", "jsonl"]),
        text("path", "PATH", "the file or the folder with the text"),
        text("tokenizer", "NAME", "a tokenizer that is shipped, or the path of its file"),
        whole("length", "ids in a row", None, 2),
        output("out", "the folder to make"),
        text("text_key", "KEY", "the key of a document's text in a line of jsonl", "text"),
        DATA_DIR,
    ],
    _prepare,
    needs=("source", "path", "tokenizer", "length", "out"),
)

PREPARE_JUDGE = Command("prepare judge", "fetches the pretrained judge smollm2", [DATA_DIR], _prepare_judge)
