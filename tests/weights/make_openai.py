"""Writes `golden/openai_*.pt`: small TorchScript archives in OpenAI's layout, and their outputs.

Run with the extra `peers` installed: python tests/weights/make_openai.py
"""

import copy
import pathlib

import numpy as np
import torch
from make_huggingface import randomise
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

GOLDEN = pathlib.Path(__file__).parent / "golden"
TEXT = {"context_length": 9, "vocab_size": 30, "width": 64, "heads": 1, "layers": 1,
        "mlp_ratio": 0.5}  # fmt: skip
CASES = {
    "openai_vit": CLIPVisionCfg(
        layers=1, width=64, head_width=64, patch_size=5, image_size=20, mlp_ratio=0.5
    ),
    "openai_resnet": CLIPVisionCfg(layers=(1, 2, 1, 1), width=2, head_width=64, image_size=64),
}


class Archive(torch.nn.Module):
    """What OpenAI traced: the model with its sizes as buffers."""

    def __init__(self, model, image_size):
        super().__init__()
        for name, child in model.named_children():
            setattr(self, name, child)
        for name, parameter in model.named_parameters(recurse=False):
            setattr(self, name, parameter)
        self.register_buffer("input_resolution", torch.tensor(image_size))
        self.register_buffer("context_length", torch.tensor(9))
        self.register_buffer("vocab_size", torch.tensor(30))

    def forward(self, x):
        return x * self.logit_scale


for seed, (name, vision) in enumerate(CASES.items(), 20):
    torch.manual_seed(seed)
    model = CLIP(8 if "resnet" in name else 12, vision, CLIPTextCfg(**TEXT), quick_gelu=True).eval()
    randomise(model, seed)
    if "resnet" in name:
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.data.uniform_(0.5, 1.5)
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 2)
    model.half().float()  # OpenAI's files hold half precision
    half = Archive(copy.deepcopy(model), vision.image_size).eval().half()
    torch.jit.trace(half, torch.ones(1)).save(str(GOLDEN / f"{name}.pt"))
    pixels = torch.randn(3, 3, vision.image_size, vision.image_size)
    tokens = torch.randint(0, 29, (4, 9))
    tokens[:, 5] = 29
    with torch.no_grad():
        np.savez_compressed(
            GOLDEN / f"{name}.npz",
            pixels=pixels.permute(0, 2, 3, 1).numpy(),
            tokens=tokens.numpy().astype(np.int32),
            z_image=model.encode_image(pixels, normalize=True).numpy(),
            z_text=model.encode_text(tokens, normalize=True).numpy(),
        )
