"""Documents of each corpus: a registry from a corpus's name to the functions that find and read its files.

A corpus is a stream of (split, id, text), read once and never whole in memory; nothing is downloaded. The files that a corpus
needs lie under `<data_dir>/sources`. A missing file raises an error before any work, which says what to put where.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import lzma
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator
from typing import BinaryIO

from absl import logging

from flowlm.data import json_lines, own_text, qm9, word_tokens
from flowlm.data.grammar import shipped_names
from flowlm.data.packing import SPLITS
from flowlm.system import storage

Document = tuple[str, str, str]
Path = pathlib.Path


@dataclasses.dataclass(frozen=True)
class Corpus:
    """How to read one corpus.

    Attributes:
      check: (sources directory) raises FileNotFoundError where files are missing.
      read: (sources directory) -> the documents (split, id, text), lazily, in one pass over the files.
      separated: whether documents are independent texts, so that a start token belongs between them.
      rows: None of most. Otherwise documents are sentences, each a row of its own, and `rows` names a tokenizer with a pad that
        suits the corpus; documents that the tokenizer cannot spell or that are longer than a row are left out.
      padded: whether each document begins a row, with pads behind it. Without `rows`, one that is longer has several rows.
      licence: of its texts, in words.
    """

    check: Callable[[Path], None]
    read: Callable[[Path], Iterator[Document]]
    separated: bool
    rows: str | None = None
    padded: bool = False
    licence: str = "not known here"


def _require(found: bool, path: Path, mend: str) -> None:
    if not found:
        raise FileNotFoundError(f"corpus source {path} is missing: {mend}")


def _decoded(content: bytes, encoding: str, path: Path) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from error


# --- sotu: the speeches that come with the package ---------------------------------------------------------------

SOTU = Path(__file__).parent / "sotu" / "speeches.jsonl.xz"
SOTU_SHA256 = "bc5452d617d186d3062bedcf97bbf738d1c19a63b8326060472a1f7a09e531fd"


def sotu_split(year: int) -> str:
    """The split of a year's speeches. One year in twenty validates and one tests, so that each split spans all eras."""
    return {12: "validation", 19: "test"}.get(year % 20, "train")


def _check_sotu(sources: Path) -> None:
    del sources
    _require(SOTU.is_file(), SOTU, "install flowlm again")


def _shipped_lines(path: Path, sha256: str) -> Iterator[str]:
    packed = path.read_bytes()
    digest = hashlib.sha256(packed).hexdigest()
    if digest != sha256:
        raise ValueError(f"{path} is damaged (sha256 {digest}, expected {sha256}): install flowlm again")
    yield from io.StringIO(lzma.decompress(packed).decode("ascii"))


def _read_sotu(sources: Path) -> Iterator[Document]:
    del sources
    for line in _shipped_lines(SOTU, SOTU_SHA256):
        document = json.loads(line)
        yield sotu_split(int(document["id"][:4])), document["id"], document["text"]


# --- everyday: the sentences that come with the package ----------------------------------------------------------

EVERYDAY = Path(__file__).parent / "everyday" / "sentences.txt.xz"
EVERYDAY_SHA256 = "8798a7891bbc703b65a764c8d74c229b1af10bc470edaa82d06be8a90154229a"


def everyday_split(sentence: str) -> str:
    """A sentence's split; validation and test hold a twentieth each. Sentences with the same words share it, in any case."""
    words = " ".join(token for token in word_tokens.split(sentence.lower()) if token not in word_tokens.PUNCTUATION)
    return {0: "validation", 1: "test"}.get(own_text.key(words) % 20, "train")


def _check_everyday(sources: Path) -> None:
    del sources
    _require(EVERYDAY.is_file(), EVERYDAY, "install flowlm again")


def _read_everyday(sources: Path) -> Iterator[Document]:
    del sources
    # The file is in order of the alphabet because it packs smaller so. The sort mixes it, so that a split's first rows are typical.
    sentences = [line.rstrip("\n") for line in _shipped_lines(EVERYDAY, EVERYDAY_SHA256)]
    for sentence in sorted(sentences, key=own_text.key):
        yield everyday_split(sentence), str(own_text.key(sentence)), sentence


# --- text8: one text of 100M characters, cut 90M / 5M / 5M -------------------------------------------------------

_TEXT8_SIZE = 100_000_000


def _check_text8(sources: Path) -> None:
    found = (sources / "text8").is_file() or (sources / "text8.zip").is_file()
    _require(found, sources / "text8", "put text8 or text8.zip of http://mattmahoney.net/dc/text8.zip there")


@contextlib.contextmanager
def _open_text8(sources: Path) -> Iterator[tuple[BinaryIO, int]]:
    plain = sources / "text8"
    if plain.is_file():
        with storage.open_bytes(plain) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            yield file, size
    else:
        with (
            storage.open_bytes(sources / "text8.zip") as file,
            zipfile.ZipFile(file) as archive,
            archive.open("text8") as content,
        ):
            yield content, archive.getinfo("text8").file_size


