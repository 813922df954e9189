"""Vision towers of transformers, alone or as a part of another model.

CLIP's and SigLIP's, ViT (arXiv:2010.11929), DINOv2 with and without registers (arXiv:2304.07193,
arXiv:2309.16588), DINOv3 (arXiv:2508.10104) and InternVL's (arXiv:2504.10479), by `model_type`. The
embedding is transformers' `pooler_output`; that of a ViT without a pooler is its normalised class
token. InternVL's class computes none: it is the mean of the patches, or the class token if
`use_mean_pooling` is false, as its documentation describes it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from vlm.config import ViTConfig
from vlm.errors import CheckpointError, brief
from vlm.weights import huggingface
from vlm.weights.checkpoint import with_zero_biases
from vlm.weights.fields import choice, integer, number
from vlm.weights.files import Tensors
from vlm.weights.layers import MLP, block, conv, fused, heads, linear, norm, out, rms_norm
from vlm.weights.resolution import Positions
from vlm.weights.rules import FLAT, LINEAR, Rule, Shapes, Transform, leading
from vlm.weights.tipsv2 import mlp_dim

_OURS = "vision.transformer.blocks"
# Defaults of transformers' configuration classes.
_SIZES: dict[str, Any] = {
    "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "image_size": 224,
    "hidden_act": "gelu",
}  # fmt: skip
_VIT = _SIZES | {
    "intermediate_size": 3072, "patch_size": 16, "layer_norm_eps": 1e-12, "qkv_bias": True,
    "pooler_act": "tanh", "pooler_output_size": None,
}  # fmt: skip
_DINOV2 = _SIZES | {
    "mlp_ratio": None, "patch_size": 14, "layer_norm_eps": 1e-6, "qkv_bias": True,
    "use_swiglu_ffn": False,
}  # fmt: skip
_DINOV3 = _SIZES | {
    "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "patch_size": 16,
    "layer_norm_eps": 1e-5, "rope_theta": 100.0, "query_bias": True, "key_bias": False,
    "value_bias": True, "proj_bias": True, "mlp_bias": True, "use_gated_mlp": False,
    "num_register_tokens": None,
}  # fmt: skip
_INTERNVL = _SIZES | {
    "num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 1024,
    "intermediate_size": 4096, "image_size": 448, "patch_size": 14, "layer_norm_eps": 1e-6,
    "attention_bias": False, "use_qk_norm": False, "norm_type": "layer_norm",
    "use_absolute_position_embeddings": True, "use_mean_pooling": True,
}  # fmt: skip
_QK_NORM_EPS = 1e-6  # of the norms of queries and keys, whatever the config says of the others
DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": huggingface.DEFAULTS["clip"]["vision"],
    "siglip_vision_model": huggingface.DEFAULTS["siglip"]["vision"],
    "siglip2_vision_model": huggingface.DEFAULTS["siglip2"]["vision"],
    "vit": _VIT,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2 | {"patch_size": 16, "num_register_tokens": None},
    "dinov3_vit": _DINOV3,
    "internvl_vision": _INTERNVL,
}
# How transformers resizes their position embeddings.
POSITIONS: dict[str, Positions] = {"dinov2_with_registers": "bicubic_antialias"}
# Models of transformers that resize them without being asked.
ANY_SIZE = ("dinov2", "dinov2_with_registers", "dinov3_vit", "internvl_vision")


def vision_config(given: dict[str, Any], kind: str, where: str) -> ViTConfig:
    """Configuration of a tower of the type `kind`, from the fields `given`.

    Raises:
        CheckpointError: an option that vlm does not support, or a field of another type or size.
    """
    if kind == "internvl_vision":
        sides = {name: given[name] for name in ("image_size", "patch_size") if name in given}
        given = given | {name: _side(side, f"{where}.{name}") for name, side in sides.items()}
    c = huggingface.fields_of_tower(given, DEFAULTS[kind], where)
    return _CONFIGS[kind](c, kind, where)


def vision_rules(kind: str, c: ViTConfig, shapes: Shapes, within: str = "") -> list[Rule]:
    """Rules of a tower without its projection, whose names start with `within`."""
    return _RULES[kind](c, root_of(kind, shapes, within))


def root_of(kind: str, shapes: Shapes, within: str = "") -> str:
    """Prefix of the tower's names in a file, which depends on the class that saved it."""
    anchor = "patch_embedding.weight" if kind.endswith("_model") else "cls_token"
    bases = ("", "vision_model.", f"{kind}.", "model.")
    roots = (within + base for base in bases)
    return next((root for root in roots if f"{root}embeddings.{anchor}" in shapes), within)


