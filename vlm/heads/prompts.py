"""Prompts: sentences for each class, and their ensembled embedding."""

import hashlib
import io
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vlm.errors import ConfigError, DataError
from vlm.heads.encoder import Encoder
from vlm.heads.model_identity import embedding_facts
from vlm.paths import cache_dir

# Prompt templates of zero-shot classifiers, by name; {} stands for the label.
TEMPLATES: dict[str, tuple[str, ...]] = {
    # The label is itself a caption.
    "plain": ("{}",),
    # The default of Radford et al., 2021 (arXiv:2103.00020), section 3.1.4.
    "photo": ("a photo of a {}.",),
    # The seven of OpenAI's 80 ImageNet templates that a forward selection chose: the last cells of
    # notebooks/Prompt_Engineering_for_ImageNet.ipynb in github.com/openai/CLIP.
    "clip_best": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    # The same seven and the bare name, lower case without punctuation, as SigLIP is evaluated:
    # evaluators/proj/image_text/prompt_engineering_constants.py in google-research/big_vision.
    "siglip": (
        "itap of a {}",
        "a bad photo of the {}",
        "a origami {}",
        "a photo of the large {}",
        "a {} in a video game",
        "art of the {}",
        "a photo of the small {}",
        "{}",
    ),
}

CHUNK = 4096  # prompts in memory at once
CACHED = 256  # fewest prompts whose embeddings are cached