def _read_text8(sources: Path) -> Iterator[Document]:
    """Each split is one text, because a tokenizer strips the blanks at the ends of a text."""
    with _open_text8(sources) as (file, size):
        if size != _TEXT8_SIZE:
            logging.warning("%s has %d characters, text8 has %d; cut 90/5/5 %%", sources / "text8", size, _TEXT8_SIZE)
        bounds = (0, size * 90 // 100, size * 95 // 100, size)
        for split, (begin, end) in zip(SPLITS, itertools.pairwise(bounds), strict=True):
            yield split, split, _decoded(file.read(end - begin), "ascii", sources / "text8")


# --- lm1b: the archive's two directories, a sentence a line ------------------------------------------------------

_LM1B_TRAIN = "training-monolingual.tokenized.shuffled"
_LM1B_HELD_OUT = "heldout-monolingual.tokenized.shuffled"


def _lm1b_files(directory: str, sources: Path) -> list[Path]:
    return sorted((sources / "lm1b" / directory).glob("news.en*"))


def _check_lm1b(sources: Path) -> None:
    archive = "1-billion-word-language-modeling-benchmark-r13output"
    for directory, least in ((_LM1B_TRAIN, 1), (_LM1B_HELD_OUT, 2)):
        mend = f"put the directory of that name of the archive {archive} there, with its news.en* files"
        _require(len(_lm1b_files(directory, sources)) >= least, sources / "lm1b" / directory, mend)


def _read_lm1b(sources: Path) -> Iterator[Document]:
    """The first held-out file is the customary test set; the other held-out files validate."""
    held_out = _lm1b_files(_LM1B_HELD_OUT, sources)
    files = {"train": _lm1b_files(_LM1B_TRAIN, sources), "validation": held_out[1:], "test": held_out[:1]}
    for split, paths in files.items():
        for path in paths:
            for number, line in storage.lines(path):
                if sentence := _decoded(line, "utf-8", path).strip():
                    yield split, f"{path.name}-{number}", sentence


# --- openwebtext: JSON lines, a document a line ------------------------------------------------------------------

_OPENWEBTEXT_HELD_OUT = 100_000


def _openwebtext_files(sources: Path) -> list[Path]:
    return sorted(
        p for p in (sources / "openwebtext").glob("*") if storage.kind_of_file(p.name).endswith(json_lines.ENDING)
    )


def _check_openwebtext(sources: Path) -> None:
    mend = 'put *.jsonl files there, a document a line: {"text": "..."}'
    _require(bool(_openwebtext_files(sources)), sources / "openwebtext", mend)


def _read_openwebtext(sources: Path) -> Iterator[Document]:
    """The last 100,000 documents (of a small set, a tenth) are held out: half validates, half tests.

    Only the end of the files tells which documents are last. Because the files are read once, 100,000 texts (half a gigabyte)
    wait in memory.
    """
    texts = (text for path in _openwebtext_files(sources) for _, text in json_lines.texts(path))
    waiting, number = collections.deque(), -1
    for number, text in enumerate(texts):
        waiting.append(text)
        if len(waiting) > _OPENWEBTEXT_HELD_OUT:
            yield "train", str(number + 1 - len(waiting)), waiting.popleft()
    total = number + 1
    held_out = max(2, min(_OPENWEBTEXT_HELD_OUT, total // 10))
    if total <= held_out:
        raise ValueError(f"{sources / 'openwebtext'} has {total} documents; at least 3 are needed, one for each split")
    while left := len(waiting):
        split = "test" if left <= held_out // 2 else "validation" if left <= held_out else "train"
        yield split, str(total - left), waiting.popleft()


# --- the registry ------------------------------------------------------------------------------------------------

CORPORA = {
    "sotu": Corpus(
        _check_sotu, _read_sotu, separated=True, licence="CC0 1.0, speeches of the United States Government"
    ),
    "everyday": Corpus(
        _check_everyday,
        _read_everyday,
        separated=True,
        rows="everyday_1000",
        padded=True,
        licence="CC BY 2.0 FR, sentences by the contributors of Tatoeba (https://tatoeba.org)",
    ),
    "qm9": Corpus(qm9.check_sources, qm9.read_sources, separated=True, rows="qm9", padded=True),
    "text8": Corpus(_check_text8, _read_text8, separated=False),
    "lm1b": Corpus(_check_lm1b, _read_lm1b, separated=True),
    "openwebtext": Corpus(_check_openwebtext, _read_openwebtext, separated=True),
    own_text.NAMES["concatenated"]: Corpus(own_text.check_sources, own_text.read_sources, separated=True),
    own_text.NAMES["documents"]: Corpus(own_text.check_sources, own_text.read_sources, separated=True, padded=True),
}


def is_padded(name: str) -> bool:
    """Whether each text of `data.name` begins a row, with pads behind it; rows of a grammar are not meant."""
    return name in CORPORA and CORPORA[name].padded


def licence(name: str) -> str:
    """The licence of the texts of `data.name`, in words."""
    if name in shipped_names():
        return "Apache-2.0, drawn from a grammar of flowlm"
    return CORPORA[name].licence if name in CORPORA else Corpus.licence


def check_corpus(name: str, data_dir: str | Path) -> None:
    """Raises FileNotFoundError, with the mend, where files of the corpus are missing."""
    CORPORA[name].check(storage.path(data_dir) / "sources")


def read_corpus(name: str, data_dir: str | Path) -> Iterator[Document]:
    """Streams the (split, id, text) of all documents of a corpus; the split is "train", "validation" or "test".

    Raises:
      FileNotFoundError: files of the corpus are missing; raised at the call, before the first document.
      ValueError: the files are there and damaged.
    """
    check_corpus(name, data_dir)
    return CORPORA[name].read(storage.path(data_dir) / "sources")


def documents(name: str, split: str, data_dir: str | Path) -> Iterator[tuple[str, str]]:
    """The (id, text) of each document of `read_corpus` that belongs to `split`."""
    return ((number, text) for found, number, text in read_corpus(name, data_dir) if found == split)
