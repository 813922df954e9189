"""`vlm blend` from the shell: a folder that loads, a picture of every alpha, one sentence else."""

import re
import shutil

import numpy as np
import pytest
import tiny

from vlm.bundle import load
from vlm.cli import main


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The test pictures in a folder for each caption."""
    root = tmp_path_factory.mktemp("photos")
    for file in (tiny.folder() / "data").glob("test-*.png"):
        _, colour, shape = file.stem.split("-")
        (root / f"{colour} {shape}").mkdir()
        shutil.copy(file, root / f"{colour} {shape}")
    return root


def test_a_blend_with_its_picture(photos, tmp_path, capsys):
    run, out = str(tiny.run()), tmp_path / "out"
    tasks = f"in=folder:{photos},out=folder:{photos}"
    assert main(["blend", run, run, str(out), "--alpha", "0.25", "--tasks", tasks]) == 0
    table = capsys.readouterr().out
    assert len(re.findall(r"of 6\b", table)) == 2 * 11
    made, before = load(out), load(run)
    assert made.name == "shapes and shapes at 0.25"
    pixels = np.full((1, 16, 16, 3), 90, np.uint8)
    np.testing.assert_allclose(made.encode_image(pixels), before.encode_image(pixels), atol=1e-6)
    page = (out / "report.html").read_text()
    assert page.count("<polyline") == 2
    assert "the saved model is at alpha 0.25" in page


def test_a_soup_of_three(photos, tmp_path, capsys):
    run, out = str(tiny.run()), tmp_path / "soup"
    assert main(["blend", run, run, run, str(out), "--greedy", f"folder:{photos}"]) == 0
    assert load(out).name == "soup of shapes, shapes, shapes"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["RUN", "OUT"], "at least two models"),
        (["RUN", "RUN", "."], "'.' exists already"),
        (["RUN", "RUN", "OUT", "--tasks", "folder:x"], "give each task its own name"),
        (["RUN", "RUN", "OUT", "--tasks", "in=vtab"], "is a suite of several tasks"),
        (["RUN", "RUN", "OUT", "--tasks", "in=nothing"], "there is no task or suite 'nothing'"),
        (["RUN", "RUN", "OUT", "--tasks", "in=folder:/nowhere"], "cannot be measured"),
        (["RUN", "RUN", "RUN", "OUT", "--tasks", "in=folder:x"], "give two"),
        (["RUN", "RUN", "OUT", "--alpha", "2"], "alpha is 2.0"),
    ],
)
def test_bad_input(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["blend", *(str(tiny.run()) if a == "RUN" else a for a in args)]) != 0
    complaint = capsys.readouterr().err.strip().splitlines()
    assert len(complaint) == 1
    assert message in complaint[0]
    assert not (tmp_path / "OUT").exists()
