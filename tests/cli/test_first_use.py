"""The first commands on a fresh machine: the default model comes from a Hub over loopback."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import tiny

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parent / "weights"))

from hub_server import hub as hub  # noqa: E402  # a fixture

from vlm.weights.catalogue import default_model  # noqa: E402

GOLDEN = HERE.parent / "weights" / "golden"
NAME = default_model().name
# What has arrived is kept in pieces of 4 kB in place of 10 MB: the weights of the tests are small.
START = """
import sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 4096
from vlm.cli import main
sys.exit(main())
"""


@pytest.fixture
def machine(hub, tmp_path):
    """Function that runs `vlm` with empty caches and returns the exit code, stdout and stderr."""
    (tmp_path / "photos").mkdir()
    for name in ("test-red-square.png", "test-blue-stripe.png"):
        shutil.copy(tiny.folder() / "data" / name, tmp_path / "photos")
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "VLM_", "HUGGING"))}
    mine |= {"HF_HOME": str(tmp_path / "hf"), "VLM_CACHE": str(tmp_path / "vlm"), "NO_PROXY": "*"}
    mine |= {"XLA_FLAGS": "", "PYTHONPATH": str(HERE.parent.parent), "HF_ENDPOINT": hub.url}

    def run(*args, **more):
        line = [sys.executable, "-c", START, *args]
        done = subprocess.run(
            line, env=mine | more, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        return done.returncode, done.stdout, done.stderr

    hub.repositories.clear()
    return run


@pytest.mark.slow
def test_search_and_classify_then_again_without_a_network(hub, machine, tmp_path):
    hub.put(NAME, GOLDEN / "oc_eva02", outputs__npz=None)
    code, hits, err = machine("search", "photos", "a dog in the snow")
    assert code == 0, err
    assert len(hits.splitlines()) == 2
    size = (GOLDEN / "oc_eva02" / "open_clip_model.safetensors").stat().st_size
    told = err.splitlines()
    assert told == [
        f"vlm: EVA02-B-16 is {NAME}",
        f"vlm: fetching {NAME} from the Hub ({size / 1e6:,.0f} MB, licence MIT) to "
        f"{tmp_path / 'hf' / 'hub'}; later commands use this copy",
        "2 images in photos (2 encoded, 0 removed)",
    ]
    hub.requests(NAME)
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    code, labels, err = machine("classify", "photos", "--labels", "dog,cat", "--json", **offline)
    assert (code, len(labels.splitlines())) == (0, 2), err
    assert err.splitlines()[0] == f"vlm: EVA02-B-16 is {NAME}"
    assert "fetching" not in err
    code, again, err = machine("search", "photos", "a dog in the snow", **offline)
    assert (code, again) == (0, hits)
    assert err.endswith("2 images in photos (0 encoded, 0 removed)\n")
    assert hub.requests(NAME) == []
    hub.put(NAME, GOLDEN / "oc_eva02", outputs__npz=None, README__md=b"new")
    code, out, err = machine("models", "EVA02-B-16", "--update")
    assert code == 0, err
    commits = [*hub.repositories[NAME].commits]
    assert out == f"{NAME} is at commit {commits[1]} (before: {commits[0]})\n"


@pytest.mark.slow
def test_no_network_is_one_sentence(machine, tmp_path):
    for offline in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        code, out, err = machine("search", "photos", "a dog", **offline)
        assert (code, out) == (1, "")
        named, message = err.splitlines()
        assert named == f"vlm: EVA02-B-16 is {NAME}"
        assert f"'{NAME}' is not on this disk, and the Hub cannot be reached" in message
        folder = tmp_path / "hf" / "hub" / ("models--" + NAME.replace("/", "--"))
        assert f"run `hf download {NAME}` elsewhere and copy it to {folder}" in message
        assert "or give a folder with its files as the model" in message


@pytest.mark.slow
def test_an_interrupted_download_goes_on(hub, machine):
    weights = "open_clip_model.safetensors"
    repository = hub.put(NAME, GOLDEN / "oc_eva02", outputs__npz=None)
    repository.faults = {weights: ["cut"] + ["drop"] * 50}
    code, out, err = machine("classify", "photos", "--labels", "dog,cat")
    assert (code, out) == (1, "")
    assert f"{weights} of the Hub model '{NAME}' did not arrive" in err
    repository.faults = {}
    hub.requests(NAME)
    code, out, err = machine("classify", "photos", "--labels", "dog,cat")
    assert code == 0, err
    size = (GOLDEN / "oc_eva02" / weights).stat().st_size
    (rest,) = [r for r in hub.requests(NAME) if r.file == weights and r.method == "GET" and r.sent]
    assert size // 2 - 4096 < rest.start <= size // 2
    assert rest.sent == size - rest.start
