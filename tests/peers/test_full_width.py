"""transformers' classes of popular models, at full width and one block deep, with random weights.

Those of open_clip's layout are in `test_architectures.py`.
"""

import json
import pathlib
import shutil

import numpy as np
import pytest
import test_eva_clip

from vlm.bundle import load

pytestmark = [pytest.mark.peers, pytest.mark.untyped]
GOLDEN = pathlib.Path(__file__).parents[1] / "weights" / "golden"
# The golden folder of the same layout, and the sizes of both towers.
L14 = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "patch_size": 14}
L14_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
MODELS = {
    "openai/clip-vit-base-patch32": ("hf_clip", {"patch_size": 32}, {}, 512),
    "openai/clip-vit-large-patch14": ("hf_clip", L14, L14_TEXT, 768),
    "google/siglip-base-patch16-224": ("hf_siglip", {}, {}, None),
    "google/siglip-so400m-patch14-384": (
        "hf_siglip", SO400M | {"patch_size": 14, "image_size": 384}, SO400M, None
    ),
    "OFA-Sys/chinese-clip-vit-base-patch16": ("hf_chinese_clip", {"patch_size": 16}, {}, 512),
}  # fmt: skip


KEPT = ("vocab_size", "eos_token_id", "bos_token_id", "pad_token_id")


def copy_inputs(golden, size, tmp_path):
    """Copy the tokenizer and the processor of a golden folder, for images of `size` pixels."""
    for file in (GOLDEN / golden).iterdir():
        if file.suffix in (".json", ".txt", ".model") and file.name != "config.json":
            shutil.copy(file, tmp_path)
    file = tmp_path / "preprocessor_config.json"
    about = json.loads(file.read_text())
    square = {"height": size, "width": size}
    about["size"] = {"shortest_edge": size} if "shortest_edge" in about["size"] else square
    if "crop_size" in about:
        about["crop_size"] = square
    file.write_text(json.dumps(about))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_at_full_width_is_the_same(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    golden, vision, text, embed_dim = MODELS[name]
    small = json.loads((GOLDEN / golden / "config.json").read_text())
    text = text | {key: v for key, v in small["text_config"].items() if key in KEPT}
    towers = {
        "vision_config": vision | {"num_hidden_layers": 1},
        "text_config": text | {"num_hidden_layers": 1},
    }
    more = {} if embed_dim is None else {"projection_dim": embed_dim}
    kind = {"hf_clip": "CLIP", "hf_siglip": "Siglip", "hf_chinese_clip": "ChineseCLIP"}[golden]
    config = getattr(transformers, f"{kind}Config")(**towers, **more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(tmp_path)
    size = config.vision_config.image_size
    copy_inputs(golden, size, tmp_path)
    ours = load(tmp_path)
    pixels = torch.randn(2, 3, size, size)
    tokens = ours.tokenizer(["a cat", "two dogs"])
    with torch.no_grad():
        options = (
            {"attention_mask": torch.tensor(tokens != 0).long()} if "chinese" in golden else {}
        )
        out = model(input_ids=torch.tensor(tokens).long(), pixel_values=pixels, **options)
    z_image = np.asarray(ours.model.encode_image(pixels.permute(0, 2, 3, 1).numpy()))
    assert np.abs(z_image - out.image_embeds.numpy()).max() < 3e-6
    z_text = np.asarray(ours.model.encode_text(tokens))
    assert np.abs(z_text - out.text_embeds.numpy()).max() < 3e-6


# The golden folder of the same layout, the class, the fields of its config, and those of its text.
B16 = {"num_hidden_layers": 1, "patch_size": 16, "image_size": 480}
GROUPS = {"depths": [1, 1, 1], "num_hidden_layers": 3, "image_size": 224}
VIT_G = {"num_hidden_layers": 1}  # the sizes are the defaults
OTHERS = {
    "google/owlv2-base-patch16": (
        "hf_owlv2", "Owlv2Model", {"vision_config": B16}, "text_config", {"num_hidden_layers": 1}
    ),
    "nvidia/groupvit-gcc-yfcc": (
        "hf_groupvit", "GroupViTModel", {"vision_config": GROUPS}, "text_config",
        {"num_hidden_layers": 1},
    ),
    "Salesforce/blip2-itm-vit-g": (
        "hf_blip2", "Blip2ForImageTextRetrieval", {"vision_config": VIT_G}, "qformer_config",
        {"num_hidden_layers": 2, "use_qformer_text_input": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_at_full_width_is_the_same(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    golden, kind, fields, part, text = OTHERS[name]
    small = json.loads((GOLDEN / golden / "config.json").read_text())[part]
    fields = fields | {part: text | {key: v for key, v in small.items() if key in KEPT}}
    model = getattr(transformers, kind)
    config = model.config_class(**fields)
    torch.manual_seed(0)
    model = model(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # some start as zeros
        for key, weight in model.named_parameters():
            if "logit" not in key:
                spread = 0.02 * torch.randn(weight.shape, generator=generator)
                weight.copy_(spread + ("norm" in key.lower() and key.endswith("weight")))
    model.save_pretrained(tmp_path)
    copy_inputs(golden, config.vision_config.image_size, tmp_path)
    ours = load(tmp_path)
    pixels = torch.randn(2, 3, config.vision_config.image_size, config.vision_config.image_size)
    tokens = ours.tokenizer(["a cat", "two dogs"])
    pad = small["pad_token_id"] if golden == "hf_blip2" else -1
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens).long(),
            pixel_values=pixels,
            attention_mask=torch.tensor(tokens != pad).long(),
        )
    z_image = np.asarray(ours.model.encode_image(pixels.permute(0, 2, 3, 1).numpy()))
    assert np.abs(z_image - out.image_embeds.numpy()).max() < 3e-6
    z_text = np.asarray(ours.model.encode_text(tokens))
    assert np.abs(z_text - out.text_embeds.numpy()).max() < 3e-6


def test_internvl_6b_at_full_width_is_the_same(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.InternVLVisionConfig(
        hidden_size=3200, intermediate_size=12800, num_attention_heads=25, num_hidden_layers=1,
        norm_type="rms_norm", use_qk_norm=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.InternVLVisionModel(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lambda" in key or "norm" in key:
                weight.copy_(1 + 0.1 * torch.randn(weight.shape))
    model.save_pretrained(tmp_path)
    copy_inputs("one_internvl_qk_norm", 448, tmp_path)
    ours, pixels = load(tmp_path), torch.randn(2, 3, 448, 448)
    with torch.no_grad():
        z = model(pixel_values=pixels).last_hidden_state[:, 1:].mean(1).numpy()
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    z_image = np.asarray(ours.model.encode_image(pixels.permute(0, 2, 3, 1).numpy()))
    assert np.abs(z_image - z).max() < 3e-6


def test_eva_clip_8b_at_full_width_is_the_same(tmp_path, monkeypatch):
    sizes = {"WIDTH": 4096, "MLP": 15360, "HEADS": 32, "DEPTH": 1, "EMBED": 1280, "PATCH": 14}
    for name, size in (sizes | {"SIZE": 224}).items():
        monkeypatch.setattr(test_eva_clip, name, size)
    test_eva_clip.test_towers_compute_the_published_forward_pass(True, False, False, tmp_path)
