"""Which kinds of devices JAX looks for."""

import importlib.util
import os
from pathlib import Path

TPU_FILES = ("accel*", "vfio/*")  # in /dev, without which libtpu finds no TPU


def leave_out_absent_tpu(devices: Path = Path("/dev")) -> None:
    """Lets JAX look for nothing but CPUs where libtpu is installed beside no TPU and no other accelerator's plugin.

    libtpu, which `flowlm plan` needs anywhere, writes errors to every command's screen when JAX looks for a TPU in vain. To be
    called before JAX is imported. Nothing is changed where JAX_PLATFORMS is set.
    """
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    if importlib.util.find_spec("jax_plugins") is None and not any(any(devices.glob(name)) for name in TPU_FILES):
        os.environ["JAX_PLATFORMS"] = "cpu"
