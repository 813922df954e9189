"""The Python of README, documentation pages, notebooks and docstrings passes pyright."""

import doctest
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_examples import NAMES

pytest.importorskip("pyright")

ROOT = Path(__file__).parent.parent
# The names that docstring examples may use: see `namespace` in test_examples.py.
PREAMBLE = """\
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import vlm

def given(kind: type[T]) -> T: ...
model = given(vlm.Bundle)
pictures = [given(Image.Image)]
folder = given(Path)
experiment = given(vlm.Experiment)
""".replace("def given", 'from typing import TypeVar\nT = TypeVar("T")\ndef given')
SETTINGS = {
    "typeCheckingMode": "standard",
    "reportMissingImports": "none",
    "reportMissingModuleSource": "none",
    "reportReturnType": "none",  # of `given`
    "reportRedeclaration": "none",
    "extraPaths": [str(ROOT)],
}


def examples() -> dict[str, str]:
    """Source text by file name."""
    found = {}
    for number, code in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    ):
        found[f"readme_{number}.py"] = code
    for path in sorted((ROOT / "vlm" / "docs").rglob("*.md")):
        code = re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
        found[f"page_{path.stem}.py"] = "\n".join(code)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        code = re.sub(r"^( *)%.*", r"\1pass", "\n\n".join(code), flags=re.MULTILINE)
        found[f"notebook_{path.stem}.py"] = code
    for name, thing in NAMES.items():
        parsed = doctest.DocTestParser().get_examples(inspect.getdoc(thing) or "")
        found[f"{name.replace('.', '_')}.py"] = PREAMBLE + "".join(e.source for e in parsed)
    return found


@pytest.mark.slow
def test_examples_pass_the_type_checker(tmp_path):
    for name, code in examples().items():
        (tmp_path / name).write_text(code)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(SETTINGS))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] > 100
    errors = [
        f"{Path(d['file']).name}:{d['range']['start']['line'] + 1}: {d['message']}"
        for d in report["generalDiagnostics"]
        if d["severity"] == "error"
    ]
    assert not errors, "\n".join(errors)
