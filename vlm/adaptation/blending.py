"""Weight averaging: interpolation of two models, and soups of several.

A model and one fine-tuned from it lie in one basin of the loss. Models between them are nearly as
good at the new task, and forget less (WiSE-FT, arXiv:2109.01903). Runs that started from one model
can be averaged too (arXiv:2203.05482).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vlm.bundle import Bundle
from vlm.config import to_dict
from vlm.errors import ConfigError
from vlm.evaluation.tasks import Task
from vlm.heads.encoder import Encoder

# The score of a model on a task is the mean of those of these metrics that the task has.
HEADLINE = ("top1", "image_to_text_R@1", "text_to_image_R@1", "acc")
# Fields that change no embedding of a loaded model.
OF_TRAINING = ("dropout", "patch_dropout", "init_scale", "init_bias", "matryoshka")


def blend(a: Bundle, b: Bundle, alpha: float = 0.5) -> Bundle:
    """Interpolate all parameters: (1 - alpha) of `a` plus alpha of `b`.

    If `b` is fine-tuned from `a`, this is WiSE-FT (arXiv:2109.01903). Alpha 0 is exactly `a`, and 1
    exactly `b`. Running statistics of batch norms are interpolated too. The result lists the
    Matryoshka sizes that both list.

    Raises:
        ConfigError: an alpha outside 0 to 1, or models that differ in more than their parameters;
            the message names the fields.

    Example:
        >>> half = vlm.adaptation.blend(model, model, 0.5)
        >>> bool(np.allclose(half.encode_image(pictures), model.encode_image(pictures), atol=1e-6))
        True
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is {alpha}: it is the weight of the second model, from 0 to 1")
    check_alike([a, b])
    return _average([a, b], [1 - alpha, alpha], f"{a.name} and {b.name} at {alpha:g}")


def soup(models: Sequence[Bundle], task: Task | None = None) -> Bundle:
    """Average several models (arXiv:2203.05482).

    Without a task the soup is uniform. With one it is greedy: from the best model on the task down,
    each is added if the soup does not get worse. Measure the soup on other data than the task.

    Raises:
        ConfigError: no models, or models that differ in more than their parameters.

    Example:
        >>> vlm.adaptation.soup([model, model]).name
        'soup of tiny, tiny'
    """
    models = list(models)
    if not models:
        raise ConfigError("there are no models to average: give at least one")
    check_alike(models)
    return _mean(models if task is None else _greedy(models, repeatable(task)))


def headline(model: Encoder, task: Task) -> float:
    """Compute one score of a model on a task: top-1, or the mean recall at 1."""
    metrics = task.measure(model).metrics
    values = [metrics[name].value for name in HEADLINE if name in metrics]
    return sum(values) / len(values)


def repeatable(task: Task) -> Task:
    """Return the task with its images in a list, to measure it more than once."""
    return dataclasses.replace(task, images=list(task.images))


def check_alike(models: Sequence[Bundle]) -> None:
    """Check that models have the same architecture, tokenizer and preprocessing.

    Raises:
        ConfigError: it names the fields that differ.
    """
    first, *others = models
    mine = _fields(first)
    for other in others:
        theirs = _fields(other)
        differ = [
            f"{name} is {mine.get(name)!r} and {theirs.get(name)!r}"
            for name in dict.fromkeys([*mine, *theirs])
            if mine.get(name) != theirs.get(name)
        ]
        if not differ and first.tokenizer.fingerprint != other.tokenizer.fingerprint:
            differ = ["their vocabularies differ"]
        if differ:
            shown = "; ".join(differ[:6]) + (f"; {len(differ) - 6} more" if differ[6:] else "")
            raise ConfigError(
                f"{first.name} and {other.name} cannot be averaged ({shown}): give models that "
                "were trained from one start"
            )


def _fields(model: Bundle) -> dict[str, Any]:
    """Return the settings that must be equal, by dotted name."""
    parts = {
        "model": to_dict(model.config),
        "preprocess": to_dict(model.preprocess.config),
        "tokenizer": to_dict(model.tokenizer.config),
    }
    found = dict(_flat(parts, ""))
    found["model.logit_bias"] = "none" if model.model.logit_bias is None else "learned"
    for tower in ("vision", "text"):
        found[f"model.{tower}"] = "left out" if getattr(model.model, tower) is None else "loaded"
    for path, leaf in nnx.to_flat_state(nnx.state(model.model)):
        found[".".join(map(str, path))] = tuple(leaf[...].shape)
    return found


def _flat(values: dict[str, Any], before: str):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        elif name not in OF_TRAINING:
            yield f"{before}{name}", value


def _greedy(models: Sequence[Bundle], task: Task) -> list[Bundle]:
    """Choose the models of a greedy soup, the best one first."""
    scores = [headline(model, task) for model in models]
    order = sorted(range(len(models)), key=lambda i: -scores[i])
    chosen, reached = [models[order[0]]], scores[order[0]]
    for i in order[1:]:
        trial = [*chosen, models[i]]
        score = headline(_mean(trial), task)
        if score >= reached:
            chosen, reached = trial, score
    return chosen


def _mean(models: Sequence[Bundle]) -> Bundle:
    names = ", ".join(model.name for model in models)
    return _average(models, [1 / len(models)] * len(models), f"soup of {names}")


def _average(models: Sequence[Bundle], weights: Sequence[float], name: str) -> Bundle:
    """Compute the weighted sum of the parameters, without models of weight 0."""
    pairs = [(m, w) for m, w in zip(models, weights, strict=True) if w]

    def mean(*leaves: jax.Array) -> jax.Array:
        parts = (w * x.astype(jnp.float32) for x, (_, w) in zip(leaves, pairs, strict=True))
        return functools.reduce(jnp.add, parts).astype(leaves[0].dtype)

    first, *others = (nnx.state(m.model) for m, _ in pairs)
    mixed = models[0].with_parameters(jax.tree.map(mean, first, *others), name)
    listed = [m.config.matryoshka for m, _ in pairs]
    sizes = tuple(size for size in listed[0] if all(size in own for own in listed))
    mixed.model.config = dataclasses.replace(mixed.config, matryoshka=sizes)
    mixed.templates = next((model.templates for model in models if model.templates), ())
    return mixed
