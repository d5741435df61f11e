"""What is set for every test before jax starts: eight fake CPU devices, and one cache of compiled programs."""

import os
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
