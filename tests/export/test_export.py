"""Exports, opened where there is no vlm, and against the model that they came from."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from vlm.bundle import Bundle, load
from vlm.cli import main
from vlm.config import ModelConfig, PreprocessConfig, ResNetConfig, TextConfig
from vlm.errors import CheckpointError, ConfigError
from vlm.export import export, exporting, onnx_rules
from vlm.export.contract import _pixels_code
from vlm.export.onnx_graph import from_jax
from vlm.export.storing import quantised
from vlm.heads.zero_shot import ZeroShotClassifier
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import train_bpe
from vlm.models.dual_encoder import DualEncoder

GOLDEN = Path(__file__).parent.parent / "weights" / "golden"
TEXTS = ["a cat", "a dog"]


@pytest.fixture(scope="module")
def bundle():
    return load(GOLDEN / "oc_vit")


@pytest.fixture(scope="module")
def classifier(bundle):
    return ZeroShotClassifier(bundle, ["cat", "dog", "red car"])


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(1).integers(0, 256, (40, 52, 3), dtype=np.uint8)


def by_its_page(folder: Path, photo: np.ndarray, *, without: list[str]) -> dict[str, np.ndarray]:
    """What the code on an export's page computes, in a process that has none of `without`."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    Image.fromarray(photo).save(folder / "photo.png")
    forbid = f"import sys\nfor name in {without}: sys.modules[name] = None\n"
    keep = "np.savez('out.npz', **{n: v for n, v in globals().items() if n[:2] in ('z_', 'sc')})"
    code = forbid + code.replace("photo.jpg", "photo.png") + keep
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, timeout=120)
    return dict(np.load(folder / "out.npz"))


@pytest.mark.slow
def test_onnx_without_vlm_and_jax(bundle, classifier, photo, tmp_path):
    found = export(bundle, tmp_path / "o", "onnx", tower="both", classifier=classifier)
    assert set(found.differences) == {"image", "text", "classifier"}
    assert max(found.differences.values()) < 1e-5
    about = json.loads((tmp_path / "o" / "export.json").read_text())
    assert about["batches"] == list(range(1, 34))
    assert about["difference"] == found.differences
    assert about["labels"] == ["cat", "dog", "red car"]
    assert about["programs"]["image"]["input"]["shape"] == ["batch", 28, 28, 3]
    ours = by_its_page(tmp_path / "o", photo, without=["vlm", "jax", "torch"])
    assert np.abs(ours["z_image"] - bundle.encode_image(photo)).max() < 1e-5
    assert np.abs(ours["z_text"] - bundle.encode_text(TEXTS)).max() < 1e-5
    assert np.abs(ours["scores"] - classifier(photo).scores).max() < 1e-5


@pytest.mark.slow
def test_stablehlo_without_vlm(bundle, photo, tmp_path):
    found = export(bundle, tmp_path / "s", "stablehlo", batches=[3])
    assert max(found.differences.values()) < 1e-5
    ours = by_its_page(tmp_path / "s", photo, without=["vlm", "flax"])
    assert np.abs(ours["z_image"] - bundle.encode_image(photo)).max() < 1e-5
    assert np.abs(ours["z_text"] - bundle.encode_text(TEXTS)).max() < 1e-5


def test_a_classifier_alone_in_narrow_types(bundle, classifier, tmp_path):
    sizes = {}
    for dtype in ("float32", "bfloat16", "int8"):
        found = export(
            bundle, tmp_path / dtype, "onnx", dtype=dtype, classifier=classifier, batches=[2]
        )
        assert set(found.differences) == {"classifier"}
        sizes[dtype] = (tmp_path / dtype / "classifier.onnx").stat().st_size
        assert not (tmp_path / dtype / "tokenizer.json").exists()
    assert sizes["bfloat16"] < 0.7 * sizes["float32"]
    assert sizes["int8"] < sizes["float32"]


@pytest.mark.untyped
def test_resnet(tmp_path):
    config = ModelConfig(
        vision=ResNetConfig(image_size=64, depths=(1, 1, 1, 1), width=4, heads=2),
        text=TextConfig(vocab_size=280, context_length=8, width=16, depth=1, heads=2, mlp_dim=16),
        embed_dim=16,
    )
    tokenizer = train_bpe(["a cat"], 270, 8)
    model = DualEncoder(config, rngs=nnx.Rngs(0))
    made = Bundle(model, Preprocess(PreprocessConfig(image_size=64)), tokenizer, "resnet")
    found = export(made, tmp_path / "o", "onnx", batches=[1, 3])
    assert max(found.differences.values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["hf_siglip", "oc_fastvit", "oc_convnext", "oc_eva02", "oc_vitamin"]
)
def test_every_kind_of_image_tower(name, tmp_path):
    found = export(load(GOLDEN / name), tmp_path / "o", "onnx", tower="image", batches=[1, 3])
    assert found.differences["image"] < 5e-5


