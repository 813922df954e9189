"""Model and index fixtures shared by all server tests."""

import pytest
from serving import running, saved_index, small_bundle


@pytest.fixture(scope="session")
def bundle():
    return small_bundle()


@pytest.fixture(scope="session")
def index(bundle, tmp_path_factory):
    """Folder of an index of 24 pictures on disk, with metadata."""
    years = [2000 + number % 5 for number in range(24)]
    kinds = [None if number == 7 else ("even", "odd")[number % 2] for number in range(24)]
    metadata = {"year": years, "kind": kinds}
    return saved_index(bundle, tmp_path_factory.mktemp("pictures"), metadata)


@pytest.fixture(scope="module")
def server(bundle, index):
    with running(bundle, index=index) as server:
        yield server
