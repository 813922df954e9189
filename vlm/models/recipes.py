"""Named models with matching preprocessing and tokenizer.

Each recipe gives fields of an `Experiment`:

    config = Experiment(**recipes.clip("B/16"), data=..., batch_size=..., epochs=...)
"""

import dataclasses
from typing import Any, TypedDict

from vlm.config import CLIP_MEAN, CLIP_STD, ModelConfig, PreprocessConfig, TokenizerConfig
from vlm.models import variants


class Recipe(TypedDict):
    """Fields of an `Experiment` that belong together."""

    model: ModelConfig
    preprocess: PreprocessConfig
    tokenizer: TokenizerConfig
    tokenizer_file: str


def clip(name: str, *, image_size: int = 224, **changes: Any) -> Recipe:
    """CLIP of size `name`, such as "B/16", with OpenAI's preprocessing and vocabulary.

    `changes` replace other fields of the model config, such as `init_scale`.
    Source: Radford et al., 2021, arXiv:2103.00020, and the code that OpenAI published with it.

    Raises:
        ConfigError: no such name, or no CLIP of that size.
    """
    return Recipe(
        model=_at(variants.clip(name, **changes), image_size),
        preprocess=PreprocessConfig(
            image_size=image_size, resize="crop", mean=CLIP_MEAN, std=CLIP_STD
        ),
        tokenizer=TokenizerConfig(
            context_length=77, pad_id=0, bos_id=49_406, eos_id=49_407, clean="clip"
        ),
        tokenizer_file="clip",
    )


def siglip(name: str, *, tokenizer_file: str, image_size: int = 224, **changes: Any) -> Recipe:
    """SigLIP of size `name`, such as "So400m/14", with its preprocessing and tokenizer rules.

    The vocabulary is not in the package: `tokenizer_file` is the `tokenizer.json` of T5's 32,000
    English pieces (c4_en), as `vlm data tokenizer OUT --model google/siglip-base-patch16-224`
    writes it. `changes` replace other fields of the model config.
    Source: Zhai et al., 2023, arXiv:2303.15343.

    Raises:
        ConfigError: no such name.
    """
    return Recipe(
        model=_at(variants.siglip(name, **changes), image_size),
        preprocess=PreprocessConfig(image_size=image_size, backend="tensor", kernel="bilinear"),
        tokenizer=TokenizerConfig(context_length=64, pad_id=1, eos_id=1, clean="siglip"),
        tokenizer_file=tokenizer_file,
    )


def _at(model: ModelConfig, image_size: int) -> ModelConfig:
    vision = dataclasses.replace(model.vision, image_size=image_size)
    return dataclasses.replace(model, vision=vision)
