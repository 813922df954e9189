"""timm's vision towers in open_clip folders: SigLIP's, the Perception Encoder's, and CLIP's ViT.

A folder gives the tower's name alone, from which timm knows the sizes: `TOWERS` has them too.
"""

import dataclasses
import re
from collections.abc import Mapping

from vlm.config import VisionTowerConfig, ViTConfig
from vlm.errors import CheckpointError
from vlm.weights.fields import first_group
from vlm.weights.layers import fused, heads, linear, norm, out
from vlm.weights.rules import CONV, Rule, leading

_SIGLIP = re.compile(r"vit_(base|large|so400m|giantopt)_patch(\d+)_siglip_(\d+)(\..*)?$")
_PE = re.compile(r"vit_pe_core_(tiny|small|base|large|gigantic)_patch(\d+)_(\d+)(\..*)?$")
_CLIP = re.compile(r"vit_(base|large)_patch(\d+)_clip_(\d+)(\..*)?$")  # MobileCLIP2-L-14's
NAME = re.compile("|".join(pattern.pattern for pattern in (_SIGLIP, _PE, _CLIP)))
READS = (
    "vit_*_siglip_* and vit_pe_core_* with attention pooling, vit_{base,large}_patch*_clip_* with "
    "the class token"
)
# Those of SigLIP's made with tanh-GELU instead of the exact one.
_TANH = re.compile(r"vit_(base_patch32|large_patch16_siglip_512|so400m_patch16|giantopt)")
_PE_POOL_HEADS = 8

# Width, depth, heads and width of the MLP by a name's size.
_SIGLIP_SIZES = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
_PE_SIZES = {
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "gigantic": (1536, 50, 16, 8960),
}


def _siglip(name: str, width: int) -> dict:
    tanh = _TANH.match(name)
    return {"pool": "map", "activation": "gelu_tanh" if tanh else "gelu", "norm_eps": 1e-6}


def _pe(name: str, width: int) -> dict:
    gigantic = first_group(_PE, name) == "gigantic"
    return {
        "pool": "map",
        "pool_heads": _PE_POOL_HEADS,
        "pool_mlp_dim": 4 * width,
        "class_token": not gigantic,
        "pre_norm": True,
        "patch_bias": False,
        "rotary": 0 if gigantic else 1,
        "projection": "linear_bias",
        "activation": "gelu",
        "norm_eps": 1e-5,
    }


def _clip(name: str, width: int) -> dict:
    return {
        "pool": "class",
        "class_token": True,
        "pre_norm": True,
        "patch_bias": False,
        "projection": "linear_bias",
        "activation": "gelu",
        "norm_eps": 1e-5,
    }


# Names, the timm_pool and timm_proj that they are read with, what else makes the tower of a name
# and its width, and the sizes.
_FAMILIES = (
    (_SIGLIP, ("map", "none"), _siglip, _SIGLIP_SIZES),
    (_PE, ("map", None), _pe, _PE_SIZES),
    (_CLIP, ("token", None), _clip, _SIGLIP_SIZES),
)


def _tower(family: tuple, name: str, width: int, depth: int, heads: int, mlp_dim: int):
    """The tower of that name, whose sizes may be others; patches and image are the name's."""
    pattern, _, other, _ = family
    _, patch_size, image_size, _ = pattern.match(name).groups()
    return ViTConfig(
        image_size=int(image_size),
        patch_size=int(patch_size),
        width=width,
        depth=depth,
        heads=heads,
        mlp_dim=mlp_dim,
        **other(name, width),
    )


def _known() -> dict[str, ViTConfig]:
    siglip = (
        "base_patch32_siglip_256 base_patch16_siglip_224 base_patch16_siglip_256 "
        "base_patch16_siglip_384 base_patch16_siglip_512 large_patch16_siglip_256 "
        "large_patch16_siglip_384 large_patch16_siglip_512 so400m_patch14_siglip_224 "
        "so400m_patch14_siglip_378 so400m_patch14_siglip_384 so400m_patch16_siglip_256 "
        "so400m_patch16_siglip_384 so400m_patch16_siglip_512 giantopt_patch16_siglip_256 "
        "giantopt_patch16_siglip_384"
    )
    pe = (
        "tiny_patch16_384 small_patch16_384 base_patch16_224 large_patch14_336 gigantic_patch14_448"
    )
    clip = (
        "base_patch32_clip_224 base_patch32_clip_256 base_patch32_clip_384 base_patch32_clip_448 "
        "base_patch16_clip_224 base_patch16_clip_384 large_patch14_clip_224 large_patch14_clip_336"
    )
    towers = {}
    starts = zip(_FAMILIES, ("vit_", "vit_pe_core_", "vit_"), (siglip, pe, clip), strict=True)
    for family, start, ends in starts:
        for end in ends.split():
            sizes = family[3][end.split("_")[0]]
            towers[start + end] = _tower(family, start + end, *sizes)
    return towers


TOWERS = _known()


