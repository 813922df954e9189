"""Training on images of any aspect: independent of padding, micro-batches and devices."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from processes import losses as logged
from processes import weights

import vlm
from vlm.config import AdapterConfig, Experiment, PreprocessConfig
from vlm.config.batch_sizes import at_size, batch_sizes
from vlm.data.batch_schedule import BatchSchedule
from vlm.errors import ConfigError, ShardingError
from vlm.inputs.preprocess import Preprocess
from vlm.planning.compile import batch_of
from vlm.sharding import global_batch, make_mesh
from vlm.training.loop import train
from vlm.training.step import Trainer

BUDGET = 16
SHAPES = {"bar": (12, 48), "pole": (48, 12), "square": (24, 24), "board": (20, 30)}  # h, w
COLOURS = {"red": (220, 30, 30), "green": (20, 160, 60), "blue": (40, 60, 210), "grey": (90,) * 3}
NAFLEX = {"image_size": 16, "resize": "naflex", "patch_size": 4, "kernel": "bilinear"}


@pytest.fixture(scope="module")
def any_aspect(tiny, tmp_path_factory):
    """`any_aspect(budget, **changes)`: an experiment on 16 pictures of four aspects."""
    folder = tmp_path_factory.mktemp("aspects")
    rows = []
    for shape, (height, width) in SHAPES.items():
        for colour, rgb in COLOURS.items():
            name = f"{shape}-{colour}.png"
            Image.new("RGB", (width, height), rgb).save(folder / name)
            row = {"image": name, "caption": f"a {colour} {shape}"}
            rows += [row | {"split": split} for split in ("train", "test")]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def build(budget: int = BUDGET, vision=(), **changes) -> Experiment:
        settings = {
            "vision": {"depth": 1, "max_patches": budget} | dict(vision),
            "text": {"depth": 1},
            "preprocess": PreprocessConfig(max_patches=budget, **NAFLEX),
            "data": {"source": str(folder)} | dict(changes.pop("data", {})),
        }
        return tiny(**(settings | changes))

    return build


def made(experiment: Experiment, devices: int = 1) -> Trainer:
    return Trainer(experiment, make_mesh(experiment.mesh, jax.devices()[:devices]))


def batch(step: int, budget: int = BUDGET) -> dict:
    """Random pictures of many aspects and sizes, of which some fill no quarter of the budget."""
    random = np.random.default_rng(step)
    prepare = Preprocess(PreprocessConfig(max_patches=BUDGET, **NAFLEX))
    room = Preprocess(PreprocessConfig(max_patches=budget, **NAFLEX))
    images = room.blank(16)
    for row in range(16):
        if row % 4 == 3:
            shape = (4, 4 * random.integers(1, 5), 3)
        else:
            aspect = (*random.integers(4, 40, 2), 3)
            shape = prepare.pixels(np.zeros(aspect, np.uint8)).shape
        room.put(images, row, random.integers(0, 256, shape, np.uint8))
    tokens = np.zeros((16, 16), np.int32)
    tokens[:, :8] = images.pixels[:, 0, :8, 0] % 250 + 2
    return {"images": images, "tokens": tokens}


# -------------------------------------------------------------------------------- a step


@pytest.mark.parametrize("pool", ["map", "mean"])
def test_padding_has_no_influence_on_loss_and_gradients(any_aspect, pool):
    vision = {"pool": pool, "projection": "linear"}
    results = []
    for budget in (BUDGET, 24):
        trainer = made(any_aspect(budget, vision))
        state, data = trainer.init(jnp.int32(20)), batch(0, budget)
        if budget > BUDGET:  # whatever it holds
            images = data["images"]
            noise = np.where(images.mask[..., None, None], images.pixels, 77)
            data["images"] = images._replace(pixels=noise.astype(np.uint8))
        compute = jax.jit(functools.partial(trainer._value_and_grad, size=16))
        results.append(compute(state, data, jax.random.key(0)))
    ((loss, _), gradient), ((padded_loss, _), padded) = results
    assert float(padded_loss) == pytest.approx(float(loss), rel=1e-6)
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(padded), strict=True):
        np.testing.assert_allclose(y, x, atol=1e-6)
    assert float(jnp.abs(gradient["vision"]["position"]).sum(1).min()) > 0


def test_one_device_and_eight_and_micro_batches_agree(any_aspect):
    """With dropout and patch dropout, whose masks belong to the examples."""
    noise = {"dropout": 0.1, "patch_dropout": 0.5}
    experiment = any_aspect(vision=noise, optimizer={"eps": 1e-3})
    found = []
    for micro, devices in ((None, 1), (8, 8)):
        trainer = made(dataclasses.replace(experiment, micro_batch_size=micro), devices)
        state, steps = trainer.init(jnp.int32(20)), []
        for step in range(3):
            placed = global_batch(batch(step), trainer.mesh)
            assert len(placed["images"].rows.sharding.device_set) == devices
            state, metrics = trainer.step(state, placed)
            steps.append(float(metrics["loss"]))
        found.append((steps, state.params))
    assert metrics["tokens"] == 16 * (BUDGET // 2 + 16)
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    for x, y in zip(*(jax.tree.leaves(params) for _, params in found), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_a_plan_compiles_the_batches_that_a_run_makes(any_aspect):
    experiment = any_aspect(24)
    form = [(x.shape, x.dtype) for x in jax.tree.leaves(batch_of(experiment))]
    assert form == [(x.shape, x.dtype) for x in jax.tree.leaves(batch(0, 24))]


# ---------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def run(any_aspect, tmp_path_factory):
    """A finished run of 24 steps that was evaluated on its way, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("naflex") / "run"
    changes = {
        "model": {"loss": "softmax", "init_bias": None, "init_scale": 10.0},
        "optimizer": {"learning_rate": 5e-3},
        "data": {"eval_split": "test"},
    }
    noise = {"dropout": 0.02, "patch_dropout": 0.1}
    e = any_aspect(vision=noise, steps=24, log_every=1, keep_checkpoints=9, **changes)
    train(dataclasses.replace(e, run_dir=str(folder), eval_every=0.5))
    return folder


