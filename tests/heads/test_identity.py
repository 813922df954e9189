"""What a saved head remembers of its model, and which models are then taken for it."""

import zlib
from pathlib import Path

import numpy as np
import pytest

from vlm.errors import CheckpointError
from vlm.heads.identity import PROBE_IMAGE, PROBE_TEXT, check_identity, identity


class Model:
    """Its embeddings of the probes are at these cosines to those of `Model()`."""

    name = "plain"

    def __init__(self, text=1.0, image=1.0, fingerprint=None):
        self.text, self.image, self.fingerprint = text, image, fingerprint

    def encode_text(self, texts):
        return self._at(self.text, len(texts))

    def encode_image(self, images):
        return self._at(self.image, len(images))

    def _at(self, cosine, count):
        return np.tile(np.array([cosine, np.sqrt(1 - cosine**2)], np.float32), (count, 1))


def test_the_probes_never_change():
    """Saved heads hold what models made of them: with others, all of them would be refused."""
    assert PROBE_TEXT == "a photo of a red car in the snow"
    assert PROBE_IMAGE.shape == (64, 64, 3)
    assert zlib.crc32(PROBE_IMAGE.tobytes()) == 3985674480


@pytest.mark.parametrize(
    ("other", "fits"),
    [
        (Model(), True),
        (Model(text=0.9995, image=0.9995), True),  # another machine or precision
        (Model(text=0.998), False),
        (Model(image=0.998), False),
        (Model(image=0.998, fingerprint="of another file"), False),
        (Model(image=0.998, fingerprint="of its file"), True),  # equal files: no image is embedded
        (Model(text=0.998, fingerprint="of its file"), False),
    ],
)
def test_a_model_is_known_by_what_it_makes_of_the_probes(other, fits):
    kept = identity(Model(fingerprint="of its file"))
    if fits:
        check_identity(kept, other, Path("here"))
    else:
        with pytest.raises(CheckpointError, match=r"here was built by .* embeds differently"):
            check_identity(kept, other, Path("here"))
