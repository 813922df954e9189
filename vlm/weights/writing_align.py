"""Export to transformers' `AlignModel`."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from vlm.config import EfficientNetConfig, ModelConfig, PreprocessConfig
from vlm.inputs.tokenizer import Tokenizer
from vlm.models.dual_encoder import DualEncoder
from vlm.weights import align
from vlm.weights import writing_parts as parts
from vlm.weights.rules import write

FORM = "transformers' AlignModel"
_DIVISORS = (8, 4, 2, 1)  # of channel counts, the authors' first


def align_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the `config.json` of a model.

    Raises:
        CheckpointError: lists all fields that `AlignModel` does not support.
    """
    vision, text = config.vision, config.text_transformer
    assert isinstance(vision, EfficientNetConfig)
    parts.check(
        FORM,
        config,
        {"projection": "none"},
        {"causal": False, "pool": "first", "positions": "learned", "scale_embedding": False}
        | {"layer_scale": False, "norm": "post", "last_norm": False, "projection": "linear_bias"}
        | {"pad_id": tokenizer.config.pad_id},
        {parts.SIGMOID: config.init_bias is not None or config.loss != "softmax"},
    )
    firsts = np.cumsum([0, *(stage.depth for stage in vision.stages)]).tolist()
    values = parts.model_values(
        "align",
        "AlignModel",
        projection_dim=config.embed_dim,
        temperature_init_value=1 / config.init_scale,
        vision_config={
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
        text_config=parts.text_values(text, "align"),
    )
    parts.refuse_differences(FORM, config, align.model_config(values, "config.json"))
    return values


def _channels(c: EfficientNetConfig) -> dict[str, Any]:
    """Return the channel counts that AlignModel scales by its stem's and rounds to the tower's.

    Raises:
        CheckpointError: there are no such counts.
    """
    inputs = [c.stem_width, *(stage.width for stage in c.stages)]
    for divisor in _DIVISORS:
        scale = {"width_coefficient": c.stem_width / align.STEM, "depth_divisor": divisor}
        found = [_unscaled(width, scale) for width in inputs]
        if None not in found and align.scaled(align.STEM, scale, FORM) == c.stem_width:
            return scale | {"in_channels": found[:-1], "out_channels": found[1:]}
    parts.refuse(FORM, [f"channels {inputs[1:]} after a stem of {c.stem_width}"])


def _unscaled(width: int, scale: dict[str, Any]) -> int | None:
    """Return a channel count that is scaled to `width`, or None."""
    near = round(width / scale["width_coefficient"])
    reach = int(scale["depth_divisor"] / scale["width_coefficient"]) + 1
    counts = sorted(range(max(1, near - reach), near + reach + 1), key=lambda n: abs(n - near))
    return next((n for n in counts if align.scaled(n, scale, FORM) == width), None)


def align_tensors(model: DualEncoder) -> Iterator[tuple[str, Any]]:
    """Yield all tensors that transformers expects.

    Our positions include the token type embedding, and BERT's pooler is not used: both are zero.
    """
    assert isinstance(model.config.vision, EfficientNetConfig)
    width = model.config.text_transformer.width
    yield from write(model, align.rules(model.config.vision))
    yield "text_model.embeddings.token_type_embeddings.weight", np.zeros((2, width), np.float32)
    yield f"{align.POOLER}.weight", np.zeros((width, width), np.float32)
    yield f"{align.POOLER}.bias", np.zeros(width, np.float32)


def align_preprocess(c: PreprocessConfig) -> dict[str, Any]:
    """Return the `preprocessor_config.json`."""
    faults = {
        "TensorFlow's resizing of images (pillow or tensor)": c.backend == "tensorflow",
        f"preprocess.resize {c.resize!r} (squash or crop)": c.resize not in ("squash", "crop"),
    }
    parts.refuse_if(FORM, faults)
    short = c.short_side or c.image_size
    square = {"height": short, "width": short}
    return parts.processor_values(
        c,
        "EfficientNetImageProcessor" + ("Fast" if c.backend == "tensor" else ""),
        size=square if c.resize == "squash" else {"shortest_edge": short},
        do_center_crop=c.resize == "crop" or short != c.image_size,
        crop_size={"height": c.image_size, "width": c.image_size},
        rescale_offset=False,
        include_top=False,
    )
