"""A sample of the mutated checkpoints; `python tests/fuzz/checkpoints.py` runs all of them."""

import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "fuzz" / "checkpoints.py"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux counts it")
def test_mutated_checkpoints_load_exactly_or_are_refused():
    run = [sys.executable, str(SCRIPT), "--count", "200"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "slowest" in done.stdout
