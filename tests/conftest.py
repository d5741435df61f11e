"""What is set for every test before jax starts: eight fake CPU devices, and one cache of compiled programs; and what tests need."""

import importlib.util
import os
import shutil
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Runs of one experiment compile the same programs; workers and subprocesses inherit the directory.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="flowlm-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Where prepared data lies, made once for all tests."""
    return tmp_path_factory.mktemp("data")


# What some tests need beyond the development packages: (name, the module or program that must be here). A test marked
# needs(name) is skipped without it. With --with-NAME it runs all the same, and a skip of it is a failure.
NEEDS = (("tpu-plan", "libtpu"),)


def pytest_addoption(parser):
    for name, what in NEEDS:
        parser.addoption(f"--with-{name}", action="store_true", help=f"{what} must be here: run what needs it")


def _wanted(item):
    """Names that a test needs: those asked for with an option, and those that are not."""
    names = [mark.args[0] for mark in item.iter_markers("needs")]
    given = [name for name in names if item.config.getoption(f"--with-{name}")]
    return given, [name for name in names if name not in given]


def pytest_collection_modifyitems(items):
    for item in items:
        for name in _wanted(item)[1]:
            what = dict(NEEDS)[name]
            if importlib.util.find_spec(what) is None and shutil.which(what) is None:
                item.add_marker(pytest.mark.skip(reason=f"{what} is not here (--with-{name} makes that a failure)"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.skipped and _wanted(item)[0]:
        report.outcome, report.longrepr = "failed", f"skipped in spite of its option: {report.longrepr}"
    return report