def without_biases(tensors: Tensors, rules: list[Rule], given: dict[str, Any]) -> Tensors:
    """Add biases of zero to the attention of a tower whose config, `given`, turns them off."""
    off = [
        (f".{part}.bias", f".{part[0]}_proj.bias")
        for part in ("query", "key", "value")
        if given.get(f"{part}_bias") is False
        or False in (given.get("qkv_bias"), given.get("attention_bias"))
    ]
    endings = tuple(ending for pair in off for ending in pair)
    return with_zero_biases(tensors, rules, lambda name: name.endswith(endings))


def is_unused(name: str) -> bool:
    """Whether a tensor has no part in an embedding: a mask, a buffer, or a classifier."""
    return name.endswith((".mask_token", ".position_ids")) or name.startswith("classifier.")


# ------------------------------------------------------------------ configs


def _clip(c: dict[str, Any], kind: str, where: str) -> ViTConfig:
    return ViTConfig(**huggingface.tower_options(c, where), **huggingface.CLIP_VISION)


def _siglip(c: dict[str, Any], kind: str, where: str) -> ViTConfig:
    return huggingface.siglip_vision(c, kind.removesuffix("_vision_model"), where)


def _vit(c: dict[str, Any], kind: str, where: str) -> ViTConfig:
    choice(c["pooler_act"], ("tanh",), f"{where}.pooler_act")
    choice(c["pooler_output_size"], (None, c["hidden_size"]), f"{where}.pooler_output_size")
    return ViTConfig(**huggingface.tower_options(c, where), pool="class")


def _dinov2(c: dict[str, Any], kind: str, where: str) -> ViTConfig:
    ratio = number(4 if c["mlp_ratio"] is None else c["mlp_ratio"], f"{where}.mlp_ratio", above=0.0)
    gated = c["use_swiglu_ffn"]
    hidden = integer(mlp_dim(c["hidden_size"], ratio, gated=gated), f"{where}.mlp_ratio")
    registers = 4 if kind == "dinov2_with_registers" else 0
    if registers and c["num_register_tokens"] is not None:
        registers = integer(c["num_register_tokens"], f"{where}.num_register_tokens", low=0)
    return ViTConfig(
        **huggingface.tower_options(c | {"intermediate_size": hidden}, where),
        pool="class",
        registers=registers,
        layer_scale=True,
        mlp="swiglu_plain" if gated else "plain",
    )


def _dinov3(c: dict[str, Any], kind: str, where: str) -> ViTConfig:
    gated = c["use_gated_mlp"]
    for field in ("proj_bias", "mlp_bias"):
        choice(c[field], (True,), f"{where}.{field}")
    if c["hidden_size"] // c["num_attention_heads"] % 4:
        raise CheckpointError(
            f"{where}: heads of {c['hidden_size'] // c['num_attention_heads']} channels: rotary "
            "positions need a multiple of 4"
        )
    if gated:
        choice(c["hidden_act"], ("silu",), f"{where}.hidden_act")
        c = c | {"hidden_act": "gelu"}  # of the plain MLP, which a gated tower does not have
    return ViTConfig(
        **huggingface.tower_options(c, where),
        pool="class",
        registers=integer(c["num_register_tokens"] or 0, f"{where}.num_register_tokens", low=0),
        layer_scale=True,
        mlp="swiglu_plain" if gated else "plain",
        key_bias=c["key_bias"],
        position=False,
        rotary=0,
        rotary_rows_first=True,
        rotary_base=number(c["rope_theta"], f"{where}.rope_theta", above=0.0),
        rotary_centred=True,
    )


