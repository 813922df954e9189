"""Bars of the compiled training step on TPUs: estimated time, and the share of copies.

The estimate is the sum of the compiler's cycles, without kernels and communication.
"""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from vlm.config import Experiment, MeshConfig, load_config
from vlm.planning.compile import CompiledStep, compile_step, with_dtype
from vlm.planning.topology import parse_topology, topology_devices
from vlm.sharding import make_mesh

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="extra `tpu`"),
]
CONFIGS = Path(__file__).parents[2] / "configs"


def siglip(name: str) -> Experiment:
    return load_config(CONFIGS / f"{name}.py")


def openai_like(width: int, depth: int, mlp_dim: int, text_width: int, text_heads: int):
    """A ViT of patch 14 with 16 heads, and its text tower, in OpenCLIP's sizes."""
    e = siglip("siglip_so400m")
    vision = dataclasses.replace(
        e.model.vision, width=width, depth=depth, heads=16, mlp_dim=mlp_dim
    )
    text = dataclasses.replace(
        e.model.text, width=text_width, heads=text_heads, mlp_dim=4 * text_width, depth=24
    )
    model = dataclasses.replace(e.model, vision=vision, text=text, embed_dim=width)
    return dataclasses.replace(e, model=model, batch_size=64 * 128, mesh=MeshConfig())


BARS = [
    ("B/16", siglip("siglip_b16"), "v5e:16x16", 190),
    ("So400m", siglip("siglip_so400m"), "v5p:4x8x8", 500),
    ("H/14", openai_like(1280, 32, 5120, 1024, 16), "v5p:4x4x8", None),
    ("bigG/14", openai_like(1664, 48, 8192, 1280, 20), "v5p:4x4x8", None),
]


@pytest.mark.parametrize(
    ("experiment", "slice_name", "milliseconds"),
    [pytest.param(*bar[1:], id=bar[0]) for bar in BARS],
)
def test_the_compiled_step(experiment, slice_name, milliseconds):
    topology = parse_topology(slice_name)
    experiment = with_dtype(experiment, "tpu")
    step = compile_step(experiment, make_mesh(experiment.mesh, topology_devices(topology)))
    assert isinstance(step, CompiledStep)
    cycles, of_layout = step.program.cycles()
    clock = topology.rated_chip.clock
    assert clock is not None
    print(f"{1000 * cycles / clock:.1f} ms, copies and layout changes {of_layout / cycles:.1%}")
    assert of_layout / cycles < 0.03
    assert milliseconds is None or 1000 * cycles / clock <= milliseconds
