"""Exports, opened where there is no vlm, and against the model that they came from."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from flax import nnx
from PIL import Image

from vlm.adaptation import learn_prompt
from vlm.bundle import Bundle, load
from vlm.cli import main
from vlm.config import ModelConfig, PreprocessConfig, ResNetConfig, TextConfig
from vlm.errors import CheckpointError, ConfigError
from vlm.exporting import bundle_export, export, onnx_file, onnx_rules, storing
from vlm.exporting.contract import pixels_code
from vlm.exporting.onnx_graph import from_jax
from vlm.exporting.storing import quantized
from vlm.heads.few_shot import FewShotClassifier
from vlm.heads.neighbours import NeighbourClassifier
from vlm.heads.retrieval import RetrievalIndex
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


IMAGE_TOWERS = (
    "hf_siglip", "oc_fastvit", "oc_convnext", "oc_eva02", "oc_vitamin", "oc_swin", "oc_resnet_v1",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGE_TOWERS)
def test_every_kind_of_image_tower(name, tmp_path):
    found = export(load(GOLDEN / name), tmp_path / "o", "onnx", tower="vision", batches=[1, 3])
    assert found.differences["image"] < 5e-5


@pytest.mark.parametrize(
    "name", ["hf_chinese_clip", "oc_coca", "hf_naflex", "oc_modernbert", "hf_jina_v1", "hf_jina_v2"]
)
def test_every_kind_of_text_tower(name, tmp_path):
    found = export(load(GOLDEN / name), tmp_path / "o", "onnx", tower="text", batches=[1, 3])
    assert found.differences["text"] < 1e-5


def test_a_large_model_has_its_parameters_beside_it(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "LARGEST", 10_000)
    found = export(bundle, tmp_path / "o", "onnx", tower="text", batches=[1, 3])
    assert found.differences["text"] < 1e-5
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "o").glob("text.onnx*")}
    assert sizes["text.onnx"] < sizes["text.onnx.data"]


def test_a_copy_that_differs_is_not_left_behind(bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(onnx_rules.RULES, "exp", onnx_rules.RULES["tanh"])
    with pytest.raises(CheckpointError, match=r"text differs from the model by .* batch of 1"):
        export(bundle, tmp_path / "o", "onnx", tower="text")
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_form_is_refused():
    with pytest.raises(CheckpointError, match="does not support JAX's 'sort'"):
        from_jax(lambda x: x.sort(), (4,), np.float32, ("x", "y"), onnx_rules.RULES)


def test_eight_bits_are_off_by_half_a_step():
    values = np.random.default_rng(0).normal(size=(5, 64, 7)).astype(np.float32)
    values[2, :, 3] = 0
    for axis in range(3):
        kept = quantized(values, axis)
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
        ({"format": "tflite"}, "format is 'tflite': choose one of 'stablehlo', 'onnx'"),
        ({"format": "savedmodel"}, "TensorFlow 2.21, the newest, reads StableHLO up to 1.13"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
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
    needs = ("onnx", "no_such_library")
    monkeypatch.setitem(bundle_export.KINDS, "onnx", ("onnx_file", needs))
    with pytest.raises(ConfigError, match=r'needs no_such_library.*pip install "vlm-jax\[onnx\]"'):
        export(bundle, tmp_path / "o", "onnx")


def test_towers_that_are_not_there(tmp_path, classifier):
    text = load(GOLDEN / "oc_vit", tower="text")
    with pytest.raises(ConfigError, match="loaded without its vision tower"):
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
    config = PreprocessConfig(image_size=32, resize=resize, short_side=short, crop_rounding="floor")
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (50, 71, 3), np.uint8))
    picture.save(tmp_path / "photo.jpg", "PNG")
    monkeypatch.chdir(tmp_path)
    names = {"np": np}
    exec(pixels_code(config), names)
    assert np.array_equal(names["pixels"][0], Preprocess(config).pixels(picture))


# ---------------------------------------------------------------------- every head


def heads(bundle, pictures):
    """A classifier of each kind that can be exported."""
    labels = [("cat", "dog", "red car")[i % 3] for i in range(len(pictures))]
    shot = ZeroShotClassifier(bundle, ["cat", "dog", "red car"])
    tree = {"animal": {"cat": None, "dog": None}, "thing": {"red car": None}}
    fitted = ZeroShotClassifier(bundle, ["cat", "dog", "red car"], other_label="a photo.")
    fitted.temperature = 2.5
    found = {
        "hierarchy": ZeroShotClassifier(bundle, tree),
        "none of these, calibrated": fitted,
        "multi-label": ZeroShotClassifier(bundle, ["cat", "dog"], multi_label=True),
        "prompt": learn_prompt(bundle, pictures, labels, n_ctx=2, steps=2),
    }
    for method in ("linear", "mean", "anchored", "cache", "tuned_cache"):
        found[method] = FewShotClassifier.fit(bundle, pictures, labels, method, zero_shot=shot)
    return found


@pytest.mark.slow
def test_every_head_is_exported(bundle, tmp_path):
    rng = np.random.default_rng(3)
    pictures = list(rng.integers(0, 256, (6, 30, 30, 3), np.uint8))
    pixels = np.stack([bundle.preprocess.pixels(picture) for picture in pictures])
    for name, head in heads(bundle, pictures).items():
        export(bundle, tmp_path / name, "onnx", classifier=head, batches=[2])
        session = onnxruntime.InferenceSession(str(tmp_path / name / "classifier.onnx"))
        (scores,) = session.run(None, {"pixels": pixels})
        assert np.abs(scores - head(pictures).scores).max() < 1e-5, name
        about = json.loads((tmp_path / name / "export.json").read_text())
        assert about["labels"] == list(head.labels)
        assert ("groups" in about) == (name == "hierarchy")


@pytest.mark.untyped
def test_heads_that_no_program_can_be_are_refused(bundle, tmp_path, photo):
    index = RetrievalIndex(bundle)
    index.add([photo, photo[::-1]], metadata={"label": ["a", "b"]})
    with pytest.raises(ConfigError, match="a NeighbourClassifier searches an index"):
        export(bundle, tmp_path / "o", "onnx", classifier=NeighbourClassifier(index, "label", k=1))
    moved = learn_prompt(bundle, [photo] * 2, ["a", "b"], n_ctx=1, steps=1, per_image=True)
    with pytest.raises(ConfigError, match="a PromptedClassifier with a net"):
        export(bundle, tmp_path / "o", "onnx", classifier=moved)


def test_the_command_takes_what_a_run_has_left(bundle, tmp_path, photo):
    bundle.save(tmp_path / "run" / "bundle")
    load_head = FewShotClassifier.fit(bundle, [photo, photo[::-1]], ["up", "down"], "mean")
    load_head.save(tmp_path / "run" / "classifier.safetensors")
    line = ["export", str(tmp_path / "run"), str(tmp_path / "o"), "--format", "onnx"]
    assert main([*line, "--batches", "1"]) == 0
    names = {file.stem for file in (tmp_path / "o").glob("*.onnx")}
    assert names == {"image", "text", "classifier"}
    assert json.loads((tmp_path / "o" / "export.json").read_text())["labels"] == ["down", "up"]


# ------------------------------------------------------------- the checks catch faults


def fifteen_levels(values, axis):
    largest = np.abs(values).max(axis, keepdims=True)
    scale = (np.where(largest > 0, largest, 1) / 7).astype(np.float32)
    return storing.EightBitArray(np.rint(values / scale).astype(np.int8), scale)


def swapped_scales(values, axis):
    kept = quantized(values, axis)
    return kept._replace(scale=np.flip(kept.scale, tuple(range(kept.scale.ndim))).copy())


def nothing(values, axis):
    kept = quantized(values, axis)
    return kept._replace(steps=np.zeros_like(kept.steps))


@pytest.mark.parametrize("fault", [fifteen_levels, swapped_scales, nothing])
def test_weights_that_are_not_of_eight_bits_are_caught(fault, bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(storing, "quantized", fault)
    monkeypatch.setattr(storing, "SMALLEST", 256)
    with pytest.raises(CheckpointError, match="more than rounding explains"):
        export(bundle, tmp_path / "o", "onnx", dtype="int8", tower="vision", batches=[1])


def test_a_file_with_other_weights_is_caught(bundle, tmp_path, monkeypatch):
    written = onnx_file.write

    def zeroed(program, folder):
        written(program, folder)
        model = onnx.load(folder / "image.onnx")
        largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        largest.raw_data = bytes(len(largest.raw_data))
        onnx.save(model, folder / "image.onnx")

    monkeypatch.setattr(onnx_file, "write", zeroed)
    for dtype in ("float32", "int8"):
        with pytest.raises(CheckpointError, match="image differs from the model by"):
            export(bundle, tmp_path / "o", "onnx", dtype=dtype, tower="vision", batches=[1])


# ----------------------------------------------------------------- pixels by the page


def picture_files(folder: Path) -> list[Path]:
    """Pictures of the kinds that programs open wrongly."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (50, 71, 4), np.uint8)
    rgba, rgb = Image.fromarray(pixels), Image.fromarray(pixels[..., :3])
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = rgb.quantize(16)
    made = {
        "transparent.png": (rgba, {}),
        "grey-alpha.png": (rgba.convert("LA"), {}),
        "palette.png": (clear, {}),
        "clear-palette.png": (clear, {"transparency": 3}),
        "clear-colour.png": (rgb, {"transparency": (1, 2, 3)}),
        "turned.jpg": (rgb, {"exif": exif}),
        "grey.jpg": (rgb.convert("L"), {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "16-bit.png": (Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), {}),
        "float.tif": (Image.fromarray(pixels[..., 0] / np.float32(255)), {}),
        "one-bit.png": (rgb.convert("1"), {}),
    }
    for name, (picture, options) in made.items():
        picture.save(folder / name, **options)
    return [folder / name for name in made]


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"resize": "crop", "short_side": 41}, {"backend": "tensor"}, {"background": None},
        {"backend": "tensorflow", "kernel": "bilinear", "antialias": False}, {"resize": "pad"},
        {"backend": "scipy", "kernel": "bilinear", "resize": "pad"},
        {"decode": "reference"}, {"backend": "tensor", "resize": "crop", "antialias": False},
    ],
    ids=str,
)  # fmt: skip
def test_the_page_opens_pictures_as_the_model_does(changes, tmp_path):
    config = PreprocessConfig(**({"image_size": 32, "resize": "squash"} | changes))
    code = pixels_code(config).rpartition("pixels = ")[0]
    names = {"np": np}
    exec(code, names)
    for file in picture_files(tmp_path):
        assert np.array_equal(names["pixels_of"](file), Preprocess(config).pixels(file)), file.name
