"""Contrastive-relational distillation: match the similarity matrix of a teacher.

For image i the teacher's softmax over all texts is a distribution p_i and the student's is q_i. The
loss is their KL divergence, averaged over all images and, in the other direction, over all texts
(Vasu et al., 2024, arXiv:2311.17049, equation 2):

    KL(p_i || q_i) = sum_j p_ij (t_ij - l_ij) - log sum_j exp(t_ij) + log sum_j exp(l_ij)

with the logits t of the teacher and l of the student. As in `softmax.py`, a row needs a few sums
that accumulate tile by tile: of exp(t), of exp(l), and of exp(t) (t - l). The gradient is a second
pass over the tiles: dKL_i/dl_ij = q_ij - p_ij.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float

from vlm.errors import ConfigError
from vlm.losses.contrastive import RingLoss, placement, ring_loss, ring_of
from vlm.losses.ring import MASKED_LOGIT, Ring, add, dot, dot_pairs, pull_back
from vlm.losses.softmax import Statistics
from vlm.losses.softmax import merge as merge_statistics


def relational_loss(
    z_image: Float[Array, "b d"],
    z_text: Float[Array, "b d"],
    logit_scale: Float[Array, ""],
    teacher_image: Float[Array, "b e"],
    teacher_text: Float[Array, "b e"],
    teacher_scale: Float[Array, ""],
    *,
    mesh: Mesh | AbstractMesh | None = None,
    batch_axes: tuple[str, ...] = ("data", "fsdp"),
    tile: int | None = None,
) -> Float[Array, ""]:
    """KL divergence of the student's softmax from the teacher's, in memory linear in the batch.

    Differentiable in the student's embeddings and scale. The widths d and e may differ.

    Args:
        z_image, z_text: the student's embeddings, row i of one belonging to row i of the other.
        logit_scale: logarithm of the factor on its cosines.
        teacher_image, teacher_text: the teacher's embeddings of the same pairs.
        teacher_scale: logarithm of the factor on its cosines.
        mesh, batch_axes, tile: see `contrastive_loss`.

    Raises:
        ConfigError: numbers of rows differ, or widths differ within one model.
        ShardingError: see `contrastive_loss`.

    Source: arXiv:2311.17049.

    Example:
        >>> from vlm.losses.relational import relational_loss
        >>> z = jnp.eye(4)
        >>> alike = relational_loss(z, z, jnp.log(10.0), z, z, jnp.log(10.0))
        >>> turned = relational_loss(z, z[::-1], jnp.log(10.0), z, z, jnp.log(10.0))
        >>> bool(abs(alike) < 1e-6), bool(turned > 1)
        (True, True)
    """
    if teacher_image.shape != teacher_text.shape or len(teacher_image) != len(z_image):
        raise ConfigError(
            f"the teacher's embeddings {teacher_image.shape} and {teacher_text.shape} must be a "
            f"row for each of the student's {len(z_image)} pairs"
        )
    mesh, batch_axes = placement(z_image, mesh, batch_axes)
    ring = ring_of(z_image, z_text, mesh, batch_axes, tile)
    student, teacher = (z_image, z_text, logit_scale), (teacher_image, teacher_text, teacher_scale)
    return ring_loss(_LOSS, mesh, ring, *student, *teacher)


class Sums(NamedTuple):
    """Partial sums of a row or a column.

    `difference` is the sum of exp(t - max t) (t - l), relative to the teacher's maximum.
    """

    teacher: Statistics
    student: Statistics
    difference: Float[Array, "..."]


def _merge(a: Sums, b: Sums) -> Sums:
    teacher = merge_statistics(a.teacher, b.teacher)
    difference, other = (x.difference * jnp.exp(x.teacher.max - teacher.max) for x in (a, b))
    return Sums(teacher, merge_statistics(a.student, b.student), difference + other)


def _divergence(sums: Sums) -> Float[Array, " b"]:
    teacher, student = sums.teacher, sums.student
    log_z = student.max + jnp.log(student.sum) - teacher.max - jnp.log(teacher.sum)
    return sums.difference / teacher.sum + log_z


def _value(ring: Ring, *inputs) -> Float[Array, ""]:
    rows, columns = _sums(ring, *inputs)
    return _mean(ring, rows, columns)


def _value_and_gradients(ring: Ring, *inputs):
    """Loss and gradients of the student's embeddings and scale, in two trips around the ring."""
    z_image, z_text, log_scale, teacher_image, teacher_text, teacher_scale = inputs
    rows, columns = _sums(ring, *inputs)
    scale, teacher = jnp.exp(log_scale), jnp.exp(teacher_scale)

    def difference(ours, theirs, sums: Sums):
        """q - p of a row or column."""
        q = jnp.exp(ours - sums.student.max) / sums.student.sum
        return q - jnp.exp(theirs - sums.teacher.max) / sums.teacher.sum

    def visit(images, texts, hide):
        (x, u, row), (y, v, column) = images, texts
        logits = hide(scale * dot(x, y)), hide(teacher * dot(u, v))
        row = jax.tree.map(lambda s: s[:, None], row)
        return pull_back(difference(*logits, row) + difference(*logits, column), x, y)

    zeros = jnp.zeros(z_image.shape, jnp.float32)
    images, texts = (z_image, teacher_image, rows), (z_text.T, teacher_text.T, columns)
    d_image, d_text = ring.all_pairs(visit, add, images, texts, (zeros, zeros.T))
    positives = scale * dot_pairs(z_image, z_text), teacher * dot_pairs(teacher_image, teacher_text)
    positives = (difference(*positives, rows) + difference(*positives, columns))[:, None]
    mean = scale / (2 * len(z_image) * ring.devices)
    d_image = mean * (d_image + positives * z_text)
    d_text = mean * (d_text.T + positives * z_image)
    d_scale = ring.total(jnp.sum(z_image * d_image))  # l = exp(s) x.y, so dl/ds = x . dl/dx
    return _mean(ring, rows, columns), (d_image, d_text, d_scale)


