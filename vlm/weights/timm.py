"""timm's ViTs as vision towers of open_clip folders: SigLIP, Perception Encoder (PE) and CLIP.

A folder gives only the tower's name, from which timm derives the sizes. `TOWERS` has them too.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vlm.config import VisionTowerConfig, ViTConfig
from vlm.errors import CheckpointError
from vlm.weights.layers import MLP, TIMM, block, conv, fused, heads, linear, norm
from vlm.weights.rules import Rule, Shapes, Transform, count_layers, leading

TRUNK, BLOCK, OURS = "visual.trunk", "visual.trunk.blocks.{}", "vision.transformer.blocks"

_SIGLIP = re.compile(r"vit_(base|large|so400m|giantopt)_patch(\d+)_siglip_(\d+)(\..*)?$")
_PE = re.compile(r"vit_pe_core_(tiny|small|base|large|gigantic)_patch(\d+)_(\d+)(\..*)?$")
_CLIP = re.compile(r"vit_(base|large)_patch(\d+)_clip_(\d+)(\..*)?$")  # MobileCLIP2-L-14's
NAMES = {_SIGLIP: {("map", "none")}, _PE: {("map", None)}, _CLIP: {("token", None)}}
READS = (
    "vit_*_siglip_* and vit_pe_core_* with attention pooling, vit_{base,large}_patch*_clip_* with "
    "the class token, without an extra projection"
)
# SigLIP towers with tanh-GELU instead of the exact one.
_TANH = re.compile(r"vit_(base_patch32|large_patch16_siglip_512|so400m_patch16|giantopt)")

# Width, depth, heads and mlp_dim by the size in a name.
_SIZES = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "gigantic": (1536, 50, 16, 8960),
}
# Image sizes for which timm has a name.
_PIXELS = {
    "vit_{}_siglip_{}": {
        "base_patch32": (256,), "base_patch16": (224, 256, 384, 512),
        "large_patch16": (256, 384, 512), "so400m_patch14": (224, 378, 384),
        "so400m_patch16": (256, 384, 512), "giantopt_patch16": (256, 384),
    },
    "vit_pe_core_{}_{}": {
        "tiny_patch16": (384,), "small_patch16": (384,), "base_patch16": (224,),
        "large_patch14": (336,), "gigantic_patch14": (448,),
    },
    "vit_{}_clip_{}": {
        "base_patch32": (224, 256, 384, 448), "base_patch16": (224, 384),
        "large_patch14": (224, 336),
    },
}  # fmt: skip
_WITH_HEAD: dict[str, Any] = {
    "pre_norm": True, "patch_bias": False, "projection": "linear_bias", "activation": "gelu",
    "norm_eps": 1e-5,
}  # fmt: skip


def _tower(name: str) -> ViTConfig:
    """The tower that timm makes of a name."""
    match = next(match for pattern in NAMES if (match := pattern.match(name)))
    width, depth, heads, mlp_dim = _SIZES[match[1]]
    if match.re is _SIGLIP:
        activation = "gelu_tanh" if _TANH.match(name) else "gelu"
        options: dict[str, Any] = {"pool": "map", "activation": activation, "norm_eps": 1e-6}
    elif match.re is _PE:
        gigantic = match[1] == "gigantic"
        options = _WITH_HEAD | {"pool": "map", "pool_heads": 8, "pool_mlp_dim": 4 * width}
        options |= {"class_token": not gigantic, "rotary": 0 if gigantic else 1}
    else:
        options = _WITH_HEAD | {"pool": "class", "class_token": True}
    return ViTConfig(
        image_size=int(match[3]),
        patch_size=int(match[2]),
        width=width,
        depth=depth,
        heads=heads,
        mlp_dim=mlp_dim,
        **options,
    )


TOWERS = {
    (name := form.format(size, pixels)): _tower(name)
    for form, sizes in _PIXELS.items()
    for size, image_sizes in sizes.items()
    for pixels in image_sizes
}


def vision_config(name: str, image_size: int, proj: str | None, shapes: Shapes) -> ViTConfig:
    """Tower `name`, with the sizes that the `shapes` of its tensors have."""
    tower = _tower(name)
    pool_mlp_dim = None
    if _PE.match(name):
        pool_mlp_dim = shapes[f"{TRUNK}.attn_pool.mlp.fc1.weight"][0]
    return dataclasses.replace(
        tower, image_size=image_size, pool_mlp_dim=pool_mlp_dim, **block_sizes(shapes)
    )


def block_sizes(shapes: Shapes, up: str = "fc1") -> dict[str, int]:
    """Fields of a ViTConfig that the tensors of one of timm's ViTs show."""
    width, _, patch_size, _ = shapes[f"{TRUNK}.patch_embed.proj.weight"]
    mlp_dim = shapes[f"{TRUNK}.blocks.0.mlp.{up}.weight"][0]
    depth = count_layers(shapes, f"{BLOCK}.norm1.weight")
    return {"patch_size": patch_size, "width": width, "depth": depth, "mlp_dim": mlp_dim}


