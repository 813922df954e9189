"""A sample of open_clip's architectures, one block deep, beside ours by their numbers.

`python tests/peers/architectures.py --numbers` walks all of them.
"""

import json

import pytest

pytestmark = [pytest.mark.peers, pytest.mark.untyped]  # the script looks at shapes without arrays

SAMPLE = (
    "ViT-S-32-alt",
    "RN50-quickgelu",
    "convnext_tiny",
    "EVA02-B-16",
    "MobileCLIP2-S0",
    "ViTamin-S",
    "ViT-B-16-SigLIP",
    "PE-Core-T-16-384",
    "roberta-ViT-B-32",
)


@pytest.mark.parametrize("name", SAMPLE)
def test_an_architecture_agrees(name):
    pytest.importorskip("open_clip")
    architectures = pytest.importorskip("architectures")
    assert architectures.agrees(name).startswith("exact")


@pytest.mark.parametrize("name", ["ViT-B-32", "coca_base", "nllb-clip-base", "ViT-bigG-14"])
def test_an_architecture_fits(name):
    pytest.importorskip("open_clip")
    architectures = pytest.importorskip("architectures")
    assert architectures.fits(name).startswith("fits")


# BiomedCLIP's layout, and each pool, projection and pooler of open_clip beside it.
BIOMED = {
    "embed_dim": 512,
    "vision_cfg": {"timm_model_name": "vit_base_patch16_224", "timm_model_pretrained": False,
                   "timm_pool": "", "timm_proj": "linear", "image_size": 224},
    "text_cfg": {"hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
                 "hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler",
                 "context_length": 256},
}  # fmt: skip
TOWERS = {
    "biomed": ({}, {}),
    "head": ({"timm_pool": "token", "timm_proj": None}, {"hf_pooler_type": "cls_pooler"}),
    "mlp": ({"timm_pool": "avg", "timm_proj": "mlp"}, {"hf_pooler_type": "mean_pooler"}),
    "bias": ({"timm_proj_bias": True}, {"hf_pooler_type": "max_pooler", "hf_proj_type": "linear"}),
    "mean": ({"timm_pool": "avg", "timm_proj": None}, {"hf_pooler_type": None}),
    "none": (
        {"timm_model_name": "vit_medium_patch32_clip_224", "timm_pool": "token",
         "timm_proj": "none"},
        {"hf_model_name": "xlm-roberta-base", "hf_pooler_type": "cls_pooler"},
    ),
    "clip": (
        {"timm_model_name": "vit_base_patch16_clip_quickgelu_224"},
        {"hf_model_name": "roberta-base", "hf_pooler_type": "max_pooler"},
    ),
    "registers": (
        {"timm_model_name": "vit_small_patch14_reg4_dinov2", "image_size": 518},
        {"hf_model_name": "bert-base-uncased"},
    ),
    "deit3": ({"timm_model_name": "deit3_small_patch16_224"}, {}),
    "gap": ({"timm_model_name": "vit_medium_patch16_gap_256", "image_size": 256}, {}),
    "gap_registers": (
        {"timm_model_name": "vit_betwixt_patch16_reg4_gap_256", "image_size": 256}, {}
    ),
    "siglip": ({"timm_model_name": "vit_base_patch16_siglip_224", "timm_proj": "mlp"}, {}),
    "swin": (
        {"timm_model_name": "swin_tiny_patch4_window7_224", "timm_pool": "avg", "timm_proj": None},
        {"hf_model_name": "google/mt5-base", "hf_pooler_type": "mean_pooler"},
    ),
    "resnet": (
        {"timm_model_name": "resnet18", "timm_pool": "avg", "timm_proj_bias": True,
         "image_size": 65},
        {"hf_model_name": "google/mt5-base", "hf_proj_type": "linear",
         "hf_pooler_type": "cls_pooler"},
    ),
    "resnet_attention": (
        {"timm_model_name": "resnet50", "timm_pool": "abs_attn", "timm_proj": None}, {}
    ),
    "efficientnet": (
        {"timm_model_name": "efficientnet_b2", "timm_proj": "mlp", "image_size": 97}, {}
    ),
    "efficientnet_tensorflow": (
        {"timm_model_name": "tf_efficientnet_b1", "timm_pool": "rot_attn", "timm_proj": None,
         "image_size": 75},
        {},
    ),
    "convnext_attention": (
        {"timm_model_name": "convnext_tiny", "timm_pool": "abs_attn", "timm_proj": "linear"}, {}
    ),
    "convnext_rotary": (
        {"timm_model_name": "convnext_tiny", "timm_pool": "rot_attn", "timm_proj": None,
         "image_size": 96},
        {},
    ),
    "convnext_head": (
        {"timm_model_name": "convnext_tiny", "timm_pool": "avg", "timm_proj": None,
         "image_size": 96},
        {},
    ),
    "siglip_gap": (
        {"timm_model_name": "vit_base_patch16_siglip_gap_224", "timm_pool": "avg",
         "timm_proj": None},
        {},
    ),
}  # fmt: skip


def max_pooler(self, x, attention_mask):
    """open_clip's main; its version 3.3 fails on the type of the mask."""
    masked = x.last_hidden_state.masked_fill(~attention_mask.bool().unsqueeze(-1), -float("inf"))
    return masked.max(1).values


def added(name, tmp_path, monkeypatch):
    """Add a config of `TOWERS` to open_clip, and return the module that compares it."""
    open_clip = pytest.importorskip("open_clip")
    monkeypatch.setattr(open_clip.hf_model.MaxPooler, "forward", max_pooler)
    architectures = pytest.importorskip("architectures")
    vision, text = TOWERS[name]
    config = BIOMED | {"vision_cfg": BIOMED["vision_cfg"] | vision,
                       "text_cfg": BIOMED["text_cfg"] | text}  # fmt: skip
    (tmp_path / f"towers-{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"towers-{name}.json")
    return architectures


@pytest.mark.parametrize("name", TOWERS)
def test_towers_of_timm_and_transformers_agree(name, tmp_path, monkeypatch):
    architectures = added(name, tmp_path, monkeypatch)
    assert architectures.agrees(f"towers-{name}").startswith("exact")


def test_a_tensorflow_tower_agrees_at_another_image_size(tmp_path, monkeypatch):
    """Its padding at 75 pixels is not that at 96."""
    architectures = added("efficientnet_tensorflow", tmp_path, monkeypatch)
    verdict = architectures.agrees("towers-efficientnet_tensorflow", 96)
    assert verdict.startswith("exact"), verdict


# The tiny one of UCSC-VLAA's OpenVision (arXiv:2505.04601), in the form that it has on the Hub.
OPENVISION = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 160, "layers": 12, "width": 192, "patch_size": 16,
                   "head_width": 64, "no_ln_pre": True, "pool_type": "avg",
                   "final_ln_after_pool": True, "norm_kwargs": {"eps": 1e-6}},
    "text_cfg": {"context_length": 80, "vocab_size": 32000, "width": 192, "heads": 3, "layers": 12,
                 "hf_tokenizer_name": "bert-base-uncased", "pool_type": "last",
                 "tokenizer_kwargs": {"strip_sep_token": True}, "no_causal_mask": True,
                 "act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6}},
}  # fmt: skip


def test_openvision_agrees(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    architectures = pytest.importorskip("architectures")
    (tmp_path / "openvision-tiny.json").write_text(json.dumps(OPENVISION))
    open_clip.add_model_config(tmp_path / "openvision-tiny.json")
    assert architectures.fits("openvision-tiny").startswith("fits")
    assert architectures.agrees("openvision-tiny").startswith("exact")
