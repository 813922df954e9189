"""What install.md promises of systems without some packages."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny
from packaging.requirements import Requirement
from PIL import Image

from vlm.config import DataConfig
from vlm.data import array_record
from vlm.data.prepare import Preparation, begin
from vlm.data.sources import open_source
from vlm.errors import DataError

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGE = (ROOT / "vlm" / "docs" / "install.md").read_text()

# Fails on the packages that Windows lacks, and on those that only training needs.
WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        missing = {"array_record", "grain", "tensorflow_datasets", "fcntl", "resource"}
        if name.split(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""
USES = """
from pathlib import Path
import vlm
from vlm.cli import main

model, photo = sys.argv[1:]
bundle = vlm.load(model)
assert vlm.ZeroShotClassifier(bundle, ["cat", "dog"])(photo).scores.shape == (1, 2)
index = vlm.RetrievalIndex(bundle)
index.add([Path(photo)], ids=["photo"])
assert index.search("a cat", k=1)[0].id == "photo"
index.save("saved")
index.save("saved")  # the lock is not there
assert main(["search", "saved", "a cat", "--model", model]) == 0
"""


def needed(platform):
    requirements = [Requirement(text) for text in PROJECT["dependencies"]]
    return {
        r.name
        for r in requirements
        if not r.marker or r.marker.evaluate({"sys_platform": platform})
    }


def test_windows_needs_no_package_without_wheels():
    assert needed("linux") - needed("win32") == {"array-record"}
    assert needed("darwin") == needed("linux")


def test_the_page_lists_every_extra():
    listed = set(re.findall(r"^\| `([a-z0-9]+)` \|", PAGE, re.MULTILINE))
    assert listed == set(PROJECT["optional-dependencies"])
    assert PROJECT["requires-python"] == ">=3.11"
    assert "Python 3.11" in PAGE


@pytest.mark.slow
def test_inference_without_packages_of_training(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "photo.png")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + USES, str(tiny.run()), "photo.png"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "photo" in done.stdout


def test_a_missing_array_record_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(array_record.importlib.util, "find_spec", lambda name: None)
    message = "need the package array-record, which has no release for Windows: use data in tar"
    (tmp_path / "a.array_record").write_bytes(b"")
    with pytest.raises(DataError, match=message):
        open_source(DataConfig(str(tmp_path / "a.array_record")), "train")
    with pytest.raises(DataError, match=message):
        open_source(DataConfig("openmoji", data_dir=str(tmp_path)), "train")
    with pytest.raises(DataError, match=message):
        begin(DataConfig("x.tar"), "train", tmp_path / "out", Preparation(form="array_record"))
    assert not (tmp_path / "out").exists()
