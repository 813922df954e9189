"""A run of `vlm train` so small that it takes seconds: drawn shapes, two thin towers."""

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import filelock
import numpy as np
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 70, 220)}

CONFIG = """\
from vlm.config import *

config = Experiment(
    name="shapes",
    model=ModelConfig(
        vision=ViTConfig(
            image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_dim=16,
            pool="mean", projection="linear",
        ),
        text=TextConfig(
            vocab_size=280, context_length=12, width=16, depth=1, heads=2, mlp_dim=16,
            pool="mean", pad_id=0, projection="linear",
        ),
        embed_dim=16,
    ),
    preprocess=PreprocessConfig(image_size=16),
    tokenizer=TokenizerConfig(context_length=12),
    data=DataConfig(source={data!r}, templates=("{{}}",)),
    batch_size=8,
    steps=40,
    log_every=20,
    checkpoint_every=1.0,
)
"""


@functools.cache
def folder() -> Path:
    """Make the data set `data/` and the config `shapes.py`, once for all workers of a session."""
    path = _shared()
    with filelock.FileLock(path / "data.lock"):
        if not (path / "shapes.py").exists():
            _make_data(path)
    return path


def _shared() -> Path:
    if "VLM_TESTS_SHARED" in os.environ:
        return Path(os.environ["VLM_TESTS_SHARED"])
    held = tempfile.TemporaryDirectory(prefix="vlm-tests-")  # a script outside of pytest
    atexit.register(held.cleanup)
    return Path(held.name)


def _make_data(path: Path) -> None:
    data = path / "data"
    data.mkdir()
    rows = ["image,caption,split"]
    y, x = np.mgrid[-12:12, -12:12]
    shapes = {"square": np.maximum(abs(x), abs(y)) < 9, "stripe": abs(y) < 4}
    for split in ("train", "test"):
        for colour, rgb in COLOURS.items():
            for shape, inside in shapes.items():
                pixels = np.full((24, 24, 3), 255, np.uint8)
                pixels[np.roll(inside, len(rows) % 3 - 1, axis=1)] = rgb
                name = f"{split}-{colour}-{shape}.png"
                Image.fromarray(pixels).save(data / name)
                caption = f"a {colour} {shape}"
                rows += [f"{name},{caption},{split}"] * (2 if split == "train" else 1)
    (data / "captions.csv").write_text("\n".join(rows) + "\n")
    (path / "shapes.py").write_text(CONFIG.format(data=str(data)))


@functools.cache
def run() -> Path:
    """The folder of a finished run, trained once for all workers of a session."""
    config, out = folder() / "shapes.py", folder() / "run"
    with filelock.FileLock(folder() / "run.lock"):
        if not (out / "bundle" / "bundle.json").exists():
            command("train", config, "--run-dir", out)
    return out


def command(*args) -> str:
    """What `vlm` prints, in a process of its own with one device: heavy work is done soonest so."""
    line = [sys.executable, "-m", "vlm", *map(str, args)]
    done = subprocess.run(line, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def siglip_folder(folder: Path) -> Path:
    """Make a SigLIP of random weights as on the Hub, with a SentencePiece vocabulary."""
    golden = Path(__file__).parent / "weights" / "golden"
    shutil.copytree(golden / "hf_siglip", folder)
    (folder / "tokenizer.json").unlink()
    shutil.copy(golden / "spiece.model", folder)
    settings = {"tokenizer_class": "SiglipTokenizer", "do_lower_case": True}
    settings |= {"pad_token": "</s>", "eos_token": "</s>", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
