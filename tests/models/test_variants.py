"""Named sizes hold the published numbers of parameters."""

import math

import jax
import pytest
from flax import nnx

from vlm.config import Experiment
from vlm.errors import ConfigError
from vlm.models import recipes, variants
from vlm.models.dual_encoder import DualEncoder
from vlm.training.start import tokenizer_of


def millions(config) -> tuple[float, float]:
    """Parameters of the image and of the text tower."""
    model = nnx.eval_shape(lambda: DualEncoder(config, rngs=nnx.Rngs(0)))
    return tuple(
        sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(tower))) / 1e6
        for tower in (model.vision, model.text)
    )


# As open_clip counts its models (docs/model_profile.csv), in millions.
@pytest.mark.parametrize(
    ("name", "image", "text"),
    [
        ("B/32", 87.85, 63.43),
        ("B/16", 86.19, 63.43),
        ("L/14", 303.97, 123.65),
        ("H/14", 632.08, 354.03),
    ],
)
def test_clip_has_the_published_size(name, image, text):
    got = millions(variants.clip(name))
    assert got == pytest.approx((image, text), abs=0.01)


# SigLIP B/16: 203 M in all; So400m/14: 878 M in all (model cards).
@pytest.mark.parametrize(("name", "total"), [("B/16", 203.16), ("So400m/14", 877.4)])
def test_siglip_has_the_published_size(name, total):
    assert sum(millions(variants.siglip(name))) == pytest.approx(total, rel=2e-3)


def test_every_name_is_a_model():
    for name in variants.NAMES:
        assert variants.siglip(name).vision.patch_size == int(name.split("/")[1])
    assert variants.vision("B/16", image_size=384).image_size == 384


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ConfigError, match=r"no size 'B/8': choose one of Ti/16, S/16"):
        variants.vision("B/8")
    with pytest.raises(ConfigError, match=r"no CLIP of size 'So400m/14'.*H/14"):
        variants.clip("So400m/14")


def test_a_recipe_is_a_model_with_its_pixels_and_its_tokens():
    experiment = Experiment(**recipes.clip("B/16", image_size=384, init_scale=10.0), steps=1)
    assert experiment.model.init_scale == 10
    assert experiment.model.vision.image_size == experiment.preprocess.image_size == 384
    tokens = tokenizer_of(experiment)(["A cat", "two dogs"])
    assert tokens.shape[1] == experiment.model.text.context_length == 77
    assert tokens.max() == experiment.model.text.vocab_size - 1 == experiment.tokenizer.eos_id
    siglip = Experiment(**recipes.siglip("S/16", tokenizer_file="t.json"), steps=1)
    assert (siglip.model.loss, siglip.tokenizer_file) == ("sigmoid", "t.json")
    with pytest.raises(ConfigError, match="no CLIP of size 'So400m/14'"):
        recipes.clip("So400m/14")
