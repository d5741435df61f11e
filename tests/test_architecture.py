"""Who may import whom: a module imports from its own room and from rooms of lower floors, never sideways or up."""

import ast
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
    {"training"},
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