def _internvl(c: dict[str, Any], kind: str, where: str) -> ViTConfig:
    if c["use_qk_norm"]:
        choice(c["layer_norm_eps"], (_QK_NORM_EPS,), f"{where}.layer_norm_eps")
    field = "use_absolute_position_embeddings"
    choice(c[field], (True,), f"{where}.{field}")
    rms = choice(c["norm_type"], ("layer_norm", "rms_norm"), f"{where}.norm_type") == "rms_norm"
    mean = c["use_mean_pooling"]
    if rms and not mean:
        raise CheckpointError(
            f"{where} has norm_type rms_norm and use_mean_pooling false, so that its last norm is "
            "of another kind than the others: vlm supports one kind in a tower"
        )
    return ViTConfig(
        **huggingface.tower_options(c, where),
        pool="mean" if mean else "class",
        class_token=mean,
        layer_scale=True,
        last_norm=not mean,
        norm_kind="rms" if rms else "layer",
        qk_norm=c["use_qk_norm"],
    )


def _side(given: Any, where: str) -> Any:
    """Return the side of a square that is given as one number or two."""
    if not isinstance(given, list | tuple):
        return given
    if len(given) != 2 or given[0] != given[1]:
        raise CheckpointError(f"{where} is {brief(given)}: vlm supports only squares")
    return given[0]


_CONFIGS: dict[str, Callable[[dict[str, Any], str, str], ViTConfig]] = {
    "clip_vision_model": _clip,
    "siglip_vision_model": _siglip,
    "siglip2_vision_model": _siglip,
    "vit": _vit,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "dinov3_vit": _dinov3,
    "internvl_vision": _internvl,
}


# ------------------------------------------------------------------ rules


def _of_dual_encoder(family: str) -> Callable[[ViTConfig, str], list[Rule]]:
    """Rules of the vision tower of a family, under another prefix."""

    def rules(c: ViTConfig, root: str) -> list[Rule]:
        start = "vision_model."
        return [
            Rule(root + rule.theirs.removeprefix(start), rule.ours, rule.transform)
            for rule in huggingface.RULES[family]
            if rule.theirs.startswith(start)
        ]

    return rules


_ATTENTION = {
    "attention.query": "attention.attention.query", "attention.key": "attention.attention.key",
    "attention.value": "attention.attention.value", "attention.out": "attention.output.dense",
}  # fmt: skip
VIT_LAYERS = _ATTENTION | {
    "attention_norm": "layernorm_before", "mlp_norm": "layernorm_after",
    "mlp.up": "intermediate.dense", "mlp.down": "output.dense",
}  # fmt: skip
_INTERNVL_LAYERS = MLP | {
    "attention.query": "attention.q_proj", "attention.key": "attention.k_proj",
    "attention.value": "attention.v_proj", "attention.out": "attention.projection_layer",
    "attention_scale": "lambda_1", "mlp_scale": "lambda_2",
}  # fmt: skip
_SCALED = {
    "attention_norm": "norm1", "attention_scale": "layer_scale1.lambda1", "mlp_norm": "norm2",
    "mlp_scale": "layer_scale2.lambda1",
}  # fmt: skip


def _vit_rules(c: ViTConfig, root: str) -> list[Rule]:
    pooler = linear(f"{root}pooler.dense", "vision.pooler") if c.pooler else []
    layers = block(f"{root}encoder.layer.{{}}", _OURS, VIT_LAYERS)
    return [*_tables(c, root), *layers, *norm(f"{root}layernorm", "vision.norm"), *pooler]