def _sums(ring, z_image, z_text, log_scale, teacher_image, teacher_text, teacher_scale):
    """Sums of each row and of each column, positives included."""
    scale, teacher = jnp.exp(log_scale), jnp.exp(teacher_scale)

    def visit(images, texts, hide):
        (x, u), (y, v) = images, texts
        ours, theirs = hide(scale * dot(x, y)), hide(teacher * dot(u, v))

        def sums(axis):
            top, teacher_top = (t.max(axis, keepdims=True) for t in (ours, theirs))
            e = jnp.exp(theirs - teacher_top)
            return Sums(
                Statistics(teacher_top.squeeze(axis), e.sum(axis)),
                Statistics(top.squeeze(axis), jnp.exp(ours - top).sum(axis)),
                (e * (theirs - ours)).sum(axis),
            )

        return sums(1), sums(0)

    zeros = jnp.zeros(len(z_image), jnp.float32)
    empty = Statistics(zeros + MASKED_LOGIT, zeros)
    empty_sums = Sums(empty, empty, zeros)
    images, texts = (z_image, teacher_image), (z_text.T, teacher_text.T)
    rows, columns = ring.all_pairs(visit, _merge, images, texts, (empty_sums, empty_sums))
    ours = scale * dot_pairs(z_image, z_text)
    theirs = teacher * dot_pairs(teacher_image, teacher_text)
    positives = Sums(Statistics(theirs, zeros + 1), Statistics(ours, zeros + 1), theirs - ours)
    return _merge(rows, positives), _merge(columns, positives)


def _mean(ring: Ring, rows: Sums, columns: Sums) -> Float[Array, ""]:
    total = jnp.sum(_divergence(rows) + _divergence(columns))
    return ring.total(total) / (2 * len(rows.difference) * ring.devices)


_LOSS = RingLoss(_value, _value_and_gradients, differentiable=3)
