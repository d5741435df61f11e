"""Pictures of results/ stand on the pages as results/NAME.png: no copy of them lies in docs/."""

from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]


def on_files(files: Files, config) -> Files:
    """Adds them to what the site is made of."""
    for path in sorted((ROOT / "results").rglob("*.png")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files
