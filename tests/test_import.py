"""`import vlm` is instant, and its lazy names are all there."""

import ast
import json
import os
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


@pytest.mark.parametrize("name", vlm.__all__)
def test_every_public_name_is_there(name):
    assert getattr(vlm, name) is not None
    assert name in dir(vlm)


def test_rooms_are_there_without_an_import():
    assert python("import vlm; print(vlm.losses.softmax_loss.__name__)").strip() == "softmax_loss"


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = vlm.nonsense
    assert not hasattr(vlm, "jax")


def test_type_checkers_see_the_names_that_load():
    """The imports under TYPE_CHECKING and the table of lazy names say the same."""
    tree = ast.parse(Path(vlm.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {(alias.asname, node.module) for node in block.body for alias in node.names}
    assert seen == set(vlm._HOME.items())
    assert vlm.__version__ == vlm._version.__version__
