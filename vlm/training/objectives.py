"""Training objectives over the embeddings of the whole batch."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int, Key, Shaped

from vlm.config import DistillConfig, Experiment, Loss
from vlm.errors import ConfigError
from vlm.losses import LossInputs, contrastive_loss, relational_loss
from vlm.models.dual_encoder import DualEncoder, unit_norm
from vlm.nn.intermediates import Intermediates
from vlm.nn.layers import split_keys
from vlm.nn.naflex import Patches
from vlm.sharding import by_rows, is_stacked
from vlm.training.custom_losses import check_losses, weighted_sum
from vlm.training.partition import Params


class Embeddings(NamedTuple):
    """Embeddings of a batch, and the intermediate activations that a loss reads."""

    image: Float[Array, "b d"]
    text: Float[Array, "b d"] | None = None  # None: a classification encodes no texts
    intermediates: Mapping[str, Any] | None = None


def embeddings(
    model: DualEncoder,
    images: Float[Array, "b h w 3"] | Patches,
    tokens: Int[Array, "b n"] | tuple[Int[Array, "_ _"], ...],
    keys: Key[Array, " b"] | None,
    names: Collection[str] = (),
    ways: int = 1,
) -> Embeddings:
    """Embed a batch; capture the activations `names`, such as "vision/blocks/output".

    A tuple of tokens is from `TextBuckets`, whose rows are on `ways` devices.

    Raises:
        ConfigError: the towers have no such activation; the message lists those that they have.
    """
    if not names and not isinstance(tokens, tuple):
        return Embeddings(*model(images, tokens, keys=keys))
    found = {"vision": Intermediates(), "text": Intermediates()}
    image_keys, text_keys = split_keys(keys)
    z_image = model.encode_image(images, keys=image_keys, intermediates=found["vision"])
    if isinstance(tokens, tuple):
        z_text = _of_buckets([model.encode_text(part) for part in tokens], ways)
    else:
        z_text = model.encode_text(tokens, keys=text_keys, intermediates=found["text"])
    known = {f"{tower}/{name}": x for tower, own in found.items() for name, x in own.found.items()}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"loss_intermediates has {name!r}, which the towers do not capture: choose among "
                f"{', '.join(known)}"
            )
    # Activations of stacked blocks have their layers first, and the batch second.
    batch_first = {
        name: jnp.moveaxis(known[name], 1, 0) if is_stacked(name.split("/")) else known[name]
        for name in names
    }
    for name, x in batch_first.items():
        if x.shape[0] != len(z_image):
            raise ConfigError(
                f"loss_intermediates has {name!r}, whose shape {x.shape} does not begin with the "
                f"{len(z_image)} examples: capture another activation"
            )
    return Embeddings(z_image, z_text, batch_first)


def _of_buckets(parts: list[Shaped[Array, "_ d"]], ways: int) -> Shaped[Array, "b d"]:
    """Join the rows of text buckets, which stay on their devices."""
    by_device = [part.reshape(ways, -1, part.shape[-1]) for part in parts]
    joined = jnp.concatenate(by_device, axis=1)
    return by_rows(joined.reshape(-1, joined.shape[-1]))


def whole_tokens(
    tokens: tuple[Int[Array, "_ _"], ...], ways: int, length: int, pad_id: int
) -> Int[Array, "b n"]:
    """Pad the tokens of `TextBuckets` to `length`, in the order of the batch."""
    parts = [
        jnp.pad(part, ((0, 0), (0, length - part.shape[1])), constant_values=pad_id)
        for part in tokens
    ]
    return _of_buckets(parts, ways)


HEADS = frozenset({"head", "distill"})  # parameters that are not part of the model
# A classification encodes its texts once, at its start.
UNTRAINED = {"classification": frozenset({"text", "logit_scale", "logit_bias"})}


def objective(
    e: Experiment,
    mesh: Mesh | AbstractMesh,
    params: Params,
    batch: dict[str, Any],
    z: Embeddings,
    key: Key[Array, ""],
    teacher_scale: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Compute the loss of `e`, and metrics to log, from the embeddings of the batch.

    `params` are those of the whole model and of the head, if any. `key` is for losses of the user.
    `teacher_scale` is the logarithm of the factor on a teacher's cosines.
    """
    z_image, z_text = z.image, z.text
    if z_text is None:
        return cross_entropy(params, z_image, batch["classes"]), {}

    def contrastive(kind: Loss) -> Float[Array, ""]:
        return contrastive_loss(
            z_image,
            z_text,
            params["logit_scale"],
            params.get("logit_bias"),
            kind=kind,
            mesh=mesh,
            groups=batch["classes"] if e.objective == "flyp" else None,
        )

    metrics: dict[str, Float[Array, ""]] = {}
    if e.losses:
        inputs = LossInputs(
            z_image,
            z_text,
            params["logit_scale"],
            params.get("logit_bias"),
            batch,
            z.intermediates or {},
            key,
            mesh,
        )
        check_losses(e.losses, inputs)
        task, metrics = weighted_sum(e.losses, contrastive, inputs)
    else:
        task = contrastive(e.model.loss)
    if e.distill is None:
        return task, metrics
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
    return loss, metrics


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
    parts = [name for name in ("distill", "selection") if getattr(e, name) is not None]
    if e.objective != "contrastive" or parts:
        why = parts[0] if parts else f"objective {e.objective!r}"
        raise ConfigError(
            f"{subject} supports only two towers with a contrastive loss, without {why}: remove it"
        )
