import os

import pytest

from vlm.data import openmoji
from vlm.paths import cache_dir


@pytest.fixture(scope="session")
def openmoji_dir() -> str:
    """The folder of the whole OpenMoji data set, drawn when this machine has none yet."""
    folder = cache_dir() / "data"
    openmoji.prepare(folder)
    return os.fspath(folder)
