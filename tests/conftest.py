"""Eight virtual devices, quick compilation and checked types, before JAX and vlm start."""

import gc
import os
import pathlib
import signal
import sys
import tempfile

import jaxtyping
import pytest
from quick import QUICK

HERE = pathlib.Path(__file__).parent

# A runner in the background may ignore Ctrl-C, and the processes that tests start inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What JAX traces is many objects that live long: looking through them less often is 8% of a run.
gc.set_threshold(50_000, 20, 20)

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK}"
)

# A program is compiled once in a session: its workers and the processes that tests start find it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = tempfile.TemporaryDirectory(prefix="vlm-programs-")  # gone when the session ends
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

jaxtyping.install_import_hook("vlm", "type_checker.check")


# Files of more than half a minute of a core, the longest first.
LONGEST = (
    "cloud/test_rehearsal.py",
    "train/test_resume.py",
    "train/test_hosts.py",
    "cloud/test_bad_buckets.py",
    "plan/test_plan.py",
    "data/test_kinds.py",
    "test_cli.py",
)


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: where a test waits for processes, another one goes on."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker is left alone with one of them."""
    turns = {name: number for number, name in enumerate(LONGEST)}

    def turn(item) -> tuple[int, bool]:
        name = item.path.relative_to(HERE).as_posix()
        return turns.get(name, len(turns)), "train" not in item.path.parts

    items.sort(key=turn)


@pytest.fixture(scope="module", autouse=True)
def _traces():
    """What a module has traced is let go: it is gigabytes in the end."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture(autouse=True)
def _types(request):
    """A test that gives arguments of a wrong type on purpose says so with the mark `untyped`."""
    untyped = request.node.get_closest_marker("untyped") is not None
    jaxtyping.config.update("jaxtyping_disable", untyped)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