def tower_name(
    config: VisionTowerConfig,
    towers: Mapping[str, VisionTowerConfig] = TOWERS,
    free: Collection[str] = (),
) -> str:
    """Find the name of timm's tower that equals this one; fields in `free` may differ.

    Raises:
        CheckpointError: there is none; the message lists the differences to the nearest one.
    """
    ours = _computed_fields(config, free)
    found = []
    for name, tower in towers.items():
        theirs = _computed_fields(tower, free)
        differ = [field for field in ours if ours[field] != theirs[field]]
        if not differ:
            return name
        found.append((len(differ), name, differ, theirs))
    _, name, differ, theirs = min(found, key=lambda item: item[0])
    raise CheckpointError(
        f"none of timm's vision towers is the model's: {name} is the nearest and has "
        + ", ".join(f"{field} {theirs[field]!r} (not {ours[field]!r})" for field in differ)
        + ": save the model as a vlm bundle instead"
    )


def _computed_fields(c: VisionTowerConfig, free: Collection[str]) -> dict[str, object]:
    """Architecture fields, with defaults filled in."""
    fields = dataclasses.asdict(c)
    if isinstance(c, ViTConfig):
        fields["pool_heads"] = c.pool_heads or c.heads
        fields["pool_mlp_dim"] = c.pool_mlp_dim or c.mlp_dim
    left_out = {"dropout", "patch_dropout", "norm_pooled", *free}
    return {name: value for name, value in fields.items() if name not in left_out}


def options(c: ViTConfig) -> dict[str, str | None]:
    """Fields of a `vision_cfg` that make this tower."""
    # PE's head is timm's own classifier; "none" is for a tower without one.
    proj = "none" if c.projection == "none" else None
    pool = "token" if c.pool == "class" else c.pool
    return {"timm_model_name": tower_name(c), "timm_pool": pool, "timm_proj": proj}


_POSITION = leading(1)


def rules(
    c: ViTConfig,
    stem: Sequence[Rule] | None = None,
    blocks: Sequence[Rule] | None = None,
    position: Transform = _POSITION,
) -> list[Rule]:
    """Rules of a ViT of timm's, whose stem and blocks may be given."""
    attn_pool = f"{TRUNK}.attn_pool"
    pool = [
        Rule(f"{attn_pool}.latent", "vision.pool.probe", leading(1)),
        *heads(f"{attn_pool}.q", "vision.pool.attention.query"),
        *fused(f"{attn_pool}.kv.", "vision.pool.attention", "key", "value"),
        *block(attn_pool, "vision.pool", {"attention.out": "proj", "norm": "norm", **MLP}),
    ]
    token = Rule(f"{TRUNK}.cls_token", "vision.class_token", leading(2))
    return [
        *(stem or conv(f"{TRUNK}.patch_embed.proj", "vision.stem", bias=c.patch_bias)),
        *([token] if c.class_token else []),
        Rule(f"{TRUNK}.pos_embed", "vision.position", position),
        *(norm(f"{TRUNK}.norm_pre", "vision.pre_norm") if c.pre_norm else []),
        *(blocks or block(BLOCK, OURS, TIMM)),
        *norm(f"{TRUNK}.norm", "vision.norm"),
        *(pool if c.pool == "map" else []),
        *(linear(f"{TRUNK}.head", "vision.projection") if c.projection != "none" else []),
    ]
