"""Learned contexts: they begin at the words, learn, stay the same for a seed, and are kept."""

import numpy as np
import pytest
import tiny
from flax import nnx

import vlm
from vlm.adaptation.learned_prompt import learn_prompt, trained_parameters
from vlm.bundle import Bundle, load
from vlm.errors import CheckpointError, ConfigError
from vlm.heads.prompted import PromptedClassifier, prompt_rows, shift
from vlm.heads.saved import load_classifier
from vlm.heads.zero_shot import ZeroShotClassifier

NAMES = ["square", "stripe", "red"]
TEMPLATE = "a {}."


@pytest.fixture(scope="module")
def model():
    return load(tiny.run())


def random_model(**text):
    """A model of random weights with the text tower that is described."""
    tokens = vlm.inputs.tokenizer.train_bpe(["a photo of a red square with a stripe"], 270, 24)
    rules = {name: text.pop(name) for name in ("pad_side", "bos_id", "zeroed_id") if name in text}
    tokens = tokens.with_rules(vlm.TokenizerConfig(**{**vars(tokens.config), **rules}))
    fields = {"width": 16, "depth": 1, "heads": 2, "mlp_dim": 16, "vocab_size": 280, **text}
    config = vlm.ModelConfig(
        vision=vlm.ViTConfig(
            image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_dim=16, pool="mean",
            projection="linear",
        ),
        text=vlm.TextConfig(context_length=24, **fields),
        embed_dim=16,
    )  # fmt: skip
    made = vlm.models.DualEncoder(config, rngs=nnx.Rngs(0))
    pixels = vlm.inputs.preprocess.Preprocess(vlm.PreprocessConfig(image_size=16))
    return Bundle(made, pixels, tokens, "random")


TOWERS = {
    "clip": {"causal": True, "pool": "end", "end_id": 1},
    "siglip": {"pool": "last"},
    "bert": {"pool": "first", "norm": "post", "pad_id": 0, "bos_id": 2},
    "coca": {"causal": True, "pool": "class", "pad_id": 0},
    "mean": {"pool": "mean", "pad_id": 0},
    "left": {"pool": "map", "pad_id": 0, "pad_side": "left"},
}


@pytest.mark.parametrize("tower", TOWERS)
def test_the_words_own_embeddings_give_the_sentences(tower):
    """For every kind of text tower, before anything is learned."""
    model = random_model(**TOWERS[tower])
    rows = prompt_rows(model, NAMES, TEMPLATE)
    table = np.asarray(model.model.text.embedding[...])
    context = table[list(rows.words)]
    made = PromptedClassifier(model, NAMES, rows, context)
    texts = [TEMPLATE.replace("{}", name) for name in NAMES]
    np.testing.assert_allclose(made.z_labels, model.encode_text(texts), atol=2e-6)
    # Padding that the tower cannot see is cut off.
    longest = max(model.tokenizer.lengths(texts))
    assert rows.tokens.shape[1] == (longest if tower in ("clip", "bert", "mean") else 24)
    other = PromptedClassifier(model, NAMES, rows, context + np.linspace(-1, 1, 16))
    assert np.abs(other.z_labels - made.z_labels).max() > 1e-3


def test_vectors_that_stand_for_no_words_have_places_of_their_own():
    model = random_model(**TOWERS["bert"])
    rows = prompt_rows(model, ["red", "stripe"], "a {}.", n_ctx=5)
    assert rows.words == ()
    np.testing.assert_array_equal(rows.positions, [[1, 2, 3, 4, 5]] * 2)
    plain = model.tokenizer(["red.", "stripe."])
    assert (rows.tokens[:, 0] == plain[:, 0]).all()
    lengths = model.tokenizer.lengths(["red.", "stripe."])
    for row, whole, length in zip(rows.tokens, plain, lengths, strict=True):
        np.testing.assert_array_equal(row[6 : 5 + length], whole[1:length])
    left = prompt_rows(random_model(**TOWERS["left"]), ["red", "stripe"], "{}.", n_ctx=2)
    assert (np.take_along_axis(left.tokens, left.positions, 1) > 1).all()
    assert (left.tokens[:, -1] == 1).all()


def images(n, d, seed=0):
    """Embeddings in three clusters that the labels do not fit at the start."""
    rng = np.random.default_rng(seed)
    target = np.arange(n) % 3
    z = rng.standard_normal((3, d))[target] + 0.3 * rng.standard_normal((n, d))
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32), target


def named(target) -> list[str]:
    return [NAMES[i] for i in target]


