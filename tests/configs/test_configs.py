"""Every config in `configs/` trains: its own data, optimizer, schedule, remat, mesh, evaluation.

Only what a machine of two cores cannot bear is made smaller: widths, depths, pixels and batch.
"""

import dataclasses
import json
import os
import re
from pathlib import Path

import jax
import made_data as made
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from vlm.config import DataConfig, DistillConfig, EvalConfig, Experiment, Phase, load_config
from vlm.config.defaults import with_defaults
from vlm.data.pipeline import train_batches
from vlm.data.sources import open_source
from vlm.errors import ConfigError, DataError
from vlm.evaluation.presets import coco, imagenet
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import Tokenizer
from vlm.training.loop import train

CONFIGS = sorted(Path(__file__).parents[2].glob("configs/*.py"))
STEPS = 4
# Trained in the suite: TFDS and AdamW on data parallelism; tars, Adafactor and FSDP. All of them
# with VLM_CONFIGS=all, a minute or two of a whole machine of two cores.
SAMPLE = {"clip_s16_coco", "siglip_so400m"}
TRAINED = [p for p in CONFIGS if p.stem in SAMPLE or os.environ.get("VLM_CONFIGS") == "all"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The data of all configs, and the programs that several of them share."""
    root = tmp_path_factory.mktemp("configs")
    made.prepare_tfds(root)
    made.write_tars(root / "tars")
    vocabulary = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"])
    vocabulary.train_from_iterator([t for i in range(10) for t in made.captions_of(i)], trainer)
    vocabulary.save(str(root / "tokenizer.json"))
    return root


def shrunk(config: Experiment, folder: Path) -> Experiment:
    """The same recipe for towers of one thin block, on the data of this test."""
    vision, text = config.model.vision, config.model.text
    small = {"width": 32, "depth": 1, "heads": 2, "mlp_dim": 64}
    size = 2 * vision.patch_size
    stems = tuple(8 for _ in vision.stem_widths)
    model = dataclasses.replace(
        config.model,
        vision=dataclasses.replace(vision, **small, image_size=size, stem_widths=stems),
        text=dataclasses.replace(text, **small),
        embed_dim=32,
    )
    source = config.data.source
    if ".tar" in source:  # remote shards are read as a stream, and so are these
        data = {
            "source": str(folder / "tars/{00000..00001}.tar"),
            "access": "stream",
            "interleave": 2,
        }

    elif source.endswith(".json"):
        captions = ("captions/text",)
        data = {"source": "tfds:coco_captions", "captions": captions, "data_dir": str(folder)}
    else:
        data = {}
    evals = tuple(prepared(e, folder) for e in config.evals)
    tokenizer = config.tokenizer_file
    if tokenizer not in (None, "clip"):
        tokenizer = str(folder / "tokenizer.json")
    return dataclasses.replace(
        config,
        model=model,
        preprocess=dataclasses.replace(config.preprocess, image_size=size),
        tokenizer_file=tokenizer,
        data=dataclasses.replace(config.data, **data, workers=0),
        evals=evals,
        batch_size=16,
        examples=None,
        epochs=None,
        steps=STEPS,
        log_every=1,
        eval_every=0.5,
        run_dir=str(folder / config.name),
        phases=tuple(
            dataclasses.replace(
                phase, step=number, changes=at_size(phase, size + vision.patch_size)
            )
            for number, phase in enumerate(config.phases, 1)
        ),
    )


def at_size(phase: Phase, size: int) -> dict:
    """The changes of a phase, with another image size."""
    return {name: size if name.endswith("image_size") else v for name, v in phase.changes}


def prepared(config: EvalConfig, folder: Path) -> EvalConfig:
    """The same evaluation on TFDS's form of its data."""
    preset = {"imagenet": imagenet, "coco": coco}[config.name](data_dir=str(folder))
    return dataclasses.replace(preset, templates=config.templates)


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_a_config_trains_and_evaluates(path, folder):
    assert jax.device_count() == 8
    config = shrunk(load_config(path), folder)
    if config.init_from:
        config = dataclasses.replace(config, init_from=str(a_siglip(folder)))
    run = Path(train(config))
    losses = [row["loss"] for row in rows(run) if "loss" in row]
    assert len(losses) == STEPS
    assert np.isfinite(losses).all()
    measured = [row for row in rows(run) if any(name.startswith("eval/") for name in row)]
    steps = [STEPS // 2]
    if config.init_from:  # is measured before it learns more, too
        steps = [0, *steps]
    assert [row["step"] for row in measured] == steps
    names = {name for name in measured[0] if name.startswith("eval/")}
    if config.evals:
        wanted = {"imagenet": "eval/imagenet/top5", "coco": "eval/coco/text_to_image_R@10"}
        assert {wanted[e.name] for e in config.evals} <= names
    else:
        assert "eval/top1" in names
    results = json.loads((run / "results.json").read_text())["results"]
    assert len(results) == (len(config.evals) or 2)
    assert (run / "bundle").is_dir()


def a_siglip(folder: Path) -> Path:
    """What LiT starts from: a run of `siglip_b16`, apart from the one that is tested."""
    config = shrunk(load_config(CONFIGS[0].parent / "siglip_b16.py"), folder)
    return Path(train(dataclasses.replace(config, run_dir=str(folder / "image-tower"))))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_reads_its_texts_and_pixels(path, folder):
    config = shrunk(load_config(path), folder)
    if config.data.source == "openmoji":
        pytest.skip("its drawings have their own tests, in tests/data")
    file = Path(config.tokenizer_file)
    if config.tokenizer_file == "clip":
        file = CONFIGS[0].parents[1] / "vlm/weights/clip/tokenizer.json"
    tokenizer = Tokenizer.from_file(file, config.tokenizer)
    batches = train_batches(
        config.data, Preprocess(config.preprocess), tokenizer, batch_size=16, seed=0
    )
    batch = next(batches)
    batches.close()
    # The same sentences, cleaned as the model's rules say: lower case, for SigLIP no full stop.
    known = {tuple(tokenizer([t])[0]): i for i in range(10) for t in made.captions_of(i)}
    size = config.preprocess.image_size
    assert batch["images"].shape == (16, size, size, 3)
    seen = set()
    for pixels, tokens in zip(batch["images"], batch["tokens"], strict=True):
        number = known[tuple(tokens)]  # a text of the data, whole
        colour = np.array(made.COLOURS[made.colour_of(number)])
        assert np.abs(pixels.reshape(-1, 3) - colour).max() <= 8  # and its own image
        seen.add(number)
    assert len(seen) > 4


def test_prepared_data_opens_without_its_class_and_by_its_folder(folder, monkeypatch):
    monkeypatch.setattr(tfds, "builder", lambda *_, **__: pytest.fail("the class was asked for"))
    where = {"captions": ("captions/text",), "data_dir": str(folder)}
    for name in ("coco_captions", folder / "coco_captions/2014/1.1.0"):
        source = open_source(DataConfig(f"tfds:{name}", **where), "val")
        found = sorted(source[i]["captions/text"][0] for i in range(len(source)))
        assert found == sorted(made.captions_of(i)[0] for i in range(10))
        assert source[0]["image/filename"].startswith("COCO_")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": ("captions",)}, "no feature 'captions'.*captions/id, captions/text, image"),
        ({"captions": ("captions/id",)}, "'captions/id'.*has no text but int64: name one"),
        (
            {"label": "captions/text", "captions": ()},
            "'captions/text'.*is not a class label but a Text",
        ),
        ({"data_dir": "/nowhere"}, "TFDS knows no data set|not prepared in /nowhere"),
    ],
)
def test_a_feature_that_gives_no_text_is_refused(folder, changes, message):
    config = DataConfig(
        **({"source": "tfds:coco_captions", "captions": ("captions/text",)} | changes)
        | {"data_dir": changes.get("data_dir", str(folder))}
    )
    with pytest.raises(DataError, match=message):
        open_source(config, "train")


