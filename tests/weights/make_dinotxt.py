"""Writes `golden/dinotxt`: shapes of a small dino.txt, and what its own code computes.

Its weights are those of seeded.py, so that no file holds them. The code is that of
https://github.com/facebookresearch/dinov3, whose folder is the argument; `--full` compares vlm with
it at full width and one block deep, and writes nothing.
Run with the extra `peers` installed: python tests/weights/make_dinotxt.py DINOV3 [--full]
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
from make_huggingface import TEXTS, images
from PIL import Image
from seeded import seeded

GOLDEN = pathlib.Path(__file__).parent / "golden" / "dinotxt"


def build(width: int, text_width: int, words: int):
    from dinov3.eval.text.dinotxt_model import DINOTxt, DINOTxtConfig
    from dinov3.eval.text.text_transformer import TextTransformer
    from dinov3.models.vision_transformer import DinoVisionTransformer

    backbone = DinoVisionTransformer(
        patch_size=16, pos_embed_rope_dtype="fp32", embed_dim=width, depth=1,
        num_heads=width // 64, layerscale_init=1e-5, norm_layer="layernormbf16",
        n_storage_tokens=4, mask_k_bias=True, img_size=224, pos_embed_rope_base=100,
        pos_embed_rope_rescale_coords=2,
    )  # fmt: skip
    text = TextTransformer(77, words, text_width, text_width // 64, 1, 4, True)
    config = DINOTxtConfig(
        embed_dim=2 * width, vision_model_use_class_token=True, vision_model_use_patch_tokens=True,
        vision_model_num_head_blocks=2, text_model_tokens_pooler_type="argmax",
        text_model_use_linear_projection=True,
    )  # fmt: skip
    model = DINOTxt(config, vision_backbone=backbone, text_backbone=text).eval()
    backbone.init_weights()  # of the mask of biases, too
    state = {
        name: torch.from_numpy(seeded(name.replace("ln_", "norm_"), tuple(tensor.shape)))
        for name, tensor in model.state_dict().items()
        if not name.endswith((".bias_mask", ".periods"))
    }
    state = {n: 0.5 + t if n.endswith("gamma") else t for n, t in state.items()}
    state["logit_scale"] = torch.full((1,), 2.3)
    model.load_state_dict(state, strict=False)
    return model


def files_of(model) -> dict[str, dict[str, torch.Tensor]]:
    """The two published files."""
    start = "visual_model.backbone."
    rest = {n: t for n, t in model.state_dict().items() if not n.startswith(start)}
    return {"backbone.pth": model.visual_model.backbone.state_dict(), "head_and_text.pth": rest}


def outputs(model, seed: int):
    from dinov3.data.transforms import make_classification_eval_transform

    from vlm.weights.vocabularies import clip_tokenizer

    raw = images(seed)
    transform = make_classification_eval_transform()
    pixels = torch.stack([transform(Image.fromarray(image)) for image in raw])
    tokens = torch.tensor(clip_tokenizer(77)(TEXTS))  # compared with CLIP's in test_tokens.py
    with torch.no_grad():
        z_image, z_text, *_ = model(pixels, tokens.long())
        logits, _ = model.get_logits(pixels, tokens.long())
    return (
        raw,
        pixels.permute(0, 2, 3, 1).numpy(),
        tokens.numpy(),
        *map(torch.Tensor.numpy, (z_image, z_text, logits)),
    )


def compare_full() -> None:
    import vlm

    model = build(1024, 1280, 49_408)
    with tempfile.TemporaryDirectory() as folder:
        for name, state in files_of(model).items():
            torch.save(state, f"{folder}/{name}")
        ours = vlm.load(folder, architecture="dinov3_vitl16_dinotxt_tet1280d20h24l")
        _, pixels, tokens, z_image, z_text, _ = outputs(model, 41)
        differ = np.abs(np.asarray(ours.model.encode_image(pixels)) - z_image).max()
        print("image", differ, "text", np.abs(ours.encode_tokens(tokens) - z_text).max())


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    torch.manual_seed(0)
    if "--full" in sys.argv:
        compare_full()
        sys.exit()
    GOLDEN.mkdir(exist_ok=True)
    model = build(128, 64, 49_408)
    shapes = {
        file: {name: tuple(tensor.shape) for name, tensor in state.items()}
        for file, state in files_of(model).items()
    }
    (GOLDEN / "shapes.json").write_text(json.dumps(shapes, indent=1) + "\n")
    raw, _, tokens, z_image, z_text, logits = outputs(model, 41)
    np.savez_compressed(
        GOLDEN / "image.npz", **{f"image/{i}": image for i, image in enumerate(raw)},
        tokens=tokens, z_image=z_image, z_text=z_text, logits=logits, texts=np.array(TEXTS),
    )  # fmt: skip
