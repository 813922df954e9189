import numpy as np
import pytest
from PIL import Image

from vlm.config import AugmentConfig, DataConfig, PreprocessConfig
from vlm.data import augmentations
from vlm.data.augmentations import DRAWS, is_on
from vlm.data.randomness import uniforms
from vlm.data.transform_example import ExampleTransform
from vlm.errors import ConfigError
from vlm.inputs.preprocess import Preprocess

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
ALL = AugmentConfig(randaugment=(2, 9), grey=0.5, blur=0.5, solarise=0.5, morphology=0.5)


def changed(config, u):
    return augmentations.augment(PIXELS, config, np.asarray(u, float))


def draws(operation=None, **values):
    u = np.full(DRAWS, 0.99)
    if operation is not None:
        u[0] = (operation + 0.5) / len(augmentations._OPERATIONS)
        u[1] = 0.2
    places = {"grey": -5, "blur": -4, "sigma": -3, "solarise": -2, "morphology": -1}
    for name, value in values.items():
        u[places[name]] = value
    return u


def test_grey_blur_and_solarise_do_what_they_say():
    grey = changed(AugmentConfig(grey=0.3), draws(grey=0.2)).astype(int)
    assert (grey[..., 0] == grey[..., 1]).all()
    luma = PIXELS @ [0.299, 0.587, 0.114]
    assert np.abs(grey[..., 0] - luma).max() <= 1
    blurred = changed(AugmentConfig(blur=0.3), draws(blur=0.2, sigma=0.9))
    assert blurred.std() < PIXELS.std() / 2
    inverted = changed(AugmentConfig(solarise=0.3), draws(solarise=0.2))
    np.testing.assert_array_equal(inverted, np.where(PIXELS < 128, PIXELS, 255 - PIXELS))
    same = changed(AugmentConfig(grey=0.3, blur=0.3, solarise=0.3), draws())
    np.testing.assert_array_equal(same, PIXELS)


def test_lines_go_or_grow():
    drawing = np.full((9, 9, 3), 255, np.uint8)
    drawing[4] = 0  # a line of one pixel
    gone, thicker = (
        augmentations.augment(drawing, AugmentConfig(morphology=0.4), draws(morphology=u))
        for u in (0.1, 0.3)
    )
    assert (gone == 255).all()
    np.testing.assert_array_equal(thicker[3:6], 0)
    assert (thicker[[2, 6]] == 255).all()


@pytest.mark.parametrize("operation", range(len(augmentations._OPERATIONS)))
def test_every_operation_grows_with_its_magnitude_from_nothing(operation):
    distances = []
    for magnitude in (0, 10, 30):
        out = changed(AugmentConfig(randaugment=(1, magnitude)), draws(operation))
        distances.append(np.abs(out.astype(int) - PIXELS).mean())
    if operation == 0:
        assert distances == [0, 0, 0]
    elif operation < 12:
        assert distances[0] == 0 < distances[1]
        assert distances[2] > 0.9 * distances[1]  # what a shift uncovers is grey, nearer to noise
    else:  # contrast and histogram have no magnitude
        assert len(set(distances)) == 1


def test_a_turn_keeps_the_centre_and_goes_both_ways():
    spot = np.zeros((33, 33, 3), np.uint8)
    spot[15:18, 15:18] = 255
    for u1 in (0.2, 0.8):
        u = draws(5)
        u[1] = u1
        out = augmentations.augment(spot, AugmentConfig(randaugment=(1, 30)), u)
        assert out[16, 16].tolist() == [255, 255, 255]


def test_they_add_to_what_is_there_and_depend_on_the_position_alone():
    positions = np.arange(6)
    plain = ExampleTransform([DataConfig()], Preprocess(PreprocessConfig(image_size=16)))
    strong = ExampleTransform(
        [DataConfig(augment=ALL)], Preprocess(PreprocessConfig(image_size=16))
    )
    a, b = plain.draws(3, positions), strong.draws(3, positions)
    np.testing.assert_array_equal(a, b[:, : a.shape[1]])
    np.testing.assert_array_equal(strong.draws(3, positions[2:4]), b[2:4])
    example = {"image": Image.fromarray(PIXELS), "caption": "x"}
    outs = np.empty((2, 6, 16, 16, 3), np.uint8)
    for row, u in enumerate(b):
        strong(example, u, outs[0], row, "")
        plain(example, u[: a.shape[1]], outs[1], row, "")
    assert (outs[0] != outs[1]).reshape(6, -1).any(axis=1).sum() >= 4
    assert not is_on(AugmentConfig())


def test_what_cannot_be():
    for changes, message in [
        ({"grey": 1.5}, r"AugmentConfig\.grey is 1\.5: choose a number from 0 to 1"),
        ({"morphology": -0.1}, r"AugmentConfig\.morphology is -0\.1"),
        ({"randaugment": (9, 3)}, r"randaugment is \(9, 3\): choose at most 4 operations"),
        ({"randaugment": (2, 31)}, "randaugment is 31: choose a number from 0 to 30"),
    ]:
        with pytest.raises(ConfigError, match=message):
            AugmentConfig(**changes)
    assert uniforms(0, np.arange(2), DRAWS).shape == (2, DRAWS)
