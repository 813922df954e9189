"""Counts of the table of known models beside those of open_clip's modules."""

import pytest

from vlm.weights.catalogue import ENTRIES

pytestmark = pytest.mark.peers

NAMES = {
    "ViT-H/14@378": "ViT-H-14-378",
    "ViT-H/14 worldwide": "ViT-H-14-worldwide",
    "MobileCLIP-B": "MobileCLIP-B",
    "SigLIP2 B/32@256": "ViT-B-32-SigLIP2-256",
    "SigLIP2 B/16": "ViT-B-16-SigLIP2",
    "SigLIP2 B/16@256": "ViT-B-16-SigLIP2-256",
    "SigLIP2 B/16@384": "ViT-B-16-SigLIP2-384",
    "SigLIP2 B/16@512": "ViT-B-16-SigLIP2-512",
    "SigLIP2 L/16@256": "ViT-L-16-SigLIP2-256",
    "SigLIP2 L/16@384": "ViT-L-16-SigLIP2-384",
    "SigLIP2 L/16@512": "ViT-L-16-SigLIP2-512",
    "SigLIP2 So400m/14": "ViT-SO400M-14-SigLIP2",
    "SigLIP2 So400m/14@384": "ViT-SO400M-14-SigLIP2-378",  # of as many patches
    "SigLIP2 So400m/16@256": "ViT-SO400M-16-SigLIP2-256",
    "SigLIP2 So400m/16@384": "ViT-SO400M-16-SigLIP2-384",
    "SigLIP2 So400m/16@512": "ViT-SO400M-16-SigLIP2-512",
    "SigLIP2 g-opt/16@256": "ViT-gopt-16-SigLIP2-256",
    "SigLIP2 g-opt/16@384": "ViT-gopt-16-SigLIP2-384",
}


@pytest.mark.parametrize("architecture", NAMES)
def test_a_count_is_that_of_open_clip(architecture):
    torch, open_clip = pytest.importorskip("torch"), pytest.importorskip("open_clip")
    config = open_clip.get_model_config(NAMES[architecture])
    custom = config.pop("custom_text", False)
    with torch.device("meta"):
        model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    (found,) = {entry.parameters for entry in ENTRIES if entry.architecture == architecture}
    assert found == pytest.approx(count, abs=0.006)
