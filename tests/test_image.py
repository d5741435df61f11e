"""The image: the steps of the Dockerfile, carried out in a fresh directory, what gets into it, and what it is built on."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from string import Template

import pytest

from flowlm.runs import directory as run_directory

ROOT = Path(__file__).parents[1]
TOOLS = ("pip", "useradd", "chown")
DIGEST = "sha256:" + "0123456789abcdef" * 4


def stages():
    """[(name of its base, its own name, [(instruction, rest)])] of the Dockerfile; the first is of what stands above all."""
    out = [("", None, [])]
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line and not line.startswith("#"):
            word, rest = line.split(" ", 1)
            if word == "FROM":
                base, _, name = rest.partition(" AS ")
                out.append((base, name, []))
            else:
                out[-1][2].append((word, rest))
    return out


def patterns():
    """(what a pattern of .dockerignore matches, whether it leaves that out), in order."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    for line in (line for line in lines if line and not line.startswith("#")):
        parts = re.split(r"(\*\*/|\*)", line.removeprefix("!"))
        words = {"**/": "(?:.*/)?", "*": "[^/]*"}
        yield re.compile("".join(words.get(part, re.escape(part)) for part in parts)), not line.startswith("!")


def taken(name):
    """Whether a file of a checkout is copied: by the last of the patterns that it, or a folder that it is in, matches."""
    folders = [name, *map(str, Path(name).parents)]
    left_out = False
    for pattern, leaves_out in patterns():
        if any(map(pattern.fullmatch, folders)):
            left_out = leaves_out
    return not left_out


def carry_out(target, folder, path, **arguments):
    """Carries the steps out in `folder`/image. Returns (environment, user, label, entry).

    Args:
      path: where the tools are that the steps call, as PATH has it.
      arguments: those of the build.
    """
    found = {name: (base, steps) for base, name, steps in stages()}
    base, steps = found[target]
    steps = [*found[None][1], *(found[base][1] if base in found else []), *steps]
    image, user, label, entry, defaults = folder / "image", "root", "", [], {}
    environment = {"PATH": path, "HOME": str(folder)} | {k: v for k, v in os.environ.items() if k.startswith("PIP_")}
    image.mkdir()
    for word, rest in steps:
        if word == "ARG":
            name, _, default = rest.partition("=")
            defaults[name] = default or defaults.get(name, "")
            environment[name] = arguments.get(name, defaults[name])
        elif word in ("ENV", "LABEL"):
            value = Template(rest).substitute(environment)
            if word == "LABEL":
                label = value
            else:
                environment |= [value.split("=", 1)]
        elif word == "COPY":
            source, name = rest.split()
            for file in subprocess.check_output(["git", "-C", ROOT, "ls-files", source], text=True).splitlines():
                if taken(file):
                    (image / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / file, image / file)
        elif word == "RUN":
            subprocess.run(["sh", "-c", rest], cwd=image, env=environment, check=True)
        elif word == "USER":
            user = rest
        elif word == "ENTRYPOINT":
            entry = json.loads(rest)
        else:
            assert word == "WORKDIR"
    return environment, user, label, entry


def build(target, folder, **arguments):
    """`carry_out` with tools that only write down what they are asked and what has been copied then: (asked, environment, user)."""
    (folder / "bin").mkdir(parents=True)
    for tool in TOOLS:
        program = folder / "bin" / tool
        # A file that pip is told to read must have been copied by then.
        program.write_text(
            f'#!/bin/sh\n[ "$3" != --requirement ] || [ -e "$4" ] || exit 1\n'
            f'[ ! -e flowlm/__init__.py ] || with=" with the code"\necho "{tool} $@$with" >> "{folder}/said"\n'
        )
        program.chmod(0o755)
    environment, user, label, entry = carry_out(target, folder, f"{folder}/bin:{os.environ['PATH']}", **arguments)
    assert entry == ["flowlm"]
    return (folder / "said").read_text().splitlines(), environment, user, label


@pytest.mark.parametrize(("extras", "lock"), [("", "core"), ("cuda", "cuda"), ("tpu,gcp", "tpu+gcp")])
def test_an_image_installs_the_core_then_its_extras_then_the_code(tmp_path, extras, lock):
    """Each is a layer: the first is the same in all images, and a change of the code leaves both as they are."""
    said, environment, user, label = build("root", tmp_path, EXTRAS=extras, COMMIT="abc", BASE=f"python@{DIGEST}")
    assert said == [
        "pip install --no-cache-dir --requirement requirements/core.txt",
        f"pip install --no-cache-dir --requirement requirements/{lock}.txt",
        "pip install --no-cache-dir --no-deps --editable . with the code",
    ]
    assert environment["FLOWLM_COMMIT"] == "abc" and user == "root"
    assert f"image.base.name=python@{DIGEST} " in label and label.endswith("image.revision=abc")


def test_every_lock_leaves_the_layer_of_the_core_as_it_is():
    core = set((ROOT / "requirements/core.txt").read_text().splitlines())
    for lock in (ROOT / "requirements").glob("*.txt"):
        assert core <= set(lock.read_text().splitlines()), lock.name


def test_an_image_is_nobody_in_particular_unless_asked(tmp_path):
    last = stages()[-1][1]
    said, environment, user, _ = build(last, tmp_path)
    assert user == "flowlm" and environment["FLOWLM_COMMIT"] == "unknown"
    assert [line.split(" with ")[0] for line in said[-2:]] == [
        "useradd --create-home flowlm", "chown flowlm:flowlm /flowlm",
    ]  # fmt: skip


