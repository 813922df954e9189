"""Adapters in folders: opened with their model, summed, switched, and refused on another."""

import json
import pathlib
import shutil
import time

import jax
import numpy as np
import pytest
from flax import nnx

from vlm import adaptation
from vlm.bundle import load
from vlm.config import AdapterConfig
from vlm.errors import CheckpointError, ConfigError
from vlm.models import adapters
from vlm.weights.files import SafetensorsFile, write_safetensors

GOLDEN = pathlib.Path(__file__).parent.parent / "weights" / "golden"
BASE = GOLDEN / "hf_clip"
TEXTS = ["a photo of a cat", "two dogs"]


def made(base, folder, config, seed):
    """An adapter at random, saved in `folder`."""
    random = np.random.default_rng(seed)
    fresh = adapters.fresh(base.model, config, jax.random.key(seed))
    factors = {
        name: adapters.Factors(
            np.asarray(f.a),
            0.1 * random.standard_normal(f.b.shape).astype(np.float32),
            np.asarray(f.scale),
            None if f.magnitude is None else np.asarray(f.magnitude) * 1.2,
        )
        for name, f in fresh.items()
    }
    bundle = base.with_adapter(factors, config)
    bundle.name = folder.name
    bundle.save_adapter(folder)
    return bundle


@pytest.fixture(scope="module")
def base():
    return load(BASE)


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Adapters of two ranks and of two sets of layers, one of them DoRA's, one over int8."""
    folder = tmp_path_factory.mktemp("adapters")
    configs = {
        "birds": AdapterConfig(rank=2, alpha=1.0),
        "cars": AdapterConfig(rank=4, alpha=1.0, targets=("text.*.query", "*.projection")),
        "dora": AdapterConfig(rank=2, alpha=1.0, dora=True),
        "small": AdapterConfig(rank=2, alpha=1.0, quantize="int8"),
    }
    return folder, {
        name: made(base, folder / name, config, seed)
        for seed, (name, config) in enumerate(configs.items())
    }


def assert_same(one, other):
    """Equal parameters, adapter and all."""
    trees = [nnx.to_pure_dict(nnx.state(bundle.model)) for bundle in (one, other)]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *trees)))


@pytest.mark.parametrize("name", ["birds", "cars", "dora", "small"])
def test_an_adapter_opens_with_its_model(base, folders, name):
    folder, bundles = folders
    about = json.loads((folder / name / "adapter.json").read_text())
    assert about["base"] == {"model": str(BASE), "fingerprint": base.identity}
    for bundle in (load(folder / name), adaptation.attach(base, folder / name)):
        assert_same(bundle, bundles[name])
        assert bundle.name == name
        assert bundle.fingerprint == about["fingerprint"] == bundle.merged().fingerprint


def test_what_is_saved_whole_is_merged(folders, tmp_path):
    bundle = load(folders[0] / "small")
    bundle.save(tmp_path / "whole")
    assert_same(load(tmp_path / "whole"), bundle.merged())
    assert adapters.adapter_of(load(tmp_path / "whole").model) == {}


def test_the_model_is_known_in_every_format(base, folders, tmp_path):
    """A checkpoint of transformers is the same model after it was converted to a bundle."""
    folder, bundles = folders
    base.save(tmp_path / "converted")
    for place in (tmp_path / "converted", BASE):
        assert_same(load(folder / "birds", base=place), bundles["birds"])
    small = load(folder / "birds", image_size=60, dtype="bfloat16", tower="vision")
    assert small.config.vision.image_size == 60
    assert set(adapters.adapter_of(small.model)) == {
        name for name in adapters.adapter_of(bundles["birds"].model) if name.startswith("vision.")
    }


def test_an_adapter_of_another_model_is_refused(base, folders, tmp_path):
    folder, _ = folders
    other = load(BASE)
    other.model.text.projection.kernel[...] *= 1.01
    other.save(tmp_path / "other")
    for refused in (
        lambda: load(folder / "birds", base=tmp_path / "other"),
        lambda: adaptation.attach(load(tmp_path / "other"), folder / "birds"),
        lambda: adaptation.AdapterSwitch(load(tmp_path / "other"), {"birds": folder / "birds"}),
    ):
        with pytest.raises(CheckpointError, match=r"is of .*hf_clip \(fingerprint .* is another m"):
            refused()


