"""Every notebook runs from top to bottom on a real run, and is kept without outputs."""

from pathlib import Path

import pytest
import tiny

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    names = {path.name for path in NOTEBOOKS}
    ours = ("quickstart", "zero_shot", "search", "mesh", "few_shot", "plan", "adapt")
    assert {f"{name}.ipynb" for name in ours} <= names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_outputs_are_left_out(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_runs(path, monkeypatch):
    monkeypatch.setenv("VLM_RUN", str(tiny.run()))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": path.parent}}
    ).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [output for cell in code for output in cell.outputs]
    assert "image/png" in {kind for output in shown for kind in output.get("data", {})}
    # It ends in a picture.
    last = [output.get("data", {}) for output in code[-1].outputs]
    assert any("image/png" in data or "<svg" in data.get("text/html", "") for data in last)
    if path.name == "quickstart.ipynb":
        assert any("top-5: " in output.get("text", "") for output in shown)
