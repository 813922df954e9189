"""Eight virtual devices, quick compilation and checked types, before JAX and vlm start."""

import os
import signal
import tempfile

import jaxtyping
import pytest

# A runner in the background may ignore Ctrl-C, and the processes that tests start inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Programs compile in half the time and run slower: what is tested is what they compute.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK}"
)

# A program is compiled once in a session: its workers and the processes that tests start find it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = tempfile.TemporaryDirectory(prefix="vlm-programs-")  # gone when the session ends
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

jaxtyping.install_import_hook("vlm", "type_checker.check")


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker is left alone with one of them."""
    items.sort(key=lambda item: "train" not in item.path.parts)


@pytest.fixture(autouse=True)
def _types(request):
    """A test that gives arguments of a wrong type on purpose says so with the mark `untyped`."""
    untyped = request.node.get_closest_marker("untyped") is not None
    jaxtyping.config.update("jaxtyping_disable", untyped)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
