"""A teacher's embeddings on disk are those of the very images and texts that training makes."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm
from vlm.cli import main
from vlm.config import AugmentConfig, DataConfig, DistillConfig, MeshConfig
from vlm.data.pipeline import train_batches
from vlm.data.reinforced import Reinforced
from vlm.errors import ConfigError, DataError
from vlm.sharding import make_mesh
from vlm.training.reinforce import reinforce
from vlm.training.teacher import Teacher

CHANGES = AugmentConfig(crop=(0.5, 1.0), jitter=0.2, flip=True, grey=0.3)


@pytest.fixture(scope="module")
def data(drawings) -> DataConfig:
    return DataConfig(drawings, eval_split=None, augment=CHANGES)


@pytest.fixture(scope="module")
def stored(data, learned, tmp_path_factory) -> str:
    """Three variants of each drawing, by a teacher that takes images as its student does."""
    folder = tmp_path_factory.mktemp("taught") / "store"
    told = []
    reinforce(
        data, folder, learned, variants=3, batch_size=16, progress=lambda *at: told.append(at)
    )
    assert told[-1] == (120, 120)
    return str(folder)


def batches(data, learned, stored, **options):
    model = vlm.load(learned)
    found = train_batches(
        data,
        model.preprocess,
        model.tokenizer,
        batch_size=8,
        seed=3,
        reinforced=Reinforced.open(stored),
        **options,
    )
    return model, found


def test_stored_embeddings_are_the_teachers_of_the_same_batches(data, learned, stored, tiny):
    _, found = batches(data, learned, stored)
    teacher = Teacher(
        tiny(distill=DistillConfig(learned)), make_mesh(MeshConfig(), jax.devices()[:1])
    )
    for _ in range(3):
        batch = next(found)
        tokens = jnp.asarray(batch["tokens"])
        live = teacher({"images": jnp.asarray(batch["images"]), "teacher_tokens": tokens})
        for name in ("teacher_image", "teacher_text"):
            np.testing.assert_allclose(batch[name], live[name], atol=2e-6)
    found.close()


def test_a_batch_is_the_same_from_its_position(data, learned, stored):
    _, found = batches(data, learned, stored)
    first, position, second = next(found), found.get_state(), next(found)
    found.close()
    _, again = batches(data, learned, stored)
    again.set_state(position)
    batch = next(again)
    again.close()
    for name in ("images", "tokens", "teacher_image", "teacher_text"):
        np.testing.assert_array_equal(batch[name], second[name])
        assert (first[name] != second[name]).any()


def test_a_bad_sample_is_replaced_with_its_embedding(data, learned, stored, drawings, tmp_path):
    """Training skips it, and its replacement has its own embedding."""
    broken = tmp_path / "broken"
    broken.mkdir()
    lines = Path(drawings, "captions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    gone = next(row for row in rows if row["split"] == "train")
    for row in rows:
        row["image"] = "gone.png" if row is gone else f"{drawings}/{row['image']}"
    (broken / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = dataclasses.replace(data, source=str(broken))
    _, found = batches(config, learned, stored)
    seen = [next(found) for _ in range(5)]
    found.close()
    assert "missing image" in found.bad.report()
    assert all(np.isfinite(batch["teacher_image"]).all() for batch in seen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": AugmentConfig()}, r"were made with different data\.augment"),
        ({"captions": ("other",)}, r"no feature 'other'"),
        ({"train_split": "test"}, r"different data\.train_split"),
    ],
)
def test_embeddings_of_other_data_are_refused(data, learned, stored, changes, message):
    with pytest.raises((ConfigError, DataError), match=message):
        batches(dataclasses.replace(data, **changes), learned, stored)


def test_an_interrupted_call_resumes_and_ends_the_same(data, learned, stored, tmp_path):
    """Also with corrupt rows after those that are recorded."""
    options = {"variants": 3, "batch_size": 16}

    def stop(done, total):
        if done == 48:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reinforce(data, tmp_path, learned, progress=stop, **options)
    with pytest.raises(DataError, match="holds no embeddings"):
        Reinforced.open(str(tmp_path))
    with pytest.raises(
        DataError, match="was started with other seed, dtype: use the same settings"
    ):
        reinforce(data, tmp_path, learned, seed=1, dtype="float16", **options)
    corrupt = np.lib.format.open_memmap(tmp_path / "images.npy", "r+")
    corrupt[17:] = 7
    corrupt.flush()
    told = []
    reinforce(data, tmp_path, learned, progress=lambda *at: told.append(at), **options)
    assert told[0] == (64, 120)
    for name in ("images.npy", "texts.npy", "reinforced.json"):
        whole = Path(stored, name).read_bytes()
        assert (tmp_path / name).read_bytes() == whole
    assert {path.name for path in tmp_path.iterdir()} == {
        "images.npy",
        "texts.npy",
        "reinforced.json",
    }


def test_a_folder_of_other_files_is_refused(data, learned, stored, tmp_path):
    with pytest.raises(DataError, match="holds no embeddings of a teacher"):
        Reinforced.open(str(tmp_path))
    with pytest.raises(DataError, match="is not empty: give an empty or new folder"):
        reinforce(data, stored, learned)
    with pytest.raises(ConfigError, match="augmentations is 0"):
        reinforce(data, tmp_path / "new", learned, variants=0)


def test_the_command_prints_its_result(drawings, learned, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--augmentations", "1", "--dtype", "float16", "--batch-size", "16"]
    assert main(["data", "reinforce", drawings, str(out), "--model", learned, *options]) == 0
    assert "40 examples x 1 augmentations, 16 dimensions" in capsys.readouterr().out
    assert Reinforced.open(str(out)).embeddings(np.array([0]), np.array([0]))[
        "teacher_image"
    ].shape == (1, 16)
