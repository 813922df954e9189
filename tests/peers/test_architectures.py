"""A sample of open_clip's architectures, one block deep, beside ours by their numbers.

`python tests/peers/architectures.py --numbers` walks all of them.
"""

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
