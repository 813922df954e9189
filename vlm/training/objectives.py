"""Training objectives over the embeddings of the whole batch."""

from typing import Any, assert_never

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from vlm.config import DistillConfig, Experiment
from vlm.errors import ConfigError
from vlm.losses import contrastive_loss, relational_loss
from vlm.models.dual_encoder import unit_norm
from vlm.training.partition import Params

HEADS = frozenset({"head", "distill"})  # parameters that are not part of the model
# A classification encodes its texts once, at its start.
UNTRAINED = {"classification": frozenset({"text", "logit_scale", "logit_bias"})}


def objective(
    e: Experiment,
    mesh: Mesh | AbstractMesh,
    params: Params,
    batch: dict[str, Any],
    *z: Float[Array, "b d"],
    teacher_scale: float = 0.0,
) -> Float[Array, ""]:
    """Compute the loss of `e` from embeddings of images and, except in classification, of texts.

    `params` are those of the whole model and of the head, if any. `teacher_scale` is the
    logarithm of the factor on a teacher's cosines.
    """
    if e.objective == "classification":
        return cross_entropy(params, z[0], batch["classes"])
    z_image, z_text = z
    task = contrastive_loss(
        z_image,
        z_text,
        params["logit_scale"],
        params.get("logit_bias"),
        kind=e.model.loss,
        mesh=mesh,
        groups=batch["classes"] if e.objective == "flyp" else None,
    )
    if e.distill is None:
        return task
    loss, of_image, of_text = e.distill.task * task, batch["teacher_image"], batch["teacher_text"]
    if e.distill.relations:
        loss += e.distill.relations * relational_loss(
            z_image,
            z_text,
            params["logit_scale"],
            of_image,
            of_text,
            jnp.float32(teacher_scale),
            mesh=mesh,
        )
    if e.distill.features:
        distance = feature_distance(e.distill, params, "image", z_image, of_image)
        distance += feature_distance(e.distill, params, "text", z_text, of_text)
        loss += e.distill.features * distance / 2
    return loss


def feature_distance(
    config: DistillConfig,
    params: Params,
    side: str,
    z: Float[Array, "b d"],
    teacher: Float[Array, "b e"],
) -> Float[Array, ""]:
    """Compute the mean distance of a student's embeddings from its teacher's unit-norm ones."""
    if config.projection:
        z = z @ params["distill"][side]["kernel"]
    match config.distance:
        case "mse":
            return jnp.sum((z - teacher) ** 2, axis=1).mean()
        case "cosine":
            return 1 - jnp.sum(unit_norm(z) * teacher, axis=1).mean()
        case _:
            assert_never(config.distance)


def cross_entropy(
    params: Params, z_image: Float[Array, "b d"], classes: Int[Array, " b"]
) -> Float[Array, ""]:
    """Compute the cross-entropy over the head's classes, with logits scaled as in zero-shot."""
    logits = jnp.exp(params["logit_scale"]) * z_image @ params["head"]["kernel"].T
    positive = jnp.take_along_axis(logits, classes[:, None], axis=1)[:, 0]
    return (jax.nn.logsumexp(logits, axis=1) - positive).mean()


def check_pairs_alone(e: Experiment, subject: str) -> None:
    """Raise a ConfigError unless `e` trains two towers with only the contrastive loss."""
    if e.objective != "contrastive" or e.distill is not None:
        why = "distill" if e.distill is not None else f"objective {e.objective!r}"
        raise ConfigError(
            f"{subject} supports only two towers with a contrastive loss, without {why}: remove it"
        )
