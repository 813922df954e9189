"""Checkpoints of 16 bits are the models of their rounded numbers, to the last bit."""

import shutil

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from test_golden import GOLDEN

from vlm.bundle import load

HALVES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
NAMES = sorted(file.parent.name for file in GOLDEN.glob("*/model.safetensors"))


def rounded(name: str, dtype: str, to, folder):
    """A copy of a golden checkpoint whose numbers are of 16 bits, kept as `to`."""
    shutil.copytree(GOLDEN / name, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for key, value in tensors.items():
        if value.dtype == np.float32:
            tensors[key] = value.astype(HALVES[dtype]).astype(to)
    save_file(tensors, file)
    return nnx.to_flat_state(nnx.state(load(folder).model))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_the_number_that_is_kept(name, dtype, tmp_path):
    half = rounded(name, dtype, HALVES[dtype], tmp_path / "half")
    whole = rounded(name, dtype, np.float32, tmp_path / "whole")
    for (path, ours), (_, theirs) in zip(half, whole, strict=True):
        ours, theirs = np.asarray(ours.get_value()), np.asarray(theirs.get_value())
        assert ours.dtype == theirs.dtype, path
        assert np.array_equal(ours, theirs), path
