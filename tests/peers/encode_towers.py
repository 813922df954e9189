"""Images per second of other vision towers on this CPU, beside open_clip in one run, in turns.

    python tests/peers/encode_towers.py [NAME ...]

Run with the extra `peers` installed beside vlm.
"""

import sys

import jax
import numpy as np
import open_clip
import torch
from architectures import described
from flax import nnx
from turns import compare_encoders

from vlm.weights import open_clip as ours
from vlm.weights.files import Arrays
from vlm.weights.instantiate import abstract_model
from vlm.weights.rules import fill

NAMES = ("convnext_base", "EVA02-B-16", "ViTamin-B", "MobileCLIP-S1")


def compare(name: str, batch_size: int, rounds: int) -> None:
    torch.manual_seed(0)
    theirs = open_clip.create_model(name).eval()
    tensors = Arrays({n: t.numpy() for n, t in theirs.state_dict().items()}, name)
    config, rules, tensors = described(open_clip.get_model_config(name), tensors)
    dtype = np.dtype(np.float32)
    model = fill(abstract_model(config, dtype), rules, tensors, dtype=dtype, ignored=ours.ignored)
    size = config.vision.image_size
    pixels = torch.randn(batch_size, 3, size, size)
    images = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    graph, state = nnx.split(model)
    encode = jax.jit(lambda state, x: nnx.merge(graph, state).encode_image(x))
    runs = {
        "vlm": lambda: jax.block_until_ready(encode(state, images)),
        "open_clip": lambda: theirs.encode_image(pixels, normalize=True),
    }
    with torch.inference_mode():
        compare_encoders(name, runs, batch_size, rounds)


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        compare(name, batch_size=8, rounds=5)
