"""A bundle as a folder of transformers' `AlignModel`."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from vlm.config import EfficientNetConfig, ModelConfig, PreprocessConfig
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import Tokenizer
from vlm.models.dual_encoder import DualEncoder
from vlm.weights import align, huggingface
from vlm.weights.rules import write
from vlm.weights.writing_parts import KERNELS, check, refuse, transformers_folder

FORM = "transformers' AlignModel"
_DIVISORS = (8, 4, 2, 1)  # of numbers of channels: the authors' own first


def write_align(
    folder: epath.Path, model: DualEncoder, preprocess: Preprocess, tokenizer: Tokenizer
) -> None:
    """Write the files of a folder that transformers opens as `AlignModel`.

    Raises:
        CheckpointError: that class has no place for something.
    """
    transformers_folder(
        folder,
        align_config(model.config, tokenizer),
        _preprocess(preprocess.config),
        tokenizer,
        _tensors(model),
        model_input_names=["input_ids", "attention_mask"],
    )


def align_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The `config.json` of a model.

    Raises:
        CheckpointError: lists all that `AlignModel` does not have.
    """
    vision, text = config.vision, config.text
    assert isinstance(vision, EfficientNetConfig)
    check(
        FORM,
        config,
        {"projection": "none"},
        {"causal": False, "pool": "first", "positions": "learned", "scale_embedding": False}
        | {"layer_scale": False, "norm": "post", "last_norm": False, "projection": "linear_bias"}
        | {"pad_id": tokenizer.config.pad_id},
    )
    if config.init_bias is not None or config.loss != "softmax":
        refuse(FORM, ["a logit_bias or the sigmoid loss"])
    firsts = np.cumsum([0, *(stage.depth for stage in vision.stages)]).tolist()
    return {
        "architectures": ["AlignModel"],
        "model_type": "align",
        "dtype": "float32",
        "projection_dim": config.embed_dim,
        "temperature_init_value": 1 / config.init_scale,
        "vision_config": {
            "model_type": "align_vision_model",
            "image_size": vision.image_size,
            **_channels(vision),
            "depth_coefficient": 1.0,
            "kernel_sizes": [stage.kernel for stage in vision.stages],
            "strides": [2 if stage.halve else 1 for stage in vision.stages],
            "num_block_repeats": [stage.depth for stage in vision.stages],
            "expand_ratios": [stage.expand for stage in vision.stages],
            "depthwise_padding": [
                first
                for first, stage in zip(firsts, vision.stages, strict=False)
                if stage.symmetric and stage.halve
            ],
            "squeeze_expansion_ratio": vision.squeeze,
            "hidden_act": "swish",
            "hidden_dim": max(vision.width, vision.sides()[-1]),
            "pooling_type": vision.pool,
            "batch_norm_eps": vision.norm_eps,
        },
        "text_config": huggingface.tower_values(text)
        | {
            "model_type": "align_text_model",
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "pad_token_id": text.pad_id,
        },
    }


def _channels(c: EfficientNetConfig) -> dict[str, Any]:
    """Channels as AlignModel has them: its stem's are a factor of all others, which it rounds.

    Raises:
        CheckpointError: no numbers come to those of the tower.
    """
    inputs = [c.stem_width, *(stage.width for stage in c.stages)]
    for divisor in _DIVISORS:
        scale = {"width_coefficient": c.stem_width / align.STEM, "depth_divisor": divisor}
        found = [_before(width, scale) for width in inputs]
        if None not in found and align.scaled(align.STEM, scale, FORM) == c.stem_width:
            return scale | {"in_channels": found[:-1], "out_channels": found[1:]}
    refuse(FORM, [f"channels {inputs[1:]} after a stem of {c.stem_width}"])


def _before(width: int, scale: dict[str, Any]) -> int | None:
    """A number of channels that is scaled to `width`, if there is one."""
    near = round(width / scale["width_coefficient"])
    reach = int(scale["depth_divisor"] / scale["width_coefficient"]) + 1
    for number in sorted(
        range(max(1, near - reach), near + reach + 1), key=lambda n: abs(n - near)
    ):
        if align.scaled(number, scale, FORM) == width:
            return number
    return None


def _tensors(model: DualEncoder) -> Iterator[tuple[str, Any]]:
    """With all that transformers looks for.

    The segment of texts is in their positions already, and what BERT pools is not used.
    """
    assert isinstance(model.config.vision, EfficientNetConfig)
    width = model.config.text.width
    yield from write(model, align.rules(model.config.vision))
    yield "text_model.embeddings.token_type_embeddings.weight", np.zeros((2, width), np.float32)
    yield f"{align.POOLER}.weight", np.zeros((width, width), np.float32)
    yield f"{align.POOLER}.bias", np.zeros(width, np.float32)


def _preprocess(c: PreprocessConfig) -> dict[str, Any]:
    if c.backend == "tensorflow":
        refuse(FORM, ["TensorFlow's resizing of images (pillow or tensor)"])
    if c.resize not in ("squash", "crop"):
        refuse(FORM, [f"preprocess.resize {c.resize!r} (squash or crop)"])
    short = c.short_side or c.image_size
    square = {"height": short, "width": short}
    return {
        "image_processor_type": "EfficientNetImageProcessor"
        + ("Fast" if c.backend == "tensor" else ""),
        "do_resize": True,
        "resample": KERNELS[c.kernel],
        "size": square if c.resize == "squash" else {"shortest_edge": short},
        "do_center_crop": c.resize == "crop" or short != c.image_size,
        "crop_size": {"height": c.image_size, "width": c.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "rescale_offset": False,
        "do_normalize": True,
        "image_mean": list(c.mean),
        "image_std": list(c.std),
        "include_top": False,
        "do_convert_rgb": True,
    }