def test_a_run_learns(run):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.5
    measured = [value for row in rows for name, value in row.items() if name.endswith("top5")]
    assert measured, "it was measured on its way"
    assert measured[-1] > 0.6  # five of 16 captions: 0.31 by chance


def test_a_resumed_run_equals_an_uninterrupted_one(run, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "bundle")
    for step in (18, 24):
        shutil.rmtree(again / "checkpoints" / str(step))
    train(resume=again)
    assert weights(again) == weights(run)
    assert logged(again) == logged(run)


def test_the_bundle_encodes_any_aspect_and_can_be_trained_further(run, any_aspect, tmp_path):
    model = vlm.load(run)
    assert model.preprocess.config.resize == "naflex"
    folder = Path(any_aspect().data.source)
    files = [folder / f"{shape}-red.png" for shape in SHAPES]
    z = model.encode_image(files)
    z_text = model.encode_text([f"a {colour} pole" for colour in COLOURS])
    assert (z @ z_text.T).argmax(1).tolist() == [0, 0, 0, 0]
    e = Experiment(
        init_from=str(run),
        data=dataclasses.replace(any_aspect().data, eval_split=None),
        adapter=AdapterConfig(rank=2),
        batch_size=8,
        steps=2,
        run_dir=str(tmp_path / "adapted"),
    )
    adapted = vlm.load(train(e))
    assert adapted.preprocess.config == model.preprocess.config
    assert 0 < np.abs(adapted.encode_image(files) - z).max() < 0.1


# --------------------------------------------------------------- several sequence lengths

LENGTHS = (4, 8, 16)


