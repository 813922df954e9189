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
HUGE_PAGES = "glibc.malloc.hugetlb=1"
# Where a CPU trains, freed buffers also stay in the process, since clearing the pages of each
# step's 2 or 3 GB again takes another sixth. Only the main arena can keep blocks of this size.
_ALWAYS = 1 << 40  # bytes: above any block
KEEP_FREED = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in (
        ("arena_max", 1),
        ("mmap_threshold", _ALWAYS),
        ("trim_threshold", _ALWAYS),
    )
)
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
    if not _accelerated():
        os.environ["JAX_PLATFORMS"] = "cpu"


def _accelerated() -> bool:
    """Whether there is a TPU, or a plugin for another device is installed."""
    if any(map(glob.glob, TPU_DEVICES)) or any(name in os.environ for name in TPU_VARIABLES):
        return True
    plugins = importlib.util.find_spec("jax_plugins") or metadata.entry_points(group="jax_plugins")
    return bool(plugins)


def malloc_settings() -> dict[str, str]:
    """Return the settings of glibc's allocator for training in this environment."""
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not _accelerated()
    return {"GLIBC_TUNABLES": f"{HUGE_PAGES}:{KEEP_FREED}" if on_cpu else HUGE_PAGES}


def prepare_inference() -> None:
    """Set the defaults of commands that only run a model."""
    for name, value in INFERENCE.items():
        os.environ.setdefault(name, value)


def restart_with_huge_pages(args: list[str]) -> None:
    """Restart this process once, with settings that only a new process reads."""
    is_heavy = sys.platform == "linux" and args[:1] and args[0] in HEAVY
    if is_heavy and "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, sys.orig_argv, os.environ | malloc_settings())
