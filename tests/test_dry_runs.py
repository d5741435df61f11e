"""Dry runs of all backends as who has installed no extra and logged in nowhere sees them: they are right, and show no secret."""

import configparser
import functools
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import kubernetes_emulator
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launch import run

ROOT = Path(__file__).parents[1]
SECRET = "a-secret-that-nobody-may-see"
RUN = "--config=experiments/test.py"
SWEEP = "--sweep=experiments/ablations.py:time_warp_cpu"
TPU = "--project=p --zone=us-central1-a --accelerator=v5litepod-16"
# {name: a line}; every one is carried out with --dry_run.
LINES = {
    "local": f"--backend=local {RUN} --workdir=HERE/run --processes=2 --cpu_devices=1 --environment=NOTE=a",
    "local sweep": f"--backend=local {SWEEP} --workdir=HERE/sweep",
    "slurm": f"--backend=slurm {RUN} --workdir=HERE/run --nodes=2 --gpus=8 --time=1:00:00",
    "slurm sweep": f"--backend=slurm {SWEEP} --workdir=HERE/sweep",
    "tpu_vm": f"--backend=tpu_vm {RUN} --workdir=gs://b/run --config.data.dir=gs://b/data {TPU} --secrets=WANDB_API_KEY,HF_TOKEN",
    "tpu_vm reserved": f"--backend=tpu_vm {RUN} --workdir=gs://b/run {TPU} --reservation=ours",
    "tpu_vm flex": f"--backend=tpu_vm {RUN} --workdir=gs://b/run {TPU} --flex_start --hours=4",
    "tpu_vm there": f"--backend=tpu_vm {RUN} --workdir=gs://b/run --project=p --zone=us-central1-a --existing=mine",
    "tpu_vm sweep": f"--backend=tpu_vm {SWEEP} --workdir=gs://b/sweep {TPU} --parallel=2",
    "gke": f"--backend=gke {RUN} --workdir=gs://b/run --image=i:1 --topology=v5e:4x4 --secrets=wandb --queue=team --spot",
    "gke GPUs": f"--backend=gke {RUN} --workdir=gs://b/run --image=i:1 --gpu=nvidia-l4 --nodes=2",
    "gke sweep": f"--backend=gke {SWEEP} --workdir=gs://b/sweep --image=i:1 --topology=v5e:4x4 --parallel=2",
}
PROGRAM = """
import contextlib, io, json, sys
from launch import run
told = {}
for name, line in json.load(sys.stdin).items():
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        run.main([*line.split(), "--dry_run"])
    told[name] = said.getvalue()
print(json.dumps(told))
"""


@functools.cache
def core():
    """Names of all distributions that are installed with no extra."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    left = [Requirement(line) for line in config["options"]["install_requires"].split("\n") if line]
    seen, names = set(), set()
    while left:
        asked = left.pop()
        key = canonicalize_name(asked.name), frozenset(asked.extras)
        if key in seen:
            continue
        seen.add(key)
        names.add(key[0])
        try:
            lines = requires(asked.name) or ()
        except PackageNotFoundError:  # of another system
            continue
        for line in map(Requirement, lines):
            extras = asked.extras or {""}
            if line.marker is None or any(line.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                left.append(line)
    return names


@functools.cache
def others():
    """Modules that are here because of some extra, or of the tests."""
    wanted = core() | {"flowlm", "pip", "setuptools"}
    found = packages_distributions()
    return [name for name, owners in found.items() if not wanted & set(map(canonicalize_name, owners))]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """{name: what its dry run prints}."""
    here = tmp_path_factory.mktemp("dry")
    modules = [*others(), "google.cloud", "google.auth", "google.api_core"]
    (here / "sitecustomize.py").write_text(f"import sys\nfor name in {modules}: sys.modules[name] = None\n")
    for name in (".netrc", "key.json", "kubeconfig", ".cache/huggingface/token"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(SECRET)
    names = (
        "WANDB_API_KEY",
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "GOOGLE_OAUTH_ACCESS_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
    )
    files = {
        "GOOGLE_APPLICATION_CREDENTIALS": f"{here}/key.json",
        "KUBECONFIG": f"{here}/kubeconfig",
        "HOME": str(here),
    }
    environment = os.environ | dict.fromkeys(names, SECRET) | files | {"PYTHONPATH": f"{here}:{ROOT}"}
    lines = json.dumps({name: line.replace("HERE", str(here)) for name, line in LINES.items()})
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, input=lines, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert not (here / "run").exists() and not (here / "sweep").exists()
    return json.loads(done.stdout)


def test_what_the_core_needs_is_known():
    """So that the dry runs are those of the core, and not of what is installed beside it."""
    assert {"jax", "flax", "numpy", "pyyaml", "msgpack"} <= core()
    assert {"pytest", "hypothesis", "jsonschema"} <= set(others()) and not {"jax", "yaml", "numpy"} & set(others())


@pytest.mark.parametrize("name", LINES)
def test_a_dry_run_shows_what_the_engine_can_read(told, name):
    """Manifests of the published schemas, requests in JSON, scripts of a shell."""
    text, backend = told[name], name.split()[0]
    runs = 1 if "sweep" not in name else len(set(re.findall(r"--workdir=(\S+?/sweep/\S+)", text)))
    assert "sweep" not in name or runs > 1
    if backend == "gke":
        made = list(yaml.safe_load_all(text))
        assert [kubernetes_emulator.wrong_with(manifest) for manifest in made] == [[]] * len(made)
        assert len({manifest["metadata"]["name"] for manifest in made}) == runs
        return
    if backend == "tpu_vm":
        for script in text.split("the script:\n")[1:]:
            parses(script.partition("\ncommit ")[0])
        requests = re.findall(r"^CreateQueuedResource (\{.*?^\})", text, re.MULTILINE | re.DOTALL)
        assert len([*map(json.loads, requests)]) == (0 if name.split()[-1] in ("flex", "there") else runs)
        return
    parses(text)
    assert text.count("-m flowlm train") == runs * (2 if name == "local" else 1)


def parses(script):
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert not checked.stderr


@pytest.mark.parametrize("name", ["local", "slurm", "tpu_vm", "gke"])
def test_a_secret_given_by_value_is_refused_and_not_repeated(name, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    line = [*LINES[name].replace("HERE", str(tmp_path)).split(), "--dry_run"]
    for variable in ("WANDB_API_KEY", "HF_TOKEN", "DB_PASSWORD", "aws_secret_access_key"):
        with pytest.raises(SystemExit, match=f"^launch: --environment={variable} would be shown to all who") as refused:
            run.main([*line, f"--environment={variable}={SECRET}"])
        assert SECRET not in refused.value.code and "\n" not in refused.value.code
    run.main([*line, "--environment=TOKENIZERS_PARALLELISM=false"])
