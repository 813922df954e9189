"""A model and an index that all tests of the server share."""

import pytest
from serving import drawn, running, small_bundle

from vlm.heads.retrieval import RetrievalIndex


@pytest.fixture(scope="session")
def bundle():
    return small_bundle()


@pytest.fixture(scope="session")
def index(bundle, tmp_path_factory):
    """The folder of an index of 24 pictures on disk, with metadata."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number:02}.png" for number in range(24)]
    for number, path in enumerate(paths):
        drawn(number).save(path)
    made = RetrievalIndex(bundle)
    years = [2000 + number % 5 for number in range(24)]
    kinds = [None if number == 7 else ("even", "odd")[number % 2] for number in range(24)]
    made.add(paths, metadata={"year": years, "kind": kinds})
    made.save(folder / "index")
    return folder / "index"


@pytest.fixture(scope="module")
def server(bundle, index):
    with running(bundle, index=index) as server:
        yield server
