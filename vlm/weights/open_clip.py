"""open_clip folders: `open_clip_config.json` beside the weights, native or timm vision towers.

Covers LAION, DataComp, DFN, MetaCLIP, CLIPA, the SigLIP exports, and the contrastive half of CoCa.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

from etils import epath

from vlm.config import (
    Activation,
    EncoderTextConfig,
    FastViTConfig,
    ModelConfig,
    ResNetConfig,
    TextConfig,
    TextPool,
    ViTConfig,
)
from vlm.errors import CheckpointError, brief
from vlm.weights import encoders, fastvit, naflexvit, text_encoders, timm, timm_towers
from vlm.weights.checkpoint import Checkpoint, weights
from vlm.weights.fields import (
    MAX_LAYERS,
    MAX_PIXELS,
    boolean,
    choice,
    fields,
    integer,
    number,
    read_json,
    string,
    with_defaults,
)
from vlm.weights.files import Tensors
from vlm.weights.layers import OPEN_CLIP, batch_norm, block, conv, fused, heads, linear, norm, out
from vlm.weights.processors import open_clip_preprocess
from vlm.weights.rules import CONV, FIRST_ROW, LINEAR, SCALAR, SCALAR_1, Rule, Shapes
from vlm.weights.vocabularies import open_clip_tokenizer

# Fields of a model_cfg: those that vlm reads, and those that change no embedding.
MODEL = {
    "embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_bias",
    "custom_text", "multimodal_cfg", "init_logit_scale", "nonscalar_logit_scale", "cast_dtype",
    "output_dict",
}  # fmt: skip
# Defaults of open_clip's CLIPVisionCfg and CLIPTextCfg: the fields that vlm reads ...
VISION = {
    "layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16,
    "image_size": 224, "ls_init_value": None, "patch_dropout": 0.0, "attentional_pool": False,
    "attn_pooler_queries": 256, "attn_pooler_heads": 8, "no_ln_pre": False,
    "pos_embed_type": "learnable", "final_ln_after_pool": False, "pool_type": "tok",
    "output_tokens": False, "act_kwargs": None, "norm_kwargs": None,
    "timm_model_name": None, "timm_model_pretrained": False, "timm_pool": "avg",
    "timm_proj": "linear", "timm_proj_bias": False, "timm_drop": 0.0, "timm_drop_path": None,
    "image_seq_len": None,
}  # fmt: skip
TEXT = {
    "context_length": 77, "vocab_size": 49408, "hf_tokenizer_name": None, "tokenizer_kwargs": None,
    "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0, "ls_init_value": None,
    "embed_cls": False, "pad_id": 0, "eos_id": 2, "no_causal_mask": False,
    "final_ln_after_pool": False, "pool_type": "argmax", "proj_bias": False, "proj_type": "linear",
    "output_tokens": False, "act_kwargs": None, "norm_kwargs": None,
    "hf_model_name": None, "hf_model_pretrained": True, "hf_proj_type": "mlp",
    "hf_pooler_type": "mean_pooler", "hf_model_config": None, "variable_text": False,
}  # fmt: skip
# ... and those that no known checkpoint sets, which must be off.
OFF = (
    "block_type", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn",
    "scale_fc", "tokenizer_mode",
)  # fmt: skip

# Names of the weights without their ending, best first.
WEIGHTS = ("open_clip_model", "open_clip_pytorch_model")

VisionPool = Literal["class", "mean", "query"]
TextProjection = Literal["none", "linear", "linear_bias"]


def recognises(path: epath.Path) -> bool:
    """Whether `path` is a folder of open_clip."""
    return (path / "open_clip_config.json").exists()


def open_checkpoint(folder: epath.Path) -> Checkpoint:
    """Open the checkpoint in a folder."""
    return assemble(folder, weights(folder, *WEIGHTS))


def assemble(folder: epath.Path, tensors: Tensors) -> Checkpoint:
    """Combine the `tensors` of a checkpoint with the config and the tokenizer in a folder.

    Raises:
        CheckpointError: towers that vlm does not have, or an incomplete folder.
    """
    where = os.fspath(folder / "open_clip_config.json")
    values = read_json(folder / "open_clip_config.json")
    model = values.get("model_cfg")
    if not isinstance(model, dict):
        raise CheckpointError(f"{where} has no model_cfg: download it again")
    pixels = fields(values.get("preprocess_cfg"), f"{where}: preprocess_cfg")
    return described(folder, model, pixels, tensors, where, name=folder.name)


def described(
    folder: epath.Path,
    model: dict[str, Any],
    pixels: dict[str, Any],
    tensors: Tensors,
    where: str,
    *,
    name: str,
) -> Checkpoint:
    """Combine the `tensors` of a checkpoint with a model_cfg, a preprocess_cfg and a tokenizer.

    Raises:
        CheckpointError: towers that vlm does not have, or an incomplete folder.
    """
    config = model_config(model, tensors.shapes, where, _encoder_values(folder))
    tensors = timm.with_biases(tensors)
    if isinstance(config.vision, FastViTConfig):
        tensors = fastvit.Fused(tensors, config.vision, model["vision_cfg"]["timm_model_name"])
    context_length = None
    encoder = isinstance(config.text, TextConfig) and text_encoders.reads(tensors.shapes)
    if isinstance(config.text, EncoderTextConfig):
        tensors = encoders.fold(tensors, config.text)
    elif encoder:  # it has positions for longer texts than the model's
        tensors = text_encoders.fold(tensors, config.text_transformer)
        length = {"context_length": TEXT["context_length"]}
        context_length = with_defaults(model["text_cfg"], length, "text_cfg")["context_length"]
    tokenizer = open_clip_tokenizer(folder, model["text_cfg"], config)
    preprocess = open_clip_preprocess(pixels, config.vision.image_size, where)
    if isinstance(config.vision, ViTConfig) and config.vision.max_patches is not None:
        preprocess = dataclasses.replace(
            preprocess,
            resize="naflex",
            patch_size=config.vision.patch_size,
            max_patches=config.vision.max_patches,
        )
    return Checkpoint(
        name,
        config,
        preprocess,
        tokenizer,
        tensors,
        rules(config, tensors.shapes),
        ignored,
        "bicubic_antialias",
        "cut" if encoder else "linear",
        context_length=context_length,
    )


def _encoder_values(folder: epath.Path) -> dict[str, Any]:
    """Fields of the `config.json` beside open_clip's files, which is that of the text encoder."""
    file = folder / "config.json"
    return read_json(file) if file.exists() else {}


