"""Models averaged weight by weight: one on the way from another, and soups of several.

A model and one that was fine-tuned from it lie in one basin of the loss: between them lie models
that know the new task nearly as well and keep what the first one knew (WiSE-FT,
arXiv:2109.01903). Runs that started from one model may be averaged all the same (arXiv:2203.05482).
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

# What one number says of a model on a task: the mean of these metrics, as far as it has them.
HEADLINE = ("top1", "image_to_text_R@1", "text_to_image_R@1", "acc")
OF_TRAINING = ("dropout", "patch_dropout", "init_scale", "init_bias")  # of no loaded model


def blend(a: Bundle, b: Bundle, alpha: float = 0.5) -> Bundle:
    """(1 - alpha) of the parameters of `a` plus alpha of those of `b`, every one of them.

    With `a` a foundation model and `b` fine-tuned from it, this is WiSE-FT (arXiv:2109.01903);
    alpha 0 is `a` to the bit, and 1 is `b`. Running statistics of batch norms are blended too.

    Raises:
        ConfigError: an alpha outside 0 to 1, or models that differ in more than their parameters;
            the message names the fields.

    Example:
        >>> half = vlm.adaptation.blend(model, model, 0.5)
        >>> bool(np.allclose(half.encode_image(pictures), model.encode_image(pictures), atol=1e-6))
        True
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is {alpha}: it is the share of the second model, from 0 to 1")
    check_alike([a, b])
    return _average([a, b], [1 - alpha, alpha], f"{a.name} and {b.name} at {alpha:g}")


def soup(models: Sequence[Bundle], task: Task | None = None) -> Bundle:
    """The average of several models (arXiv:2203.05482).

    Without a task it is uniform. With one it is greedy: the best model on the task, and then one
    after another, from the best down, whichever does not make the soup worse there. The task must
    not be the one that the soup is measured by in the end.

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
    chosen = list(range(len(models))) if task is None else _greedy(models, repeatable(task))
    names = ", ".join(models[i].name for i in chosen)
    return _average(
        [models[i] for i in chosen], [1 / len(chosen)] * len(chosen), f"soup of {names}"
    )


def headline(model: Encoder, task: Task) -> float:
    """What a model scores on a task, in one number: top-1, or the mean recall at 1."""
    metrics = task.measure(model).metrics
    values = [metrics[name].value for name in HEADLINE if name in metrics]
    return sum(values) / len(values)


def repeatable(task: Task) -> Task:
    """The task with its images in a list, so that it can be measured more than once."""
    return dataclasses.replace(task, images=list(task.images))


def check_alike(models: Sequence[Bundle]) -> None:
    """Raise a ConfigError unless the models have one architecture, one tokenizer, equal pixels."""
    first, *others = models
    mine = _fields(first)
    for other in others:
        theirs = _fields(other)
        differ = [
            f"{name} is {mine.get(name)!r} and {theirs.get(name)!r}"
            for name in dict.fromkeys([*mine, *theirs])
            if mine.get(name) != theirs.get(name)
        ]
        if not differ and first.tokenizer.vocabulary.to_str() != (
            other.tokenizer.vocabulary.to_str()
        ):
            differ = ["their vocabularies hold other tokens"]
        if differ:
            shown = "; ".join(differ[:6]) + (f"; {len(differ) - 6} more" if differ[6:] else "")
            raise ConfigError(
                f"{first.name} and {other.name} cannot be averaged ({shown}): give models that "
                "were trained from one start"
            )


def _fields(model: Bundle) -> dict[str, Any]:
    """By dotted name, all that two models must agree on."""
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


def _greedy(models: Sequence[Bundle], task: Task) -> list[int]:
    """Which models go into a greedy soup, the best one first."""
    scores = [headline(model, task) for model in models]
    best, *rest = sorted(range(len(models)), key=lambda i: -scores[i])
    chosen, reached = [best], scores[best]
    for i in rest:
        trial = [*chosen, i]
        score = headline(_mean([models[j] for j in trial]), task)
        if score >= reached:
            chosen, reached = trial, score
    return chosen


def _mean(models: Sequence[Bundle]) -> Bundle:
    names = ", ".join(model.name for model in models)
    return _average(models, [1 / len(models)] * len(models), f"soup of {names}")


def _average(models: Sequence[Bundle], weights: Sequence[float], name: str) -> Bundle:
    """The weighted sum of the models' parameters; what has no weight is not read."""
    pairs = [(m, w) for m, w in zip(models, weights, strict=True) if w]

    def mean(*leaves: jax.Array) -> jax.Array:
        parts = (w * x.astype(jnp.float32) for x, (_, w) in zip(leaves, pairs, strict=True))
        return functools.reduce(jnp.add, parts).astype(leaves[0].dtype)

    first, *others = (nnx.state(m.model) for m, _ in pairs)
    mixed = models[0].with_parameters(jax.tree.map(mean, first, *others), name)
    mixed.templates = next((model.templates for model in models if model.templates), ())
    return mixed
