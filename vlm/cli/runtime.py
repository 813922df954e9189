"""Environment variables that must be set before JAX starts; values of the user take precedence.

JAX and XLA read their environment once, when they are imported. So a command calls this module
before it imports one that uses JAX.
"""

import glob
import importlib.util
import os
import sys
from importlib import metadata

# Huge pages for large buffers: XLA allocates them at every step, and page faults of small pages
# take a fifth of a training step on a CPU. glibc reads this when a process starts.
MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
HEAVY = ("train", "bench")  # commands that use it

INFERENCE = {
    # Inference needs little memory: leave the rest of a GPU to other processes.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}

# A usable TPU appears as a device, or in a variable of its cloud. (TPU_SKIP_MDS_QUERY and
# TPU_LIBRARY_PATH are set by JAX and libtpu on machines without one.)
TPU_DEVICES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
TPU_VARIABLES = (
    "TPU_NAME",
    "TPU_WORKER_ID",
    "TPU_PROCESS_ADDRESSES",
    "TPU_VISIBLE_CHIPS",
    "TPU_VISIBLE_DEVICES",
    "CLOUD_TPU_TASK_ID",
    "COLAB_TPU_ADDR",
    "JAX_FORCE_TPU_INIT",
)


def leave_out_absent_tpu() -> None:
    """Set JAX_PLATFORMS=cpu if libtpu is installed (as for `vlm plan`) and there is no TPU.

    Otherwise JAX starts libtpu, which prints errors. Nothing is set if a plugin for another device
    is installed, or if the user has named the platforms.
    """
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    if any(map(glob.glob, TPU_DEVICES)) or any(name in os.environ for name in TPU_VARIABLES):
        return
    if importlib.util.find_spec("jax_plugins") or metadata.entry_points(group="jax_plugins"):
        return
    os.environ["JAX_PLATFORMS"] = "cpu"


def prepare_inference() -> None:
    """Set the defaults of commands that only run a model."""
    for name, value in INFERENCE.items():
        os.environ.setdefault(name, value)


def restart_with_huge_pages(args: list[str]) -> None:
    """Restart this process once, with settings that only a new process reads."""
    unset = [name for name in MALLOC if name not in os.environ]
    if sys.platform == "linux" and args[:1] and args[0] in HEAVY and unset:
        os.execve(sys.executable, sys.orig_argv, os.environ | MALLOC)
