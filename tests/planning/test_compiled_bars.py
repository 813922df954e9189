"""Bars of the compiled training step on TPUs: estimated time, MFU, and the share of copies.

The estimate is the sum of the compiler's cycles, and of kernels at published rates. It has no
communication.
"""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from vlm.config import Experiment, MeshConfig, load_config
from vlm.planning import plan
from vlm.planning.roofline import mfu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="extra `tpu`"),
]
CONFIGS = Path(__file__).parents[2] / "configs"


def config(name: str) -> Experiment:
    return load_config(CONFIGS / f"{name}.py")


def openai_like(width: int, depth: int, mlp_dim: int, text_width: int, text_heads: int):
    """A ViT of patch 14 with 16 heads, and its text tower, in OpenCLIP's sizes."""
    e = config("siglip_so400m")
    vision = dataclasses.replace(
        e.model.vision, width=width, depth=depth, heads=16, mlp_dim=mlp_dim
    )
    text = dataclasses.replace(
        e.model.text, width=text_width, heads=text_heads, mlp_dim=4 * text_width, depth=24
    )
    model = dataclasses.replace(e.model, vision=vision, text=text, embed_dim=width)
    return dataclasses.replace(e, model=model, batch_size=64 * 128, mesh=MeshConfig())


# Experiment, slice, most milliseconds, and least MFU.
BARS = {
    "B/16 on v5e": (config("siglip_b16"), "v5e:16x16", 165, 0.5),
    "B/16 on v5p": (config("siglip_b16"), "v5p:4x4x8", 155, 0.5),
    "L/14": (config("clip_l14_laion"), "v5p:4x8x8", 265, 0.5),
    "So400m": (config("siglip_so400m"), "v5p:4x8x8", 385, 0.5),
    "H/14": (openai_like(1280, 32, 5120, 1024, 16), "v5p:4x4x8", None, None),
    "bigG/14": (openai_like(1664, 48, 8192, 1280, 20), "v5p:4x4x8", None, None),
}


@pytest.mark.parametrize("name", BARS)
def test_the_compiled_step(name):
    experiment, slice_name, milliseconds, least_mfu = BARS[name]
    made = plan(experiment, slice_name, loss=False)
    assert made.roofline is not None
    seconds, layout = made.roofline.compiler_estimate, made.roofline.layout_share
    assert seconds is not None
    assert layout is not None
    reached = mfu(made.experiment, made.topology, seconds)
    print(f"{1000 * seconds:.1f} ms, MFU {reached:.1%}, copies and layout changes {layout:.1%}")
    assert layout < 0.03
    assert milliseconds is None or 1000 * seconds <= milliseconds
    assert least_mfu is None or reached >= least_mfu
