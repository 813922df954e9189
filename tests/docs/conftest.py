"""The site, built once for all tests, without a warning."""

import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the built site."""
    for package in ("sphinx", "myst_nb", "furo", "pagefind"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra docs)")
    out = tmp_path_factory.mktemp("docs") / "site"
    # A process of its own: without the import hook that checks types, which changes signatures.
    line = [sys.executable, "-m", "vlm", "docs", "--strict", "--out", str(out)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return out