def test_extras_without_a_lock_end_the_build(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        build("root", tmp_path, EXTRAS="hf")


def test_what_lies_about_in_a_checkout_gets_into_no_image():
    for name in (
        ".env",
        "key.json",
        "runs/a/samples.txt",
        ".venv/bin/python",
        ".git/config",
        "data/text",
        "site/index.html",
    ):
        assert not taken(name)
    for name in (
        "flowlm/__pycache__/main.cpython-311.pyc",
        "flowlm.egg-info/PKG-INFO",
        "tests/toy.py",
        "results/a.csv",
    ):
        assert not taken(name)
    for name in ("flowlm/main.py", "flowlm/data/tokenizers/sotu_bpe_512.json", "setup.cfg", "experiments/lm1b.py"):
        assert (ROOT / name).is_file() and taken(name)
    assert taken("README.md") and taken("requirements/core.txt") and taken("checkpoints/everyday/config.json")


@pytest.mark.slow
def test_the_steps_build_what_trains_and_knows_its_commit(tmp_path):
    """For real, in a fresh directory, by a new Python of the base's version. No user is made, because this is no container."""
    wanted = re.search("python:([0-9.]+)", (ROOT / "Dockerfile").read_text())[1]
    here = "{}.{}".format(*sys.version_info)
    python = sys.executable if here == wanted else shutil.which(f"python{wanted}")
    if python is None:
        pytest.skip("there is no Python of the version of the Dockerfile's base")
    subprocess.run([python, "-m", "venv", tmp_path / "python"], check=True)
    for tool in TOOLS[1:]:
        (tmp_path / "python/bin" / tool).symlink_to(shutil.which("true"))
    path = f"{tmp_path}/python/bin:{os.environ['PATH']}"
    environment, _, _, (entry,) = carry_out(stages()[-1][1], tmp_path, path, EXTRAS="gcp", COMMIT="abc")
    quick = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": os.environ["XLA_FLAGS"]}
    inside = dict(cwd=tmp_path / "image", env=environment | quick, check=True)
    subprocess.run(["pip", "check"], **inside)
    subprocess.run([entry, "--help"], **inside)
    line = f"--config=experiments/test.py --workdir={tmp_path}/run --config.steps=2 --config.evaluation.every=2"
    subprocess.run([entry, "train", *line.split(), f"--config.data.dir={tmp_path}/data"], **inside)
    assert json.loads((tmp_path / "run/versions.json").read_text())["git_commit"] == "abc"
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["step"] == 2


def test_the_commit_of_an_image_is_what_its_build_was_told(tmp_path, monkeypatch):
    """Also where the directory around the code is a repository of something else."""
    for words in (["init", "-q"], ["-c", "user.name=n", "-c", "user.email=e", "commit", "--allow-empty", "-qm", "m"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    assert len(run_directory._git_commit().removesuffix("-dirty")) == 40
    (tmp_path / "image/flowlm").mkdir(parents=True)
    monkeypatch.setattr(run_directory, "__file__", str(tmp_path / "image/flowlm/runs/directory.py"))
    monkeypatch.setenv("FLOWLM_COMMIT", "abc")
    assert run_directory._git_commit() == "abc"
    monkeypatch.setenv("FLOWLM_COMMIT", "")
    assert run_directory._git_commit() == "unknown"


# ---- What it is built on -----------------------------------------------------------------------------------------

CURL = f"""#!{sys.executable}
# A registry: it gives a token to who asks for the repository, and a digest to who has the token and wants an index.
import sys
words, url = sys.argv[1:], sys.argv[-1]
if "/token?" in url:
    assert "scope=repository:library/python:pull" in url
    print('{{"token":"a-token","access_token":"another"}}')
else:
    assert url == "https://registry-1.docker.io/v2/library/python/manifests/3.11-slim", url
    assert "--head" in words and "Authorization: Bearer a-token" in words
    assert "Accept: application/vnd.oci.image.index.v1+json" in words
    print("HTTP/1.1 200 OK\\r\\nDocker-Content-Digest: DIGEST\\r\\nETag: x\\r")
"""


@pytest.fixture
def base(tmp_path):
    """base(digest of the registry, name or nothing): the script, finished, in a checkout of its own."""
    (tmp_path / "requirements").mkdir()
    for name in ("Dockerfile", "requirements/base.sh"):
        shutil.copy(ROOT / name, tmp_path / name)

    def call(digest, *names):
        (tmp_path / "curl").write_text(CURL.replace("DIGEST", digest))
        (tmp_path / "curl").chmod(0o755)
        path = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        line = ["bash", tmp_path / "requirements/base.sh", *names]
        return subprocess.run(line, env=path, capture_output=True, text=True)

    return call


def test_the_base_is_named_with_the_digest_that_the_registry_has(base):
    assert base(DIGEST).stdout == base(DIGEST, "python:3.11-slim").stdout == f"python:3.11-slim@{DIGEST}\n"


@pytest.mark.parametrize("digest", ["", "sha256:0123", "latest"])
def test_no_digest_is_no_name(base, digest):
    ended = base(digest)
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr == "The registry gave no digest of python:3.11-slim: see that there is such an image.\n"


def test_the_base_is_pinned_by_a_digest_and_moves_by_the_line_of_the_runbook(base, tmp_path):
    """Which changes nothing where the registry gives no digest."""
    (line,) = re.findall(r"^    (base=.* Dockerfile)$", (ROOT / "launch/README.md").read_text(), re.MULTILINE)

    def pin(digest):
        base(digest)
        path = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=path, capture_output=True)
        return done.returncode, (tmp_path / "Dockerfile").read_text()

    text = (tmp_path / "Dockerfile").read_text()
    (pinned,) = re.findall(r"^ARG BASE=(python:3\.11-slim@sha256:[0-9a-f]{64})$", text, re.MULTILINE)
    assert pin("latest") == (1, text)
    assert pin(DIGEST) == (0, text.replace(pinned, f"python:3.11-slim@{DIGEST}"))
