"""What a process sets before JAX starts: the place for defaults that pay. Yours come first.

JAX and XLA read their environment once, when they are imported, so a door calls this before it
imports a room that does. Compiled programs are kept by `vlm.load` itself.
"""

import glob
import importlib.util
import os
import sys
from importlib import metadata

# Large buffers in huge pages: XLA allocates them anew at every step, and the page faults of small
# pages take a fifth of a training step on a CPU. glibc reads this when a process starts.
MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
HEAVY = ("train", "bench")  # commands that this pays for

INFERENCE = {
    # A model that only encodes takes little: leave the rest of a GPU to what else runs there.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}

# A TPU that this machine can use shows itself as a device, or in a variable of its cloud. (JAX and
# libtpu leave TPU_SKIP_MDS_QUERY and TPU_LIBRARY_PATH behind where there is none.)
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
    """Let JAX start on the CPU where libtpu is installed, say to plan, and there is no TPU.

    JAX would start libtpu to see, which prints errors. A machine with the plugin of another device
    is left to JAX, and so is one whose user has named the platforms.
    """
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    if any(glob.glob(pattern) for pattern in TPU_DEVICES):
        return
    if any(name in os.environ for name in TPU_VARIABLES):
        return
    if importlib.util.find_spec("jax_plugins") or metadata.entry_points(group="jax_plugins"):
        return
    os.environ["JAX_PLATFORMS"] = "cpu"


def prepare_inference() -> None:
    """Set the defaults of commands that load a model and use it."""
    for name, value in INFERENCE.items():
        os.environ.setdefault(name, value)


def restart_with_huge_pages(args: list[str]) -> None:
    """Start this process anew, once, where only a new process can take the settings that pay."""
    unset = [name for name in MALLOC if name not in os.environ]
    if sys.platform == "linux" and args[:1] and args[0] in HEAVY and unset:
        os.execve(sys.executable, sys.orig_argv, os.environ | MALLOC)
