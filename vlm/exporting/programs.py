"""Towers and classifiers as functions of one array, with their parameters inside."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from vlm.bundle import Bundle
from vlm.config import absence
from vlm.errors import ConfigError
from vlm.exporting.storing import Dtype, check_direction, check_stored, restored, stored
from vlm.heads.neighbours import NeighbourClassifier
from vlm.heads.prompted import PromptedClassifier
from vlm.heads.saved import Classifier
from vlm.heads.zero_shot import to_scores
from vlm.models.adapters import merged
from vlm.weights.instantiate import Tower, abstract_model, checked_tower

Name = Literal["image", "text", "classifier"]
EXAMPLES = 33  # input rows to verify with


@dataclass(frozen=True)
class ExportProgram:
    """One function of a batch, with its input, output and examples.

    Attributes:
        name: of its file.
        function: from input to output, traceable by JAX with a symbolic batch.
        input: name of the input: "pixels" or "tokens".
        row: shape of one row of the input.
        dtype: of the input.
        output: name of the output: "embeddings" or "scores".
        examples: input rows.
        expected: the model's output for `examples`.
        reference: JAX's output for `examples` with the stored parameters.
    """

    name: Name
    function: Callable[[Array], Array]
    input: str
    row: tuple[int, ...]
    dtype: Any
    output: str
    examples: UInt8[np.ndarray, "n h w 3"] | Float[np.ndarray, "n 3 h w"] | Int[np.ndarray, "n l"]
    expected: Float[np.ndarray, "n e"]
    reference: Float[np.ndarray, "n e"]


def programs(
    bundle: Bundle,
    tower: Tower | None,
    classifier: Classifier | None,
    dtype: Dtype,
    *,
    compute: Literal["float32", "bfloat16"],
    planes: bool = False,
) -> list[ExportProgram]:
    """Make the programs of the towers and the classifier.

    Parameters are stored as `dtype` and computed in `compute`. `tower=None` means both, or none
    with a classifier. With `planes`, images are normalised float32 (n, 3, size, size).

    Raises:
        ConfigError: a tower that the bundle does not have, images without one fixed size, or a
            classifier of another model.
    """
    if tower is None and classifier is None:
        kinds: dict[Tower, str] = {
            "vision": bundle.config.vision.kind,
            "text": bundle.config.text.kind,
        }
        present: list[Tower] = [key for key, kind in kinds.items() if kind != "none"]
        tower = "both" if len(present) == 2 else present[0]
    if tower is not None:
        tower = checked_tower(tower)
    towers: dict[Tower, Name] = {"vision": "image", "text": "text"}
    names: list[Name] = [name for key, name in towers.items() if tower in (key, "both")]
    if classifier is not None:
        names.append("classifier")
    for name in names:
        if problem := _problem(bundle, name, classifier):
            raise ConfigError(problem)
    return [_program(bundle, name, classifier, dtype, compute, planes) for name in names]


def _problem(bundle: Bundle, name: Name, classifier: Any) -> str:
    """Return why a program cannot be exported; empty if it can."""
    needed = "text" if name == "text" else "vision"
    if getattr(bundle.model, needed) is None:
        fix = "load it with tower='both', or export only the other tower"
        return absence(needed, getattr(bundle.config, needed), bundle.name, fix)
    if needed == "vision" and bundle.config.vision.video_frames is not None:
        return (
            f"{bundle.name} takes videos, and an exported program takes images: export only its "
            "text tower, or an image model"
        )
    if needed == "vision" and bundle.config.vision.vectors > 1:
        return (
            f"{bundle.name} makes several vectors of an image, and an exported program one: export "
            "only its text tower, or another model"
        )
    if needed == "vision" and bundle.preprocess.config.resize == "naflex":
        return (
            f"{bundle.name} takes images of any aspect (NaFlex), and an exported program takes "
            "pixels of one size: export only its text tower, or a model of a fixed size"
        )
    if isinstance(classifier, NeighbourClassifier):
        return (
            "a NeighbourClassifier searches an index, which no exported program has: export the "
            "vision tower and search with its embeddings, or fit a FewShotClassifier"
        )
    if isinstance(classifier, PromptedClassifier) and classifier.net is not None:
        return (
            "a PromptedClassifier with a net runs the text tower for each image, which no exported "
            "program does: learn the prompt with per_image=False"
        )
    if name == "classifier" and classifier.model is not bundle:
        return (
            f"the classifier is of {classifier.model.name} and not of the exported model: make it "
            "with the same model"
        )
    return ""


def _program(
    bundle: Bundle,
    name: Name,
    classifier: Any,  # a Classifier, if name is "classifier"
    dtype: Dtype,
    compute: Literal["float32", "bfloat16"],
    planes: bool,
) -> ExportProgram:
    other = "vision" if name == "text" else "text"
    skeleton = abstract_model(bundle.config, jnp.dtype(compute))
    setattr(skeleton, other, None)
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
        if planes:
            return model.encode_image(jnp.moveaxis(rows, 1, -1))
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
    if planes and name != "text":
        rows = np.moveaxis(np.asarray(bundle.preprocess.normalize(rows)), -1, 1)
    reference = np.asarray(jax.jit(encode)(rows))
    check_direction(name, reference, expected, dtype)
    if name == "classifier":
        expected = to_scores(classifier.logits(expected), classifier.rule)
        function, output = classify, "scores"
        reference = np.asarray(jax.jit(classify)(rows))
    input = "tokens" if name == "text" else "pixels"
    row, kind = rows.shape[1:], rows.dtype.type
    return ExportProgram(name, function, input, row, kind, output, rows, expected, reference)


def _texts(bundle: Bundle) -> Int[np.ndarray, "n l"]:
    """Tokenize random texts of all lengths, from empty to longer than the context."""
    vocabulary, random = bundle.tokenizer.vocabulary, np.random.default_rng(0)
    longest = 2 * bundle.tokenizer.config.context_length
    lengths = np.linspace(0, longest, EXAMPLES).astype(int)
    ids = (random.integers(0, bundle.tokenizer.vocab_size, length).tolist() for length in lengths)
    return bundle.tokenizer([vocabulary.decode(row) for row in ids])


def _original(bundle: Bundle, rows: np.ndarray) -> Float[np.ndarray, "n e"]:
    """Compute the embeddings of the model itself, in its own types."""
    graph, state = nnx.split(bundle.model)

    @jax.jit
    def run(state: nnx.State, rows: Array) -> Array:
        model = nnx.merge(graph, state)
        if rows.ndim == 2:
            return model.encode_text(rows)
        return model.encode_image(bundle.preprocess.normalize(rows))

    return np.asarray(run(state, rows))
