""".github/workflows: it tests the versions that setup.cfg promises, and what its lines name is there."""

import configparser
import itertools
import re
import shlex
from pathlib import Path

import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
JOBS = yaml.safe_load((ROOT / ".github/workflows/tests.yaml").read_text())["jobs"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def lines(job, point):
    """The commands of a job's steps at a point of its matrix."""
    for step in JOBS[job]["steps"]:
        text = re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda found: point[found[1]], step.get("run", ""))
        yield from (shlex.split(line, comments=True) for line in text.splitlines())


def points(matrix):
    """The points of a matrix, as GitHub makes them: all of its product but what is excluded, or those that are listed."""
    if "include" in matrix:
        return matrix["include"]
    names = [name for name in matrix if name != "exclude"]
    made = [dict(zip(names, values)) for values in itertools.product(*(matrix[name] for name in names))]
    return [point for point in made if not any(left.items() <= point.items() for left in matrix["exclude"])]


def test_every_pair_of_promised_versions_is_tested_that_can_be_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    promised = SpecifierSet(setup["options"]["python_requires"])
    pythons = [f"3.{n}" for n in range(30) if f"3.{n}" in promised]
    (jax,) = re.findall(r"^jax (.*)$", setup["options"]["install_requires"], re.MULTILINE)
    jaxes = [f"0.{n}" for n in range(30) if f"0.{n}" in SpecifierSet(jax)]
    # As their own metadata says: jax 0.10 needs Python 3.11, jax 0.11 needs 3.12.
    expected = [{"python": p, "jax": j} for p in pythons for j in jaxes if (p, j) != ("3.11", "0.11")]
    assert points(JOBS["tests"]["strategy"]["matrix"]) == expected


def test_what_the_tests_are_started_by_is_there():
    *_, last = lines("tests", {"python": "3.11", "jax": "0.10"})
    assert last[2] == "bash" and (ROOT / last[3]).is_file()
    assert JOBS["tests"]["env"]["PIP_CONSTRAINT"].startswith("/")


def test_images_are_built_of_what_is_there():
    known = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    stages = set(re.findall(r"^FROM \S+ AS (\w+)", DOCKERFILE, re.MULTILINE))
    for point in JOBS["image"]["strategy"]["matrix"]["include"]:
        (build,) = (words for words in lines("image", point) if words[:2] == ["docker", "build"])
        given = dict(word.split("=", 1) for before, word in itertools.pairwise(build) if before == "--build-arg")
        assert given.keys() == known - {"BASE"} and given["COMMIT"] == "$GITHUB_SHA"
        assert (ROOT / "requirements" / f"{given['EXTRAS'].replace(',', '+')}.txt").is_file()
        assert {word.partition("=")[2] for word in build if word.startswith("--target=")} <= stages
