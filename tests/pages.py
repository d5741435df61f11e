"""What README, pages and runbook say that can be wrong: command lines, Python blocks, settings, files, links, names of code."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "launch/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
PROGRAMS = ("flowlm", ".venv/bin/flowlm", "bash", "python", ".venv/bin/python", "pip", "mkdocs")
# A page says NAME, DIR or N for what a reader puts there; the parser gets something that is there.
STANDS_FOR = {
    "experiments/NAME.py": "experiments/grammar.py",
    "[:arg]": "",
    "[:ARG]": "",
    "path.to.key=value": "seed=1",
    "key=value": "seed=1",
    "KEY=VALUE": "seed=1",
    "=N": "=2",
    "--backend=NAME": "--backend=local",
    ":NAME_cpu": ":target_cpu",
}
# Its folder exists on the reader's machine alone.
OWN_TEXT = re.compile(r"experiments/(my_text|fineweb_edu|tinystories)\.py:DATA")


class Said(NamedTuple):
    """Something on a page, and for the name of a test.

    Attributes:
      where: the page.
      what: the text.
      in_sentence: whether it stands within one, where a command may be named without all that it needs.
    """

    where: str
    what: str
    in_sentence: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, text) of the code blocks of a page; one by indentation has no language."""
    fence = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
    for match in fence.finditer(text):
        yield match[1], match[2]
    for match in re.finditer(r"(?:^    .*\n|^\n(?=    ))+", fence.sub("", text), re.MULTILINE):
        yield "", re.sub("^    ", "", match[0], flags=re.MULTILINE)


def _spans(text: str) -> Iterator[str]:
    """Code within sentences."""
    yield from re.findall(
        r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    )


def _said(kind) -> list[Said]:
    return [
        Said(page.relative_to(ROOT).as_posix(), what)
        for page in PAGES
        for what in dict.fromkeys(kind(page.read_text(encoding="utf-8")))
    ]


def command_lines() -> list[Said]:
    """Every line that a reader may give to a shell, of blocks and of sentences."""

    def of_blocks(text: str) -> Iterator[str]:
        for language, block in _blocks(text):
            if language in ("", "bash", "sh"):
                yield from block.replace("\\\n", " ").splitlines()

    def of_sentences(text: str) -> Iterator[str]:
        return (span for span in _spans(text) if " " in span)

    lines = _said(of_blocks) + [said._replace(in_sentence=True) for said in _said(of_sentences)]
    lines = [said._replace(what=" ".join(said.what.split())) for said in lines]
    return [said for said in lines if any(words[0] in PROGRAMS for words in split(said.what))]


def split(line: str) -> list[list[str]]:
    """The words of each command of a line, without comments, variables in front and brackets of what may be left out."""
    line = line.replace(" ... ", " ").replace(" ...", "").replace("[--", "--")
    line = re.sub(r"(--[^\s\[\]]+)\]", r"\1", line) if "pip" not in line else line
    for said, stands in STANDS_FOR.items():
        line = re.sub(re.escape(said) + r"(?!\w)", stands, line)
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # an apostrophe of a sentence
        return []
    commands: list[list[str]] = [[]]
    for word in words:
        if word == "&&":
            commands.append([])
        elif commands[-1] or not re.match(r"[A-Z_]+=", word):
            commands[-1].append(word)
    return [words for words in commands if words]


def python_blocks() -> list[Said]:
    """Every block of Python."""
    return _said(lambda text: (block for language, block in _blocks(text) if language == "python"))


def settings() -> list[Said]:
    """Every setting that a sentence names by its path."""
    sections = "data|model|objective|optimizer|mesh|checkpoint|evaluation"
    pattern = re.compile(rf"(?:--config\.|config\.)?((?:{sections})\.(?!json|png)[a-z_0-9]+)(?:=.*)?")
    return _said(lambda text: (match[1] for span in _spans(text) if (match := pattern.fullmatch(span))))


def files() -> list[Said]:
    """Every file or folder of the checkout that a sentence names; `*` stands for anything."""
    places = "flowlm|experiments|launch|tests|docs|results|examples|checkpoints|requirements"
    pattern = re.compile(rf"(?:{places})/[\w./*-]*[a-z/*]")
    return _said(lambda text: (span for span in _spans(text) if pattern.fullmatch(span)))


def links() -> list[Said]:
    """Every link and picture that leads to a file."""
    pattern = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)")
    return _said(lambda text: pattern.findall(re.sub(r"`[^`\n]*`", "", text)))


def names() -> list[Said]:
    """Every name of the package that a page links to."""
    return _said(lambda text: re.findall(r"\]\[(flowlm[\w.]*)\]", text))