@pytest.mark.parametrize("name", ["hf_chinese_clip", "oc_coca", "hf_naflex"])
def test_every_kind_of_text_tower(name, tmp_path):
    found = export(load(GOLDEN / name), tmp_path / "o", "onnx", tower="text", batches=[1, 3])
    assert found.differences["text"] < 1e-5


def test_a_copy_that_differs_is_not_left_behind(bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(onnx_rules.RULES, "exp", onnx_rules.RULES["tanh"])
    with pytest.raises(CheckpointError, match=r"text differs from the model by .* batch of 1"):
        export(bundle, tmp_path / "o", "onnx", tower="text")
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_form_is_refused():
    with pytest.raises(CheckpointError, match="no form for JAX's 'sort'"):
        from_jax(lambda x: x.sort(), (4,), np.float32, ("x", "y"), onnx_rules.RULES)


def test_eight_bits_are_off_by_half_a_step():
    values = np.random.default_rng(0).normal(size=(5, 64, 7)).astype(np.float32)
    values[2, :, 3] = 0
    for axis in range(3):
        kept = quantised(values, axis)
        assert np.all(np.abs(kept.steps * kept.scale - values) <= kept.scale * 0.5001)
        assert kept.scale.shape[axis] == 1


# ------------------------------------------------------------------------- bad input


def test_a_folder_that_is_there(bundle, tmp_path):
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already: give the path of a new folder"):
        export(bundle, tmp_path, "onnx")
    assert (tmp_path / "diary.txt").read_text() == "mine"


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "tflite"}, "format 'tflite' is unknown: choose one of stablehlo, onnx"),
        ({"format": "savedmodel"}, "TensorFlow 2.21, the newest, reads StableHLO up to 1.13"),
        ({"dtype": "float8"}, "dtype 'float8' is unknown"),
        ({"tower": "audio"}, "tower 'audio' is unknown"),
        ({"batches": []}, "compares nothing"),
        ({"batches": [0]}, "compares nothing"),
    ],
)
def test_options_that_are_none(bundle, tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        export(bundle, tmp_path / "o", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_is_missing(bundle, tmp_path, monkeypatch):
    kind = exporting.KINDS["onnx"]._replace(needs=("onnx", "no_such_library"))
    monkeypatch.setitem(exporting.KINDS, "onnx", kind)
    with pytest.raises(ConfigError, match=r'needs no_such_library.*pip install "vlm-jax\[onnx\]"'):
        export(bundle, tmp_path / "o", "onnx")


def test_towers_that_are_not_there(tmp_path, classifier):
    text = load(GOLDEN / "oc_vit", tower="text")
    with pytest.raises(ConfigError, match="loaded without its image tower"):
        export(text, tmp_path / "o", "onnx")
    with pytest.raises(ConfigError, match="classifier is of"):
        export(load(GOLDEN / "oc_vit"), tmp_path / "o", "onnx", classifier=classifier)
    with pytest.raises(ConfigError, match=r"any aspect \(NaFlex\)"):
        export(load(GOLDEN / "hf_naflex"), tmp_path / "o", "onnx")


def test_the_command(tmp_path, capsys):
    out = tmp_path / "o"
    line = ["export", str(GOLDEN / "oc_vit"), str(out), "--format", "onnx", "--tower", "text"]
    assert main([*line, "--batches", "1", "2"]) == 0
    assert "text: within" in capsys.readouterr().err
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md",
        "export.json",
        "text.onnx",
        "tokenizer.json",
    ]
    assert main(line) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("form", [("squash", None), ("squash", 41), ("crop", 41), ("pad", None)])
def test_the_page_makes_the_pixels_of_the_model(form, tmp_path, monkeypatch):
    resize, short = form
    config = PreprocessConfig(image_size=32, resize=resize, short_side=short, crop_offset="floor")
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (50, 71, 3), np.uint8))
    picture.save(tmp_path / "photo.jpg", "PNG")
    monkeypatch.chdir(tmp_path)
    names = {"np": np}
    exec(_pixels_code(config), names)
    assert np.array_equal(names["pixels"][0], Preprocess(config).pixels(picture))
