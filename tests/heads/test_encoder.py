"""A user's own model fits every head, at run time and for a type checker."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vlm.heads import Encoder

sys.path.insert(0, str(Path(__file__).parent))
from own_encoder import MeanColour, classify

EXAMPLE = Path(__file__).with_name("own_encoder.py")
ROOT = Path(__file__).parents[2]


def test_heads_take_an_own_model():
    red, green = np.zeros((2, 4, 4, 3), np.uint8)
    red[..., 0] = green[..., 1] = 255
    assert classify([red, green]) == ["red", "green"]
    assert isinstance(MeanColour(), Encoder)


def test_a_model_without_an_encoder_is_none():
    class Half(MeanColour):
        encode_text = None

    class Nameless:
        loss, logit_scale, logit_bias = "softmax", 10.0, 0.0
        encode_image, encode_text = MeanColour.encode_image, MeanColour.encode_text

    assert not isinstance(Half(), Encoder)
    assert not isinstance(Nameless(), Encoder)


def pyright(source: str, folder: Path) -> subprocess.CompletedProcess:
    """Check a module in a folder of its own, against the package of this checkout."""
    (folder / "example.py").write_text(source)
    (folder / "pyrightconfig.json").write_text(f'{{"extraPaths": ["{ROOT}"]}}')
    command = [shutil.which("pyright") or Path(sys.executable).with_name("pyright")]
    command += ["--pythonpath", sys.executable, "example.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_pyright_accepts_an_own_model_and_rejects_a_wrong_one(tmp_path):
    pytest.importorskip("pyright")
    source = EXAMPLE.read_text()
    done = pyright(source, tmp_path)
    assert done.returncode == 0, done.stdout
    done = pyright(source.replace("def encode_text", "def encode_words"), tmp_path)
    assert done.returncode == 1
    assert '"encode_text" is not present' in done.stdout
