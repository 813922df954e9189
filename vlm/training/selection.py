"""Online data selection in a step: score a super-batch, choose the batch to train on.

The learner embeds the super-batch without dropout, in parts of a micro-batch; the reference has
embedded it before the step (`teacher.py`). `losses.joint_selection` samples the batch, whose rows
are then moved to the devices that train on them.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from vlm.config import Experiment
from vlm.losses import contrastive_loss
from vlm.losses.cached import join_batch, split_batch
from vlm.losses.joint_selection import ScoredEmbeddings, select_jointly
from vlm.sharding import BATCH_AXES, batch_ways
from vlm.training.partition import Params
from vlm.training.teacher import AnyTeacher

SCOPE = "selection"  # of the operations in compiled programs
SEEN, TRAINED = "examples_seen", "examples_trained"  # in the log

Embed = Callable[[dict[str, Any]], tuple[Float[Array, "b d"], Float[Array, "b d"]]]


@jax.named_scope(SCOPE)
def select_batch(
    e: Experiment,
    mesh: Mesh | AbstractMesh,
    teacher: AnyTeacher | None,
    embed: Embed,
    params: Params,
    super_batch: dict[str, Any],
    key: Key[Array, ""],
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Choose the batch of a step from its super-batch; return it, and metrics to log.

    Args:
        embed: encodes a part of the super-batch with the learner.
        params: of the learner, for scale and bias of its logits.
        super_batch: global arrays; those of a reference have its embeddings.
    """
    selection = e.selection
    assert selection is not None
    inputs = {name: super_batch[name] for name in ("images", "tokens")}
    models: list[ScoredEmbeddings] = []
    if selection.score != "easy_reference":
        parts = e.super_batch_size // (e.micro_batch_size or e.batch_size)
        x, y = join_batch(lax.map(embed, split_batch(inputs, parts)))
        scale, bias = params["logit_scale"], params.get("logit_bias")
        models.append(ScoredEmbeddings(1.0, x, y, scale, bias))
    if selection.score != "hard_learner":
        assert teacher is not None
        x, y = super_batch["teacher_image"], super_batch["teacher_text"]
        bias = None if teacher.logit_bias is None else jnp.float32(teacher.logit_bias)
        models.append(ScoredEmbeddings(-1.0, x, y, jnp.float32(teacher.own_log_scale), bias))

    chosen = select_jointly(
        key, models, e.batch_size, chunks=selection.chunks, kind=e.model.loss, mesh=mesh
    )
    rows = super_batch, [(m.z_image, m.z_text) for m in models]
    batch, pairs = take_rows(rows, chosen, mesh)

    def score(pairs: Any) -> Float[Array, ""]:
        """Score a batch by its loss, per pair."""
        total = jnp.float32(0)
        for model, (x, y) in zip(models, pairs, strict=True):
            scale = model.logit_scale, model.logit_bias
            total += model.weight * contrastive_loss(x, y, *scale, kind=e.model.loss, mesh=mesh)
        return total

    uniform = lax.map(score, split_batch(rows[1], selection.super_batch))
    return batch, {
        f"selection/{selection.score}": score(pairs),
        f"selection/{selection.score}_uniform": uniform.mean(),
        "selection/share": jnp.float32(e.batch_size / e.super_batch_size),
    }


class ExampleCounts:
    """Examples of a run so far: those that were read and scored, and those that were trained on.

    A resumed run counts on from the rows of its log.
    """

    def __init__(self, e: Experiment, rows: list[dict[str, Any]], step: int):
        self._seen, self._trained = e.super_batch_size, e.batch_size  # of a step
        counted = [row for row in rows if SEEN in row and row["step"] <= step]
        uniform = {"step": step, SEEN: step * e.batch_size, TRAINED: step * e.batch_size}
        self._last = counted[-1] if counted else uniform

    def set_phase(self, e: Experiment, step: int) -> None:
        """Count the steps after `step` as those of another experiment."""
        self._last = {"step": step, **self.at(step)}
        self._seen, self._trained = e.super_batch_size, e.batch_size

    def at(self, step: int) -> dict[str, int]:
        """Return both counts after `step` steps."""
        steps, last = step - self._last["step"], self._last
        return {
            SEEN: last[SEEN] + steps * self._seen,
            TRAINED: last[TRAINED] + steps * self._trained,
        }


def take_rows(tree: Any, rows: Int[Array, " n"], mesh: Mesh | AbstractMesh) -> Any:
    """Move rows of global arrays, in this order, to arrays sharded like a batch.

    Devices send them in parts, so that a device holds no more than its own rows of `tree` twice.
    """
    ways, count = batch_ways(mesh), len(rows)
    if ways == 1:
        return jax.tree.map(lambda x: x[rows], tree)

    def local(tree, rows):
        b = len(jax.tree.leaves(tree)[0])
        part = _divisor(count // ways, max(1, b // ways))  # rows to each device at a time
        first = lax.axis_index(BATCH_AXES) * b

        def send(rows):
            here = (rows >= first) & (rows < first + b)

            def exchange(x):
                own = x[jnp.clip(rows - first, 0, b - 1)]
                own = jnp.where(here.reshape(*rows.shape, *(1,) * (x.ndim - 1)), own, 0)
                return lax.psum_scatter(own, BATCH_AXES)

            return jax.tree.map(exchange, tree)

        parts = lax.map(send, rows.reshape(ways, -1, part).swapaxes(0, 1))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), parts)

    sharded, number = PartitionSpec(BATCH_AXES), PartitionSpec()
    move = jax.shard_map(
        local, mesh=mesh, in_specs=(sharded, number), out_specs=sharded, check_vma=False
    )
    return move(tree, rows)


def _divisor(number: int, most: int) -> int:
    """Return the largest divisor of `number` that is at most `most`."""
    pairs = ((i, number // i) for i in range(1, math.isqrt(number) + 1) if number % i == 0)
    return max(d for pair in pairs for d in pair if d <= most)