def vision_config(
    name: str,
    image_size: int,
    pool: str,
    proj: str | None,
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
) -> ViTConfig:
    """The tower `name`, with the sizes that the `shapes` of its tensors have.

    Raises:
        CheckpointError: not one of these towers, or one with another pool or projection.
    """
    ends = pool, proj or None
    family = next((f for f in _FAMILIES if f[0].match(name) and f[1] == ends), None)
    if family is None:
        raise CheckpointError(
            f"{where}: the vision tower {name!r} has timm_pool {pool!r} and timm_proj {proj!r}: "
            f"vlm reads {READS}, without an extra projection"
        )
    pattern, _, _, sizes = family
    try:
        width, _, patch_size, _ = shapes["visual.trunk.patch_embed.proj.weight"]
        mlp_dim = shapes["visual.trunk.blocks.0.mlp.fc1.weight"][0]
        pool_mlp_dim = shapes["visual.trunk.attn_pool.mlp.fc1.weight"][0] if pool == "map" else None
    except (KeyError, ValueError):
        raise CheckpointError(f"{where}: the weights are not those of timm's {name}") from None
    depth = block_count(shapes)
    return dataclasses.replace(
        _tower(family, name, width, depth, sizes[first_group(pattern, name)][2], mlp_dim),
        image_size=image_size,
        patch_size=patch_size,
        pool_mlp_dim=pool_mlp_dim if pattern is _PE else None,
    )


def block_count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many blocks the tensors of one of timm's towers are of."""
    return sum(bool(re.fullmatch(r"visual\.trunk\.blocks\.\d+\.norm1\.weight", n)) for n in shapes)


def tower_name(config: ViTConfig) -> str:
    """The name of timm's tower that is exactly this one.

    Raises:
        CheckpointError: there is none; the message says how the nearest one differs.
    """
    ours = _spelled_out(config)
    found = []
    for name, tower in TOWERS.items():
        theirs = _spelled_out(tower)
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


def _spelled_out(c: ViTConfig) -> dict[str, object]:
    """The fields that decide what is computed, defaults filled in."""
    fields = dataclasses.asdict(c)
    fields["pool_heads"] = c.pool_heads or c.heads
    fields["pool_mlp_dim"] = c.pool_mlp_dim or c.mlp_dim
    for name in ("dropout", "patch_dropout", "norm_pooled"):
        del fields[name]
    return fields


# --------------------------------------------------------------------- their names and ours

_TRUNK, _BLOCK, _OURS = "visual.trunk", "visual.trunk.blocks.{}", "vision.transformer.blocks"


def attention_rules() -> list[Rule]:
    """Of the blocks of timm's ViT: all but the MLP."""
    return [
        *norm(f"{_BLOCK}.norm1", f"{_OURS}.attention_norm"),
        *fused(
            f"{_BLOCK}.attn.qkv.weight",
            f"{_BLOCK}.attn.qkv.bias",
            f"{_OURS}.attention",
            ("query", "key", "value"),
        ),
        *out(f"{_BLOCK}.attn.proj", f"{_OURS}.attention.out"),
        *norm(f"{_BLOCK}.norm2", f"{_OURS}.mlp_norm"),
    ]


_TOWER_RULES: list[Rule] = [
    Rule(f"{_TRUNK}.patch_embed.proj.weight", "vision.stem.kernel", CONV),
    Rule(f"{_TRUNK}.patch_embed.proj.bias", "vision.stem.bias"),
    Rule(f"{_TRUNK}.pos_embed", "vision.position", leading(1)),
    *attention_rules(),
    *linear(f"{_BLOCK}.mlp.fc1", f"{_OURS}.mlp.up"),
    *linear(f"{_BLOCK}.mlp.fc2", f"{_OURS}.mlp.down"),
    *norm(f"{_TRUNK}.norm", "vision.norm"),
]
_POOL_RULES: list[Rule] = [
    Rule(f"{_TRUNK}.attn_pool.latent", "vision.pool.probe", leading(1)),
    *heads(f"{_TRUNK}.attn_pool.q", "vision.pool.attention.query"),
    *fused(
        f"{_TRUNK}.attn_pool.kv.weight",
        f"{_TRUNK}.attn_pool.kv.bias",
        "vision.pool.attention",
        ("key", "value"),
    ),
    *out(f"{_TRUNK}.attn_pool.proj", "vision.pool.attention.out"),
    *norm(f"{_TRUNK}.attn_pool.norm", "vision.pool.norm"),
    *linear(f"{_TRUNK}.attn_pool.mlp.fc1", "vision.pool.mlp.up"),
    *linear(f"{_TRUNK}.attn_pool.mlp.fc2", "vision.pool.mlp.down"),
]


def owns(config: VisionTowerConfig) -> bool:
    """Whether a tower is one of these: they pool by attention, or end in a layer with a bias."""
    return isinstance(config, ViTConfig) and (
        config.pool == "map" or config.projection == "linear_bias"
    )


def options(c: ViTConfig) -> dict[str, str | None]:
    """The fields of a `vision_cfg` that make this tower of timm's.

    Raises:
        CheckpointError: timm has no name for it.
    """
    # PE's head is timm's own classifier; "none" is of a tower without one.
    proj = "none" if c.projection == "none" else None
    pool = "token" if c.pool == "class" else c.pool
    return {"timm_model_name": tower_name(c), "timm_pool": pool, "timm_proj": proj}


def rules(c: ViTConfig) -> list[Rule]:
    """The table of a tower: SigLIP's, the Perception Encoder's, or CLIP's."""
    table = [*_TOWER_RULES, *(_POOL_RULES if c.pool == "map" else [])]
    if not c.pre_norm:  # SigLIP's; the others have a norm before the blocks, and a head
        return table
    token = [Rule(f"{_TRUNK}.cls_token", "vision.class_token", leading(2))] if c.class_token else []
    return [
        *(rule for rule in table if rule.ours != "vision.stem.bias"),
        *token,
        *norm(f"{_TRUNK}.norm_pre", "vision.pre_norm"),
        *linear(f"{_TRUNK}.head", "vision.projection"),
    ]