@pytest.mark.parametrize("per_image", [False, True])
def test_it_learns_the_same_each_time_and_is_kept(model, per_image, tmp_path):
    z, target = images(24, 16)
    options = {"per_image": per_image, "n_ctx": 3, "hold": 0.0, "steps": 60, "rate": 0.3}
    made = learn_prompt(model, z, named(target), NAMES, TEMPLATE, **options)
    before = ZeroShotClassifier(model, NAMES, [TEMPLATE])
    assert (made.logits(z).argmax(1) == target).mean() > 0.9
    assert (before.logits(z).argmax(1) == target).mean() < 0.7
    assert trained_parameters(made) == 3 * 16 + (16 + 1 + 16 + 16 if per_image else 0)
    again = learn_prompt(model, z, named(target), NAMES, TEMPLATE, **options)
    np.testing.assert_array_equal(again.context, made.context)

    made.save(tmp_path / "prompt.safetensors")
    found = load_classifier(tmp_path / "prompt.safetensors", model)
    assert isinstance(found, PromptedClassifier)
    np.testing.assert_array_equal(found.logits(z), made.logits(z))
    assert repr(found) == repr(made)
    with pytest.raises(CheckpointError, match="random"):
        load_classifier(tmp_path / "prompt.safetensors", random_model(**TOWERS["mean"]))


def test_each_image_moves_the_context(model):
    """CoCoOp's logits of an image do not depend on what stands beside it."""
    z, target = images(9, 16)
    made = learn_prompt(model, z, named(target), NAMES, TEMPLATE, per_image=True, steps=5)
    together, alone = made.logits(z), np.concatenate([made.logits(row[None]) for row in z])
    np.testing.assert_allclose(together, alone, atol=2e-4)
    fixed = PromptedClassifier(model, NAMES, made.rows, made.context)
    assert np.abs(fixed.logits(z) - together).max() > 1e-3
    context = made.context + shift(made.net, z[:1])
    moved = PromptedClassifier(model, NAMES, made.rows, context).logits(z[:1])
    np.testing.assert_allclose(moved, together[:1], atol=2e-4)
    assert made.logits(z[:0]).shape == (0, 3)


def test_held_firmly_it_stays_at_zero_shot(model):
    z, target = images(12, 16)
    start = ZeroShotClassifier(model, NAMES, [TEMPLATE])
    far, near = (
        learn_prompt(model, z, named(target), NAMES, TEMPLATE, hold=hold, rate=0.2)
        for hold in (0.0, 1e4)
    )
    moved = [np.abs(made.z_labels - start.z_labels).max() for made in (far, near)]
    assert moved[1] < 0.3 * moved[0]


def test_from_images(model):
    folder = tiny.folder() / "data"
    files = [folder / f"train-{colour}-square.png" for colour in tiny.COLOURS]
    made = learn_prompt(model, files, list(tiny.COLOURS), template="a {} square", steps=3)
    assert made.labels == ("blue", "green", "red")
    assert [row[0][0] for row in made(files).top(1)] == list(tiny.COLOURS)
    np.testing.assert_allclose(made(files).scores.sum(1), 1, atol=1e-5)


@pytest.mark.untyped
def test_bad_input(model, tmp_path):
    z, target = images(6, 16)
    learn = lambda **options: learn_prompt(model, z, named(target), NAMES, **options)  # noqa: E731
    with pytest.raises(ConfigError, match="no words before the label: give n_ctx"):
        learn(template="{}.")
    with pytest.raises(ConfigError, match=r"label 'square' with 40 context vectors is 4. tokens"):
        learn(n_ctx=40)
    with pytest.raises(ConfigError, match="n_ctx is 0"):
        learn(n_ctx=0)
    with pytest.raises(ConfigError, match="no place for the label"):
        learn(template="a photo")
    pictures = [np.zeros((16, 16, 3), np.uint8)] * 2
    with pytest.raises(ConfigError, match="2 images and 1 labels"):
        learn_prompt(model, pictures, ["red"])
    with pytest.raises(ConfigError, match="label 'red' is none of the 1 classes"):
        learn_prompt(model, pictures, ["red", "blue"], classes=["blue"])
    with pytest.raises(ConfigError, match="steps 0"):
        learn_prompt(model, pictures, ["red", "blue"], steps=0)
    half = load(tiny.run(), tower="vision")
    with pytest.raises(ConfigError, match="text tower"):
        learn_prompt(half, pictures, ["red", "blue"], template="a {}")
    (tmp_path / "other.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="is not a saved classifier"):
        load_classifier(tmp_path / "other.safetensors", model)
    with pytest.raises(CheckpointError, match="is not a saved classifier"):
        load_classifier(tmp_path / "missing.safetensors", model)