def _dinov2_rules(c: ViTConfig, root: str) -> list[Rule]:
    layer = f"{root}encoder.layer.{{}}"
    layers = block(layer, _OURS, _ATTENTION | _SCALED | (MLP if c.mlp == "plain" else {}))
    if c.mlp != "plain":
        layers += fused(f"{layer}.mlp.weights_in.", f"{_OURS}.mlp", "gate", "up")
        layers += linear(f"{layer}.mlp.weights_out", f"{_OURS}.mlp.down")
    return [*_tables(c, root), *layers, *norm(f"{root}layernorm", "vision.norm")]


def _dinov3_rules(c: ViTConfig, root: str) -> list[Rule]:
    layer, attention = f"{root}layer.{{}}", f"{_OURS}.attention"
    table = []
    for part in ("query", "key"):
        theirs, ours = f"{layer}.attention.{part[0]}_proj", f"{attention}.{part}"
        table.append(Rule(f"{theirs}.weight", f"{ours}.kernel", paired(LINEAR)))
        if part == "query" or c.key_bias:
            table.append(Rule(f"{theirs}.bias", f"{ours}.bias", paired(FLAT)))
    parts = ("up", "down") if c.mlp == "plain" else ("gate", "up", "down")
    return [
        *_tables(c, root),
        *table,
        *heads(f"{layer}.attention.v_proj", f"{attention}.value"),
        *out(f"{layer}.attention.o_proj", f"{attention}.out"),
        *block(layer, _OURS, _SCALED | {f"mlp.{part}": f"mlp.{part}_proj" for part in parts}),
        *norm(f"{root}norm", "vision.norm"),
    ]


def _internvl_rules(c: ViTConfig, root: str) -> list[Rule]:
    layer, make = f"{root}encoder.layer.{{}}", rms_norm if c.norm_kind == "rms" else norm
    normed = ("query", "key") if c.qk_norm else ()
    return [
        *_tables(c, root),
        *block(layer, _OURS, _INTERNVL_LAYERS),
        *(
            rule
            for part in normed
            for rule in rms_norm(
                f"{layer}.attention.{part[0]}_norm", f"{_OURS}.attention.{part}_norm"
            )
        ),
        *make(f"{layer}.layernorm_before", f"{_OURS}.attention_norm"),
        *make(f"{layer}.layernorm_after", f"{_OURS}.mlp_norm"),
        *(norm(f"{root}layernorm", "vision.norm") if c.last_norm else []),
    ]


def _tables(c: ViTConfig, root: str) -> list[Rule]:
    """Rules of what comes before the blocks."""
    tables = f"{root}embeddings"
    stem = f"{tables}.patch_embeddings" + (".projection" if c.position else "")
    position = [Rule(f"{tables}.position_embeddings", "vision.position", leading(1))]
    registers = [Rule(f"{tables}.register_tokens", "vision.registers", leading(1))]
    return [
        Rule(f"{tables}.cls_token", "vision.class_token", leading(2)),
        *conv(stem, "vision.stem"),
        *(position if c.position else []),
        *(registers if c.registers else []),
    ]


def paired(transform: Transform) -> Transform:
    """Follow `transform` by the order of a head's channels for our rotary positions.

    Theirs rotate channel i with channel i + n / 2 of the n, ours neighbouring channels.
    """

    def read(theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        x = transform.read(theirs, shape)
        return x.reshape(*shape[:-1], 2, -1).swapaxes(-1, -2).reshape(shape)

    def write(ours: np.ndarray) -> np.ndarray:
        x = ours.reshape(*ours.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(ours.shape)
        return transform.write(x)

    return Transform(transform.shape, read, write)


_RULES: dict[str, Callable[[ViTConfig, str], list[Rule]]] = {
    "clip_vision_model": _of_dual_encoder("clip"),
    "siglip_vision_model": _of_dual_encoder("siglip"),
    "siglip2_vision_model": _of_dual_encoder("siglip2"),
    "vit": _vit_rules,
    "dinov2": _dinov2_rules,
    "dinov2_with_registers": _dinov2_rules,
    "dinov3_vit": _dinov3_rules,
    "internvl_vision": _internvl_rules,
}
