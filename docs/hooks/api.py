"""A page for each module of the package, written by its docstrings, and their places in the navigation."""

from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PACKAGE = "flowlm"


def modules() -> list[str]:
    """Dotted names, the package's own first."""
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return sorted(names, key=lambda name: (name.split(".")[:-1], name))


def page(name: str) -> str:
    """Where the page of a module lies."""
    return f"reference/api/{name}.md"


def on_config(config):
    """Puts the pages below `API`, those of a package's modules below it."""
    rooms: dict[str, list] = {}
    for name in modules():
        parts = name.split(".")
        is_package = (ROOT / Path(*parts)).is_dir()
        room = ".".join(parts[:2]) if len(parts) > 2 or (is_package and len(parts) > 1) else PACKAGE
        rooms.setdefault(room, []).append({name.removeprefix(f"{room}.") if name != room else name: page(name)})
    api = [{room: pages} for room, pages in rooms.items()]
    reference = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    next(entry for entry in reference if isinstance(entry, dict) and "API" in entry)["API"] = api
    return config


def on_files(files: Files, config) -> Files:
    """The pages themselves."""
    for name in modules():
        files.append(File.generated(config, page(name), content=f"::: {name}\n"))
    return files
