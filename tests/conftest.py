"""Eight virtual devices, quick compilation and checked types, before JAX and vlm start."""

import collections
import gc
import json
import os
import pathlib
import shutil
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

# Compiled programs are kept between sessions, and shared by all processes of one.
PROGRAMS = HERE.parent / ".pytest_cache" / "programs"
MAX_PROGRAM_BYTES = 2 * 2**30
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    if sum(file.stat().st_size for file in PROGRAMS.glob("*")) > MAX_PROGRAM_BYTES:
        shutil.rmtree(PROGRAMS)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(PROGRAMS)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# One folder of shared test data for all workers: see tiny.py.
if "VLM_TESTS_SHARED" not in os.environ:
    shared = tempfile.TemporaryDirectory(prefix="vlm-tests-")
    os.environ["VLM_TESTS_SHARED"] = shared.name

jaxtyping.install_import_hook("vlm", "type_checker.check")


# Seconds of each test as pytest-split records them: `pytest --all --store-durations`.
DURATIONS = HERE / "durations.json"
MAX_FIRST_TIER_SECONDS = 1.0


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests marked `slow` too")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Run folders of tests on all cores; a file or a single test starts sooner in this process."""
    if hasattr(config, "workerinput"):  # a worker, which must not start workers of its own
        return
    parallel = config.pluginmanager.hasplugin("xdist") and not config.option.usepdb
    if parallel and config.option.numprocesses is None and not _named_files(config):
        config.option.numprocesses = "auto"
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: where a test waits for processes, another one goes on."""
    return (os.cpu_count() or 1) + 1


def _named_files(config) -> bool:
    """Whether the command line names files or tests instead of folders."""
    return any(not pathlib.Path(arg).is_dir() for arg in config.args)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(config, items):
    """Mark tests that are recorded as slow, leave them out unless asked, run long files first."""
    recorded = json.loads(DURATIONS.read_text())
    for item in items:
        if recorded.get(item.nodeid, 0.0) > MAX_FIRST_TIER_SECONDS:
            item.add_marker("slow")
    if not config.option.markexpr and not _named_files(config):
        kept, deselected = [], []
        for item in items:
            (deselected if _left_out(item, config.option.all) else kept).append(item)
        config.hook.pytest_deselected(items=deselected)
        items[:] = kept
    by_file = collections.Counter()
    for item in items:
        by_file[item.path] += recorded.get(item.nodeid, 0.0)
    items.sort(key=lambda item: by_file[item.path], reverse=True)


def _left_out(item, both_tiers: bool) -> bool:
    marks = {mark.name for mark in item.iter_markers()}
    slow = "slow" in marks and "first_tier" not in marks
    return "peers" in marks or (slow and not both_tiers)


@pytest.fixture(scope="module", autouse=True)
def _traces():
    """What a module has traced is let go: it is gigabytes in the end."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture(autouse=True)
def _hang_up():
    """A runner or the TPU compiler ignores SIGHUP, and processes that tests start inherit that."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _types(request):
    """A test that gives arguments of a wrong type on purpose says so with the mark `untyped`."""
    untyped = request.node.get_closest_marker("untyped") is not None
    jaxtyping.config.update("jaxtyping_disable", untyped)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
