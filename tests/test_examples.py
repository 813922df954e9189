"""The example of every public name runs, and every public name has one."""

import doctest
import importlib
import inspect
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from PIL import Image
from test_import import IN_SUBPACKAGES, PUBLIC

import vlm
from vlm.inputs import Preprocess, train_bpe
from vlm.models import DualEncoder

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 70, 220)}


def documented() -> dict[str, object]:
    """Every public class and function, by its full name, once."""
    found = {}
    for package, name in PUBLIC + IN_SUBPACKAGES + [("vlm.losses", n) for n in vlm.losses.__all__]:
        thing = getattr(importlib.import_module(package), name)
        if inspect.isclass(thing) or isinstance(thing, types.FunctionType):
            found[f"{thing.__module__}.{thing.__qualname__}"] = thing
    return found


NAMES = documented()


@pytest.fixture(scope="module")
def namespace(tmp_path_factory):
    """What examples may use: a model of random weights, three pictures, a folder, an experiment."""
    experiment = vlm.load_config(tiny.folder() / "shapes.py")
    texts = ["a red square", "a green square", "a blue stripe"]
    model = vlm.Bundle(
        DualEncoder(experiment.model, rngs=nnx.Rngs(0)),
        Preprocess(experiment.preprocess),
        train_bpe(texts, 280, 12),
        "tiny",
    )
    return {
        "vlm": vlm,
        "np": np,
        "jax": jax,
        "jnp": jnp,
        "model": model,
        "pictures": [Image.new("RGB", (24, 24), colour) for colour in COLOURS.values()],
        "folder": Path(tmp_path_factory.mktemp("examples")),
        "experiment": experiment,
    }


@pytest.mark.parametrize("name", sorted(NAMES))
def test_example(name, namespace):
    text = inspect.getdoc(NAMES[name]) or ""
    test = doctest.DocTestParser().get_doctest(text, dict(namespace), name, None, 0)
    assert test.examples, f"{name} has no example in its docstring"
    output = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL)
    runner.run(test, out=output.append)
    assert not runner.failures, "".join(output)
