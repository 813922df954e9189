"""timm's ViTs of plain blocks as vision towers of open_clip folders, and Perception Encoder (PE).

A folder gives only the tower's name, from which timm derives the sizes. `TOWERS` has those that vlm
writes. Any pool and projection of open_clip is read, with or without a class token and registers.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from vlm.config import VisionTowerConfig, ViTConfig
from vlm.errors import CheckpointError
from vlm.weights.checkpoint import ComputedTensors
from vlm.weights.files import Tensors
from vlm.weights.layers import MLP, TIMM, block, conv, fused, heads, linear, norm
from vlm.weights.rules import WITHOUT_FIRST, Rule, Shapes, count_layers, leading

TRUNK, BLOCK, OURS = "visual.trunk", "visual.trunk.blocks.{}", "vision.transformer.blocks"
_REGISTERS, _PROJECTION = f"{TRUNK}.reg_token", "visual.head.proj"
_QKV = re.compile(re.escape(BLOCK).replace(r"\{\}", r"\d+") + r"\.attn\.qkv\.weight")
_SCALES = {"attention_scale": "ls1.gamma", "mlp_scale": "ls2.gamma"}

# Width, depth, heads and mlp_dim by the size in a name.
_SIZES = {
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "medium": (512, 12, 8, 2048),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144),
    "gigantic": (1664, 48, 16, 8192),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
    "mediumd": (512, 20, 8, 2048),
    "betwixt": (640, 12, 10, 2560),
    "so150m": (896, 18, 14, 2320),
    "so150m2": (832, 21, 13, 2176),
}
_PE_GIGANTIC = (1536, 50, 16, 8960)

# Plain ViTs: sizes, patch, kind and image size. All but the heads, the activation and the epsilon
# is in the shapes of the tensors.
PLAIN_VIT = re.compile(
    rf"(?:vit|deit3?)_({'|'.join(_SIZES)})_patch(\d+)_"
    r"(?:(clip_quickgelu|clip|siglip_gap|siglip|(?:reg\d_)?gap|(?:reg\d_)?map)_)?"
    r"(?:(\d+)|(?:reg\d_)?(?:dinov2|tipsv2))(\..*)?$"
)
_PE = re.compile(r"vit_pe_core_(tiny|small|base|large|gigantic)_patch(\d+)_(\d+)(\..*)?$")
_PROJECTIONS = (None, "none", "linear", "mlp")
NAMES = {
    _PE: {("map", None)},
    PLAIN_VIT: {(pool, proj) for pool in ("token", "avg", "map") for proj in _PROJECTIONS}
    | {("", "linear"), ("", "mlp")},  # the name's own pool
}
READS = (
    "vit_pe_core_* with attention pooling and no extra projection; vit_*, deit_* and deit3_* of "
    "plain blocks with the pools token, avg and map and any projection (with the name's own pool: "
    "linear and mlp)"
)
# SigLIP towers with tanh-GELU instead of the exact one.
_TANH = re.compile(r"vit_(base_patch32|large_patch16_siglip_(gap_)?512|so400m_patch16|giantopt)_?")

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
    "vit_{}_{}": {
        "tiny_patch16": (224, 384), "small_patch32": (224, 384), "small_patch16": (224, 384),
        "small_patch8": (224,), "base_patch32": (224, 384), "base_patch16": (224, 384),
        "base_patch8": (224,), "large_patch32": (224, 384), "large_patch16": (224, 384),
        "large_patch14": (224,), "huge_patch14": (224,), "giant_patch14": (224,),
        "gigantic_patch14": (224,),
    },
}  # fmt: skip
_WITH_HEAD: dict[str, Any] = {
    "pre_norm": True, "patch_bias": False, "projection": "linear_bias", "activation": "gelu",
    "norm_eps": 1e-5,
}  # fmt: skip


def named_tower(name: str) -> ViTConfig:
    """The tower that timm makes of a name, with its own head and without registers."""
    options: dict[str, Any]
    if match := _PE.match(name):
        gigantic = match[1] == "gigantic"
        sizes = _PE_GIGANTIC if gigantic else _SIZES[match[1]]
        options = _WITH_HEAD | {"pool": "map", "pool_heads": 8, "pool_mlp_dim": 4 * sizes[0]}
        options |= {"class_token": not gigantic, "rotary": 0 if gigantic else 1}
        image_size = int(match[3])
    else:
        match = PLAIN_VIT.match(name)
        assert match is not None  # the caller has found the name
        sizes, kind, image_size = _SIZES[match[1]], match[3] or "", int(match[4] or 224)
        if name.startswith("vit_base_patch16_gap_"):
            sizes = (768, 12, 16, 3072)
        if kind.startswith("clip"):
            activation = "quick_gelu" if kind.endswith("quickgelu") else "gelu"
            options = _WITH_HEAD | {"pool": "class", "class_token": True, "activation": activation}
        elif kind.startswith("siglip"):
            activation = "gelu_tanh" if _TANH.match(name) else "gelu"
            options = {"pool": "map", "activation": activation}
        else:
            pool = kind.rpartition("_")[2]
            options = {"pool": pool or "class", "class_token": not pool, "activation": "gelu"}
            options["projection"] = "linear_bias"
        if kind.endswith("gap"):
            options["pool"] = "mean"
    width, depth, heads, mlp_dim = sizes
    return ViTConfig(
        image_size=image_size,
        patch_size=int(match[2]),
        width=width,
        depth=depth,
        heads=heads,
        mlp_dim=mlp_dim,
        **options,
    )


TOWERS = {
    (name := form.format(size, pixels)): named_tower(name)
    for form, sizes in _PIXELS.items()
    for size, image_sizes in sizes.items()
    for pixels in image_sizes
}


def vision_config(
    name: str, image_size: int, pool: str, proj: str | None, shapes: Shapes
) -> ViTConfig:
    """Tower `name`, with the sizes and parts that the `shapes` of its tensors have."""
    tower = dataclasses.replace(named_tower(name), image_size=image_size, **block_sizes(shapes))
    if _PE.match(name):
        mlp_dim = shapes[f"{TRUNK}.attn_pool.mlp.fc1.weight"][0]
        return dataclasses.replace(tower, pool_mlp_dim=mlp_dim)
    has_token, has_probe = f"{TRUNK}.cls_token" in shapes, f"{TRUNK}.attn_pool.latent" in shapes
    registers = shapes.get(_REGISTERS, (1, 0))[1]
    pools: dict[str, Any] = {"token": "class", "avg": "mean", "map": "map", "": tower.pool}
    pool = pools[pool]
    if (pool == "class" and not has_token) or has_probe != (pool == "map"):
        raise ValueError(f"no {pool} pooling")
    if pool == "map" and (has_token or registers):  # timm's pools the patches alone
        raise ValueError("a pool without the class token and registers")
    projections: dict[str | None, Any] = {
        "linear": "linear", "mlp": "mlp_bias", "none": "none", None: "linear_bias"
    }  # fmt: skip
    projection = projections[proj]
    if f"{_PROJECTION}.bias" in shapes:
        projection = "linear_bias"
    return dataclasses.replace(
        tower,
        pool=pool,
        class_token=has_token,
        registers=registers,
        pre_norm=f"{TRUNK}.norm_pre.weight" in shapes,
        patch_bias=f"{TRUNK}.patch_embed.proj.bias" in shapes,
        layer_scale=f"{TRUNK}.blocks.0.ls1.gamma" in shapes,
        norm_pooled=pool == "mean" and f"{TRUNK}.fc_norm.weight" in shapes,
        projection=projection,
    )


def with_biases(tensors: Tensors) -> Tensors:
    """Add biases of zero to the attention of a tower of plain blocks that has none."""
    computed = {}
    for name, shape in tensors.shapes.items():
        beside = [f"{name.removesuffix('qkv.weight')}{end}" for end in ("qkv.bias", "q_bias")]
        if _QKV.fullmatch(name) and not any(bias in tensors.shapes for bias in beside):
            computed[beside[0]] = shape[:1], _zeros(shape[0])
    return ComputedTensors(tensors, computed) if computed else tensors


def _zeros(count: int) -> Callable[[int, int | None], np.ndarray]:
    return lambda start, stop: np.zeros(count, np.float32)[start:stop]


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
    projections = {"none": "none", "linear": "linear", "mlp_bias": "mlp"}
    # PE's head is timm's own classifier; "none" is for a tower without one.
    return {
        "timm_model_name": tower_name(c, TOWERS, free=["projection"]),
        "timm_pool": "token" if c.pool == "class" else c.pool,
        "timm_proj": projections.get(c.projection),
    }


_POSITION = leading(1)


def rules(
    c: ViTConfig,
    stem: Sequence[Rule] | None = None,
    blocks: Sequence[Rule] | None = None,
    position: Rule | None = None,
    shapes: Shapes | None = None,
) -> list[Rule]:
    """Rules of a ViT of timm's, whose stem, blocks and positions may be given.

    The `shapes` of its tensors tell if the class token has no position, which norm it has and where
    its projection is.
    """
    shapes = shapes or {}
    if position is None:
        grid = (c.image_size // c.patch_size) ** 2
        alone = c.class_token and shapes.get(f"{TRUNK}.pos_embed", ())[1:2] == (grid,)
        layout = WITHOUT_FIRST if alone else _POSITION
        position = Rule(f"{TRUNK}.pos_embed", "vision.position", layout)
    attn_pool = f"{TRUNK}.attn_pool"
    pool = [
        Rule(f"{attn_pool}.latent", "vision.pool.probe", leading(1)),
        *heads(f"{attn_pool}.q", "vision.pool.attention.query"),
        *fused(f"{attn_pool}.kv.", "vision.pool.attention", "key", "value"),
        *block(attn_pool, "vision.pool", {"attention.out": "proj", "norm": "norm", **MLP}),
    ]
    last = f"{TRUNK}.fc_norm" if f"{TRUNK}.fc_norm.weight" in shapes else f"{TRUNK}.norm"
    own = _PROJECTION if f"{_PROJECTION}.bias" in shapes else f"{TRUNK}.head"
    projections = {
        "none": [],
        "linear": linear(_PROJECTION, "vision.projection", bias=False),
        "linear_bias": linear(own, "vision.projection"),
        "mlp_bias": [
            *linear("visual.head.mlp.fc1", "vision.projection.up"),
            *linear("visual.head.mlp.fc2", "vision.projection.down", bias=False),
        ],
    }
    return [
        *(stem or conv(f"{TRUNK}.patch_embed.proj", "vision.stem", bias=c.patch_bias)),
        *([Rule(f"{TRUNK}.cls_token", "vision.class_token", leading(2))] if c.class_token else []),
        *([Rule(_REGISTERS, "vision.registers", leading(1))] if c.registers else []),
        position,
        *(norm(f"{TRUNK}.norm_pre", "vision.pre_norm") if c.pre_norm else []),
        *(blocks or block(BLOCK, OURS, TIMM | (_SCALES if c.layer_scale else {}))),
        *norm(last, "vision.norm"),
        *(pool if c.pool == "map" else []),
        *projections[c.projection],
    ]
