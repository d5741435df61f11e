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


def test_every_promised_version_is_tested():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    points = JOBS["tests"]["strategy"]["matrix"]["include"]
    promised = SpecifierSet(setup["options"]["python_requires"])
    assert {point["python"] for point in points} == {f"3.{n}" for n in range(30) if f"3.{n}" in promised}
    (jax,) = re.findall(r"^jax (.*)$", setup["options"]["install_requires"], re.MULTILINE)
    assert {point["jax"] for point in points} == {f"0.{n}" for n in range(30) if f"0.{n}" in SpecifierSet(jax)}


def test_what_the_tests_are_started_by_is_there():
    for point in JOBS["tests"]["strategy"]["matrix"]["include"]:
        *_, last = lines("tests", point)
        assert last[2] == "bash" and (ROOT / last[3]).is_file()
        assert JOBS["tests"]["env"]["PIP_CONSTRAINT"].startswith("/")


def test_images_are_built_of_what_is_there():
    known = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    stages = set(re.findall(r"^FROM \S+ AS (\w+)", DOCKERFILE, re.MULTILINE))
    for point in JOBS["image"]["strategy"]["matrix"]["include"]:
        (build,) = (words for words in lines("image", point) if words[:2] == ["docker", "build"])
        given = dict(word.split("=", 1) for before, word in itertools.pairwise(build) if before == "--build-arg")
        assert given.keys() <= known and given["COMMIT"] == "$GITHUB_SHA"
        assert (ROOT / "requirements" / f"{given['EXTRAS'].replace(',', '+')}.txt").is_file()
        assert {word.partition("=")[2] for word in build if word.startswith("--target=")} <= stages