BASE = with_defaults(Experiment(steps=1))
NAFLEX = {"resize": "naflex", "patch_size": 16, "max_patches": 64}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_every": -0.1}, "eval_every is -0.1: choose a number"),
        (
            {"evals": (EvalConfig(source="a/"), EvalConfig(source="b/"))},
            "two of evals are called 'eval'",
        ),
        ({"lock": "vision"}, "without init_from that is at random: name the model"),
        (
            {"lock": "vision", "init_from": "x", "init_towers": "text"},
            "leaves it at random: set init_towers to \"both\" or 'vision'",
        ),
        (
            {"vision": {"max_patches": 64}},
            "max_patches 64 is only valid with NaFlex, and preprocess.resize is 'squash'",
        ),
        (
            {"preprocess": NAFLEX},
            'preprocess.max_patches 64 of resize "naflex" is not model.vision.max_patches None',
        ),
        (
            {"vision": {"max_patches": 64}, "preprocess": NAFLEX | {"patch_size": 14}},
            'preprocess.patch_size 14 of resize "naflex" is not model.vision.patch_size 16',
        ),
        (
            {
                "vision": {"max_patches": 64},
                "preprocess": NAFLEX,
                "resolution_schedule": ((0.5, 112),),
            },
            'resolution_schedule is of square images, and preprocess.resize "naflex" makes images',
        ),
        (
            {"vision": {"max_patches": 64}, "preprocess": NAFLEX, "distill": DistillConfig("x")},
            "distill is of square images",
        ),
        (
            {"vision": {"patch_dropout": 0.5, "rotary": 0}},
            "patch_dropout needs a tower without rotary positions",
        ),
        (
            {"vision": {"rotary": 0}, "resolution_schedule": ((0.5, 112),)},
            "resolution_schedule needs a tower without rotary positions",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(changes, message):
    model, preprocess = BASE.model, BASE.preprocess
    vision = dataclasses.replace(model.vision, **changes.pop("vision", {}))
    changes["model"] = dataclasses.replace(model, vision=vision)
    changes["preprocess"] = dataclasses.replace(preprocess, **changes.pop("preprocess", {}))
    with pytest.raises(ConfigError, match=re.escape(message)):
        dataclasses.replace(BASE, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "a name must be a word without a slash"),
        ({"templates": ("a photo",)}, "needs a {}"),
        ({"task": "retrieval", "captions": ()}, "captions is empty"),
        ({"examples": 0}, "examples is 0"),
        ({"source": ""}, "evals 'eval' has no source: give the data to evaluate on"),
        ({"captions": ("text",)}, 'has no effect: set task to "retrieval"'),
        ({"task": "retrieval", "class_names": "a.txt"}, 'has no effect: set task to "zero-shot"'),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        EvalConfig(**({"source": "a/"} | changes))
