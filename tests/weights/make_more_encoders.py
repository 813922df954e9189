"""Writes goldens of AIMv2: small random models.

Run with the extra `peers` installed: python tests/weights/make_more_encoders.py
"""

import torch
from make_dual_encoders import CROP, VISION, embed, record, text_of, vocabulary_of
from make_vision_towers import transformers as record_vision
from transformers import (
    Aimv2Config,
    Aimv2Model,
    Aimv2VisionConfig,
    Aimv2VisionModel,
    CLIPImageProcessorPil,
)


def aimv2(name: str, seed: int) -> None:
    made = vocabulary_of("clip")
    config = Aimv2Config(
        text_config=text_of("clip", *made), vision_config=VISION, projection_dim=20
    )
    model = Aimv2Model(config)
    record(name, model, CLIPImageProcessorPil(**CROP), "clip", made, seed, embed)


if __name__ == "__main__":
    torch.manual_seed(0)
    aimv2("hf_aimv2", 31)
    biased = Aimv2VisionConfig(**VISION, qkv_bias=True, mlp_bias=True)
    record_vision("one_aimv2", Aimv2VisionModel(biased), CLIPImageProcessorPil(**CROP), 32)
