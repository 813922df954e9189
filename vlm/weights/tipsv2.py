"""transformers' `Tipsv2Model`: TIPSv2 (arXiv:2604.12012), Google's encoders with spatial awareness.

The vision tower is DINOv2's with registers, the text tower has sinusoidal positions and the mean of
what is not padding. Its files have either of two sets of names: those of the published weights,
under which transformers saves too unless it is told otherwise, or those of transformers' modules.
"""

import functools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Shaped

from vlm.config import ModelConfig, TextConfig, TokenizerConfig, ViTConfig
from vlm.errors import CheckpointError
from vlm.inputs.tokenizer import Tokenizer
from vlm.weights import huggingface, sentencepiece
from vlm.weights.checkpoint import Checkpoint, weights
from vlm.weights.fields import integer, number, read_json, show, with_defaults
from vlm.weights.files import Tensors
from vlm.weights.layers import conv, fused, heads, linear, norm, out
from vlm.weights.rules import FLAT, LINEAR, Rule, Transform, leading
from vlm.weights.vocabularies import check_vocabulary, huggingface_tokenizer

MODEL_TYPES = ("tipsv2",)
# The defaults of transformers' configuration classes.
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


def open_checkpoint(folder: epath.Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        CheckpointError: it is incomplete, torn or contradictory.
    """
    config = model_config(read_json(folder / "config.json"), os.fspath(folder / "config.json"))
    tokenizer = _tokenizer(folder, config)
    check_vocabulary(tokenizer, config, folder)
    if tokenizer.config.pad_id != config.text.pad_id:
        raise CheckpointError(
            f"{folder} pads texts with token {tokenizer.config.pad_id}, and its config.json has "
            f"pad_token_id {config.text.pad_id}: they are not of one model"
        )
    tensors = weights(folder, *huggingface.WEIGHTS)
    return Checkpoint(
        folder.name,
        config,
        huggingface.preprocess_config(folder, config.vision.image_size),
        tokenizer,
        WithTemperature(tensors, "temperature", 1 / config.init_scale),
        rules(config, tensors.shapes),
        functools.partial(ignored, tensors.shapes),
        "bilinear_antialias",
    )


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Our configuration of a `config.json` of this family.

    Raises:
        CheckpointError: an option that vlm does not know, or a size that cannot be.
    """
    huggingface.check_architecture(values.get("architectures"), where)
    vision = huggingface.tower_fields(values, "vision", _VISION, where)
    text = huggingface.tower_fields(values, "text", _TEXT, where)
    if not vision["qkv_bias"]:
        raise CheckpointError(f"{where}: vision_config.qkv_bias is off: vlm reads TIPSv2 with it")
    if not 0 <= text["pooling_epsilon"] < 1e-6:
        raise CheckpointError(
            f"{where}: text_config.pooling_epsilon is {text['pooling_epsilon']}, which changes "
            "means: vlm reads less than 1e-6"
        )
    width = vision["hidden_size"]
    if width != text["hidden_size"]:
        raise CheckpointError(
            f"{where}: the towers have hidden_size {width} and {text['hidden_size']}, and TIPSv2 "
            "has no projections: they must be equal"
        )
    ratio = number(
        4 if vision["mlp_ratio"] is None else vision["mlp_ratio"],
        f"{where}: vision_config.mlp_ratio", above=0.0,
    )  # fmt: skip
    registers = vision["num_register_tokens"]
    temperature = with_defaults(values, _TEMPERATURE, where)["temperature_init_value"]
    vision["intermediate_size"] = integer(
        mlp_dim(width, ratio, gated=vision["use_swiglu_ffn"]), f"{where}: vision_config.mlp_ratio"
    )
    return ModelConfig(
        ViTConfig(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            **huggingface.tower_sizes(vision, f"{where}: vision_config"),
            pool="class",
            registers=1
            if registers is None
            else integer(registers, f"{where}: vision_config.num_register_tokens", low=0),
            layer_scale=True,
            mlp="swiglu_plain" if vision["use_swiglu_ffn"] else "plain",
        ),
        TextConfig(
            vocab_size=text["vocab_size"],
            context_length=text["max_position_embeddings"],
            **huggingface.tower_sizes(text, f"{where}: text_config"),
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
    """The width of the hidden layer of a vision tower's MLP; gated, it is two thirds of it."""
    whole_dim = int(width * ratio)
    return (int(whole_dim * 2 / 3) + 7) // 8 * 8 if gated else whole_dim


def _tokenizer(folder: epath.Path, config: ModelConfig) -> Tokenizer:
    """That of `tokenizer.json`, or of the SentencePiece file that transformers makes it from."""
    pieces = folder / "tokenizer.model"
    if (folder / "tokenizer.json").exists() or not pieces.exists():
        return huggingface_tokenizer(folder, config)
    rules = TokenizerConfig(
        context_length=config.text.context_length, pad_id=0, eos_id=None, lowercase=True,
        parse_special=True,
    )  # fmt: skip
    return Tokenizer(sentencepiece.read(pieces), rules)


class WithTemperature:
    """Tensors with the temperature of the logits, from the config where the file has none."""

    def __init__(self, tensors: Tensors, name: str, temperature: float):
        self.where = tensors.where
        self._tensors, self._name, self._temperature = tensors, name, temperature
        self.shapes: Mapping[str, tuple[int, ...]] = {name: (), **tensors.shapes}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "..."]:
        if name not in self._tensors.shapes:
            return np.asarray(self._temperature)
        value = self._tensors.read(name, start, stop)
        if name == self._name and not (value > 0).all():
            raise CheckpointError(
                f"{self.where} has the temperature {show(value.tolist())}, which must be greater "
                "than 0: get it again"
            )
        return value


# --------------------------------------------------------------------- their names and ours

# Theirs divides the cosines. Back and forth is exact for a scale of 8 and more, whose logarithm
# has fewer digits than the temperature.
TEMPERATURE = Transform(
    lambda s: (),
    lambda x, s: np.asarray(-np.log(x.astype(np.float64)), np.float32).reshape(s),
    lambda x: np.asarray(np.exp(-x.astype(np.float64)), np.float32),
)


def rules(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Rule]:
    """The table of a model, for the set of names that a file has."""
    vision = config.vision
    assert isinstance(vision, ViTConfig)
    of_modules = any(name.startswith("vision_model.") for name in shapes)
    rules = _of_modules(vision) if of_modules else _published(vision, shapes)
    return [Rule("temperature", "logit_scale", TEMPERATURE), *rules]


def _of_modules(c: ViTConfig) -> list[Rule]:
    tables = "vision_model.embeddings"
    layer, block = "vision_model.encoder.layer.{}", "vision.transformer.blocks"
    attention = f"{layer}.attention"
    if c.mlp == "plain":
        mlp = [*linear(f"{layer}.mlp.fc1", f"{block}.mlp.up")]
        mlp += linear(f"{layer}.mlp.fc2", f"{block}.mlp.down")
    else:
        mlp = [*linear(f"{layer}.mlp.gate_proj", f"{block}.mlp.gate")]
        mlp += linear(f"{layer}.mlp.up_proj", f"{block}.mlp.up")
        mlp += linear(f"{layer}.mlp.down_proj", f"{block}.mlp.down")
    text, words = "text_model.encoder.layers.{}", "text.transformer.blocks"
    return [
        *_tokens(tables, f"{tables}.position_embeddings", c),
        *conv(f"{tables}.patch_embeddings.projection", "vision.stem"),
        *norm(f"{layer}.norm1", f"{block}.attention_norm"),
        *heads(f"{attention}.q_proj", f"{block}.attention.query"),
        *heads(f"{attention}.k_proj", f"{block}.attention.key"),
        *heads(f"{attention}.v_proj", f"{block}.attention.value"),
        *out(f"{attention}.o_proj", f"{block}.attention.out"),
        Rule(f"{layer}.layer_scale1.lambda1", f"{block}.attention_scale"),
        *norm(f"{layer}.norm2", f"{block}.mlp_norm"),
        *mlp,
        Rule(f"{layer}.layer_scale2.lambda1", f"{block}.mlp_scale"),
        *norm("vision_model.layernorm", "vision.norm"),
        Rule("text_model.embeddings.token_embedding.weight", "text.embedding"),
        *norm(f"{text}.layer_norm1", f"{words}.attention_norm"),
        *heads(f"{text}.self_attn.q_proj", f"{words}.attention.query"),
        *heads(f"{text}.self_attn.k_proj", f"{words}.attention.key"),
        *heads(f"{text}.self_attn.v_proj", f"{words}.attention.value"),
        *out(f"{text}.self_attn.out_proj", f"{words}.attention.out"),
        *norm(f"{text}.layer_norm2", f"{words}.mlp_norm"),
        *linear(f"{text}.mlp.fc1", f"{words}.mlp.up"),
        *linear(f"{text}.mlp.fc2", f"{words}.mlp.down"),
        *norm("text_model.final_layer_norm", "text.norm"),
    ]


def _published(c: ViTConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Rule]:
    root, layer, block = "vision_encoder", "vision_encoder.blocks.{}", "vision.transformer.blocks"
    text, words = "text_encoder.transformer.resblocks.{}", "text.transformer.blocks"
    if c.mlp == "plain":
        # transformers saves the names of the text tower's MLP, in the vision tower too.
        names = ("fc1", "fc2")
        if f"{layer}.mlp.c_fc.weight".format(0) in shapes:
            names = ("c_fc", "c_proj")
        mlp = linear(f"{layer}.mlp.{names[0]}", f"{block}.mlp.up")
        mlp += linear(f"{layer}.mlp.{names[1]}", f"{block}.mlp.down")
    else:
        gates = (f"{block}.mlp.gate", f"{block}.mlp.up")
        mlp = [
            Rule(f"{layer}.mlp.w12.weight", tuple(f"{gate}.kernel" for gate in gates), LINEAR),
            Rule(f"{layer}.mlp.w12.bias", tuple(f"{gate}.bias" for gate in gates), FLAT),
            *linear(f"{layer}.mlp.w3", f"{block}.mlp.down"),
        ]
    parts = ("query", "key", "value")
    qkv, in_proj = f"{layer}.attn.qkv", f"{text}.attn.in_proj"
    return [
        *_tokens(root, f"{root}.pos_embed", c),
        *conv(f"{root}.patch_embed.proj", "vision.stem"),
        *norm(f"{layer}.norm1", f"{block}.attention_norm"),
        *fused(f"{qkv}.weight", f"{qkv}.bias", f"{block}.attention", parts),
        *out(f"{layer}.attn.proj", f"{block}.attention.out"),
        Rule(f"{layer}.ls1.gamma", f"{block}.attention_scale"),
        *norm(f"{layer}.norm2", f"{block}.mlp_norm"),
        *mlp,
        Rule(f"{layer}.ls2.gamma", f"{block}.mlp_scale"),
        *norm(f"{root}.norm", "vision.norm"),
        Rule("text_encoder.token_embedding.weight", "text.embedding"),
        *norm(f"{text}.ln_1", f"{words}.attention_norm"),
        *fused(f"{in_proj}_weight", f"{in_proj}_bias", f"{words}.attention", parts),
        *out(f"{text}.attn.out_proj", f"{words}.attention.out"),
        *norm(f"{text}.ln_2", f"{words}.mlp_norm"),
        *linear(f"{text}.mlp.c_fc", f"{words}.mlp.up"),
        *linear(f"{text}.mlp.c_proj", f"{words}.mlp.down"),
        *norm("text_encoder.ln_final", "text.norm"),
    ]


def _tokens(root: str, position: str, c: ViTConfig) -> list[Rule]:
    registers = [Rule(f"{root}.register_tokens", "vision.registers", leading(1))]
    return [
        Rule(f"{root}.cls_token", "vision.class_token", leading(2)),
        *(registers if c.registers else []),
        Rule(position, "vision.position", leading(1)),
    ]


def ignored(shapes: Mapping[str, tuple[int, ...]], name: str) -> bool:
    """What only pre-training uses, and the table of a model that has no registers."""
    return name.endswith(".mask_token") or 0 in shapes[name]
