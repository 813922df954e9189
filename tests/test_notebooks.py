"""Notebooks run from top to bottom, and are stored with the outputs of their present code."""

import pytest
import tiny

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

from run_notebooks import FOLDER, LARGEST, cleaned, code_cells, code_digest, run  # noqa: E402

NAMES = ("zero_shot", "search", "few_shot", "fine_tune", "train", "mesh", "plan", "evaluate",
         "explain", "serve_export")  # fmt: skip
PICTURES = ("image/png", "<svg", "<img", "<table")


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def ends_with_a_picture(notebook) -> bool:
    """Whether the last code cell shows a picture or a table."""
    data = [output.get("data", {}) for output in code_cells(notebook)[-1].outputs]
    shown = "".join(f"{list(kinds)} {kinds.get('text/html')}" for kinds in data)
    return any(each in shown for each in PICTURES)


def test_all_notebooks_are_listed():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_code(name):
    """Else: `python tests/run_notebooks.py RUN NAME`."""
    notebook = read(name)
    assert notebook.metadata["vlm"]["code"] == code_digest(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert ends_with_a_picture(notebook)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < LARGEST
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(output.get("name") != "stderr" for output in outputs)
    assert all(output.output_type != "error" for output in outputs)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_short_and_begins_with_its_purpose(name):
    notebook = read(name)
    first, install = notebook.cells[:2]
    assert first.source.startswith("# ")
    assert f"/notebooks/{name}.ipynb)" in first.source  # opens it in Colab
    assert "google.colab" in install.source
    assert "%pip install" in install.source
    assert 15 <= len(notebook.cells) <= 25
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 18, cell.source
        else:
            assert max(map(len, cell.source.splitlines())) <= 160, cell.source


def test_the_lines_of_a_log_are_joined():
    html = '<pre style="white-space:pre;overflow-x:auto;line-height:normal">step</pre>'
    new = nbformat.v4.new_output
    lines = [
        new("display_data", data={"text/html": html, "text/plain": f"\x1b[1mstep {i}\x1b[0m\n"})
        for i in range(2)
    ]
    lines.append(new("stream", name="stdout", text="run runs/lora-20260102-030405\n"))
    (output,) = cleaned(lines)
    assert output.text == "step 0\nstep 1\nrun runs/lora\n"
    assert cleaned([new("stream", name="stderr", text="oops")])[0].name == "stderr"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, monkeypatch, tmp_path):
    monkeypatch.setenv("VLM_MODEL", str(tiny.run()))
    monkeypatch.setenv("STEPS", "2")
    monkeypatch.setenv("EPOCHS", "0.1")
    notebook = run(FOLDER / f"{name}.ipynb", tmp_path)
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert ends_with_a_picture(notebook)
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
