"""What is exported: towers and classifiers as functions of one array, their parameters inside."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from vlm.bundle import Bundle
from vlm.errors import ConfigError
from vlm.exporting.storing import Dtype, check_direction, check_stored, restored, stored
from vlm.heads.neighbours import NeighbourClassifier
from vlm.heads.prompted import PromptedClassifier
from vlm.heads.saved import Classifier
from vlm.heads.zero_shot import to_scores
from vlm.models.adapters import merged
from vlm.weights.instantiate import Tower, abstract_model, checked_tower

Name = Literal["image", "text", "classifier"]
EXAMPLES = 33  # rows of an input to check with


@dataclass(frozen=True)
class Program:
    """One function of a batch, with all that a format must know of it.

    Attributes:
        name: of its file.
        function: from the input to the output, traceable by JAX; the batch may be symbolic.
        input: what the input is called: "pixels" or "tokens".
        row: the shape of one row of the input.
        dtype: of the input.
        output: what the output is called: "embeddings" or "scores".
        examples: rows that the original was given, and `expected`, what it made of them.
        reference: what JAX makes of them with the parameters as they are kept.
    """

    name: Name
    function: Callable[[Array], Array]
    input: str
    row: tuple[int, ...]
    dtype: Any
    output: str
    examples: UInt8[np.ndarray, "n h w 3"] | Int[np.ndarray, "n l"]
    expected: Float[np.ndarray, "n e"]
    reference: Float[np.ndarray, "n e"]


def programs(
    bundle: Bundle,
    tower: Tower | None,
    classifier: Classifier | None,
    dtype: Dtype,
    *,
    compute: Literal["float32", "bfloat16"],
) -> list[Program]:
    """The programs that are asked for: towers, and a classifier where there is one.

    Parameters are kept as `dtype` and computed with as `compute`. Without `tower`, both towers, or
    none where there is a classifier.

    Raises:
        ConfigError: a tower that the model was loaded without, images without one fixed size, or a
            classifier of another model.
    """
    if tower is None and classifier is None:
        tower = "both"
    if tower is not None:
        tower = checked_tower(tower)
    names: list[Name] = []
    if tower in ("both", "vision"):
        names.append("image")
    if tower in ("both", "text"):
        names.append("text")
    if classifier is not None:
        names.append("classifier")
    for name in names:
        _check(bundle, name, classifier)
    return [_program(bundle, name, classifier, dtype, compute) for name in names]


def _check(bundle: Bundle, name: Name, classifier: Any) -> None:
    needed = "text" if name == "text" else "vision"
    if getattr(bundle.model, needed) is None:
        raise ConfigError(
            f"{bundle.name} was loaded without its {needed} tower: load it with tower='both', or "
            "export the other tower alone"
        )
    if needed == "vision" and bundle.preprocess.config.resize == "naflex":
        raise ConfigError(
            f"{bundle.name} takes images of any aspect (NaFlex), and an exported program takes "
            "pixels of one size: export its text tower alone, or a model of a fixed size"
        )
    if isinstance(classifier, NeighbourClassifier):
        raise ConfigError(
            "a NeighbourClassifier asks an index, which no exported program has: export the image "
            "tower and search with its embeddings, or fit a FewShotClassifier"
        )
    if isinstance(classifier, PromptedClassifier) and classifier.net is not None:
        raise ConfigError(
            "a PromptedClassifier with a net runs the text tower for each image, which no exported "
            "program does: learn the prompt with per_image=False"
        )
    if name == "classifier" and classifier.model is not bundle:
        raise ConfigError(
            f"the classifier is of {classifier.model.name} and not of the model that is exported: "
            "make it with the same model"
        )


def _program(
    bundle: Bundle,
    name: Name,
    classifier: Any,  # a Classifier, where it is that which is exported
    dtype: Dtype,
    compute: Literal["float32", "bfloat16"],
) -> Program:
    other = "vision" if name == "text" else "text"
    skeleton = abstract_model(bundle.config, jnp.dtype(compute))
    setattr(skeleton, other, None)  # its parameters do not travel with this one
    graph, _ = nnx.split(skeleton)
    _, state = nnx.split(merged(bundle.model))
    flat = {path: value for path, value in nnx.to_flat_state(state) if path[0] != other}
    held = {
        path: stored(path, np.asarray(value.get_value()), dtype) for path, value in flat.items()
    }
    for path, value in flat.items():
        check_stored(path, np.asarray(value.get_value()), held[path], dtype)

    def encode(rows: Array) -> Array:
        kept = {path: flat[path].replace(restored(held[path], compute)) for path in flat}
        model = nnx.merge(graph, nnx.from_flat_state(kept))
        if name == "text":
            return model.encode_text(rows)
        return model.encode_image(bundle.preprocess.normalize(rows))

    def classify(pixels: Array) -> Array:
        logits = classifier.logits(encode(pixels))
        return jax.nn.softmax(logits) if classifier.rule == "softmax" else jax.nn.sigmoid(logits)

    if name == "text":
        rows = _texts(bundle)
    else:
        size = bundle.config.vision.image_size
        rows = np.random.default_rng(0).integers(0, 256, (EXAMPLES, size, size, 3), dtype=np.uint8)
    expected, function, output = _original(bundle, rows), encode, "embeddings"
    reference = np.asarray(jax.jit(encode)(rows))
    check_direction(name, reference, expected, dtype)
    if name == "classifier":
        expected = to_scores(classifier.logits(expected), classifier.rule)
        function, output = classify, "scores"
        reference = np.asarray(jax.jit(classify)(rows))
    input = "tokens" if name == "text" else "pixels"
    row, kind = rows.shape[1:], rows.dtype.type
    return Program(name, function, input, row, kind, output, rows, expected, reference)


def _texts(bundle: Bundle) -> Int[np.ndarray, "n l"]:
    """Token ids of texts of every length, the empty one and one that is cut among them."""
    vocabulary, random = bundle.tokenizer.vocabulary, np.random.default_rng(0)
    longest = 2 * bundle.tokenizer.config.context_length
    lengths = np.linspace(0, longest, EXAMPLES).astype(int)
    ids = (random.integers(0, bundle.tokenizer.vocab_size, length).tolist() for length in lengths)
    return bundle.tokenizer([vocabulary.decode(row) for row in ids])


def _original(bundle: Bundle, rows: np.ndarray) -> Float[np.ndarray, "n e"]:
    """What the model itself makes of the inputs, in its own types."""
    graph, state = nnx.split(bundle.model)

    @functools.partial(jax.jit, static_argnums=0)
    def run(is_text: bool, state: nnx.State, rows: Array) -> Array:
        model = nnx.merge(graph, state)
        if is_text:
            return model.encode_text(rows)
        return model.encode_image(bundle.preprocess.normalize(rows))

    return np.asarray(run(rows.ndim == 2, state, rows))
