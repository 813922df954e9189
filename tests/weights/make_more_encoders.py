"""Writes goldens of AIMv2, FLAVA, OWLv2, GroupViT, BLIP-2 and InternVL: small random models.

Run with the extra `peers` installed: python tests/weights/make_more_encoders.py [NAME ...]
"""

import sys
from types import SimpleNamespace

import torch
from make_dual_encoders import CROP, SQUARE, VISION, embed, record, text_of, vocabulary_of
from make_vision_towers import transformers as record_vision
from transformers import (
    Aimv2Config,
    Aimv2Model,
    Aimv2VisionConfig,
    Aimv2VisionModel,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    FlavaConfig,
    FlavaForPreTraining,
    FlavaImageProcessorPil,
    FlavaModel,
    GotOcr2ImageProcessorPil,
    GroupViTConfig,
    GroupViTModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
)


def aimv2(name: str, seed: int) -> None:
    made = vocabulary_of("clip")
    config = Aimv2Config(
        text_config=text_of("clip", *made), vision_config=VISION, projection_dim=20
    )
    model = Aimv2Model(config)
    record(name, model, CLIPImageProcessorPil(**CROP), "clip", made, seed, embed)


def of_flava(model, pixels, tokens, mask):
    """What `FlavaForPreTraining` computes for its contrastive loss."""
    model = getattr(model, "flava", model)
    image = model.get_image_features(pixel_values=pixels).pooler_output[:, 0]
    text = model.get_text_features(input_ids=tokens, attention_mask=mask).pooler_output[:, 0]
    unit = torch.nn.functional.normalize
    logits = model.logit_scale.exp() * unit(image) @ unit(text).T
    return SimpleNamespace(image_embeds=image, text_embeds=text, logits_per_image=logits)


def flava(name: str, kind, seed: int, **options) -> None:
    made = vocabulary_of("bert")
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 8}  # fmt: skip
    config = FlavaConfig(
        text_config=text_of("bert", *made) | options,
        image_config=VISION | {"vocab_size": 8} | options,
        multimodal_config=small, projection_dim=20, hidden_size=24,
        init_codebook=False,
    )  # fmt: skip
    model = kind(config)
    processor = FlavaImageProcessorPil(size=SQUARE, crop_size=SQUARE)
    record(name, model, processor, "bert", made, seed, of_flava)


def owlv2(name: str, seed: int) -> None:
    made = vocabulary_of("clip")
    config = Owlv2Config(
        text_config=text_of("clip", *made), vision_config=VISION, projection_dim=24
    )
    model, processor = Owlv2ForObjectDetection(config), Owlv2ImageProcessorPil(size=SQUARE)
    record(name, model, processor, "clip", made, seed, lambda m, *given: embed(m.owlv2, *given))


def groupvit(name: str, seed: int) -> None:
    made = vocabulary_of("clip")
    stages = {"depths": [2, 1, 1], "num_group_tokens": [6, 3, 0], "num_output_groups": [6, 3, 3],
              "num_hidden_layers": 4}  # fmt: skip
    config = GroupViTConfig(
        text_config=text_of("clip", *made), vision_config=VISION | stages, projection_dim=20,
        projection_intermediate_dim=28,
    )  # fmt: skip
    model = GroupViTModel(config)
    generator = torch.Generator().manual_seed(seed)
    for key, buffer in model.named_buffers():
        if "running" in key:
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    record(name, model, CLIPImageProcessorPil(**CROP), "clip", made, seed, embed)


def blip2(name: str, seed: int) -> None:
    made = vocabulary_of("bert")
    vocabulary = made[0]
    config = Blip2Config(
        vision_config=VISION,
        qformer_config=text_of("bert", *made)
        | {"use_qformer_text_input": True, "num_hidden_layers": 3},
        text_config={
            "model_type": "opt", "hidden_size": 8, "ffn_dim": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "vocab_size": 8, "word_embed_proj_dim": 8,
        },
        num_query_tokens=5,
        image_text_hidden_size=16,
    )  # fmt: skip
    vocabulary.add_special_tokens(["<image>"])  # as its processor does, without a row in the table
    model = Blip2ForImageTextRetrieval(config)
    record(name, model, BlipImageProcessorPil(size=SQUARE), "bert", made, seed, embed)


def internvl(name: str, seed: int, **options) -> None:
    config = InternVLVisionConfig(**VISION, **options)
    processor = GotOcr2ImageProcessorPil(size={"height": 40, "width": 40})
    mean = config.use_mean_pooling

    def pooled(out):
        hidden = out.last_hidden_state
        return hidden[:, 1:].mean(1) if mean else hidden[:, 0]

    record_vision(name, InternVLVisionModel(config), processor, seed, pooled)


MODELS = {
    "hf_aimv2": lambda: aimv2("hf_aimv2", 31),
    "one_aimv2": lambda: record_vision(
        "one_aimv2",
        Aimv2VisionModel(Aimv2VisionConfig(**VISION, qkv_bias=True, mlp_bias=True)),
        CLIPImageProcessorPil(**CROP),
        32,
    ),
    "hf_flava": lambda: flava("hf_flava", FlavaModel, 33, qkv_bias=False),
    "hf_owlv2": lambda: owlv2("hf_owlv2", 35),
    "hf_groupvit": lambda: groupvit("hf_groupvit", 36),
    "hf_blip2": lambda: blip2("hf_blip2", 40),
    "one_internvl": lambda: internvl("one_internvl", 37, norm_type="rms_norm"),
    "one_internvl_class": lambda: internvl(
        "one_internvl_class", 38, use_mean_pooling=False, attention_bias=True, use_mask_token=True
    ),
    "one_internvl_qk_norm": lambda: internvl(
        "one_internvl_qk_norm", 39, norm_type="rms_norm", use_qk_norm=True
    ),
    "hf_flava_pretraining": lambda: flava("hf_flava_pretraining", FlavaForPreTraining, 34),
}


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        torch.manual_seed(0)
        MODELS[name]()
