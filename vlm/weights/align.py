"""transformers' `AlignModel`: ALIGN (arXiv:2102.05918), of which Kakao Brain published weights.

The vision tower is an EfficientNet, whose pooled channels are the embedding; the text tower a BERT.
Its config scales the sizes of EfficientNet-B0; ours has the results.
"""

import dataclasses
import math
from typing import Any

from etils import epath

from vlm.config import EfficientNetConfig, EfficientNetStage, ModelConfig, TextConfig
from vlm.errors import CheckpointError
from vlm.weights import huggingface
from vlm.weights.checkpoint import Checkpoint, ComputedTensors, weights
from vlm.weights.fields import (
    MAX_LAYERS,
    MAX_PIXELS,
    choice,
    integer,
    integers,
    number,
    with_defaults,
)
from vlm.weights.layers import batch_norm, conv, linear, point
from vlm.weights.rules import Rule
from vlm.weights.text_encoders import bert_positions, bert_rules
from vlm.weights.tipsv2 import TEMPERATURE, with_temperature

MODEL_TYPES = ("align",)
LENGTH = 64  # to which AlignProcessor pads texts; the tower has positions for more
# Defaults of transformers' configuration classes. Lists have a value for each stage ...
_STAGES: dict[str, list[int]] = {
    "kernel_sizes": [3, 3, 5, 3, 5, 5, 3],
    "in_channels": [32, 16, 24, 40, 80, 112, 192],
    "out_channels": [16, 24, 40, 80, 112, 192, 320],
    "strides": [1, 2, 2, 2, 1, 2, 1],
    "num_block_repeats": [1, 2, 2, 3, 3, 4, 1],
    "expand_ratios": [1, 6, 6, 6, 6, 6, 6],
}
# ... but for `depthwise_padding`, which has the numbers of blocks.
_VISION: dict[str, Any] = {
    "image_size": None, "width_coefficient": 2.0, "depth_coefficient": 3.1, "depth_divisor": 8,
    "depthwise_padding": None, "squeeze_expansion_ratio": 0.25, "hidden_act": "swish",
    "hidden_dim": 2560, "pooling_type": "mean", "batch_norm_eps": 1e-3, **dict.fromkeys(_STAGES),
}  # fmt: skip
_MODEL = {"projection_dim": 640, "temperature_init_value": 1.0}
STEM = 32  # channels of the stem, before they are scaled