def model_config(
    values: dict[str, Any], shapes: Shapes, where: str, encoder: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Configuration that a `model_cfg` describes, with the sizes of timm's towers from `shapes`.

    `encoder` are the values of the `config.json` of a text encoder of transformers.

    Raises:
        CheckpointError: a field, activation or type of tower that vlm does not have.
    """
    for name in ("embed_dim", "vision_cfg", "text_cfg"):
        if values.get(name) is None:
            raise CheckpointError(f"{where}: model_cfg has no {name!r}")
    for name, value in values.items():
        if name not in MODEL and value not in (None, False):
            raise CheckpointError(
                f"{where}: model_cfg has {name} {brief(value)}, which vlm does not support"
            )
    vision, text = tower_fields(values, where)
    quick = boolean(values.get("quick_gelu") or False, f"{where}: model_cfg.quick_gelu")
    bias = values.get("init_logit_bias")
    if bias is not None:
        bias = number(bias, f"{where}: model_cfg.init_logit_bias")
    if name := string(vision["timm_model_name"] or "", f"{where}: vision_cfg.timm_model_name"):
        image_size = _side(vision["image_size"], f"{where}: vision_cfg.image_size")
        pool, proj = vision["timm_pool"], vision["timm_proj"]
        vision_tower = timm_towers.vision_config(name, image_size, pool, proj, shapes, where)
    else:
        vision_tower = _vision(vision, quick, f"{where}: vision_cfg")
    if (length := vision["image_seq_len"]) is not None:
        vision_tower = naflexvit.with_length(
            vision_tower, length, f"{where}: vision_cfg.image_seq_len"
        )
    _check_text(text, f"{where}: text_cfg")
    if text["hf_model_name"]:
        known = encoders.recognises(text["hf_model_name"], encoder or {})
        family = encoders if known else text_encoders
        text_tower = family.text_config(text, shapes, where, encoder or {})
    else:
        text_tower = _text(text, quick, f"{where}: text_cfg")
    return ModelConfig(
        vision_tower,
        text_tower,
        embed_dim=integer(values["embed_dim"], f"{where}: model_cfg.embed_dim"),
        loss="softmax" if bias is None else "sigmoid",
        init_bias=bias,
    )


def tower_fields(values: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the towers of a `model_cfg`, with open_clip's defaults.

    Raises:
        CheckpointError: a field that vlm does not have, or a value of another type.
    """
    return (
        _fields(values["vision_cfg"], VISION, f"{where}: vision_cfg"),
        _fields(values["text_cfg"], TEXT, f"{where}: text_cfg"),
    )


def native_towers(
    values: dict[str, Any], where: str
) -> tuple[ViTConfig | ResNetConfig | None, TextConfig | None]:
    """Towers of open_clip's own that a `model_cfg` describes; None for those of timm and the Hub.

    Raises:
        CheckpointError: a field or an activation that vlm does not have.
    """
    vision, text = tower_fields(values, where)
    quick = boolean(values.get("quick_gelu") or False, f"{where}: model_cfg.quick_gelu")
    return (
        None if vision["timm_model_name"] else _vision(vision, quick, f"{where}: vision_cfg"),
        None if text["hf_model_name"] else _text(text, quick, f"{where}: text_cfg"),
    )


def _vision(c: dict[str, Any], quick: bool, where: str) -> ViTConfig | ResNetConfig:
    image_size = _side(c["image_size"], f"{where}.image_size")
    if isinstance(c["layers"], list):
        return ResNetConfig(
            image_size=image_size,
            depths=_stages(c["layers"], f"{where}.layers"),
            width=c["width"],
            heads=c["width"] * 32 // c["head_width"],
        )
    pools: dict[str, VisionPool] = {"tok": "class", "avg": "mean"}
    pool = pools[choice(c["pool_type"], pools, f"{where}.pool_type")]
    if c["attentional_pool"]:
        if c["attentional_pool"] is not True or pool != "class":
            raise CheckpointError(f"{where}: vlm reads attentional_pool true, with pool_type 'tok'")
        pool = "query"
    return ViTConfig(
        image_size=image_size,
        patch_size=_side(c["patch_size"], f"{where}.patch_size"),
        heads=c["width"] // c["head_width"],
        pool=pool,
        pool_heads=c["attn_pooler_heads"] if pool == "query" else None,
        class_token=True,
        pre_norm=not c["no_ln_pre"],
        norm_pooled=c["final_ln_after_pool"] and pool == "mean",
        patch_bias=False,
        projection="linear",
        patch_dropout=c["patch_dropout"],
        **_tower(c, quick, where),
    )


def _text(c: dict[str, Any], quick: bool, where: str) -> TextConfig:
    pools: dict[str, TextPool] = {
        "argmax": "argmax", "eos": "end", "first": "first", "last": "last"
    }  # fmt: skip
    pool = pools[choice(c["pool_type"], pools, f"{where}.pool_type")]
    pool = "class" if c["embed_cls"] else pool
    linear: TextProjection = "linear_bias" if c["proj_bias"] else "linear"
    projections: dict[str, TextProjection] = {"none": "none", "linear": linear}
    return TextConfig(
        vocab_size=c["vocab_size"],
        context_length=c["context_length"],
        heads=c["heads"],
        causal=not c["no_causal_mask"],
        pool=pool,
        end_id=c["eos_id"] if pool == "end" else None,
        pad_id=c["pad_id"] if pool == "class" else None,
        projection=projections[choice(c["proj_type"], projections, f"{where}.proj_type")],
        **_tower(c, quick, where),
    )


def _check_text(c: dict[str, Any], where: str) -> None:
    """Check the fields of open_clip's main branch that change the towers of older versions.

    Raises:
        CheckpointError: an override of the encoder's config, or texts of variable length.
    """
    for field, value in fields(c["hf_model_config"], f"{where}.hf_model_config").items():
        # The tensors show the number of positions.
        if field != "max_position_embeddings" and "dropout" not in field:
            raise CheckpointError(
                f"{where}.hf_model_config has {field} {brief(value)}, which vlm does not support"
            )
    # Encoders of transformers mask the padding, so that batches of shorter texts embed the same.
    if c["variable_text"] and not c["hf_model_name"]:
        raise CheckpointError(f"{where}.variable_text is true, and vlm reads only fixed lengths")


def _tower(c: dict[str, Any], quick: bool, where: str) -> dict[str, Any]:
    """Fields that both towers have."""
    norms = fields(c["norm_kwargs"], f"{where}.norm_kwargs")
    return {
        "width": c["width"],
        "depth": integer(c["layers"], f"{where}.layers", high=MAX_LAYERS),
        "mlp_dim": int(c["width"] * c["mlp_ratio"]),
        "layer_scale": c["ls_init_value"] is not None,
        "activation": _activation(c, quick, where),
        # The default is torch's.
        "norm_eps": with_defaults(norms, {"eps": 1e-5}, f"{where}.norm_kwargs")["eps"],
    }


def _activation(c: dict[str, Any], quick: bool, where: str) -> Activation:
    options = fields(c["act_kwargs"], f"{where}.act_kwargs")
    if quick and not options:
        return "quick_gelu"
    if not quick and options.keys() <= {"approximate"}:
        known: dict[str, Activation] = {"none": "gelu", "tanh": "gelu_tanh"}
        kind = options.get("approximate", "none")
        if isinstance(kind, str) and kind in known:
            return known[kind]
    raise CheckpointError(
        f"{where} has act_kwargs {brief(options)}, an activation that vlm does not support"
    )


def _fields(given: Any, known: dict[str, Any], where: str) -> dict[str, Any]:
    given = fields(given, where)
    for name, value in given.items():
        if name not in known and (name not in OFF or value not in (None, False)):
            raise CheckpointError(f"{where} has {name} {brief(value)}, which vlm does not support")
    # These may be a number or a list, a flag or a kind: the caller checks them.
    several = {name: None for name in _SEVERAL if name in known}
    values = with_defaults(given, known | several, where)
    values = known | {name: v for name, v in values.items() if v is not None}
    # A null is none, or the default of the architecture; an absent field is open_clip's default.
    return values | {name: None for name in _NULL if name in values and given.get(name, 0) is None}


_NULL = ("timm_proj", "hf_proj_type", "hf_pooler_type")
_SEVERAL = ("layers", "image_size", "patch_size", "attentional_pool")


def _side(size: Any, where: str) -> int:
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if not isinstance(size, int):
        raise CheckpointError(f"{where} is {brief(size)}: vlm supports only squares")
    return integer(size, where, high=MAX_PIXELS)


def _stages(layers: list[Any], where: str) -> tuple[int, ...]:
    """The blocks in the four stages of a ResNet."""
    if len(layers) != 4:
        raise CheckpointError(f"{where} is {brief(layers)}: a ResNet has four stages")
    return tuple(integer(blocks, where, high=MAX_LAYERS) for blocks in layers)


def rules(config: ModelConfig, shapes: Shapes) -> list[Rule]:
    """Rules of a model whose tensors have these `shapes`."""
    prefix = "text." if any(name.startswith("text.") for name in shapes) else ""
    scalar = SCALAR_1 if shapes.get("logit_scale") == (1,) else SCALAR
    logits = [Rule("logit_scale", "logit_scale", scalar)]
    if config.init_bias is not None:
        logits.append(Rule("logit_bias", "logit_bias", scalar))
    if isinstance(config.vision, ResNetConfig):
        image = _resnet_rules(config.vision.depths)
    elif (family := timm_towers.family_of(config.vision, shapes)) is not None:
        more = {"shapes": shapes} if family in timm_towers.BY_SHAPES else {}
        image = family.rules(config.vision, **more)
    else:
        image = _vision_rules(config)
    if isinstance(config.text, EncoderTextConfig):
        text = encoders.rules(config.text)
    elif text_encoders.owns(config.text_transformer):
        text = text_encoders.rules(config.text_transformer)
    else:
        text = _text_rules(config.text_transformer, prefix)
    return [*logits, *image, *text]


def _blocks(theirs: str, ours: str, *, layer_scale: bool) -> list[Rule]:
    scales = {"attention_scale": "ls_1.gamma", "mlp_scale": "ls_2.gamma"} if layer_scale else {}
    return block(f"{theirs}.resblocks.{{}}", f"{ours}.transformer.blocks", OPEN_CLIP | scales)


def _vision_rules(config: ModelConfig) -> list[Rule]:
    c = config.vision
    assert isinstance(c, ViTConfig)  # the other kinds have rules of their own
    pre_norm = norm("visual.ln_pre", "vision.pre_norm") if c.pre_norm else []
    pool = _query_pool(same_width=c.width == config.embed_dim) if c.pool == "query" else []
    return [
        Rule("visual.class_embedding", "vision.class_token"),
        Rule("visual.positional_embedding", "vision.position"),
        Rule("visual.conv1.weight", "vision.stem.kernel", CONV),
        *pre_norm,
        *_blocks("visual.transformer", "vision", layer_scale=c.layer_scale),
        *pool,
        *norm("visual.ln_post", "vision.norm"),
        Rule("visual.proj", "vision.projection.kernel"),  # (in, out) already
    ]


def _resnet_rules(stages: tuple[int, ...]) -> list[Rule]:
    table = []
    for i in range(3):
        table += conv(f"visual.conv{i + 1}", f"vision.stem.{i}", bias=False)
        table += batch_norm(f"visual.bn{i + 1}", f"vision.stem_norms.{i}")
    for stage, depth in enumerate(stages):
        for index in range(depth):
            theirs, ours = f"visual.layer{stage + 1}.{index}", f"vision.stages.{stage}.{index}"
            for i in (1, 2, 3):
                table += conv(f"{theirs}.conv{i}", f"{ours}.conv{i}", bias=False)
                table += batch_norm(f"{theirs}.bn{i}", f"{ours}.norm{i}")
            if index == 0:  # a stage begins with another width or size
                table += conv(f"{theirs}.downsample.0", f"{ours}.shortcut", bias=False)
                table += batch_norm(f"{theirs}.downsample.1", f"{ours}.shortcut_norm")
    pool = "visual.attnpool"
    return [
        *table,
        Rule(f"{pool}.positional_embedding", "vision.position"),
        *heads(f"{pool}.q_proj", "vision.pool.query"),
        *heads(f"{pool}.k_proj", "vision.pool.key"),
        *heads(f"{pool}.v_proj", "vision.pool.value"),
        *out(f"{pool}.c_proj", "vision.pool.out"),
    ]


def _query_pool(*, same_width: bool) -> list[Rule]:
    """CoCa's attentional pooler, of which the contrastive half uses only the first query."""
    theirs, ours = "visual.attn_pool", "vision.pool"
    names = ("query", "key", "value")
    matrix, bias = fused(f"{theirs}.attn.in_proj_", f"{ours}.attention", *names)
    matrices = [matrix]
    if not same_width:  # torch then keeps three matrices
        matrices = [
            Rule(f"{theirs}.attn.{name[0]}_proj_weight", f"{ours}.attention.{name}.kernel", LINEAR)
            for name in names
        ]
    return [
        Rule(f"{theirs}.query", f"{ours}.query", FIRST_ROW),
        *matrices,
        bias,
        *out(f"{theirs}.attn.out_proj", f"{ours}.attention.out"),
        *norm(f"{theirs}.ln_q", f"{ours}.query_norm"),
        *norm(f"{theirs}.ln_k", f"{ours}.context_norm"),
    ]


def _text_rules(c: TextConfig, prefix: str) -> list[Rule]:
    projection = {
        "none": [],
        "linear": [Rule(f"{prefix}text_projection", "text.projection.kernel")],  # (in, out)
        "linear_bias": linear(f"{prefix}text_projection", "text.projection"),
    }[c.projection]
    token = [Rule(f"{prefix}cls_emb", "text.class_token")] if c.pool == "class" else []
    return [
        Rule(f"{prefix}token_embedding.weight", "text.embedding"),
        Rule(f"{prefix}positional_embedding", "text.position"),
        *token,
        *_blocks(f"{prefix}transformer", "text", layer_scale=c.layer_scale),
        *norm(f"{prefix}ln_final", "text.norm"),
        *projection,
    ]


def ignored(name: str) -> bool:
    """Whether a tensor is a buffer without learned values, or of CoCa's captioning half."""
    return (
        name.endswith(("attn_mask", "num_batches_tracked"))
        or name.startswith("text_decoder.")
        or text_encoders.ignored(name)
    )
