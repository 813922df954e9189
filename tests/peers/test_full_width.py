"""transformers' classes of popular models, at full width and one block deep, with random weights.

Those of open_clip's layout are in `test_architectures.py`.
"""

import json
import pathlib
import shutil

import numpy as np
import pytest

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


@pytest.mark.parametrize("name", MODELS)
def test_a_model_at_full_width_is_the_same(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    golden, vision, text, embed_dim = MODELS[name]
    for file in (GOLDEN / golden).iterdir():  # its tokenizer and processor
        if file.suffix in (".json", ".txt", ".model") and file.name != "config.json":
            shutil.copy(file, tmp_path)
    small = json.loads((GOLDEN / golden / "config.json").read_text())
    kept = ("vocab_size", "eos_token_id", "bos_token_id", "pad_token_id")
    text = text | {key: v for key, v in small["text_config"].items() if key in kept}
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
    file = tmp_path / "preprocessor_config.json"
    about = json.loads(file.read_text())
    square = {"height": size, "width": size}
    about["size"] = {"shortest_edge": size} if "shortest_edge" in about["size"] else square
    if "crop_size" in about:
        about["crop_size"] = square
    file.write_text(json.dumps(about))
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
