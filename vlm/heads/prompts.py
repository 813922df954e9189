"""Prompts: the sentences that stand for a class, and the one embedding made of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vlm.errors import ConfigError, DataError

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


def class_prompts(
    labels: Sequence[str] | Mapping[str, Sequence[str]], templates: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """The prompts of every label: templates filled in, or a mapping's own sentences as they are.

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
    model: Any,
    labels: Sequence[str] | Mapping[str, Sequence[str]],
    templates: Sequence[str] = TEMPLATES["photo"],
) -> Float[np.ndarray, "m d"]:
    """One unit-norm embedding per label: the mean of its prompts' embeddings, normalised again.

    Prompt ensembling in embedding space, as Radford et al., 2021 (arXiv:2103.00020), section 3.1.4.

    Args:
        model: anything with `encode_text`.
        labels: label names for `templates`, or a mapping from label to its own sentences.
        templates: sentences in which `{}` stands for the label.

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
    return normalise(total, "the mean of a label's prompt embeddings")


def normalise(z: Float[np.ndarray, "n d"], what: str) -> Float[np.ndarray, "n d"]:
    """Rows of `z` scaled to unit norm.

    Raises:
        DataError: a row that has no direction: all zero, or not finite.
    """
    z = np.asarray(z, np.float32)
    norm = np.linalg.norm(z, axis=-1, keepdims=True)
    bad = ~(np.isfinite(norm) & (norm > 0))
    if bad.any():
        raise DataError(
            f"{what} has no direction, its length is {norm[bad][0]}: look at the model's weights"
        )
    return z / norm


def _label(label: Any) -> str:
    """`label`, if it is a name that can be shown and put into a template."""
    if not isinstance(label, str) or not label.strip():
        raise ConfigError(f"label {label!r} is not a name: give a text that is not blank")
    return label
