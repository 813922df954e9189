"""`import vlm` is instant, and its lazy names are all there."""

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vlm

HEAVY = ("jax", "flax", "optax", "grain", "orbax", "tensorflow_datasets", "PIL", "numpy", "rich")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def seconds(code: str) -> float:
    """Of processor time in a fresh process: the clock would tell of all else that runs."""
    before = os.times()
    python(code)
    after = os.times()
    spent = [t.children_user + t.children_system for t in (before, after)]
    return spent[1] - spent[0]


def test_import_takes_under_a_fifth_of_a_second_and_nothing_heavy():
    bare, ours = [], []
    for _ in range(5):  # in turns, so that both meet the same load
        bare.append(seconds("pass"))
        ours.append(seconds("import vlm"))
    assert min(ours) - min(bare) < 0.2
    loaded = json.loads(python("import vlm, sys, json; print(json.dumps(list(sys.modules)))"))
    assert not set(HEAVY) & set(loaded)


def test_help_takes_under_half_a_second_and_no_jax():
    code = "from vlm.cli import main; import sys; sys.exit(main(['--help']))"
    bare = min(seconds("pass") for _ in range(3))
    assert min(seconds(code) for _ in range(3)) - bare < 0.5
    shown = python(f"{code.replace('sys.exit', '')}; print('jax' in sys.modules)")
    assert shown.strip().endswith("False")


def exported(init: Path) -> list[tuple[str, str]]:
    """(package, name) of what an `__init__.py` gives lazily."""
    package = ".".join(init.relative_to(PACKAGE.parent).parent.parts)
    blocks = [node for node in ast.parse(init.read_text()).body if isinstance(node, ast.With)]
    return [
        (package, alias.asname)
        for block in blocks
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]


PACKAGE = Path(vlm.__file__).parent
PUBLIC = exported(PACKAGE / "__init__.py")
IN_SUBPACKAGES = [pair for init in sorted(PACKAGE.glob("*/__init__.py")) for pair in exported(init)]


def test_there_are_public_names():
    assert len(PUBLIC) > 30
    assert len(IN_SUBPACKAGES) > 30


@pytest.mark.parametrize(("package", "name"), PUBLIC + IN_SUBPACKAGES, ids=lambda part: part)
def test_every_public_name_is_there(package, name):
    owner = importlib.import_module(package)
    assert getattr(owner, name) is not None
    assert name in dir(owner)


def test_no_name_of_a_subpackage_is_that_of_its_module():
    """Importing the module would put it in the place of the name."""
    shadowed = [
        f"{package}.{name}"
        for package, name in IN_SUBPACKAGES
        if (PACKAGE.parent / package.replace(".", "/") / f"{name}.py").exists()
        and not inspect.ismodule(getattr(importlib.import_module(package), name))
    ]
    assert not shadowed


@pytest.mark.parametrize(
    "path",
    [
        "vlm.losses.softmax_loss",
        "vlm.models.variants.clip",
        "vlm.weights.catalogue.table",
        "vlm.planning.plan",
        "vlm.training.Trainer",
        "vlm.evaluation.evaluate",
        "vlm.inputs.open_image",
    ],
)
def test_subpackages_work_after_import_vlm_alone(path):
    assert python(f"import vlm; print(callable({path}))").strip() == "True"


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = vlm.nonsense
    assert not hasattr(vlm, "jax")
    assert not hasattr(vlm, "epy")


def test_a_log_is_written_without_pytorch_where_it_is_installed(tmp_path):
    (tmp_path / "torch.py").write_text("raise AssertionError('PyTorch was imported')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from vlm.training.logs import "
        f"EventWriter; board = EventWriter({str(tmp_path / 'board')!r}, 0); "
        "board.add_scalar('loss', 1.0, 1); board.close(); print('torch' in sys.modules)"
    )
    assert python(code) == "False\n"
    assert list((tmp_path / "board").iterdir())


def test_old_names_of_subpackages_import_with_a_warning():
    code = (
        "from vlm.train.step import Trainer; import vlm.training as t; print(t.Trainer is Trainer)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"
    assert (
        "<string>:1: DeprecationWarning: vlm.train.step is renamed to vlm.training.step"
        in done.stderr
    )


def test_old_names_of_modules_import_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r"standard is renamed to vlm\.evaluation\.presets"):
        from vlm.evaluation.standard import imagenet
    assert imagenet is vlm.evaluation.presets.imagenet


def test_functions_and_subpackages_have_different_names():
    for name in ("adapt", "evaluate", "explain", "export", "plan", "serve", "train"):
        assert inspect.isfunction(getattr(vlm, name))


def test_documentation_imports_only_public_names():
    """From `vlm` or a subpackage, and not from modules inside of one."""
    root = PACKAGE.parent
    pages = [root / "README.md", *root.glob("configs/*.py"), *root.glob("notebooks/*.ipynb")]
    for page in pages:
        for module in re.findall(r"(?:from|import) (vlm[a-z_.]*)", page.read_text()):
            parts = module.rstrip(".").split(".")
            public = len(parts) < 3 or (".".join(parts[:2]), parts[2]) in IN_SUBPACKAGES
            assert public, f"{page.name} imports the private module {module}"
