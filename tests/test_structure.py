"""The package keeps its structure: import order, size of modules, who prints.

import-linter checks the import order and finds cycles: its contracts are in `pyproject.toml`.
"""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vlm"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 500


def lint_imports(root: Path) -> subprocess.CompletedProcess:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_imports_follow_the_contracts():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("losses/ring.py", "import vlm.training.step"),
        ("losses/ring.py", "def f():\n    from vlm.bundle import load"),
        ("losses/ring.py", "from vlm.losses.softmax import softmax_loss"),  # a cycle
        ("data/tar.py", "import torch.nn"),
        ("training/step.py", "if True:\n    from vlm.cli import main"),
        ("unlisted.py", "import vlm.errors"),  # a module that no layer names
    ],
)
def test_a_wrong_import_breaks_a_contract(module, line, tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(PACKAGE, tmp_path / "vlm", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "vlm" / module, "a") as f:
        f.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode != 0
    assert "BROKEN" in done.stdout or "unlisted" in done.stdout + done.stderr


def test_contributing_lists_the_subpackages_in_import_order():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = settings["contracts"][0]["layers"][::-1]
    page = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    named = re.search(r"\n((?:`[a-z ]+`[ \n·]+)+)\n", page)[1].replace("`", "").replace("·", "")
    assert named.split() == [name for name in layers if not name.startswith("_")]


def test_modules_are_short_and_named_for_their_contents():
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= MAX_LINES, path
        assert path.stem not in ("utils", "util", "helpers", "misc", "common"), path


def prints_to_stdout(source: str) -> list[int]:
    """Line numbers of the `print` calls that write to stdout."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "print"
        and not any(k.arg == "file" and ast.unparse(k.value) == "sys.stderr" for k in node.keywords)
    ]


def test_only_the_command_line_prints():
    assert prints_to_stdout("print(1)\nprint(2, file=sys.stderr)") == [1]
    for path in MODULES:
        if path.relative_to(PACKAGE).parts[0] != "cli":
            assert prints_to_stdout(path.read_text()) == [], path


def test_test_modules_have_names_of_their_own():
    """Pytest imports test modules by their base names, so two of one name are an error."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
