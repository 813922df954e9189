"""`contrastive_loss`: softmax and sigmoid losses of global arrays, exact on any mesh."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from vlm.config import Loss
from vlm.errors import ConfigError, ShardingError
from vlm.losses import sigmoid, softmax
from vlm.losses.ring import Ring
from vlm.sharding import explicit_mesh, leading_axes, manual_axes, under_auto_axes, varying_axes


class RingLoss(NamedTuple):
    """Loss that is computed around the ring; its first `differentiable` inputs have gradients."""

    value: Callable
    value_and_gradients: Callable
    differentiable: int


LOSSES = {
    kind: RingLoss(module.value, module.value_and_gradients, differentiable=4)
    for kind, module in {"softmax": softmax, "sigmoid": sigmoid}.items()
}


def contrastive_loss(
    z_image: Float[Array, "b d"],
    z_text: Float[Array, "b d"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None = None,
    *,
    kind: Loss,
    mesh: Mesh | AbstractMesh | None = None,
    groups: Int[Array, " b"] | None = None,
    batch_axes: tuple[str, ...] = ("data", "fsdp"),
    tile: int | None = None,
) -> Float[Array, ""]:
    """Softmax or sigmoid loss of the global batch, in memory linear in the batch.

    Equals `softmax_loss` or `sigmoid_loss` and their gradients without storing the B x B matrix:
    each of n devices keeps B / n images, text blocks travel around a ring, and logits are computed
    in tiles. Matrix products use the dtype of the embeddings and JAX's default matmul precision
    (which rounds float32 on GPUs and TPUs unless it is set); everything else is float32.

    Args:
        z_image, z_text: embeddings, row i of one belonging to row i of the other; on a mesh, global
            arrays whose rows are sharded over `batch_axes` (other layouts are resharded).
        logit_scale: logarithm of the factor on the cosines.
        logit_bias: added to every logit; None for no bias.
        groups: an integer for each pair, such as its class; pairs of the same group are not
            negatives of each other. None: all other pairs are negatives.
        mesh: None for one device, or for the mesh and the axes of the rows in the embeddings' type
            if these axes are Explicit; other axes than `batch_axes` hold replicas. Inside a
            `jax.shard_map` over `batch_axes`, arrays are the local rows and the loss is global.
        tile: upper bound on the side of a tile; None chooses one.

    Raises:
        ConfigError: unknown kind, tile below 1, no pairs, or embeddings whose shapes differ.
        ShardingError: the mesh has none of `batch_axes`, or they do not divide the batch; or a
            surrounding `jax.shard_map` has not all of them, or `check_vma=False`.

    Source: arXiv:2103.00020 and arXiv:2303.15343.

    Example:
        >>> z_image, z_text = jnp.eye(4), jnp.roll(jnp.eye(4), 1, axis=0)
        >>> loss = lambda s: vlm.losses.contrastive_loss(z_image, z_text, s, kind="softmax")
        >>> value, slope = jax.value_and_grad(loss)(jnp.log(10.0))
        >>> bool(slope > 0)  # all pairs are wrong: a smaller scale would help
        True
    """
    if kind not in LOSSES:
        raise ConfigError(f"there is no {kind!r} loss: choose one of {', '.join(LOSSES)}")
    mesh, batch_axes = placement(z_image, mesh, batch_axes)
    ring = ring_of(z_image, z_text, mesh, batch_axes, tile)
    return ring_loss(LOSSES[kind], mesh, ring, z_image, z_text, logit_scale, logit_bias, groups)


def placement(
    rows: Array, mesh: Mesh | AbstractMesh | None, batch_axes: tuple[str, ...]
) -> tuple[Mesh | AbstractMesh | None, tuple[str, ...]]:
    """Return the mesh and the axes of rows: by default, those of the array's type if Explicit."""
    if mesh is not None or (mesh := explicit_mesh(rows)) is None:
        return mesh, batch_axes
    (axes,) = leading_axes(rows)
    return (None, ()) if axes is None else (mesh, axes if isinstance(axes, tuple) else (axes,))


