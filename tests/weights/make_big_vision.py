"""Writes `golden/bv_*`: small `.npz` files in big_vision's layout, and what they compute.

The reference is open_clip's own reader of such files.
Run with the extra `peers` installed: python tests/weights/make_big_vision.py
"""

import functools
import pathlib
import shutil
import tempfile

import ml_dtypes
import numpy as np
import torch
from open_clip.convert import load_big_vision_weights
from open_clip.model import CustomTextCLIP
from timm.models.vision_transformer import VisionTransformer

GOLDEN = pathlib.Path(__file__).parent / "golden"
WIDTH, HEADS, MLP, DEPTH, TEXT_WIDTH, TEXT_HEADS, TEXT_MLP = 24, 3, 38, 2, 16, 2, 30
LENGTH, VOCABULARY, OUT = 9, 120, 24


def parameters(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    out = {}

    def add(name, *shape, centre=0.0):
        out[name] = (centre + 0.25 * rng.standard_normal(shape)).astype(np.float32)

    def dense(name, *shape, bias):
        add(f"{name}/kernel", *shape)
        add(f"{name}/bias", *bias)

    def norm(name, width):
        add(f"{name}/scale", width, centre=1.0)
        add(f"{name}/bias", width)

    def attention(name, width, heads):
        for part in ("query", "key", "value"):
            dense(f"{name}/{part}", width, heads, width // heads, bias=(heads, width // heads))
        dense(f"{name}/out", heads, width // heads, width, bias=(width,))

    def mlp(name, width, hidden):
        dense(f"{name}/Dense_0", width, hidden, bias=(hidden,))
        dense(f"{name}/Dense_1", hidden, width, bias=(width,))

    def encoder(name, width, heads, hidden):
        for i in range(DEPTH):
            block = f"{name}/encoderblock_{i}"
            norm(f"{block}/LayerNorm_0", width)
            attention(f"{block}/MultiHeadDotProductAttention_0", width, heads)
            norm(f"{block}/LayerNorm_1", width)
            mlp(f"{block}/MlpBlock_0", width, hidden)
        norm(f"{name}/encoder_norm", width)

    dense("img/embedding", 7, 7, 3, WIDTH, bias=(WIDTH,))
    add("img/pos_embedding", 1, 16, WIDTH)
    encoder("img/Transformer", WIDTH, HEADS, MLP)
    add("img/MAPHead_0/probe", 1, 1, WIDTH)
    attention("img/MAPHead_0/MultiHeadDotProductAttention_0", WIDTH, HEADS)
    norm("img/MAPHead_0/LayerNorm_0", WIDTH)
    mlp("img/MAPHead_0/MlpBlock_0", WIDTH, MLP)
    add("txt/Embed_0/embedding", VOCABULARY, TEXT_WIDTH)
    add("txt/pos_embedding", 1, LENGTH, TEXT_WIDTH)
    encoder("txt/Encoder_0", TEXT_WIDTH, TEXT_HEADS, TEXT_MLP)
    dense("txt/head", TEXT_WIDTH, OUT, bias=(OUT,))
    out["t"], out["b"] = np.float32([2.1]), np.float32([-4.5])
    return {f"params/{name}": value for name, value in out.items()}


def stacked(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = {}
    for name, value in flat.items():
        if "encoderblock_0/" in name:
            layers = [flat[name.replace("block_0/", f"block_{i}/")] for i in range(DEPTH)]
            out[name.replace("encoderblock_0/", "encoderblock/")] = np.stack(layers)
        elif "encoderblock_" not in name:
            out[name] = value
    return out


def reference(path) -> CustomTextCLIP:
    vision = {"width": 8, "head_width": 8, "layers": 1, "image_size": 28, "patch_size": 7}
    text = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": TEXT_WIDTH,
            "heads": TEXT_HEADS, "layers": DEPTH, "mlp_ratio": TEXT_MLP / TEXT_WIDTH,
            "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}  # fmt: skip
    model = CustomTextCLIP(OUT, vision, text, init_logit_bias=-10)
    model.visual = torch.nn.Module()
    model.visual.trunk = VisionTransformer(
        img_size=28, patch_size=7, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS,
        mlp_ratio=MLP / WIDTH + 1e-6, class_token=False, global_pool="map", num_classes=0,
        act_layer=functools.partial(torch.nn.GELU, approximate="tanh"),
    )  # fmt: skip
    load_big_vision_weights(model, str(path))
    return model.eval()


for seed, name in enumerate(("bv_siglip", "bv_stacked_bfloat16"), 30):
    folder = GOLDEN / name
    folder.mkdir(exist_ok=True)
    flat = parameters(seed)
    if name == "bv_siglip":
        np.savez(folder / "model.npz", **flat)
        model = reference(folder / "model.npz")
    else:
        half = {k: v.astype(ml_dtypes.bfloat16) for k, v in flat.items()}
        # As old files are: the position embedding in two parts.
        name_1, name_2 = "params/txt/pos_embedding", "params/txt/Encoder_0/pos_embedding"
        half[name_2] = half[name_1][..., ::-1].copy()
        whole = {k: v.astype(np.float32) for k, v in half.items()}
        whole[name_1] += whole.pop(name_2)
        with tempfile.NamedTemporaryFile(suffix=".npz") as file:
            np.savez(file.name, **whole)
            model = reference(file.name)
        np.savez(folder / "model.npz", **{k: v.view("V2") for k, v in stacked(half).items()})
    shutil.copy(GOLDEN / "spiece.model", folder / "sentencepiece.model")
    pixels = torch.randn(3, 3, 28, 28)
    tokens = torch.randint(0, VOCABULARY, (4, LENGTH))
    with torch.no_grad():
        z_image = torch.nn.functional.normalize(model.visual.trunk(pixels), dim=-1).numpy()
        z_text = model.encode_text(tokens, normalize=True).numpy()
    np.savez_compressed(
        folder / "expected.npz",
        pixels=pixels.permute(0, 2, 3, 1).numpy(),
        tokens=tokens.numpy().astype(np.int32),
        z_image=z_image,
        z_text=z_text,
        logits=np.exp(2.1 if name == "bv_siglip" else np.float32(ml_dtypes.bfloat16(2.1)))
        * z_image @ z_text.T - 4.5,
    )  # fmt: skip