def class_prompts(
    labels: Sequence[str] | Mapping[str, Sequence[str]], templates: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Make the prompts of every label: filled templates, or the sentences of a mapping.

    Raises:
        ConfigError: no labels, a label twice or empty, a template without `{}`, no prompts.
    """
    if isinstance(labels, str):
        raise ConfigError(
            f"labels is the text {labels!r}: give a list of labels, such as [{labels!r}]"
        )
    if isinstance(labels, Mapping):
        prompts = {}
        for label, own in labels.items():
            if isinstance(own, str) or not own or not all(isinstance(p, str) and p for p in own):
                raise ConfigError(
                    f"the prompts of label {label!r} are {own!r}: give a list of sentences"
                )
            prompts[_label(label)] = tuple(own)
    else:
        check_templates(templates)
        prompts = {}
        for label in map(_label, labels):
            if label in prompts:
                raise ConfigError(f"label {label!r} is given twice: keep one")
            prompts[label] = tuple(t.replace("{}", label) for t in templates)
    if not prompts:
        raise ConfigError("there are no labels: give at least one to choose from")
    return prompts


def label_prompts(
    labels: Sequence[str], names: Sequence[str], templates: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Make the prompts of every label by filling its name, which may differ, into the templates.

    Raises:
        ConfigError: see `class_prompts`; or different numbers of names and labels.
    """
    if len(labels) != len(names):
        raise ConfigError(f"{len(labels)} labels have {len(names)} names: give one for each")
    own = class_prompts(labels, ("{}",))  # validates the labels
    check_templates(templates)
    return {
        label: tuple(t.replace("{}", name) for t in templates)
        for label, name in zip(own, names, strict=True)
    }


def check_templates(templates: Sequence[str]) -> None:
    """Raise a ConfigError unless `templates` is a list of sentences that each hold `{}`."""
    if isinstance(templates, str):
        raise ConfigError(
            f"templates is the text {templates!r}: give a list, such as [{templates!r}]"
        )
    if not templates:
        raise ConfigError('there are no templates: give at least one, such as "a photo of a {}."')
    for template in templates:
        if not isinstance(template, str) or "{}" not in template:
            raise ConfigError(
                f"template {template!r} has no place for the label: put {{}} where the label goes"
            )


def class_embeddings(
    model: Encoder,
    labels: Sequence[str] | Mapping[str, Sequence[str]],
    templates: Sequence[str] = TEMPLATES["photo"],
) -> Float[np.ndarray, "m d"]:
    """Compute one unit-norm embedding per label: the normalised mean of its prompts' embeddings.

    Prompt ensembling in embedding space, as Radford et al., 2021 (arXiv:2103.00020), section 3.1.4.

    Args:
        model: anything with `encode_text`.
        labels: label names for `templates`, or a mapping from label to its own sentences.
        templates: sentences with `{}` for the label.

    Raises:
        ConfigError: see `class_prompts`.
    """
    prompts = class_prompts(labels, templates)
    owner = np.repeat(np.arange(len(prompts)), [len(own) for own in prompts.values()])
    sentences = [sentence for own in prompts.values() for sentence in own]
    total = None
    for start in range(0, len(sentences), CHUNK):
        z = np.asarray(model.encode_text(sentences[start : start + CHUNK]), np.float32)
        if total is None:
            total = np.zeros((len(prompts), z.shape[1]), np.float32)
        np.add.at(total, owner[start : start + CHUNK], z)
    assert total is not None  # there are labels
    return normalise(total, "the mean of a label's prompt embeddings")


def cached_embeddings(
    model: Encoder, prompts: Mapping[str, Sequence[str]]
) -> Float[np.ndarray, "m d"]:
    """Compute `class_embeddings`, cached in the cache folder if there are many prompts.

    The key is a hash of the prompts, of the weights' fingerprint and of `embedding_facts`. Without
    a fingerprint, or with `model.caches_prompts` False, the prompts are encoded each time.
    """
    fingerprint = getattr(model, "fingerprint", None)
    may_cache = bool(fingerprint) and getattr(model, "caches_prompts", True)
    if not may_cache or sum(map(len, prompts.values())) < CACHED:
        return class_embeddings(model, prompts)
    parts = [fingerprint, embedding_facts(model, "text"), list(prompts.items())]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    file = cache_dir() / "classifiers" / f"{key}.npy"
    if file.is_file():
        try:
            z = np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
            if z.shape[0] == len(prompts):
                return z
        except (OSError, ValueError):
            pass  # corrupt: computed again below
    z = class_embeddings(model, prompts)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.parent / f"{key}.{uuid.uuid4().hex[:8]}"
    out = io.BytesIO()
    np.save(out, z, allow_pickle=False)
    partial.write_bytes(out.getvalue())
    partial.replace(file)
    return z


def leaves_of(
    labels: Sequence[str] | Mapping[str, Any], templates: Sequence[str]
) -> tuple[Sequence[str] | Mapping[str, Sequence[str]], list[dict[str, list[str]]]]:
    """Return the leaf labels of a hierarchy, and for each level its nodes with their labels.

    A mapping inside a mapping is a node; None instead of sentences means the templates.

    Raises:
        ConfigError: a label or node twice.
    """
    if not isinstance(labels, Mapping):
        return labels, []
    leaves: dict[str, Any] = {}
    levels: list[dict[str, list[str]]] = []

    def walk(name: str, node: Any, depth: int) -> list[str]:
        if not isinstance(node, Mapping):
            if name in leaves:
                raise ConfigError(f"label {name!r} is given twice: keep one")
            filled = [t.replace("{}", name) for t in templates]
            leaves[name] = filled if node is None else node
            return [name]
        under = [leaf for child, own in node.items() for leaf in walk(child, own, depth + 1)]
        levels.extend({} for _ in range(depth + 1 - len(levels)))
        if name in levels[depth]:
            raise ConfigError(f"group {name!r} is given twice: keep one")
        levels[depth][name] = under
        return under

    for name, node in labels.items():
        walk(name, node, 0)
    return leaves, levels


def indices(labels: Sequence[str], names: Sequence[str]) -> Int[np.ndarray, " n"]:
    """Return the index of each label among the names.

    Raises:
        ConfigError: a label that is not one of them.
    """
    at = {name: i for i, name in enumerate(names)}
    for label in labels:
        if label not in at:
            raise ConfigError(f"label {label!r} is none of the {len(names)} classes: add it")
    return np.array([at[label] for label in labels], np.int64)


def normalise(z: Float[np.ndarray, "n d"], what: str) -> Float[np.ndarray, "n d"]:
    """Scale the rows of `z` to unit norm.

    Raises:
        DataError: a row that is zero or not finite.
    """
    z = np.asarray(z, np.float32)
    norm = np.linalg.norm(z, axis=-1, keepdims=True)
    bad = ~(np.isfinite(norm) & (norm > 0))
    if bad.any():
        raise DataError(
            f"{what} is zero or not finite (its length is {norm[bad][0]}): the model's weights "
            "may be corrupt"
        )
    return z / norm


def _label(label: Any) -> str:
    """Return `label` if it is a non-blank text, else raise a ConfigError."""
    if not isinstance(label, str) or not label.strip():
        raise ConfigError(f"label {label!r} is not a name: give a text that is not blank")
    return label