def test_a_sum_with_weights(base, folders):
    folder, _ = folders
    two = [folder / "birds", folder / "cars"]
    neither = adaptation.attach(base, *two, weights=[0.0, 0.0])
    assert np.array_equal(neither.encode_text(TEXTS), base.encode_text(TEXTS))

    def kernels(bundle):
        layers = adapters.linear_layers(bundle.merged().model)
        return {name: adapters.matrix(layer) for name, layer in layers.items()}

    both = adaptation.attach(base, *two, weights=[1.0, -0.5])
    assert both.name == "1 birds + -0.5 cars"
    parts = [kernels(b) for b in (base, *(adaptation.attach(base, folder) for folder in two))]
    for name, kernel in kernels(both).items():
        plain, birds, cars = (part[name] for part in parts)
        np.testing.assert_allclose(
            kernel, plain + (birds - plain) - 0.5 * (cars - plain), atol=1e-5, err_msg=name
        )
    with pytest.raises(ConfigError, match="there are 1 weights for 2 adapters: give one for each"):
        adaptation.attach(base, *two, weights=[1.0])


def test_switching_takes_no_time_and_compiles_nothing(base, folders):
    folder, bundles = folders
    switch = adaptation.AdapterSwitch(
        base, {name: folder / name for name in ("birds", "cars", "small")}
    )
    assert list(switch) == ["birds", "cars", "small"]
    z = {"birds": switch["birds"].encode_text(TEXTS)}
    program = switch["birds"]._text_program
    assert program._cache_size() == 1
    for name in ("cars", "birds", "small"):
        began = time.perf_counter()
        bundle = switch[name]
        assert time.perf_counter() - began < 5e-3
        z[name] = bundle.encode_text(TEXTS)
        assert bundle.fingerprint == bundles[name].fingerprint
        assert bundle._text_program is program
    assert program._cache_size() == 1
    assert np.abs(z["birds"] - bundles["birds"].encode_text(TEXTS)).max() < 1e-6
    assert np.abs(z["birds"] - z["cars"]).max() > 1e-3
    with pytest.raises(ConfigError, match="is DoRA's and another is not"):
        adaptation.AdapterSwitch(base, {name: folder / name for name in ("birds", "dora")})


@pytest.fixture
def copied(folders, tmp_path):
    shutil.copytree(folders[0] / "birds", tmp_path / "birds")
    return tmp_path / "birds"


def test_a_changed_number_is_refused(copied):
    file = copied / "adapter.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 64
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="is not what was saved: the file is damaged"):
        load(copied)


def test_a_missing_or_foreign_tensor_is_refused(copied):
    file = copied / "adapter.safetensors"
    tensors = SafetensorsFile(file)
    arrays = {name: tensors.read(name) for name in tensors.shapes}
    name = next(iter(arrays))
    for changed in ({k: v for k, v in arrays.items() if k != name}, arrays | {"x": arrays[name]}):
        write_safetensors(file, changed.items(), {})
        with pytest.raises(CheckpointError, match="do not agree on"):
            load(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "is of format 99 and this vlm reads up to 1: update vlm"),
        ({"base": None}, "is not as saved"),
        ({"base": {"model": "/gone", "fingerprint": "0" * 32}}, "digests are not those of its fi"),
        ({"config": {"rank": "x"}}, "is not as saved .*rank must be int"),
        ({"digests": {}}, "is not as saved"),
    ],
)
def test_a_description_that_cannot_be(copied, change, message):
    file = copied / "adapter.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load(copied)


def test_a_model_that_moved_is_named(base, tmp_path):
    base.save(tmp_path / "model")
    made(load(tmp_path / "model"), tmp_path / "adapter", AdapterConfig(rank=1), 0)
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"cannot be loaded: .*with base if it has mov"):
        load(tmp_path / "adapter")
    load(tmp_path / "adapter", base=tmp_path / "moved")


def test_what_is_no_adapter(base, tmp_path):
    with pytest.raises(CheckpointError, match="has no adapter: give a folder with an adapter"):
        adaptation.attach(base, BASE)
    with pytest.raises(ConfigError, match=r"has no adapter: save it with Bundle\.save"):
        base.save_adapter(tmp_path / "out")
