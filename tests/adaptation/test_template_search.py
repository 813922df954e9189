"""The search finds the sentences that the images were made by, and nothing where there is none."""

import numpy as np
import pytest

from vlm.adaptation.template_search import POOL, search_by_embeddings, search_templates
from vlm.errors import ConfigError

NAMES = ["cat", "dog", "cow", "hen"]


class Sentences:
    """A text tower that hashes words; "drawing" turns every label another way."""

    loss, logit_scale, logit_bias, name = "softmax", 30.0, 0.0, "sentences"

    def __init__(self, d=24):
        self.d = d

    def _word(self, word):
        seed = int.from_bytes(word.encode()[:6].ljust(6), "little")
        return np.random.default_rng(seed).standard_normal(self.d)

    def encode_text(self, texts):
        rows = []
        for text in texts:
            words = text.strip(".").split()
            label = next(word for word in words if word in NAMES)
            style = "drawing" if "drawing" in words else "photo"
            own = self._word(label + style)
            rows.append(own + 0.3 * sum(self._word(w) for w in words if w != label))
        z = np.array(rows)
        return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)

    def encode_image(self, images, batch_size=None):
        return np.stack(list(images)).astype(np.float32)


def drawn(model, n=40, noise=0.15, seed=0):
    rng = np.random.default_rng(seed)
    target = np.arange(n) % len(NAMES)
    z = model.encode_text([f"a drawing of a {NAMES[i]}." for i in target])
    z = z + noise * rng.standard_normal(z.shape)
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32), target


def test_it_finds_how_the_images_are_called():
    model = Sentences()
    z, target = drawn(model)
    pool = ["a drawing of a {}.", "a photo of the {}.", "art of a {}."]
    found = search_by_embeddings(model, z, target, NAMES, pool)
    assert found.templates[0] == "a drawing of a {}."
    assert found.accuracy.value > 0.9
    assert found.accuracy.low > found.before.high
    labels = [NAMES[i] for i in target]
    assert search_templates(model, list(z[:, None].squeeze()), labels, NAMES, pool) == found


def test_where_nothing_helps_the_start_stays():
    model = Sentences()
    rng = np.random.default_rng(0)
    z = rng.standard_normal((12, 24)).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    kept = [search_by_embeddings(model, z, rng.integers(0, 4, 12), NAMES, POOL, seed=seed)
            for seed in range(6)]  # fmt: skip
    assert sum(found.templates == ("a photo of a {}.",) for found in kept) >= 4
    for found in kept:
        assert found.accuracy.value >= found.before.value


def test_bad_input():
    model = Sentences()
    z, target = drawn(model, 8)
    with pytest.raises(ConfigError, match="no place for the label"):
        search_by_embeddings(model, z, target, NAMES, ["a drawing"])
    with pytest.raises(ConfigError, match="at least two"):
        search_by_embeddings(model, z[:1], target[:1], NAMES)
    with pytest.raises(ConfigError, match="8 images and 1 labels"):
        search_templates(model, list(z), ["cat"])
