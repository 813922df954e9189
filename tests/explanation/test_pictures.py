"""Segmentation, embedding maps, faithfulness curves and overlays."""

import pathlib

import numpy as np
import pytest
from PIL import Image

import vlm
from vlm.errors import ConfigError, DataError
from vlm.explanation.curves import faithfulness
from vlm.explanation.heat_map import colours, overlay
from vlm.explanation.projection import embedding_map
from vlm.explanation.segmentation import segment

GOLDEN = pathlib.Path(__file__).parent.parent / "weights" / "golden"


@pytest.fixture(scope="module")
def clip():
    return vlm.load(GOLDEN / "oc_vit")


def photo(size=(90, 60)):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def test_every_visible_pixel_gets_a_label(clip):
    found = segment(clip, photo(), ["a dog", "grass"], templates=["{}"], other_label="a photo.")
    assert found.labels == ("a dog", "grass", "none of these")
    assert found.scores.shape == (3, 60, 90)
    assert found.mask.shape == (60, 90)
    # This model crops: it sees the middle 60 x 60 pixels.
    assert (found.mask[:, :14] == -1).all()
    assert (found.mask[:, 16:74] >= 0).all()
    np.testing.assert_allclose(found.scores[:, :, 20:70].sum(0), 1, atol=1e-4)
    assert sum(share for _, share in found.shares) == pytest.approx(1)
    assert found.picture().size == (90, 60)
    assert found._repr_html_().count("<img") == 2


@pytest.mark.untyped
def test_bad_input_of_segment(clip):
    with pytest.raises(ConfigError):
        segment(clip, photo(), [])
    with pytest.raises(DataError, match="one image"):
        segment(clip, [photo()], ["a"])
    with pytest.raises(ConfigError, match="without its vision tower"):
        segment(vlm.load(GOLDEN / "oc_vit", tower="text"), photo(), ["a"])


def squares(n):
    return [Image.new("RGB", (20, 20), (10 * i, 0, 0)) for i in range(n)]


def test_a_map_preserves_planar_embeddings(tmp_path):
    rng = np.random.default_rng(0)
    plane = rng.standard_normal((12, 2))
    rotation = np.linalg.qr(rng.standard_normal((8, 8)))[0][:2]
    z = np.float32(plane @ rotation)
    found = embedding_map(z, squares(12))
    assert found.explained == pytest.approx(1)
    assert found.points.min() >= 0
    assert found.points.max() <= 1
    # Distances equal those of the embeddings up to a scale.
    ours = np.linalg.norm(found.points[:, None] - found.points, axis=-1)
    theirs = np.linalg.norm(plane[:, None] - plane, axis=-1)
    ratio = ours[np.triu_indices(12, 1)] / theirs[np.triu_indices(12, 1)]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    again = embedding_map(z, squares(12))
    np.testing.assert_array_equal(found.points, again.points)
    assert found.svg() == again.svg()
    assert found.svg().count("<circle") == 12
    for name in ("map.svg", "map.png"):
        found.save(tmp_path / name)
    assert Image.open(tmp_path / "map.png").size == (900, 900)
    assert "<svg" in found._repr_html_()
    with pytest.raises(ConfigError, match="neither"):
        found.save(tmp_path / "map.gif")


@pytest.mark.untyped
def test_a_map_of_given_points():
    points = np.array([[0.0, 0], [2, 0], [0, 1]])
    found = embedding_map(np.eye(3, dtype=np.float32), squares(3), projection=points)
    assert found.explained is None
    np.testing.assert_allclose(found.points, [[0, 0.25], [1, 0.25], [0, 0.75]])
    for bad in (points[:2], np.full((3, 2), np.nan)):
        with pytest.raises(DataError):
            embedding_map(np.eye(3, dtype=np.float32), squares(3), projection=bad)
    with pytest.raises(DataError, match="give one for each"):
        embedding_map(np.eye(3, dtype=np.float32), squares(2))
    with pytest.raises(DataError, match="at least two"):
        embedding_map(np.eye(1, dtype=np.float32), squares(1))


def test_lightness_is_monotonic_and_heat_is_visible():
    scale = colours(np.linspace(0, 1, 20)[None])[0].astype(float)
    assert (np.diff(scale @ [0.299, 0.587, 0.114]) > 0).all()
    heat = np.zeros((60, 90), np.float32)
    heat[20:40, 30:60] = 1
    drawn = np.asarray(overlay(photo(), heat)).astype(float)
    assert np.ptp(drawn[5, 5]) == 0  # grey
    assert np.ptp(drawn[30, 45]) > 20


class RedSquare:
    """Stub model: scores of "red corner" and "no red corner"."""

    logit_scale = 4.0


@pytest.mark.untyped  # the model is a stand-in
def test_a_faithful_map_beats_its_opposite(monkeypatch):
    """For a model that sees one corner only, the map of that corner beats its complement."""
    image = np.zeros((16, 16, 3), np.uint8)
    image[:8, :8] = (255, 0, 0)

    def encode(model, images, batch_size):
        red = np.array([float(i[:8, :8, 0].mean()) / 255 for i in images], np.float32)
        return np.stack([red, 1 - red], axis=1)

    monkeypatch.setattr("vlm.explanation.curves._encode", encode)
    true = np.zeros((16, 16), np.float32)
    true[:8, :8] = 1
    areas = faithfulness(
        RedSquare(), [image, image], [true, 1 - true], np.eye(2, dtype=np.float32), np.array([0, 0])
    )
    assert areas.deletion[0] < areas.deletion[1] - 0.2
    assert areas.insertion[0] > areas.insertion[1] + 0.02


def test_curves_of_a_real_tower(clip):
    pixels = [clip.preprocess.pixels(photo())] * 2
    side = pixels[0].shape[0]
    heats = [np.ones((side, side), np.float32), np.zeros((side, side), np.float32)]
    z_texts = clip.encode_text(["a dog", "a cat"])
    areas = faithfulness(clip, pixels, heats, z_texts, np.array([0, 0]), batch_size=4)
    # Two constant maps delete the same pixels, row by row.
    assert areas.deletion[0] == pytest.approx(areas.deletion[1], abs=1e-6)
    both = faithfulness(clip, pixels[:1], heats[:1], z_texts, np.array([1]), batch_size=4)
    assert both.deletion[0] == pytest.approx(1 - areas.deletion[0], abs=1e-5)
