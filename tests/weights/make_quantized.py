"""Writes `quantized/`: a small CLIP as libraries of quantized weights save it, and its embeddings.

Run with the extra `peers`, and bitsandbytes, compressed-tensors, optimum-quanto and accelerate
installed: python tests/weights/make_quantized.py. The reference embeddings are those of CLIPModel
with the weights that each library's own code dequantizes. fbgemm_fp8 and fp8 quantize on GPUs
alone, so their layouts are written here as transformers documents and dequantizes them.
"""

import json
import pathlib
import shutil
import sys

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, CLIPModel

HERE = pathlib.Path(__file__).parent
SOURCE = HERE / "golden" / "hf_clip"


def linear_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def write(name, weights, fill):
    """Store the folder that `fill` writes, and outputs of CLIPModel with these linear weights."""
    folder = HERE / "quantized" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    fill(folder)
    for file in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SOURCE / file, folder)
    model = CLIPModel.from_pretrained(SOURCE).eval()
    for layer, weight in weights.items():
        model.get_submodule(layer).weight.data = weight.float()
    golden = np.load(SOURCE / "outputs.npz")
    with torch.no_grad():
        out = model(torch.from_numpy(golden["tokens"]).long(),
                    torch.from_numpy(golden["pixels"]).permute(0, 3, 1, 2))  # fmt: skip
    kept = {key: golden[key] for key in ("pixels", "tokens")}
    np.savez_compressed(folder / "outputs.npz", **kept, z_image=out.image_embeds.numpy(),
                        z_text=out.text_embeds.numpy())  # fmt: skip


def bitsandbytes():
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = CLIPModel.from_pretrained(SOURCE, quantization_config=config, device_map="cpu")
    import bitsandbytes.functional as F

    weights = {}
    for layer, module in model.named_modules():
        if type(module).__name__ == "Linear8bitLt":
            weights[layer] = F.int8_vectorwise_dequant(module.weight.CB, module.weight.SCB)
    assert weights
    write("bitsandbytes", weights, lambda folder: model.save_pretrained(folder))


def quanto(kind):
    from optimum.quanto import QuantizedTransformersModel, qfloat8, qint8, quantization_map

    model = CLIPModel.from_pretrained(SOURCE)
    made = QuantizedTransformersModel.quantize(model, weights={"int8": qint8, "fp8": qfloat8}[kind])
    model.config.tie_word_embeddings = False
    layers = {n: model.get_submodule(n) for n in quantization_map(model)}  # also the patches'
    weights = {name: layer.weight.dequantize() for name, layer in layers.items()}
    write(f"quanto_{kind}", weights, lambda folder: made.save_pretrained(folder))


def compressed(name, **options):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    form = options.pop("form")
    model = CLIPModel.from_pretrained(SOURCE)
    args = QuantizationArgs(num_bits=8, **options)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=form, ignore=[])
    apply_quantization_config(model, config)
    for module in linear_layers(model).values():
        x = module.weight.data
        if args.strategy == "group":
            x = x.reshape(x.shape[0], -1, args.group_size)
        elif args.strategy == "tensor":
            x = x.reshape(1, -1)
        scale, zero = calculate_qparams(x.amin(-1), x.amax(-1), args)
        module.weight_scale.data = scale.reshape(module.weight_scale.shape)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero.reshape(module.weight_zero_point.shape).to(
                module.weight_zero_point.dtype
            )
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=form)
    compressor.compress_model(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    compressor.decompress_model(model)
    weights = {n: m.weight.data for n, m in linear_layers(model).items()}

    def fill(folder):
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        shutil.copy(SOURCE / "config.json", folder)
        compressor.update_config(folder)

    write(f"compressed_{name}", weights, fill)


def tiles(name, rows, columns, config, suffix):
    """fp8 weights with a scale for each tile, by transformers' rule: weight * scale."""
    model = CLIPModel.from_pretrained(SOURCE)
    state, weights = dict(model.state_dict()), {}
    for layer, module in linear_layers(model).items():
        x = module.weight.data
        r, c = min(rows, x.shape[0]), min(columns, x.shape[1])
        down, across = -(-x.shape[0] // r), -(-x.shape[1] // c)
        scale = torch.zeros(down, across)
        for i in range(down):
            for j in range(across):
                tile = x[i * r : (i + 1) * r, j * c : (j + 1) * c]
                scale[i, j] = tile.abs().max() / 448
        spread = scale.repeat_interleave(r, 0)[: x.shape[0]].repeat_interleave(c, 1)[
            :, : x.shape[1]
        ]
        q = (x / spread).to(torch.float8_e4m3fn)
        state[f"{layer}.weight"], state[f"{layer}.weight{suffix}"] = q, scale
        weights[layer] = q.float() * spread

    def fill(folder):
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
        values = json.loads((SOURCE / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"quantization_config": config}))

    write(name, weights, fill)


MAKERS = {
    "tiles": lambda: (
        tiles("fbgemm_fp8", 1, 10**6, {"quant_method": "fbgemm_fp8"}, "_scale"),
        tiles("fp8", 16, 16, {"quant_method": "fp8", "weight_block_size": [16, 16]}, "_scale_inv"),
    ),
    "quanto": lambda: (quanto("int8"), quanto("fp8")),
    "bitsandbytes": bitsandbytes,
    "compressed": lambda: (
        compressed("int8", type="int", strategy="channel", symmetric=True, form="int-quantized"),
        compressed("int8_zero", type="int", strategy="channel", symmetric=False,
                   form="int-quantized"),
        compressed("fp8", type="float", strategy="tensor", symmetric=True, form="float-quantized"),
        compressed("group", type="int", strategy="group", group_size=4, symmetric=True,
                   form="naive-quantized"),
    ),
}  # fmt: skip

if __name__ == "__main__":
    for maker in sys.argv[1:] or MAKERS:
        MAKERS[maker]()