def open_checkpoint(folder: epath.Path, values: dict[str, Any], config: ModelConfig) -> Checkpoint:
    """Open the checkpoint in a folder."""
    # The tower takes images of any size; the processor has the size it was trained on.
    preprocess = huggingface.preprocess_config(folder, config.vision.image_size)
    vision = config.vision
    assert isinstance(vision, EfficientNetConfig)
    vision = dataclasses.replace(vision, image_size=preprocess.image_size)
    config = dataclasses.replace(config, vision=vision)
    tensors = weights(folder, *huggingface.WEIGHTS)
    tensors = ComputedTensors(
        tensors, *bert_positions(tensors, "text_model", config.text_transformer, 0)
    )
    return huggingface.assemble(
        folder,
        config,
        rules(vision),
        tensors=with_temperature(tensors, "temperature", 1 / config.init_scale),
        preprocess=preprocess,
        ignored=_ignored,
        context_length=min(LENGTH, config.text.context_length),
    )


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Configuration of a model."""
    text, text_options = huggingface.read_tower(values, "text", huggingface.BERT, where)
    vision = _vision(
        huggingface.tower_fields(values, "vision", _VISION, where), f"{where}: vision_config"
    )
    about = with_defaults(values, _MODEL, where)
    if about["projection_dim"] != vision.width:
        raise CheckpointError(
            f"{where}: projection_dim is {about['projection_dim']}, and the vision tower has "
            f"{vision.width} channels, which ALIGN takes as they are: they must be equal"
        )
    temperature = about["temperature_init_value"]
    return ModelConfig(
        vision,
        TextConfig(
            **text_options,
            norm="post",
            pool="first",
            pad_id=text["pad_token_id"],
            projection="linear_bias",
        ),
        embed_dim=vision.width,
        init_scale=1 / number(temperature, f"{where}: temperature_init_value", above=0.0),
    )


def _vision(c: dict[str, Any], where: str) -> EfficientNetConfig:
    choice(c["hidden_act"], ("swish", "silu"), f"{where}.hidden_act")
    lists = {name: integers(c[name] or given, f"{where}.{name}") for name, given in _STAGES.items()}
    if len({len(values) for values in lists.values()}) > 1:
        raise CheckpointError(
            f"{where} has lists of different lengths: give {', '.join(lists)} one value per stage"
        )
    kernels, strides = lists["kernel_sizes"], lists["strides"]
    if even := [size for size in kernels if size % 2 == 0]:
        raise CheckpointError(f"{where}.kernel_sizes has {even[0]}: vlm supports odd sizes")
    if other := [stride for stride in strides if stride > 2]:
        raise CheckpointError(f"{where}.strides has {other[0]}: vlm supports 1 and 2")
    inputs = [scaled(width, c, f"{where}.in_channels") for width in lists["in_channels"]]
    widths = [scaled(width, c, f"{where}.out_channels") for width in lists["out_channels"]]
    stem_width = scaled(STEM, c, where)
    if inputs != [stem_width, *widths[:-1]]:
        raise CheckpointError(
            f"{where}: in_channels are scaled to {inputs} and the layers before them have "
            f"{[stem_width, *widths[:-1]]}: they must be equal"
        )
    given = c["depthwise_padding"]
    padded = integers(given, f"{where}.depthwise_padding", low=0) if given else ()
    stages, block = [], 0
    for width, repeats, kernel, stride, expand in zip(
        widths, lists["num_block_repeats"], kernels, strides, lists["expand_ratios"], strict=True
    ):
        depth = math.ceil(number(c["depth_coefficient"], where, above=0.0) * repeats)
        block = integer(block + depth, f"{where}.num_block_repeats", high=MAX_LAYERS)
        halve = stride == 2
        stages.append(
            EfficientNetStage(
                depth,
                width,
                expand,
                kernel,
                halve=halve,
                symmetric=halve and block - depth in padded,
            )
        )
    side = c["image_size"]
    side = side[0] if isinstance(side, list) and len(side) == 2 and side[0] == side[1] else side
    tower = EfficientNetConfig(
        image_size=integer(600 if side is None else side, f"{where}.image_size", high=MAX_PIXELS),
        stem_width=stem_width,
        stages=tuple(stages),
        squeeze=c["squeeze_expansion_ratio"],
        pool=choice(c["pooling_type"], ("mean", "max"), f"{where}.pooling_type"),
        norm_eps=c["batch_norm_eps"],
        projection="none",
    )
    if tower.sides()[-1] > c["hidden_dim"]:
        raise CheckpointError(
            f"{where}.hidden_dim {c['hidden_dim']} is the side of the pooled grid, and the tower "
            f"has {tower.sides()[-1]} places along each: vlm pools all of them"
        )
    return tower


def scaled(width: int, c: dict[str, Any], where: str) -> int:
    """Channels after `width_coefficient`, a multiple of `depth_divisor`.

    They are rounded to the nearest, or up where that would be a tenth less or more.
    """
    wanted = width * c["width_coefficient"]
    divisor = c["depth_divisor"]
    nearest = max(divisor, int(wanted + divisor / 2) // divisor * divisor)
    return integer(nearest + divisor * (nearest < 0.9 * wanted), where)


def rules(c: EfficientNetConfig) -> list[Rule]:
    """Rules of a model whose positions are folded by `bert_positions`."""
    table = [
        Rule("temperature", "logit_scale", TEMPERATURE),
        *conv("vision_model.embeddings.convolution", "vision.stem", bias=False),
        *batch_norm("vision_model.embeddings.batchnorm", "vision.stem_norm"),
    ]
    block = 0
    for index, stage in enumerate(c.stages):
        ours = f"vision.stages.{index}"
        table += _block(f"vision_model.encoder.blocks.{block}", f"{ours}.first", stage)
        if stage.depth > 1:
            rest = _block("vision_model.encoder.blocks.{}", f"{ours}.blocks", stage)
            table += [dataclasses.replace(rule, first=block + 1) for rule in rest]
        block += stage.depth
    return [*table, *bert_rules("text_model"), *linear("text_projection", "text.projection")]


def _block(theirs: str, ours: str, stage: EfficientNetStage) -> list[Rule]:
    table = []
    if stage.expand > 1:
        table += point(f"{theirs}.expansion.expand_conv", f"{ours}.expand", bias=False)
        table += batch_norm(f"{theirs}.expansion.expand_bn", f"{ours}.expand_norm")
    squeeze = f"{theirs}.squeeze_excite"
    return [
        *table,
        *conv(f"{theirs}.depthwise_conv.depthwise_conv", f"{ours}.conv", bias=False),
        *batch_norm(f"{theirs}.depthwise_conv.depthwise_norm", f"{ours}.conv_norm"),
        *point(f"{squeeze}.reduce", f"{ours}.squeeze.down"),
        *point(f"{squeeze}.expand", f"{ours}.squeeze.up"),
        *point(f"{theirs}.projection.project_conv", f"{ours}.project", bias=False),
        *batch_norm(f"{theirs}.projection.project_bn", f"{ours}.project_norm"),
    ]


POOLER = "text_model.pooler.dense"  # BERT's, whose output ALIGN leaves unused


def _ignored(name: str) -> bool:
    """Whether it takes no part in embeddings: counts of batches, buffers, and BERT's pooler."""
    return (
        name.endswith(("num_batches_tracked", "position_ids", "token_type_ids"))
        or name.rpartition(".")[0] == POOLER
    )
