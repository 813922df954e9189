"""What a process sets before JAX starts: the place for defaults that pay. Yours come first.

JAX and XLA read their environment once, when they are imported, so a door calls this before it
imports a room that does. Compiled programs are kept by `vlm.load` itself.
"""

import os
import sys

# Large buffers in huge pages: XLA allocates them anew at every step, and the page faults of small
# pages take a fifth of a training step on a CPU. glibc reads this when a process starts.
MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
HEAVY = ("train", "bench")  # commands that this pays for

INFERENCE = {
    # A model that only encodes takes little: leave the rest of a GPU to what else runs there.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


def prepare_inference() -> None:
    """Set the defaults of commands that load a model and use it."""
    for name, value in INFERENCE.items():
        os.environ.setdefault(name, value)


def restart_with_huge_pages(args: list[str]) -> None:
    """Start this process anew, once, where only a new process can take the settings that pay."""
    unset = [name for name in MALLOC if name not in os.environ]
    if sys.platform == "linux" and args[:1] and args[0] in HEAVY and unset:
        os.execve(sys.executable, sys.orig_argv, os.environ | MALLOC)
