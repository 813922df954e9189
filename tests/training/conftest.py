"""A data set of 48 small drawings and the experiments that train on it in a second."""

import dataclasses
import json

import numpy as np
import pytest
from pale import redraw
from PIL import Image

from vlm.config import (
    AugmentConfig,
    DataConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    PreprocessConfig,
    TextConfig,
    TokenizerConfig,
    ViTConfig,
)

COLOURS = {"red": (220, 30, 30), "green": (20, 160, 60), "blue": (40, 60, 210), "black": (0, 0, 0)}
PLACES = [(row, column) for row in ("top", "middle", "bottom") for column in ("left", "right")]


@pytest.fixture(scope="session")
def drawings(tmp_path_factory) -> str:
    """A folder of drawings: a bar or a square, of some colour, somewhere."""
    folder = tmp_path_factory.mktemp("drawings")
    rows = []
    for shape, (h, w) in {"bar": (3, 7), "square": (5, 5)}.items():
        for colour, rgb in COLOURS.items():
            for row, column in PLACES:
                pixels = np.full((16, 16, 3), 255, np.uint8)
                y = {"top": 0, "middle": 5, "bottom": 10}[row]
                x = {"left": 0, "right": 8}[column]
                pixels[y : y + h, x : x + w] = rgb
                name = f"{shape}-{colour}-{row}-{column}.png"
                Image.fromarray(pixels).save(folder / name)
                caption = f"a {colour} {shape} at the {row} {column}"
                split = "test" if len(rows) % 6 == 5 else "train"
                rows.append({"image": name, "caption": caption, "split": split})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


MODEL = ModelConfig(
    vision=ViTConfig(
        image_size=16,
        patch_size=4,
        width=32,
        depth=2,
        heads=2,
        mlp_dim=64,
        pool="mean",
        projection="linear",
    ),
    text=TextConfig(
        vocab_size=300,
        context_length=16,
        width=32,
        depth=2,
        heads=2,
        mlp_dim=64,
        pool="mean",
        pad_id=0,
        projection="linear",
    ),
    embed_dim=16,
    init_scale=5.0,
    init_bias=-3.0,
    loss="sigmoid",
)


OPTIMIZER = {"learning_rate": 1e-3, "warmup": 0.1}
DATA = {"eval_split": None, "augment": AugmentConfig(crop=(0.8, 1.0), jitter=0.1)}


@pytest.fixture(scope="session")
def tiny(drawings):
    """`tiny(**changes)`: an experiment on the drawings; `vision`, `text`, `optimizer` by parts."""

    def build(*, vision=(), text=(), optimizer=(), model=(), data=(), **changes) -> Experiment:
        parts = dataclasses.replace(
            MODEL,
            vision=dataclasses.replace(MODEL.vision, **dict(vision)),
            text=dataclasses.replace(MODEL.text, **dict(text)),
            **dict(model),
        )
        settings = {
            "name": "tiny",
            "model": parts,
            "preprocess": PreprocessConfig(image_size=parts.vision.image_size, kernel="bilinear"),
            "tokenizer": TokenizerConfig(context_length=16),
            "data": DataConfig(**(DATA | {"source": drawings} | dict(data))),
            "optimizer": optimizer
            if callable(optimizer)
            else OptimizerConfig(**(OPTIMIZER | dict(optimizer))),
            "batch_size": 16,
            "steps": 12,
            "log_every": 4,
        }
        return Experiment(**(settings | changes))

    return build


@pytest.fixture(scope="session")
def learned(tiny, tmp_path_factory) -> str:
    """A run on the drawings that has learned them: what fine-tuning starts from."""
    from vlm.training.loop import train

    run = tmp_path_factory.mktemp("learned") / "run"
    changes = {
        "model": {"loss": "softmax", "init_bias": None, "init_scale": 10.0},
        "optimizer": {"learning_rate": 3e-3},
        "vision": {"depth": 1},
        "text": {"depth": 1},
    }
    return str(train(tiny(run_dir=str(run), steps=250, log_every=50, **changes)))


@pytest.fixture(scope="session")
def pale(drawings, tmp_path_factory) -> str:
    """The drawings in another style, each with a label beside its caption."""
    return redraw(drawings, tmp_path_factory.mktemp("pale"))
