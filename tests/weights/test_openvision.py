"""OpenVision's Orbax checkpoints: found by any of their folders, in every layout, or refused."""

import json
import pathlib
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from vlm.bundle import load
from vlm.errors import CheckpointError
from vlm.weights.openvision import OrbaxTree, sinusoidal_positions
from vlm.weights.rules import flat_arrays

GOLDEN = pathlib.Path(__file__).parent / "golden" / "openvision_jax"
BELOW = "jax_orbax_weight/checkpoint.npz/3/default"


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(GOLDEN, tmp_path / "openvision"))


def parameters(model) -> dict[str, np.ndarray]:
    return dict(flat_arrays(load(model).model))


def same(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def rewrite(folder: pathlib.Path, change) -> None:
    """The folder's checkpoint with what `change` makes of its parameters, names to arrays."""
    tree = OrbaxTree(epath.Path(folder / BELOW))
    flat = change({name: tree.read(name) for name in tree.shapes})
    nested: dict = {}
    for name, value in flat.items():
        *path, last = name.split("/")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    shutil.rmtree(folder / BELOW)
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder / BELOW, {"params": nested})


@pytest.mark.parametrize("below", ["jax_orbax_weight", "jax_orbax_weight/checkpoint.npz", BELOW])
def test_it_is_found_by_any_of_its_folders(below):
    same(parameters(GOLDEN / below), parameters(GOLDEN))


def test_the_newest_step_is_read(folder):
    shutil.copytree(folder / BELOW, folder / "jax_orbax_weight/checkpoint.npz/12/default")
    rewrite(folder, lambda flat: flat | {"t": np.zeros(1, np.float32)})  # step 3
    assert load(folder).logit_scale == pytest.approx(np.exp(2.1))


def test_heads_may_be_an_axis_of_the_kernels_and_positions_may_be_learned(folder):
    def change(flat):
        for name in flat:
            if any(f"/{part}/" in name for part in ("query", "key", "value")):
                flat[name] = flat[name].reshape(*flat[name].shape[:-1], 2, -1)
            elif name.endswith("out/kernel"):
                flat[name] = flat[name].reshape(2, -1, flat[name].shape[-1])
        return flat | {"img/pos_embedding": sinusoidal_positions(4, 24)[None]}

    rewrite(folder, change)
    same(parameters(folder), parameters(GOLDEN))


def test_weights_for_open_clip_come_first(folder):
    other = folder.parent / "other"
    load(folder).save(other, format="open_clip")
    shutil.copy(other / "open_clip_model.safetensors", folder)
    shutil.rmtree(folder / BELOW)
    same(parameters(folder), parameters(GOLDEN))


def test_without_its_config_it_is_refused(folder):
    (folder / "open_clip_config.json").unlink()
    for named in (folder, folder / BELOW):
        with pytest.raises(
            CheckpointError, match=r"does not identify its model: .* whole repository"
        ):
            load(named)


def test_a_corrupt_store_is_named(folder):
    largest = max((folder / BELOW).rglob("ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"is corrupt .* download it again"):
        load(folder)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("img/embedding/kernel", "has no img/embedding/kernel: it is no OpenVision"),
        ("txt/encoder_norm/scale", "missing from the file: .*txt/encoder_norm/scale"),
    ],
)
def test_missing_parameters_are_named(folder, lost, message):
    rewrite(folder, lambda flat: {name: value for name, value in flat.items() if name != lost})
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_another_width_is_refused(folder):
    wide = np.zeros((14, 20), np.float32)
    rewrite(folder, lambda flat: flat | {"txt/Embed_0/embedding": wide})
    with pytest.raises(CheckpointError, match=r"of another shape: .*txt/Embed_0/embedding"):
        load(folder)


def stored(folder, name, driver="zarr", rows=8, shape=(64, 8)):
    """An Orbax-like store whose array has this shape, of which only some rows were written."""
    import tensorstore

    place = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"params.{name}/"}
    array = tensorstore.open(
        {"driver": driver, "kvstore": place},
        create=True,
        dtype=tensorstore.float32,
        shape=shape,
        chunk_layout=tensorstore.ChunkLayout(chunk_shape=(8, shape[1])),
    ).result()
    array[:rows].write(np.ones((rows, shape[1]), np.float32)).result()


@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
def test_a_missing_part_is_not_read_as_zeros(tmp_path, driver):
    stored(tmp_path, "w", driver)
    about = {"store_array_data_equal_to_fill_value": True, "use_zarr3": driver == "zarr3"}
    (tmp_path / "_METADATA").write_text(json.dumps(about))
    tree = OrbaxTree(epath.Path(tmp_path))
    assert tree.read("w", 0, 8).sum() == 64
    with pytest.raises(CheckpointError, match=r"NOT_FOUND: chunk .*download it again"):
        tree.read("w")


def test_parts_equal_to_zero_may_be_missing_in_old_checkpoints(tmp_path):
    stored(tmp_path, "w")
    assert OrbaxTree(epath.Path(tmp_path)).read("w").sum() == 64


def test_a_small_store_that_claims_large_arrays_is_refused(tmp_path):
    stored(tmp_path, "w", shape=(1 << 24, 8))
    with pytest.raises(CheckpointError, match="claims 536,870,912 bytes of arrays in files of"):
        OrbaxTree(epath.Path(tmp_path))