def ring_of(
    z_image: Float[Array, "b d"],
    z_text: Float[Array, "b d"],
    mesh: Mesh | AbstractMesh | None,
    batch_axes: tuple[str, ...],
    tile: int | None,
) -> Ring:
    """Check the inputs of `contrastive_loss` and make the ring for them; see its errors."""
    if z_image.ndim != 2 or z_image.shape != z_text.shape:
        raise ConfigError(
            f"z_image {z_image.shape} and z_text {z_text.shape} must both be (batch, embed_dim): "
            "row i of one is the pair of row i of the other"
        )
    if len(z_image) == 0:
        raise ConfigError("the batch is empty: a contrastive loss needs at least one pair")
    if tile is None:
        tile = default_tile(mesh)
    elif tile < 1:
        raise ConfigError(
            f"tile is {tile}: give a positive number of rows, or None to have one chosen"
        )
    axes, devices = (), 1
    if mesh is not None:
        axes = tuple(axis for axis in batch_axes if axis in mesh.shape)
        devices = math.prod(mesh.shape[axis] for axis in axes)
        if not axes:
            raise ShardingError(
                f"the mesh has axes {mesh.axis_names} and none of batch_axes {batch_axes}: name "
                "the axes that the batch is sharded over"
            )
        if manual := manual_axes() & set(axes):
            if not varying_axes(z_image) >= set(axes):
                raise ShardingError(
                    f"the loss is over mesh axes {axes}, in a jax.shard_map over {sorted(manual)}, "
                    f"and its rows vary over {sorted(varying_axes(z_image))}: shard them over all "
                    "of these axes, with check_vma=True"
                )
        elif len(z_image) % devices:
            raise ShardingError(
                f"a batch of {len(z_image)} does not divide over the {devices} devices of mesh "
                f"axes {axes}: choose a multiple of {devices}"
            )
    return Ring(tile, axes, devices)


def default_tile(mesh: Mesh | AbstractMesh | None) -> int:
    """Tile side for the mesh: fits the cache of a CPU, fills the matrix units elsewhere."""
    # The mesh decides, not the host: a TPU program may be compiled on a CPU host.
    platform = jax.default_backend()
    if isinstance(mesh, Mesh):  # an AbstractMesh has no devices
        platform = mesh.devices.flat[0].platform
    return tile_side(platform)


def tile_side(platform: str) -> int:
    """Tile side for a platform."""
    return 1024 if platform == "cpu" else 4096


def ring_loss(loss: RingLoss, mesh, ring: Ring, *inputs):
    """Compute a loss of global arrays; rows of arrays are sharded, numbers are replicated."""
    explicit = explicit_mesh(inputs) is not None

    @under_auto_axes(PartitionSpec())
    def run(*inputs):
        auto = jax.sharding.get_abstract_mesh() if explicit and mesh is not None else mesh
        return _ring_loss(loss, auto, ring, *inputs)

    return run(*inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ring_loss(loss: RingLoss, mesh, ring: Ring, *inputs):
    return on_mesh(loss.value, mesh, ring, _specs(ring, inputs), PartitionSpec())(*inputs)


def _specs(ring: Ring, inputs) -> tuple[PartitionSpec, ...]:
    rows, number = PartitionSpec(ring.axes), PartitionSpec()
    return tuple(rows if getattr(x, "ndim", 0) else number for x in inputs)


def _forward(loss, mesh, ring, *inputs):
    """Compute the gradients with the loss: the backward pass only scales them."""
    specs, count = _specs(ring, inputs), loss.differentiable
    out = PartitionSpec(), specs[:count]
    value, gradients = on_mesh(loss.value_and_gradients, mesh, ring, specs, out)(*inputs)
    gradients = jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, inputs[:count])
    return value, (*gradients, *(None for _ in inputs[count:]))


def _backward(loss, mesh, ring, gradients, factor):
    return jax.tree.map(lambda g: (factor * g).astype(g.dtype), gradients)


_ring_loss.defvjp(_forward, _backward)


def on_mesh(function, mesh, ring, in_specs, out_specs):
    """Run `function(ring, *inputs)` on each device's rows."""
    function = functools.partial(function, ring)
    if mesh is None or manual_axes() & set(ring.axes):
        return function
    # Results are replicated over unused axes by construction. The check is off because it needs
    # annotations on loop carries that differ between JAX versions.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
