"""What is set for every test before jax starts: eight fake CPU devices, quick compilation, and one cache of compiled programs.

A test marked `needs("NAME")` is skipped, with the reason, where what it needs is not here; with --with-NAME it fails instead.
What changes the machine is done only if asked for.
"""

import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from importlib.metadata import version

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# Most programs here run a few steps, so that compiling them well takes longer than it saves. The few that run thousands of steps
# are compiled with toy.OPTIMIZED. Subprocesses inherit the flags.
QUICK = {"xla_backend_optimization_level": "0"}
if tuple(map(int, version("jaxlib").split(".")[:2])) < (
    0,
    11,
):  # later ones do not know the flag, and end where they read it
    QUICK["xla_cpu_use_fusion_emitters"] = "false"
_flags = os.environ.get("XLA_FLAGS", "")
_quick = [f"--{name}={value}" for name, value in QUICK.items() if name not in _flags]
os.environ["XLA_FLAGS"] = " ".join([_flags, *_quick, "--xla_force_host_platform_device_count=8"]).strip()
# Runs of one experiment compile the same programs; workers and subprocesses inherit the directory.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="flowlm-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"


# Whoever starts the tests under nohup has hangups ignored, or in a shell's background Ctrl-C; so would every process of theirs.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


SUITES = (
    "tpu-plan",
    "slurm",
    "gke",
    "sky",
    "browser",
    "torch",
    "hf",
    "datasets",
    "mauve",
    "molecules",
    "wandb",
    "notebook",
    "serve",
)
SUITES += ("docs",)
# NAME: (whether it is here, what is missing).
AVAILABLE = {
    "tpu-plan": (importlib.util.find_spec("libtpu") is not None, "no libtpu: pip install -e .[tpu-plan]"),
    "slurm": (os.geteuid() == 0, "not root: tests/slurm_cluster.sh installs and starts a cluster"),
    "gke": (importlib.util.find_spec("kubernetes") is not None, "no kubernetes: pip install -e .[gke]"),
    "sky": (importlib.util.find_spec("sky") is not None, "no skypilot: pip install skypilot"),
    "browser": (shutil.which("chromium") is not None, "no chromium: apt-get install chromium"),
    "torch": (importlib.util.find_spec("torch") is not None, "no torch: pip install -e .[torch]"),
    "hf": (
        all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers")),
        "no transformers and torch: pip install -e .[hf]",
    ),
    "datasets": (importlib.util.find_spec("datasets") is not None, "no datasets: pip install -e .[hf]"),
    "mauve": (importlib.util.find_spec("mauve") is not None, "no mauve-text: pip install -e .[mauve]"),
    "molecules": (importlib.util.find_spec("rdkit") is not None, "no rdkit: pip install -e .[molecules]"),
    "wandb": (importlib.util.find_spec("wandb") is not None, "no wandb: pip install -e .[wandb]"),
    "notebook": (
        all(importlib.util.find_spec(name) is not None for name in ("nbclient", "ipykernel")),
        "no nbclient and ipykernel: pip install -e .[notebook]",
    ),
    "serve": (
        all(
            importlib.util.find_spec(name) is not None for name in ("fastapi", "uvicorn", "prometheus_client", "openai")
        ),
        "no fastapi, uvicorn, prometheus-client and openai: pip install -e .[serve] openai",
    ),
    "docs": (
        all(
            importlib.util.find_spec(name) is not None for name in ("material", "mkdocstrings_handlers", "latex2mathml")
        ),
        "no mkdocs: pip install -e .[docs]",
    ),
}
ON_REQUEST = {"slurm": "starts daemons and names two nodes in /etc/hosts: give --with-slurm"}


def pytest_addoption(parser):
    for name in SUITES:
        parser.addoption(
            f"--with-{name}", action="store_true", help=f"a test that needs {name} fails where it would be skipped"
        )


def pytest_configure(config):
    config.addinivalue_line("markers", f"needs(name): what must be here, one of {', '.join(SUITES)}")


def pytest_runtest_setup(item):
    for mark in item.iter_markers("needs"):
        (name,) = mark.args
        asked = item.config.getoption(f"--with-{name}")
        here, reason = AVAILABLE[name]
        if not here:
            (pytest.fail if asked else pytest.skip)(reason)
        if name in ON_REQUEST and not asked:
            pytest.skip(ON_REQUEST[name])


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Where prepared data lies, made once for all tests."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(autouse=True)
def signals_as_before():
    """A command that a test runs in this process listens to signals; the next test must not."""
    from flowlm.system import signals  # not before the environment is set

    hooks = sys.unraisablehook, sys.excepthook
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)
    sys.unraisablehook, sys.excepthook = hooks
    signals._listener = signals._Listener()
