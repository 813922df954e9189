"""Short runs of `tests/fuzz/server.py` and `tests/fuzz/openapi.py`."""

import importlib.util
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "fuzz"


def load(name):
    spec = importlib.util.spec_from_file_location(f"fuzz_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_mutated_images_and_bodies_give_2xx_or_4xx(server):
    counts = load("server").run(server, range(300))
    assert counts[200] > 30
    assert counts[400] + counts[422] > 60


def test_a_server_error_is_found(server, monkeypatch):
    monkeypatch.setattr(server.service.model, "texts", None)
    with pytest.raises(AssertionError, match="500"):
        load("server").run(server, range(0, 60, 2))


@pytest.mark.slow
def test_responses_match_the_openapi_document(server):
    pytest.importorskip("schemathesis")
    counts = load("openapi").conform(server.url, 12)
    assert len(counts) >= 8
    assert sum(counts.values()) > 100
