"""Named model sizes as explicit numbers.

A name is a size and a patch, such as "B/16" or "So400m/14". Two families give a whole model of that
name: `clip` (causal text, softmax) and `siglip` (bidirectional text, sigmoid).

Sources: Ti to B, L, H of ViT and DeiT (arXiv:2010.11929, arXiv:2012.12877), g of scaling ViTs
(arXiv:2106.04560), So400m and g-opt of shape-optimised ViTs (arXiv:2305.13035), as big_vision
writes them; the text towers of CLIP (arXiv:2103.00020, table 20), of open_clip for the sizes that
CLIP lacks, and of SigLIP and SigLIP 2 (arXiv:2303.15343, arXiv:2502.14786).
"""

import dataclasses
from typing import Any, NamedTuple

from vlm.config import ModelConfig, TextConfig, ViTConfig
from vlm.errors import ConfigError


class Size(NamedTuple):
    """Sizes of a transformer."""

    width: int
    depth: int
    heads: int
    mlp_dim: int


VISION = {
    "Ti": Size(192, 12, 3, 768),
    "S": Size(384, 12, 6, 1536),
    "B": Size(768, 12, 12, 3072),
    "L": Size(1024, 24, 16, 4096),
    "So400m": Size(1152, 27, 16, 4304),
    "H": Size(1280, 32, 16, 5120),
    "g": Size(1408, 40, 16, 6144),
    "g-opt": Size(1536, 40, 16, 6144),
}

# CLIP's text towers are narrower than their vision towers, and deeper only from H on.
CLIP_TEXT = {
    "Ti": Size(192, 12, 3, 768),
    "S": Size(384, 12, 6, 1536),
    "B": Size(512, 12, 8, 2048),
    "L": Size(768, 12, 12, 3072),
    "H": Size(1024, 24, 16, 4096),
    "g": Size(1024, 24, 16, 4096),
}

# SigLIP's have the size of the vision tower, except the largest.
SIGLIP_TEXT = VISION | {"H": VISION["So400m"], "g": VISION["So400m"], "g-opt": VISION["So400m"]}

PATCHES = {
    "Ti": (16,),
    "S": (16, 32),
    "B": (16, 32),
    "L": (14, 16),
    "So400m": (14, 16),
    "H": (14,),
    "g": (14,),
    "g-opt": (16,),
}
NAMES = tuple(f"{size}/{patch}" for size, patches in PATCHES.items() for patch in patches)


def vision(name: str, **changes: Any) -> ViTConfig:
    """Config of the ViT of size `name`; `changes` replace other fields.

    Raises:
        ConfigError: no such name.
    """
    size, patch = _parse(name)
    return dataclasses.replace(
        ViTConfig(**VISION[size]._asdict(), patch_size=patch, image_size=224), **changes
    )


def clip(name: str, **changes: Any) -> ModelConfig:
    """CLIP of size `name`: class token, causal text of 77 tokens pooled at its end, softmax.

    Raises:
        ConfigError: no such name, or no CLIP of that size.
    """
    size, _ = _parse(name)
    if size not in CLIP_TEXT:
        raise ConfigError(f"there is no CLIP of size {name!r}: choose one of {_names(CLIP_TEXT)}")
    width = CLIP_TEXT[size].width
    text = TextConfig(
        **CLIP_TEXT[size]._asdict(),
        vocab_size=49_408,
        context_length=77,
        causal=True,
        pool="argmax",
        projection="linear",
        activation="gelu",
        norm_eps=1e-5,
    )
    image = vision(
        name,
        pool="class",
        pre_norm=True,
        patch_bias=False,
        projection="linear",
        activation="gelu",
        norm_eps=1e-5,
    )
    return dataclasses.replace(ModelConfig(vision=image, text=text, embed_dim=width), **changes)


def siglip(name: str, **changes: Any) -> ModelConfig:
    """SigLIP of size `name`: attention pooling, bidirectional text of 64 tokens, sigmoid.

    Raises:
        ConfigError: no such name.
    """
    size, _ = _parse(name)
    text = TextConfig(**SIGLIP_TEXT[size]._asdict(), vocab_size=32_000, context_length=64)
    return dataclasses.replace(
        ModelConfig(
            vision=vision(name),
            text=text,
            embed_dim=VISION[size].width,
            loss="sigmoid",
            init_scale=10.0,
            init_bias=-10.0,
        ),
        **changes,
    )


def _parse(name: str) -> tuple[str, int]:
    if name not in NAMES:
        raise ConfigError(f"there is no size {name!r}: choose one of {', '.join(NAMES)}")
    size, patch = name.split("/")
    return size, int(patch)


def _names(sizes: dict[str, Size]) -> str:
    return ", ".join(name for name in NAMES if name.split("/")[0] in sizes)
