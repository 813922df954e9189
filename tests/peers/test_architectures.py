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
