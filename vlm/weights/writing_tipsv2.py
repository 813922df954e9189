"""A bundle as a folder of transformers' `Tipsv2Model`."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from vlm.config import ModelConfig, PreprocessConfig, ViTConfig
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import Tokenizer
from vlm.models.dual_encoder import DualEncoder
from vlm.weights import huggingface, tipsv2
from vlm.weights.rules import write
from vlm.weights.writing_parts import KERNELS, check, refuse, transformers_folder

FORM = "transformers' Tipsv2Model"


def is_tipsv2(config: ModelConfig) -> bool:
    """Whether no other model of transformers could be meant."""
    return config.text.positions == "sinusoidal" or getattr(config.vision, "registers", 0) > 0


def write_tipsv2(
    folder: epath.Path, model: DualEncoder, preprocess: Preprocess, tokenizer: Tokenizer
) -> None:
    """Write the files of a folder that transformers opens as `Tipsv2Model`.

    Raises:
        CheckpointError: that class has no place for something.
    """
    transformers_folder(
        folder,
        tipsv2_config(model.config, tokenizer),
        _preprocess(preprocess.config),
        tokenizer,
        _tensors(model),
        model_input_names=["input_ids", "attention_mask"],
    )


def tipsv2_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The `config.json` of a model.

    Raises:
        CheckpointError: lists all that `Tipsv2Model` does not have.
    """
    vision, text = config.vision, config.text
    if not isinstance(vision, ViTConfig):
        refuse(FORM, [f"a vision tower of the kind {vision.kind!r} ('vit')"])
    check(
        FORM,
        config,
        {"stem": "linear", "patch_bias": True, "rotary": None, "pool": "class", "pre_norm": False}
        | {"norm_pooled": False, "norm": "pre", "attention_norm": False, "key_bias": True}
        | {"projection": "none", "max_patches": None},
        {"causal": False, "pool": "mean", "positions": "sinusoidal", "layer_scale": False}
        | {"norm": "pre", "projection": "none", "pad_id": tokenizer.config.pad_id},
    )
    if config.init_bias is not None or config.loss != "softmax":
        refuse(FORM, ["a logit_bias or the sigmoid loss"])
    gated = vision.mlp == "swiglu_plain"
    if not gated and vision.mlp != "plain":
        refuse(FORM, [f"vision.mlp {vision.mlp!r} (plain or swiglu_plain)"])
    vision_values = huggingface.tower_values(vision)
    del vision_values["intermediate_size"]  # a ratio says it
    return {
        "architectures": ["Tipsv2Model"],
        "model_type": "tipsv2",
        "dtype": "float32",
        "temperature_init_value": 1 / config.init_scale,
        "vision_config": vision_values
        | {
            "model_type": "tipsv2_vision_model",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "mlp_ratio": _ratio(vision.width, vision.mlp_dim, gated=gated),
            "use_swiglu_ffn": gated,
            "num_register_tokens": vision.registers,
        },
        "text_config": huggingface.tower_values(text)
        | {
            "model_type": "tipsv2_text_model",
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "pad_token_id": text.pad_id,
            "scale_sqrt_depth": text.scale_embedding,
        },
    }


def _ratio(width: int, mlp_dim: int, *, gated: bool) -> float:
    """A ratio of which transformers makes this width of the hidden layer.

    Raises:
        CheckpointError: gated, there is none, as all of them are multiples of 8.
    """
    whole = mlp_dim * 3 // 2 if gated else mlp_dim
    for ratio in (whole / width, (whole + 0.5) / width):  # the product is rounded down
        if tipsv2.mlp_dim(width, ratio, gated=gated) == mlp_dim:
            return ratio
    refuse(FORM, [f"vision.mlp_dim {mlp_dim} of a gated MLP (a multiple of 8)"])


def _tensors(model: DualEncoder) -> Iterator[tuple[str, Any]]:
    """Under the names of the published weights, with all that transformers looks for.

    The mask of pre-training is zero there too, and factors that a model does not have are one.
    """
    vision = model.config.vision
    assert isinstance(vision, ViTConfig)  # checked with the config
    rules = tipsv2.rules(model.config, {})
    if not vision.layer_scale:
        scales = [rule.theirs for rule in rules if rule.theirs.endswith(".gamma")]
        rules = [rule for rule in rules if rule.theirs not in scales]
        for name in (scale.format(i) for i in range(vision.depth) for scale in scales):
            yield name, np.ones(vision.width, np.float32)
    if not vision.registers:
        yield "vision_encoder.register_tokens", np.zeros((1, 0, vision.width), np.float32)
    yield "vision_encoder.mask_token", np.zeros((1, vision.width), np.float32)
    yield from write(model, rules)


def _preprocess(c: PreprocessConfig) -> dict[str, Any]:
    if c.backend != "tensor" or c.resize != "squash":
        refuse(FORM, [f"images that {c.backend} resizes by {c.resize} (tensor, squash)"])
    plain = (c.mean, c.std) == ((0.0,) * 3, (1.0,) * 3)
    return {
        "image_processor_type": "Tipsv2ImageProcessor",
        "do_resize": True,
        "resample": KERNELS[c.kernel],
        "size": {"height": c.image_size, "width": c.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": not plain,
        **({} if plain else {"image_mean": list(c.mean), "image_std": list(c.std)}),
        "do_convert_rgb": True,
    }
