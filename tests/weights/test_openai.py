"""OpenAI's TorchScript archives, and PyTorch files that must not be trusted."""

import collections
import os
import pathlib
import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from vlm.bundle import load
from vlm.errors import CheckpointError
from vlm.weights import open_clip, openai
from vlm.weights.instantiate import abstract_model
from vlm.weights.rules import fill
from vlm.weights.torch_pickle import TorchFile

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["openai_vit", "openai_resnet"])
def test_towers_compute_what_theirs_do(name):
    tensors = TorchFile(GOLDEN / f"{name}.pt")
    assert tensors.is_script
    config = openai.model_config(tensors.shapes, name)
    model = fill(
        abstract_model(config, jnp.float32),
        open_clip.rules(config, tensors.shapes),
        tensors,
        dtype=np.float32,
        ignored=openai.ignored,
    )
    golden = np.load(GOLDEN / f"{name}.npz")
    assert (
        np.abs(model.encode_image(jnp.asarray(golden["pixels"])) - golden["z_image"]).max() < 2e-6
    )
    assert np.abs(model.encode_text(jnp.asarray(golden["tokens"])) - golden["z_text"]).max() < 2e-6


def test_a_vocabulary_of_another_size_is_refused():
    with pytest.raises(CheckpointError, match="49,408 tokens and its embedding table 30 rows"):
        load(GOLDEN / "openai_vit.pt")


# ------------------------------------------------------------------------------ bad input


class Evil:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def archive(path, data):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
    return path


@pytest.mark.parametrize(
    ("call", "args", "name"),
    [
        (os.system, ("touch MARK",), "system"),
        (exec, ("open('MARK', 'w')",), "exec"),
        (eval, ("open('MARK', 'w')",), "eval"),
        (open, ("MARK", "w"), "open"),
    ],
)
def test_a_pickle_runs_nothing(call, args, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = Evil(call, *args)
    for content in (evil, {"state_dict": {"w": evil}}, [evil]):
        path = archive(tmp_path / "evil.pt", pickle.dumps(content, protocol=2))
        with pytest.raises(CheckpointError, match=rf"refused, for it wants to import .*{name}"):
            load(path)
        assert not (tmp_path / "MARK").exists()


def test_allowed_names_cannot_be_misused(tmp_path):
    """Names on the list are called with nonsense, and attributes of them are set."""
    spoiled = collections.OrderedDict(a=1)
    spoiled.__dict__["keys"] = "x"
    for content in (spoiled, {"state_dict": 3}, 5, None, "text"):
        path = archive(tmp_path / "odd.pt", pickle.dumps(content, protocol=2))
        with pytest.raises(CheckpointError):
            load(path)


def test_damaged_files(tmp_path):
    whole = (GOLDEN / "openai_vit.pt").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 30):
        (tmp_path / "truncated.pt").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="no zip archive"):
            load(tmp_path / "truncated.pt")
    path = archive(tmp_path / "short.pt", pickle.dumps({"a": 1})[:-3])
    with pytest.raises(CheckpointError, match=r"refused|damaged"):
        load(path)


def test_a_file_that_does_not_say_what_it_is(tmp_path):
    path = archive(tmp_path / "epoch_32.pt", pickle.dumps({"state_dict": {}}))
    with pytest.raises(CheckpointError, match=r"ViT-B-32.*, or put .*open_clip_config\.json"):
        load(path)
