"""TIPSv2 (arXiv:2604.12012) as transformers' `Tipsv2Model`: encoders with spatial awareness.

The vision tower is DINOv2's with registers. The text tower has sinusoidal positions and pools the
mean of all tokens but the padding. Files have one of two sets of names: those of the published
weights, which transformers saves by default, or those of transformers' modules.
"""

from typing import Any

import numpy as np
from etils import epath

from vlm.config import ModelConfig, TextConfig, TokenizerConfig, ViTConfig
from vlm.errors import CheckpointError, brief
from vlm.inputs.tokenizer import Tokenizer
from vlm.weights import huggingface, sentencepiece
from vlm.weights.checkpoint import Checkpoint, ComputedTensors, weights
from vlm.weights.fields import integer, number, with_defaults
from vlm.weights.files import Tensors
from vlm.weights.layers import (
    MLP,
    OPEN_CLIP,
    TIMM_ATTENTION,
    TRANSFORMERS,
    block,
    conv,
    fused,
    linear,
    norm,
)
from vlm.weights.rules import Rule, Shapes, Transform, leading
from vlm.weights.vocabularies import huggingface_tokenizer

MODEL_TYPES = ("tipsv2",)
# Defaults of transformers' configuration classes.
_VISION: dict[str, Any] = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "gelu",
    "layer_norm_eps": 1e-6, "image_size": 448, "patch_size": 14, "qkv_bias": True,
    "use_swiglu_ffn": False, "num_register_tokens": None, "mlp_ratio": None,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 64, "hidden_act": "relu",
    "layer_norm_eps": 1e-5, "pad_token_id": 0, "scale_sqrt_depth": True,
    "pooling_epsilon": 1e-8,
}  # fmt: skip
_TEMPERATURE = {"temperature_init_value": 0.005065968260169029}


def open_checkpoint(folder: epath.Path, values: dict[str, Any], config: ModelConfig) -> Checkpoint:
    """Open the checkpoint in a folder."""
    tensors = weights(folder, *huggingface.WEIGHTS)
    return huggingface.assemble(
        folder,
        config,
        rules(config, tensors.shapes),
        tensors=with_temperature(tensors, "temperature", 1 / config.init_scale),
        tokenizer=_tokenizer(folder, config),
        # A mask used only in pre-training, and the empty table of a model without registers.
        ignored=lambda name: name.endswith(".mask_token") or 0 in tensors.shapes[name],
        positions="bilinear_antialias",
    )


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Configuration of a model of this family."""
    vision = huggingface.tower_fields(values, "vision", _VISION, where)
    text, text_options = huggingface.read_tower(values, "text", _TEXT, where)
    if not vision["qkv_bias"]:
        raise CheckpointError(f"{where}: vision_config.qkv_bias is off: vlm reads TIPSv2 with it")
    if not 0 <= text["pooling_epsilon"] < 1e-6:
        raise CheckpointError(
            f"{where}: text_config.pooling_epsilon is {text['pooling_epsilon']}, which changes "
            "means: vlm reads less than 1e-6"
        )
    width, gated = vision["hidden_size"], vision["use_swiglu_ffn"]
    if width != text["hidden_size"]:
        raise CheckpointError(
            f"{where}: the towers have hidden_size {width} and {text['hidden_size']}, and TIPSv2 "
            "has no projections: they must be equal"
        )
    place = f"{where}: vision_config"
    ratio = 4 if vision["mlp_ratio"] is None else vision["mlp_ratio"]
    hidden = mlp_dim(width, number(ratio, f"{place}.mlp_ratio", above=0.0), gated=gated)
    vision["intermediate_size"] = integer(hidden, f"{place}.mlp_ratio")
    registers = vision["num_register_tokens"]
    registers = 1 if registers is None else registers
    temperature = with_defaults(values, _TEMPERATURE, where)["temperature_init_value"]
    return ModelConfig(
        ViTConfig(
            **huggingface.tower_options(vision, place),
            pool="class",
            registers=integer(registers, f"{place}.num_register_tokens", low=0),
            layer_scale=True,
            mlp="swiglu_plain" if gated else "plain",
        ),
        TextConfig(
            **text_options,
            pool="mean",
            positions="sinusoidal",
            scale_embedding=text["scale_sqrt_depth"],
            pad_id=text["pad_token_id"],
            projection="none",
        ),
        embed_dim=width,
        init_scale=1 / number(temperature, f"{where}: temperature_init_value", above=0.0),
    )


def mlp_dim(width: int, ratio: float, *, gated: bool) -> int:
    """Width of the hidden layer of a vision tower's MLP; a gated one has two thirds of it."""
    full = int(width * ratio)
    return (int(full * 2 / 3) + 7) // 8 * 8 if gated else full


