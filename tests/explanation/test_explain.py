"""Explanations for every kind of tower: completeness, positions and errors."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import vlm
from vlm.cli import main
from vlm.config import (
    ConvNeXtConfig,
    FastViTConfig,
    FastViTStage,
    PreprocessConfig,
    ResNetConfig,
)
from vlm.errors import ConfigError, DataError
from vlm.explanation.geometry import grid, on_image
from vlm.explanation.heat_map import Explanation, check_method, explain
from vlm.explanation.methods import relevance_maps
from vlm.inputs.preprocess import Preprocess
from vlm.models.dual_encoder import DualEncoder
from vlm.nn.intermediates import Intermediates

GOLDEN = pathlib.Path(__file__).parent.parent / "weights" / "golden"
KINDS = {
    "class": "oc_vit",
    "mean": "oc_mean",
    "map": "hf_siglip",
    "naflex": "hf_naflex",
    "query": "oc_coca",
    "rotary": "oc_pe",
    "convnext": "oc_convnext",
    "vitamin": "oc_vitamin",
    "efficientnet": "hf_align",
    # The golden ResNet has no vocabulary; the golden FastViT is less smooth than trained ones.
    "resnet": ResNetConfig(image_size=32, depths=(1, 1), width=8, heads=2),
    "fastvit": FastViTConfig(
        stem_width=8,
        stages=(
            FastViTStage(1, 8, 16, halve=False),
            FastViTStage(1, 16, 32, heads=2, norm=True, position=True),
        ),
        width=32,
        squeeze=8,
        image_size=32,
    ),
}
# Mean pooling, queries and rotary positions take the same code path as these.
PATH_KINDS = ["class", "map", "naflex", "resnet", "convnext", "fastvit", "vitamin", "efficientnet"]
TEXT = "a small dog"


def photo(size=(90, 60)):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def load(kind):
    """Load or create a model of random weights with that kind of vision tower."""
    tower = KINDS[kind]
    if isinstance(tower, str):
        return vlm.load(GOLDEN / tower)
    clip = vlm.load(GOLDEN / "oc_vit")
    config = dataclasses.replace(clip.config, vision=tower)
    encoder = DualEncoder(config, rngs=nnx.Rngs(0))
    preprocess = Preprocess(PreprocessConfig(image_size=32))
    return vlm.Bundle(encoder, preprocess, clip.tokenizer, kind)


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return load(request.param)


@pytest.fixture(scope="module", params=["class", "naflex", "resnet"])
def some_model(request):
    return load(request.param)


@pytest.fixture(scope="module")
def clip():
    return vlm.load(GOLDEN / "oc_vit")


def normalised(model, pixels):
    return model.preprocess.normalize(model.preprocess.collate([pixels]))


@pytest.mark.parametrize("kind", PATH_KINDS)
def test_the_path_adds_up_to_the_cosine(kind):
    model = load(kind)
    z_text = model.encode_text([TEXT])
    pixels = model.preprocess.pixels(photo()).astype(np.float32)
    blank = np.broadcast_to(pixels.mean((0, 1)), pixels.shape)
    maps, cosine = relevance_maps(model.model, normalised(model, pixels), z_text, "path")
    of_blank, start = relevance_maps(model.model, normalised(model, blank), z_text, "path")
    expected = (model.encode_image([photo()]) @ z_text.T)[0, 0]
    assert float(cosine[0]) == pytest.approx(expected, abs=1e-5)
    difference = float(cosine[0] - start[0])
    assert float(maps.sum()) == pytest.approx(difference, abs=0.02 * abs(difference) + 1e-4)
    assert np.abs(maps).max() > 1e-5
    assert np.abs(of_blank).max() < 1e-6


ODD = [
    ("convnext", ConvNeXtConfig(image_size=47, depths=(1, 1, 1), widths=(8, 12, 16),
                                mlp_dims=(16, 24, 32))),
    ("resnet", ResNetConfig(image_size=35, depths=(1, 1), width=8, heads=2)),
    ("resnet", ResNetConfig(image_size=39, depths=(1, 1), width=8, heads=2)),
    ("fastvit", dataclasses.replace(KINDS["fastvit"], image_size=41)),
    ("mean", 29),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "tower"), ODD)
def test_the_path_adds_up_at_odd_sizes(kind, tower):
    """Sides that no stride divides, where a row and column of the first stage were left out."""
    clip = vlm.load(GOLDEN / "oc_vit")
    embed_dim = clip.config.embed_dim
    if isinstance(tower, int):
        vision = vlm.load(GOLDEN / KINDS[kind]).config.vision
        tower = dataclasses.replace(vision, image_size=tower)
    config = dataclasses.replace(clip.config, vision=tower)
    encoder = DualEncoder(config, rngs=nnx.Rngs(0))
    preprocess = Preprocess(PreprocessConfig(image_size=tower.image_size))
    model = vlm.Bundle(encoder, preprocess, clip.tokenizer, kind)
    z_text = np.random.default_rng(0).standard_normal((1, embed_dim)).astype(np.float32)
    z_text /= np.linalg.norm(z_text)
    pixels = preprocess.pixels(photo()).astype(np.float32)
    blank = np.broadcast_to(pixels.mean((0, 1)), pixels.shape)
    maps, cosine = relevance_maps(encoder, normalised(model, pixels), z_text, "path")
    start = encoder.encode_image(jnp.asarray(normalised(model, blank)))[0] @ z_text[0]
    difference = float(cosine[0] - start)
    assert abs(difference) > 1e-4
    assert float(maps.sum()) == pytest.approx(difference, rel=0.05, abs=1e-4)
    rows, columns = grid(tower, preprocess, photo().size)
    assert maps.shape == (1, rows * columns)


def test_every_position_has_its_own_similarity(model):
    pixels = model.preprocess.pixels(photo())
    z_text = model.encode_text([TEXT])
    maps, _ = relevance_maps(model.model, normalised(model, pixels), z_text, "similarity")
    rows, columns = grid(model.config.vision, model.preprocess, photo().size)
    places = np.asarray(maps)[0, : rows * columns]
    assert np.abs(places).max() <= 1 + 1e-5
    assert len(places) == 1 or places.std() > 1e-4


def test_captured_intermediates_do_not_change_the_embedding(some_model):
    model = some_model
    images = jax.tree.map(jnp.asarray, normalised(model, model.preprocess.pixels(photo())))
    z_text = jnp.asarray(model.encode_text([TEXT]))

    @jax.jit
    def score(changes):
        intermediates = Intermediates(changes)
        z = model.model.encode_image(images, intermediates=intermediates)
        return (z * z_text).sum(), (intermediates.found, z)

    _, (found, z) = score({})
    np.testing.assert_allclose(z, model.encode_image([photo()]), atol=3e-6)
    for name, weights in found.items():
        if name.endswith("attention"):
            np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    if "stem" in found:
        depth = model.config.vision.depth
        assert found["blocks/attention"].shape[0] == depth
        assert found["blocks/output"].shape == (depth, *found["stem"].shape)
    # A small change of an intermediate changes the score as its gradient predicts.
    name = "blocks/attention" if "stem" in found else "stages/0"
    direction = jax.random.normal(jax.random.key(0), found[name].shape)
    gradient, _ = jax.grad(score, has_aux=True)({name: 0 * direction})
    up, down = (score({name: size * direction})[0] for size in (1e-2, -1e-2))
    slope = float((gradient[name] * direction).sum())
    assert slope == pytest.approx(float(up - down) / 2e-2, rel=0.1, abs=1e-3)


def test_intermediates_are_captured_only_on_request(clip):
    """With intermediates the scan of the blocks has more outputs than the tokens."""

    images = normalised(clip, clip.preprocess.pixels(photo()))

    def outputs(intermediates):
        program = jax.make_jaxpr(lambda x: clip.model.encode_image(x, intermediates=intermediates))(
            images
        )
        (scan,) = [e for e in program.eqns if e.primitive.name == "scan"]
        return len(scan.outvars)

    assert (outputs(None), outputs(Intermediates())) == (1, 3)


@pytest.mark.parametrize("method", ["attention", "gradcam"])
def test_the_other_methods_give_maps_that_depend_on_the_text(some_model, method):
    model = some_model
    pixels = [model.preprocess.pixels(photo())] * 2
    images = model.preprocess.normalize(model.preprocess.collate(pixels))
    z_text = model.encode_text([TEXT, "something else"])
    maps = np.asarray(relevance_maps(model.model, images, z_text, method)[0])
    assert (maps >= 0).all()
    assert maps.std(1).max() > 0
    assert np.abs(maps[0] - maps[1]).max() > 0


@pytest.mark.parametrize(
    "config",
    [
        PreprocessConfig(image_size=32, resize="squash"),
        PreprocessConfig(image_size=32, resize="squash", short_side=40),
        PreprocessConfig(image_size=32, resize="crop"),
        PreprocessConfig(image_size=32, resize="crop", short_side=40),
        PreprocessConfig(image_size=32, resize="pad"),
        PreprocessConfig(resize="naflex", patch_size=8, max_patches=20, image_size=32),
    ],
    ids=lambda config: f"{config.resize}{config.short_side or ''}",
)
@pytest.mark.parametrize("size", [(64, 64), (120, 70), (50, 90)])
def test_a_position_maps_to_its_pixels(config, size):
    """A spot drawn at the heat of one position is in the input patch of that position."""
    preprocess = Preprocess(config)
    width, height = size
    shape = preprocess.pixels(Image.new("RGB", size)).shape[:2]
    rows, columns = shape[0] // 8, shape[1] // 8
    for place in ((rows // 2, columns // 2), (rows // 2 - 1, columns // 2 - 1)):
        places = np.zeros((rows, columns), np.float32)
        places[place] = 1
        heat = on_image(places, preprocess, 8, size)
        assert heat.shape == (height, width)
        spot = np.repeat(np.uint8(255 * heat**2)[..., None], 3, 2)
        pixels = preprocess.pixels(spot).astype(float)[..., 0]
        by_position = pixels.reshape(rows, 8, columns, 8).sum((1, 3))
        assert np.unravel_index(by_position.argmax(), by_position.shape) == place


def test_pixels_outside_the_crop_have_no_heat():
    preprocess = Preprocess(PreprocessConfig(image_size=32, resize="crop"))
    heat = on_image(np.ones((4, 4), np.float32), preprocess, 8, (100, 50))
    assert heat[:, :24].max() == heat[:, 76:].max() == 0
    assert heat[:, 26:74].min() == pytest.approx(1)


def test_token_importance_is_leave_one_out(clip):
    found = explain(clip, photo(), TEXT)
    assert "".join(name for name, _ in found.tokens).replace(" ", "") == "asmalldog"
    z_image = clip.encode_image([photo()])
    rows = clip.tokenizer([TEXT])
    first = 0 if clip.tokenizer.config.bos_id is None else 1
    without = np.append(np.delete(rows[0], first), clip.tokenizer.config.pad_id)
    z = clip.model.encode_text(jnp.asarray(without[None], jnp.int32))
    assert found.tokens[0][1] == pytest.approx(
        found.cosine - float((z @ z_image.T)[0, 0]), abs=1e-5
    )


def test_an_explanation_is_rendered_and_saved(clip, tmp_path):
    found = vlm.explain(clip, photo(), "a <b> dog")
    assert isinstance(found, Explanation)
    assert (found.heat.shape, found.heat.dtype) == ((60, 90), np.float32)
    assert (found.heat.min() >= 0) & (found.heat.max() <= 1)
    assert found.logit == pytest.approx(clip.logit_scale * found.cosine, abs=1e-3)
    assert "&lt;b&gt;" in found._repr_html_()
    assert found._repr_html_().count("<img") == 2
    found.save(tmp_path / "heat.png")
    assert Image.open(tmp_path / "heat.png").size == (90, 60)
    assert "a <b> dog" in repr(found)


def test_the_command(tmp_path, capsys):
    photo().save(tmp_path / "photo.png")
    out = tmp_path / "heat.png"
    line = [
        "explain",
        "--model",
        str(GOLDEN / "oc_vit"),
        str(tmp_path / "photo.png"),
        TEXT,
        "--out",
        str(out),
    ]
    assert main(line) == 0
    assert capsys.readouterr().out.startswith("cosine ")
    assert Image.open(out).size == (90, 60)
    assert main([*line[:-1], "heat.jpg"]) == 2
    assert "ends in .png" in capsys.readouterr().err
    assert main([*line[:3], str(tmp_path / "none.png"), TEXT]) == 1
    assert "none.png" in capsys.readouterr().err


@pytest.mark.untyped
def test_bad_input(clip):
    with pytest.raises(ConfigError, match="choose one of path"):
        explain(clip, photo(), TEXT, method="magic")
    with pytest.raises(DataError, match="give one string"):
        explain(clip, photo(), ["a", "b"])
    with pytest.raises(DataError, match="one image"):
        explain(clip, [photo(), photo()], TEXT)
    with pytest.raises(DataError):
        explain(clip, b"no image", TEXT)
    with pytest.raises(ConfigError, match='choose "path"'):
        check_method("attention", ConvNeXtConfig())
    with pytest.raises(ConfigError, match="without its text tower"):
        explain(vlm.load(GOLDEN / "oc_vit", tower="vision"), photo(), TEXT)
    with pytest.raises(ConfigError, match="without its vision tower"):
        explain(vlm.load(GOLDEN / "oc_vit", tower="text"), photo(), TEXT)
