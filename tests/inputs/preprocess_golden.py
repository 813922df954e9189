"""Writes `preprocess_golden.npz`: pixels by torchvision and transformers of small awkward images.

Run with the extra `peers` installed: python tests/inputs/preprocess_golden.py
Every output is stored as uint8 levels.
"""

import pathlib

import numpy as np
import torch
from open_clip.transform import CenterCropOrPad, ResizeKeepRatio
from PIL import Image
from torchvision.transforms import v2
from transformers import (
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    SiglipImageProcessor,
    SiglipImageProcessorPil,
)

SIZES = [(37, 53), (64, 47), (13, 90), (40, 40), (7, 5), (19, 21), (21, 60)]  # height, width
KERNELS = ["nearest", "bilinear", "bicubic", "lanczos"]


def images():
    """Edges, ramps and noise, which show ringing, phase and rounding."""
    rng = np.random.default_rng(7)
    for height, width in SIZES:
        y, x = np.mgrid[:height, :width]
        ramp = 255 * np.stack([x / width, y / height, (x + y) / (height + width)], -1)
        edges = 255.0 * ((x // 5 + y // 4) % 2)[..., None]
        noise = rng.uniform(0, 255, (height, width, 3))
        parts = np.stack([ramp, np.broadcast_to(edges, ramp.shape), noise])
        choice = (x * 3 // width)[None, ..., None]
        yield np.take_along_axis(parts, np.broadcast_to(choice, (1, *ramp.shape)), 0)[0]


def processor_levels(processor, image):
    return processor(image, do_rescale=False, do_normalize=False, return_tensors="np")[
        "pixel_values"
    ][0].transpose(1, 2, 0)


out = {}
for i, image in enumerate(np.rint(im).astype(np.uint8) for im in images()):
    out[f"input/{i}"] = image
    pil = Image.fromarray(image)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    for kernel in KERNELS:
        mode = v2.InterpolationMode(kernel)
        for size in (16, 17):
            crop = v2.Compose([v2.Resize(size, mode), v2.CenterCrop(size)])
            squash = v2.Resize((size, size), mode)
            if kernel != "lanczos":
                padded = CenterCropOrPad(size, fill=77)(ResizeKeepRatio(size, 1.0, mode)(pil))
                out[f"pillow/pad/{kernel}/{size}/{i}"] = np.asarray(padded)
            out[f"pillow/crop/{kernel}/{size}/{i}"] = np.asarray(crop(pil))
            out[f"pillow/squash/{kernel}/{size}/{i}"] = np.asarray(squash(pil))
            for antialias in (True, False):
                if kernel == "lanczos" and not antialias:
                    continue
                squash = v2.Resize((size, size), mode, antialias=antialias)
                levels = squash(tensor).permute(1, 2, 0).numpy()
                out[f"tensor/{antialias}/{kernel}/{size}/{i}"] = levels
    clip = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    for name, cls in {"pillow": CLIPImageProcessorPil, "tensor": CLIPImageProcessor}.items():
        out[f"clip/{name}/{i}"] = processor_levels(cls(**clip), pil).astype(np.uint8)
    siglip = {"size": {"height": 16, "width": 16}, "resample": Image.Resampling.BICUBIC}
    for name, cls in {"pillow": SiglipImageProcessorPil, "tensor": SiglipImageProcessor}.items():
        out[f"siglip/{name}/{i}"] = processor_levels(cls(**siglip), pil).astype(np.uint8)

np.savez_compressed(pathlib.Path(__file__).with_suffix(".npz"), **out)
print(len(out), "arrays")
