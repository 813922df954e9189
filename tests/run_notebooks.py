"""Run notebooks from top to bottom, and store their outputs.

    python tests/run_notebooks.py runs/openmoji               # all, with this model
    python tests/run_notebooks.py runs/openmoji plan mesh     # some

Paths of this machine and times of day are left out, and pictures are reduced to 256 colours.
"""

import base64
import hashlib
import io
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).parent.parent / "notebooks"
LARGEST = 1_500_000  # bytes of a stored notebook
LOG = '<pre style="white-space:pre;overflow-x:auto'  # how rich prints a line in a notebook
MOST = 400  # characters of a plain text beside the same in HTML


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_digest(notebook: NotebookNode) -> str:
    """Hash of all code, by which stored outputs belong to it."""
    code = "\0".join(cell.source for cell in code_cells(notebook))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def run(path: Path, folder: Path, timeout: int = 900) -> NotebookNode:
    """Run a notebook in `folder`; return it with its outputs, or raise the error of a cell."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(
        notebook, timeout=timeout, resources=resources, record_timing=False
    )
    client.execute()
    for cell in code_cells(notebook):
        cell.outputs = cleaned(cell.outputs)
    return notebook


def cleaned(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Join the lines of a log, shrink pictures, and remove dates from names of runs."""
    found: list[NotebookNode] = []
    for output in outputs:
        data = output.get("data", {})
        if data.get("text/html", "").startswith(LOG):
            text = re.sub(r"\x1b\[[\d;]*m", "", data["text/plain"])
            output = nbformat.v4.new_output("stream", name="stdout", text=text.rstrip("\n") + "\n")
        if output.output_type == "stream":
            output.text = re.sub(r"-20\d{6}-\d{6}", "", output.text)
            if found and found[-1].get("name") == output.name:
                found[-1].text += output.text
                continue
        if "image/png" in data:
            data.pop("image/jpeg", None)
            data["image/png"] = shrunk(data["image/png"])
        if "text/html" in data and len(data["text/plain"]) > MOST:
            data["text/plain"] = data["text/plain"][:MOST] + "..."
        if output.output_type != "stream":
            output.metadata = {}
        found.append(output)
    return found


def shrunk(png: str) -> str:
    """Encode a picture with 256 colours; return it as it is if that is smaller."""
    picture, out = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return min(base64.b64encode(out.getvalue()).decode(), png.replace("\n", ""), key=len)


def store(path: Path, model: str) -> int:
    """Run a notebook and write its outputs into it; return its size in bytes.

    Raises:
        ValueError: an output has a path of this machine or stderr, or the file would be too large.
    """
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(model, Path(folder, os.environ["VLM_MODEL"]), symlinks=True)
        notebook = run(path, Path(folder))
        private = {folder, str(Path.home()), str(FOLDER.parent), os.path.abspath(model)}
    for cell in code_cells(notebook):
        cell.metadata = {}
        for output in cell.outputs:
            if "text" in output:
                output.text = output.text.replace(f"{folder}/", "")
        shown = nbformat.writes(nbformat.v4.new_notebook(cells=[cell]))
        if bad := [each for each in (*private, '"stderr"') if each in shown]:
            raise ValueError(f"{path.name}: the output of {cell.id} has {bad}")
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "vlm": {"code": code_digest(notebook)},
    }
    text = nbformat.writes(notebook) + "\n"
    if len(text) > LARGEST:
        raise ValueError(f"{path.name} would have {len(text):,} bytes, more than {LARGEST:,}")
    return path.write_text(text)


if __name__ == "__main__":
    model, *names = sys.argv[1:]
    os.environ["VLM_MODEL"] = "runs/openmoji"  # in the folder of a notebook
    for path in [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb")):
        print(f"{path.name}: {store(path, model):,} bytes", flush=True)