def _tokenizer(folder: epath.Path, config: ModelConfig) -> Tokenizer:
    """Read `tokenizer.json`, or the SentencePiece file from which transformers makes it."""
    pieces = folder / "tokenizer.model"
    if (folder / "tokenizer.json").exists() or not pieces.exists():
        return huggingface_tokenizer(folder, config)
    rules = TokenizerConfig(
        context_length=config.text.context_length, pad_id=0, eos_id=None, lowercase=True,
        parse_special=True,
    )  # fmt: skip
    return Tokenizer(sentencepiece.read(pieces), rules)


def with_temperature(tensors: Tensors, name: str, default: float) -> ComputedTensors:
    """Check the temperature of the logits, or add a `default` to a file without one.

    Raises (when it is read):
        CheckpointError: it is not positive.
    """

    def read(start: int, stop: int | None) -> np.ndarray:
        if name not in tensors.shapes:
            return np.asarray(default)
        value = tensors.read(name, start, stop)
        if not (value > 0).all():
            raise CheckpointError(
                f"{tensors.where} has the temperature {brief(value.tolist())}, which must be "
                "greater than 0: get it again"
            )
        return value

    return ComputedTensors(tensors, {name: (tensors.shapes.get(name, ()), read)})


# Their temperature divides the cosines. A round trip is exact for scales of 8 and more, whose
# logarithm has fewer digits than the temperature.
TEMPERATURE = Transform(
    lambda s: (),
    lambda x, s: np.asarray(-np.log(x.astype(np.float64)), np.float32).reshape(s),
    lambda x: np.asarray(np.exp(-x.astype(np.float64)), np.float32),
)


def rules(config: ModelConfig, shapes: Shapes) -> list[Rule]:
    """Rules of a model, for the set of names that a file has."""
    c = config.vision
    assert isinstance(c, ViTConfig)
    of_modules = any(name.startswith("vision_model.") for name in shapes)
    rules = _of_modules(c) if of_modules else _published(c, shapes)
    return [Rule("temperature", "logit_scale", TEMPERATURE), *rules]


_IMAGE, _TEXT_BLOCKS = "vision.transformer.blocks", "text.transformer.blocks"


def _of_modules(c: ViTConfig) -> list[Rule]:
    tables, text = "vision_model.embeddings", "text_model"
    layers = {
        "attention_norm": "norm1", "attention.query": "attention.q_proj",
        "attention.key": "attention.k_proj", "attention.value": "attention.v_proj",
        "attention.out": "attention.o_proj", "attention_scale": "layer_scale1.lambda1",
        "mlp_norm": "norm2", "mlp_scale": "layer_scale2.lambda1",
    }  # fmt: skip
    if c.mlp == "plain":
        layers |= MLP
    else:
        layers |= {f"mlp.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    return [
        *_tokens(tables, f"{tables}.position_embeddings", c),
        *conv(f"{tables}.patch_embeddings.projection", "vision.stem"),
        *block("vision_model.encoder.layer.{}", _IMAGE, layers),
        *norm("vision_model.layernorm", "vision.norm"),
        Rule(f"{text}.embeddings.token_embedding.weight", "text.embedding"),
        *block(f"{text}.encoder.layers.{{}}", _TEXT_BLOCKS, TRANSFORMERS),
        *norm(f"{text}.final_layer_norm", "text.norm"),
    ]


def _published(c: ViTConfig, shapes: Shapes) -> list[Rule]:
    root, layer = "vision_encoder", "vision_encoder.blocks.{}"
    if c.mlp == "plain":
        # transformers saves the names of the text tower's MLP, in the vision tower too.
        renamed = f"{layer}.mlp.c_fc.weight".format(0) in shapes
        mlp = block(
            layer, _IMAGE, {"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"} if renamed else MLP
        )
    else:
        mlp = fused(f"{layer}.mlp.w12.", f"{_IMAGE}.mlp", "gate", "up")
        mlp += linear(f"{layer}.mlp.w3", f"{_IMAGE}.mlp.down")
    scales = {"attention_scale": "ls1.gamma", "mlp_scale": "ls2.gamma"}
    return [
        *_tokens(root, f"{root}.pos_embed", c),
        *conv(f"{root}.patch_embed.proj", "vision.stem"),
        *block(layer, _IMAGE, TIMM_ATTENTION | scales),
        *mlp,
        *norm(f"{root}.norm", "vision.norm"),
        Rule("text_encoder.token_embedding.weight", "text.embedding"),
        *block("text_encoder.transformer.resblocks.{}", _TEXT_BLOCKS, OPEN_CLIP),
        *norm("text_encoder.ln_final", "text.norm"),
    ]


def _tokens(root: str, position: str, c: ViTConfig) -> list[Rule]:
    registers = [Rule(f"{root}.register_tokens", "vision.registers", leading(1))]
    return [
        Rule(f"{root}.cls_token", "vision.class_token", leading(2)),
        *(registers if c.registers else []),
        Rule(position, "vision.position", leading(1)),
    ]
