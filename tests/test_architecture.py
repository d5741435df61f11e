"""Who may import whom: a module imports from its own room and from rooms of lower floors, never sideways or up.

And what every file keeps to: its public functions have types, its functions and itself are short enough to be read at once.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = (
    {"system", "maths"},
    {"data", "models", "judges"},
    {"objectives"},
    {"config"},
    {"engine"},
    {"runs"},
    {"evaluation", "studies", "scale", "exchange"},
    {"training", "serving"},
    {"cli"},
    {"main"},
    {"__main__"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = {"config", "training", "main", "__main__", "__init__"}  # the modules of flowlm/ that lie in no room
# Arrays in, arrays out: the mathematics knows no settings, files, flags or tables.
PURE = {"maths", "models", "objectives"}
IMPURE = {
    "absl",
    "ml_collections",
    "orbax",
    "tensorflow_datasets",
    "grain",
    "rich",
    "matplotlib",
    "etils",
    "subprocess",
}


def imports(source: str):
    """Every dotted name that a source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            yield from ([f"flowlm.{a.name}" for a in node.names] if node.module == "flowlm" else [node.module or ""])
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


def wrong_imports(mine: str, source: str):
    """What a module in the room `mine` imports against the law."""
    for name in imports(source):
        top, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        # The front door, flowlm's own functions, is for the commands.
        if (
            top == "flowlm"
            and other != mine
            and (other in FLOOR or mine != "cli")
            and other
            and FLOOR[other] >= FLOOR[mine]
        ):
            yield name
        if mine in PURE and top in IMPURE:
            yield name


def room(path: Path) -> str:
    return path.relative_to(ROOT / "flowlm").parts[0].removesuffix(".py")


def test_every_import_goes_down():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / "flowlm").rglob("*.py"))
        if room(path) != "__init__"  # the front door imports in its functions what they need
        for name in wrong_imports(room(path), path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


def test_the_law_is_broken_by_what_goes_up_sideways_or_out():
    broken = (
        ("maths", "from flowlm.models.network import Network"),
        ("judges", "from flowlm.data import tokenizers"),
        ("evaluation", "def f():\n    from flowlm.studies import study"),
        ("system", "import flowlm.engine.state"),
        ("objectives", "from rich.table import Table"),
        ("runs", "from flowlm import training"),
    )
    for mine, source in broken:
        assert [*wrong_imports(mine, source)], source
    kept = (("engine", "from flowlm.maths import prior, vocab"), ("cli", "import flowlm"), ("scale", "import rich"))
    for mine, source in kept:
        assert not [*wrong_imports(mine, source)], source


def test_every_module_lies_in_a_room():
    assert {path.stem for path in (ROOT / "flowlm").glob("*.py")} == FILES
    rooms = {path.name for path in (ROOT / "flowlm").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(FLOOR) - FILES


# --- types, lengths and docstrings -------------------------------------------------------------------------------------------

MOST_LINES = {"function": 80, "file": 400}
SOURCES = [path for folder in ("flowlm", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]


def public_functions(body: list[ast.stmt], owner: str = ""):
    """(name, node, whether it is a method) of all functions that other modules may call."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield owner + node.name, node, bool(owner)


def untyped(source: str):
    """What the public functions of a source leave without a type: `name: parameter`, or `name: return`."""
    for name, node, method in public_functions(ast.parse(source).body):
        static = any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in node.decorator_list)
        arguments = [*node.args.posonlyargs, *node.args.args][method and not static :] + node.args.kwonlyargs
        for argument in (*arguments, node.args.vararg, node.args.kwarg):
            if argument is not None and argument.annotation is None:
                yield f"{name}: {argument.arg}"
        if node.returns is None:
            yield f"{name}: return"


def too_long(source: str):
    """Functions with more lines than may be, with their number; `file` where it is the file."""
    if (lines := source.count("\n")) > MOST_LINES["file"]:
        yield f"file: {lines}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and (lines := node.end_lineno - node.lineno + 1) > MOST_LINES["function"]:
            yield f"{node.name}: {lines}"


def unread(source: str):
    """Lines that a documentation tool does not read as one attribute of a class, or as one parameter of a function.

    It takes sections of lines `name: what it is`, set in below their heading, which is not the docstring's first line.
    """
    for node in ast.walk(ast.parse(source)):
        text = ast.get_docstring(node) if isinstance(node, ast.ClassDef | ast.FunctionDef) else None
        if text and re.match("(Attributes|Args):", text):
            yield f"{node.name}: {text.splitlines()[0]}"
        for section in re.findall(r"^(?:Attributes|Args):\n((?:  .*(?:\n|$))*)", text or "", re.MULTILINE):
            for line in re.findall(r"^  \S.*", section, re.MULTILINE):
                if not re.match(r"  \*{0,2}\w+: ", line) or re.search(r"\. \w+: ", line):
                    yield f"{node.name}: {line.strip()}"


def assert_nothing_found(search):
    wrong = [f"{path.relative_to(ROOT)} {each}" for path in SOURCES for each in search(path.read_text("utf-8"))]
    assert not wrong, "\n".join(wrong)


def test_public_functions_are_typed():
    assert_nothing_found(untyped)


def test_functions_and_files_are_short():
    assert_nothing_found(too_long)


def test_an_attribute_has_a_line_of_its_own():
    assert_nothing_found(unread)


def test_no_family_is_asked_what_it_has():
    """The contract of objectives/base.py says it, so an editor finds who answers."""
    assert_nothing_found(lambda source: re.findall(r"(?:hasattr|getattr)\([\w.]*family\b.*", source))


def test_a_missing_type_and_a_long_function_are_found():
    source = (
        "class A:\n    def f(self, a: int, b, *c, d=1, **e: int): ...\n    def _g(self, a): ...\ndef h() -> int: ...\n"
    )
    assert [*untyped(source)] == ["A.f: b", "A.f: d", "A.f: c", "A.f: return"]
    assert not [*too_long("def f():\n" + "    0\n" * 79)]
    assert [*too_long("def f():\n" + "    0\n" * 80)] == ["f: 81"]
    assert [*too_long("0\n" * 401)] == ["file: 401"]


def test_attributes_that_share_a_line_are_found():
    documented = 'class A:\n    """What it is.\n\n    Attributes:\n      {}\n    """\n'
    assert not [*unread(documented.format("one: 1, see B.two: it.\n      two: 2\n        and more."))]
    for line in ("one: 1. two: 2", "one, two: 1 and 2"):
        assert [*unread(documented.format(line))] == [f"A: {line}"]
    assert [*unread('class A:\n    """Attributes:\n    one: 1\n    """\n')] == ["A: Attributes:"]