@pytest.fixture(scope="module")
def several_lengths(any_aspect, tmp_path_factory):
    """`several_lengths(**changes)`: the experiment with three lengths, on 64 pairs."""
    pictures = Path(any_aspect().data.source)
    folder = tmp_path_factory.mktemp("pairs")
    lines = (pictures / "captions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if '"train"' in line] * 4
    for row in rows:
        row["image"] = str(pictures / row["image"])
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def build(**changes) -> Experiment:
        settings = {"data": {"source": str(folder)}, "sequence_lengths": LENGTHS}
        return any_aspect(**(settings | changes))

    return build


def shortened_images(images, length: int, pairs: int):
    """The first pairs of a batch, cut to a length."""
    cut = [np.asarray(array)[:pairs, :length] for array in images]
    return type(images)(*cut)


@pytest.mark.slow
def test_a_batch_of_each_length_is_one_of_an_experiment_with_only_that_length(several_lengths):
    e = several_lengths(optimizer={"eps": 1e-3})
    assert batch_sizes(e) == ((64, 4), (32, 8), (16, 16))
    whole, data = made(e, 8), [batch(step) for step in range(4)]
    micro = made(dataclasses.replace(e, micro_batch_size=8), 8)  # 2 micro-batches
    tokens = np.concatenate([one["tokens"] for one in data])
    parts = zip(*(one["images"] for one in data), strict=True)
    images = type(data[0]["images"])(*(np.concatenate(part) for part in parts))
    for size in batch_sizes(e):
        cut = shortened_images(images, size.patches, size.pairs)
        rows = {"images": cut, "tokens": tokens[: size.pairs]}
        alone = made(at_size(e, size))
        shapes = jax.tree.map(lambda x: x.shape, batch_of(alone.experiment))
        assert shapes == jax.tree.map(np.shape, rows)
        results = []
        for trainer in (alone, whole, micro):
            state = trainer.init(jnp.int32(20))
            state, metrics = trainer.step(state, global_batch(rows, trainer.mesh))
            results.append((float(metrics["loss"]), state.params))
            assert metrics["tokens"] == size.pairs * (size.patches + 16)
        for loss, params in results[1:]:
            assert loss == pytest.approx(results[0][0], rel=1e-6)
            for x, y in zip(*map(jax.tree.leaves, (results[0][1], params)), strict=True):
                np.testing.assert_allclose(y, x, atol=1e-6)


@pytest.mark.slow
def test_a_run_of_several_lengths_resumes_inside_a_round(several_lengths, tmp_path):
    changes = {"data": {"eval_split": None, "source": several_lengths().data.source}}
    e = several_lengths(
        steps=None, examples=300, log_every=1, keep_checkpoints=9, checkpoint_every=0.25, **changes
    )
    train(dataclasses.replace(e, run_dir=str(tmp_path / "run")))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = {row["step"]: row for row in rows if "loss" in row}
    # 300 pairs are two rounds of 112, and the next batches that fit in the 76 left.
    schedule = BatchSchedule(batch_sizes(e), e.seed)
    assert max(steps) == schedule.steps_of(300) >= 7
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    shutil.rmtree(again / "bundle")
    saved = sorted(int(f.name) for f in (again / "checkpoints").iterdir() if f.name.isdigit())
    assert saved[1] % len(LENGTHS), "inside a round"
    for step in saved[2:]:
        shutil.rmtree(again / "checkpoints" / str(step))
    train(resume=again)
    assert weights(again) == weights(tmp_path / "run")
    assert logged(again) == logged(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_lengths": (8, 32)}, "has 32 patches, and preprocess.max_patches is 16"),
        ({"sequence_lengths": (0, 8)}, "sequence_lengths is 0: choose a number from 1"),
        (
            {"micro_batch_size": 4, "sequence_lengths": (7, 16)},
            "batch_size 16 is 36 pairs at the sequence length 7, which do not divide into 8",
        ),
    ],
)
def test_lengths_that_do_not_fit_are_refused(several_lengths, changes, message):
    if "micro_batch_size" in changes:
        changes = changes | {"micro_batch_size": 2}
    with pytest.raises(ConfigError, match=message):
        several_lengths(**changes)


def test_lengths_need_naflex_and_a_mesh_that_divides_all_batches(several_lengths, tiny, tmp_path):
    with pytest.raises(
        ConfigError, match=r"sequence_lengths is \(8, 16\) and has no effect: it needs"
    ):
        tiny(sequence_lengths=(8, 16))
    e = several_lengths(sequence_lengths=(5, 16), run_dir=str(tmp_path / "run"))
    with pytest.raises(ShardingError, match="batch_size 16 is 51 pairs at the sequence length 5"):
        train(e)
