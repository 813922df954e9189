"""Writes `golden/one_*`: small random vision towers as transformers and timm save them.

Run with the extra `peers` installed: python tests/weights/make_vision_towers.py
"""

import json
import pathlib
import shutil

import numpy as np
import timm
import torch
from make_huggingface import images, randomise
from PIL import Image
from seeded import seeded
from timm.models._hub import save_config_for_hf
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTImageProcessor,
    DINOv3ViTModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

GOLDEN = pathlib.Path(__file__).parent / "golden"
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
         "patch_size": 8}  # fmt: skip
WITH_MLP = SMALL | {"intermediate_size": 40}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def record(name, model, pixels, raw, z) -> None:
    np.savez_compressed(
        GOLDEN / name / "image.npz",
        **{f"image/{i}": image for i, image in enumerate(raw)},
        pixels=pixels.permute(0, 2, 3, 1).numpy(),
        z_image=z.numpy(),
    )


def prepare(name, model, seed) -> pathlib.Path:
    randomise(model, seed)
    model.eval()
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if "lambda" in parameter:  # scales of branches, which random values would turn off
                value.mul_(2).add_(0.5)
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def transformers(name, model, processor, seed, output="pooler_output") -> None:
    folder = prepare(name, model, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    raw = images(seed)
    pixels = processor([Image.fromarray(i) for i in raw], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = model(pixel_values=pixels)
    record(name, model, pixels, raw, out[output] if isinstance(output, str) else output(out))


def of_timm(name, architecture, seed, **options) -> None:
    model = timm.create_model(architecture, img_size=32, depth=1, num_classes=3, **options)
    folder = prepare(name, model, seed)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    weights = {key: torch.from_numpy(seeded(key, shape)) for key, shape in shapes.items()}
    model.load_state_dict(weights)
    # timm's widths are large: the test makes the same weights.
    (folder / "shapes.json").write_text(json.dumps(shapes, indent=1) + "\n")
    model.pretrained_cfg.update(input_size=(3, 32, 32), crop_pct=0.9)
    save_config_for_hf(model, folder / "config.json")
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(model.pretrained_cfg, model=model)
    )
    raw = images(seed)
    pixels = torch.stack([transform(Image.fromarray(image)) for image in raw])
    with torch.no_grad():
        z = model.forward_head(model.forward_features(pixels), pre_logits=True)
    record(name, model, pixels, raw, z)


def clip_text(name, seed) -> None:
    """CLIP's text tower, with the tokenizer of golden/hf_clip."""
    about = json.loads((GOLDEN / "hf_clip" / "config.json").read_text())["text_config"]
    config = CLIPTextConfig(**about | {"num_hidden_layers": 1, "projection_dim": 16})
    model = CLIPTextModelWithProjection(config)
    folder = prepare(name, model, seed)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "hf_clip" / file, folder / file)
    tokens = np.load(GOLDEN / "hf_clip" / "outputs.npz")["tokens"]
    with torch.no_grad():
        z = model(input_ids=torch.tensor(tokens)).text_embeds
    np.savez_compressed(folder / "text.npz", tokens=tokens, z_text=z.numpy())


if __name__ == "__main__":
    bit = {"resample": 3, **IMAGENET}
    small = {"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 24}}
    same = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    square = {"size": {"height": 32, "width": 32}}
    projected = CLIPVisionModelWithProjection(CLIPVisionConfig(**WITH_MLP, projection_dim=16))
    clip = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers("one_clip", projected, CLIPImageProcessorPil(**clip), 1, "image_embeds")
    plain = CLIPVisionModel(CLIPVisionConfig(**WITH_MLP))
    transformers("one_clip_pooled", plain, CLIPImageProcessorPil(**clip), 2)
    siglip = SiglipVisionModel(SiglipVisionConfig(**WITH_MLP))
    transformers("one_siglip", siglip, SiglipImageProcessorPil(**square), 3)
    transformers("one_vit", ViTModel(ViTConfig(**WITH_MLP)), ViTImageProcessorPil(**square), 4)
    bare = ViTModel(ViTConfig(**WITH_MLP, qkv_bias=False), add_pooling_layer=False)
    first = lambda out: out.last_hidden_state[:, 0]  # noqa: E731
    transformers("one_vit_bare", bare, ViTImageProcessorPil(**square), 5, first)
    # At another image size than that of the positions, as the published DINOv2.
    dinov2 = Dinov2Model(Dinov2Config(**SMALL))
    transformers("one_dinov2", dinov2, BitImageProcessorPil(**bit, **small), 6)
    gated = Dinov2Model(Dinov2Config(**SMALL, use_swiglu_ffn=True))
    transformers("one_dinov2_gated", gated, BitImageProcessorPil(**bit, **same), 7)
    registers = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL))
    transformers("one_dinov2_registers", registers, BitImageProcessorPil(**bit, **small), 8)
    dinov3 = DINOv3ViTModel(DINOv3ViTConfig(**WITH_MLP, num_register_tokens=4))
    transformers("one_dinov3", dinov3, DINOv3ViTImageProcessor(**square), 9)
    gated = {"use_gated_mlp": True, "hidden_act": "silu", "query_bias": False}
    dinov3 = DINOv3ViTModel(DINOv3ViTConfig(**WITH_MLP, **gated, num_register_tokens=2))
    transformers("one_dinov3_gated", dinov3, DINOv3ViTImageProcessor(**square), 10)
    of_timm("one_timm", "vit_tiny_patch16_224", 11)
    of_timm("one_timm_dinov2", "vit_small_patch14_reg4_dinov2", 12, patch_size=8, mlp_ratio=1)
    clip_text("one_clip_text", 13)
