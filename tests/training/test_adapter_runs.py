"""Adapter runs: only the adapter has gradients, moments, checkpoints and a bundle."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from test_step import copy, make, run

from vlm.bundle import Bundle, load
from vlm.config import AdapterConfig, MeshConfig
from vlm.errors import CheckpointError, ConfigError
from vlm.inputs.tokenizer import train_bpe
from vlm.models import adapters
from vlm.planning.compile import state_bytes
from vlm.sharding import path_names
from vlm.training.init_from import from_model
from vlm.training.loop import train
from vlm.training.partition import joined, partition

NOISE = {"vision": {"dropout": 0.1, "patch_dropout": 0.25}, "optimizer": {"ema": 0.99}}
ADAPTER = AdapterConfig(rank=4)
EVERYTHING = AdapterConfig(rank=4, dora=True, quantize="int8")


def names(tree):
    return {".".join(path_names(path)) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory) -> str:
    """A bundle of a random model."""
    folder = tmp_path_factory.mktemp("base") / "model"
    e = tiny()
    trainer = make(e)
    texts = [f"a {colour} square" for colour in ("red", "green", "blue", "black")]
    tokenizer = train_bpe(texts, 300, 16, lowercase=True)
    model = trainer.model(trainer.init(jnp.int32(1)))
    Bundle(model, trainer.preprocess, tokenizer, "base").save(folder)
    return str(folder)


def test_trees_divide_and_join_again():
    tree = {"a": {"lora": {"a": 1, "scale": 2}, "kernel": 3}, "b": {0: {"kernel": 4}}, "c": 5}
    trained, rest = partition(tree, adapters.is_trained)
    assert trained == {"a": {"lora": {"a": 1}}}
    assert rest == {"a": {"lora": {"scale": 2}, "kernel": 3}, "b": {0: {"kernel": 4}}, "c": 5}
    assert joined(trained, rest) == tree


def test_int8_takes_its_documented_memory(tiny):
    def bytes_of(quantize):
        trainer = make(tiny(adapter=AdapterConfig(rank=1, quantize=quantize)))
        return state_bytes(trainer.abstract_state, trainer.mesh).parameters

    trainer = make(tiny(adapter=AdapterConfig(rank=1)))
    kernels = sum(
        x.size
        for path, x in jax.tree_util.tree_leaves_with_path(trainer.abstract_state.frozen)
        if path_names(path)[-1] == "kernel" and "stem" not in path_names(path)
    )
    assert 2.5 * kernels < bytes_of("none") - bytes_of("int8") < 3 * kernels


@pytest.fixture(scope="module")
def one(tiny, base):
    """On one device: the trainer, its state before, the losses of some steps, the state after."""
    rule = {"learning_rate": 1e-2, "eps": 1e-3}
    e = tiny(adapter=EVERYTHING, init_from=base, optimizer=rule, vision=NOISE["vision"])
    trainer = make(e)
    state = from_model(trainer, trainer.init(jnp.int32(20)), load(base))
    before = jax.tree.map(np.asarray, state)
    return trainer, before, *run(trainer, 12, state)


def test_only_the_adapter_is_trained(one):
    trainer, before, losses, after = one
    (again,), _ = run(trainer, 1, copy(after))  # the first batch
    assert again < losses[0] - 0.1
    assert all("lora" in name and not name.endswith("scale") for name in names(after.params))
    assert all("lora" in n or n.endswith("count") for n in names(after.opt_state))
    assert len(names(after.params)) == 12 * 3
    same = jax.tree.map(lambda x, y: np.array_equal(x, y), before.frozen, after.frozen)
    assert all(jax.tree.leaves(same))
    moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), before.params, after.params)
    assert all(jax.tree.leaves(moved)), moved


@pytest.mark.slow
def test_eight_devices_take_the_steps_of_one(one, base):
    """With parameters sharded over `fsdp` and `tensor`."""
    trainer, _, losses, _ = one
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    trainer = make(dataclasses.replace(trainer.experiment, mesh=mesh), 8)
    state = from_model(trainer, trainer.init(jnp.int32(20)), load(base))
    got, _ = run(trainer, 4, state)
    np.testing.assert_allclose(got, losses[:4], rtol=1e-5)


@pytest.fixture(scope="module")
def finished(tiny, base, tmp_path_factory):
    """A finished run with an adapter, and its checkpoints of steps 6 and 12."""
    folder = tmp_path_factory.mktemp("adapter") / "run"
    e = tiny(adapter=ADAPTER, init_from=base, run_dir=str(folder), log_every=1, **NOISE)
    train(dataclasses.replace(e, checkpoint_every=0.5, keep_checkpoints=9))
    return Path(folder)


def test_a_run_writes_a_small_bundle_that_opens(finished, base):
    assert sorted(os.listdir(finished / "bundle")) == ["adapter.json", "adapter.safetensors"]
    about = json.loads((finished / "bundle" / "adapter.json").read_text())
    below = load(base)
    assert about["base"] == {"model": base, "fingerprint": below.fingerprint}
    bundle = load(finished)
    texts = ["a red square", "a black square"]
    assert np.abs(bundle.encode_text(texts) - below.encode_text(texts)).max() > 1e-4
    merged = bundle.merged()
    assert np.abs(merged.encode_text(texts) - bundle.encode_text(texts)).max() < 1e-6
    assert bundle.fingerprint == about["fingerprint"] != below.fingerprint


def test_checkpoints_hold_only_the_adapter(finished, base):
    size = sum(f.stat().st_size for f in (finished / "checkpoints" / "6").rglob("*") if f.is_file())
    rows = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    written = next(row["checkpoint/bytes"] for row in rows if "checkpoint/bytes" in row)
    numbers = sum(x.size for x in load_file(finished / "bundle" / "adapter.safetensors").values())
    assert written < 4 * 4 * numbers + 1000  # the adapter, its average and its two moments
    assert written < (Path(base) / "model.safetensors").stat().st_size * 2
    assert size > 0


@pytest.fixture
def killed(finished, tmp_path) -> Path:
    """The same run as if it had been killed after step 6."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "bundle")
    shutil.rmtree(folder / "checkpoints" / "12")
    return folder


@pytest.mark.slow
def test_a_resumed_run_ends_bit_for_bit_the_same(finished, killed):
    train(resume=killed)
    name = "adapter.safetensors"
    assert (killed / "bundle" / name).read_bytes() == (finished / "bundle" / name).read_bytes()


def test_a_run_does_not_resume_with_another_base_model(killed, base, tmp_path):
    moved = tmp_path / "moved"
    other = load(base)
    layer = other.model.text.projection
    layer.kernel = nnx.Param(layer.kernel[...] * 1.5)
    other.save(moved)
    config = killed / "config.json"
    values = json.loads(config.read_text()) | {"init_from": str(moved)}
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"has changed .*restore that model"):
        train(resume=killed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lock": "vision", "init_from": "x"}, "adapter freezes both towers .* and lock is 'vis"),
        ({"init_towers": "text", "init_from": "x"}, "init_towers is 'text'.*such as \"text"),
    ],
)
def test_options_that_contradict_an_adapter_are_refused(tiny, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(adapter=ADAPTER, **changes)


def test_an_adapter_needs_a_model(tiny, tmp_path):
    with pytest.raises(ConfigError, match="without init_from the model is random: name the model"):
        train(tiny(adapter=ADAPTER, run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
