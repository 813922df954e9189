"""Sums over all pairs of the global batch, for custom losses, in memory linear in the batch.

Forward, the pairs are visited in tiles around the ring (`ring.py`). Backward, a second trip visits
them again: tiles are recomputed, and each block of texts carries its gradients.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import core
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from vlm.errors import ConfigError, check_choice
from vlm.losses.contrastive import on_mesh, placement, ring_of
from vlm.losses.ring import Hide, Ring, add
from vlm.sharding import explicit_mesh, under_auto_axes

Reduction = Literal["sum", "logsumexp"]
Values = Callable[..., Float[Array, "m n"]]


def all_pairs(
    values: Values,
    images: Any,
    texts: Any,
    parameters: Any = (),
    *,
    reduce: Reduction = "sum",
    mesh: Mesh | AbstractMesh | None = None,
    batch_axes: tuple[str, ...] = ("data", "fsdp"),
    tile: int | None = None,
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Reduce a value of each pair over all texts of an image, and over all images of a text.

    The B x B values are never stored: each device computes a tile at a time, as `contrastive_loss`
    does. Differentiable in the arrays of floats and in `parameters`.

    Args:
        values: a pure function `values(images, texts, paired, parameters)` of m images and n texts
            that returns an array (m, n). `paired` is bool (m, n): row and column belong together.
        images, texts: trees of global arrays (B, ...), row i of one belonging to row i of the
            other, such as embeddings, or (embeddings, classes).
        parameters: tree of scalars, such as scale and bias of the logits.
        reduce: how values are reduced.
        mesh: mesh of the run; None for one device, or for that of arrays on Explicit axes.
        batch_axes: mesh axes that the batch is sharded over, as in `contrastive_loss`.
        tile: upper bound on the side of a tile; None chooses one.

    Returns:
        two float32 arrays (B,): of each image over all texts, and of each text over all images.

    Raises:
        ConfigError: `values` returns another shape, parameters are no scalars, or as in
            `contrastive_loss`.
        ShardingError: as in `contrastive_loss`.

    Example:
        >>> z_image, z_text = jnp.eye(4), jnp.roll(jnp.eye(4), 1, axis=0)
        >>> logits = lambda x, y, paired, scale: scale * x @ y.T
        >>> of_image, of_text = vlm.losses.all_pairs(
        ...     logits, z_image, z_text, jnp.float32(10), reduce="logsumexp"
        ... )
        >>> of_image.shape
        (4,)
    """
    check_choice("reduce", reduce, ("sum", "logsumexp"))
    leaves = jax.tree.leaves((images, texts))
    if not leaves or len({x.shape[:1] for x in leaves}) != 1 or leaves[0].ndim == 0:
        shapes = ", ".join(str(x.shape) for x in leaves)
        raise ConfigError(
            f"all_pairs got arrays of shapes {shapes or 'none'}: all must begin with the batch"
        )
    if any(jnp.ndim(x) for x in jax.tree.leaves(parameters)):
        raise ConfigError(
            "parameters of all_pairs must be scalars: apply larger ones to the embeddings before it"
        )
    mesh, batch_axes = placement(leaves[0], mesh, batch_axes)
    rows = next((x for x in leaves if x.ndim == 2), jnp.zeros((len(leaves[0]), 1)))
    ring = ring_of(rows, rows, mesh, batch_axes, tile)
    _check_values(values, images, texts, parameters)
    parameters = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), parameters)
    explicit = explicit_mesh((images, texts)) is not None

    @under_auto_axes((PartitionSpec(ring.axes), PartitionSpec(ring.axes)))
    def run(images, texts, parameters):
        auto = jax.sharding.get_abstract_mesh() if explicit and mesh is not None else mesh
        return _reduced(values, reduce, auto, ring, images, texts, parameters)

    return run(images, texts, parameters)


def _check_values(values: Values, images: Any, texts: Any, parameters: Any) -> None:
    """Raise a ConfigError unless `values` of 2 images and 3 texts is an array (2, 3)."""
    sizes = 2, 3
    few = [
        jax.tree.map(lambda x, n=n: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype), tree)
        for n, tree in zip(sizes, (images, texts), strict=True)
    ]
    numbers = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), jnp.float32), parameters)
    inputs = (*few, jax.ShapeDtypeStruct(sizes, bool), numbers)
    traced, found = jax.make_jaxpr(values, return_shape=True)(*inputs)
    if any(isinstance(x, core.Tracer) for x in traced.consts):
        raise ConfigError(
            "values of all_pairs uses a traced array from outside of itself, such as logit_scale: "
            "pass it in parameters, and arrays of the batch in images or texts"
        )
    if getattr(found, "shape", None) != sizes:
        raise ConfigError(
            f"values of all_pairs returns {getattr(found, 'shape', type(found).__name__)} for "
            f"{sizes[0]} images and {sizes[1]} texts: return an array {sizes}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _reduced(values, reduce, mesh, ring, images, texts, parameters):
    trip = functools.partial(_forward_trip, values, reduce)
    return _trip(trip, mesh, ring, (images, texts, parameters))


def _forward(values, reduce, mesh, ring, images, texts, parameters):
    sums = _reduced(values, reduce, mesh, ring, images, texts, parameters)
    return sums, (images, texts, parameters, sums)


def _backward(values, reduce, mesh, ring, saved, gradients):
    images, texts, parameters, (of_image, of_text) = saved
    d_image, d_text = gradients
    trip = functools.partial(_backward_trip, values, reduce)
    rows, columns = (images, d_image, of_image), (texts, d_text, of_text)
    found = _trip(trip, mesh, ring, (rows, columns, parameters), gradient=True)
    return tuple(map(_with_float0, found, (images, texts, parameters)))


_reduced.defvjp(_forward, _backward)


def _trip(function, mesh, ring: Ring, inputs, *, gradient: bool = False):
    """Run a trip around the ring on each device's rows."""
    rows, number = PartitionSpec(ring.axes), PartitionSpec()
    out = (rows, rows, number) if gradient else (rows, rows)
    return on_mesh(function, mesh, ring, (rows, rows, number), out)(*inputs)


def _forward_trip(values, reduce, ring: Ring, images, texts, parameters):
    """Reduce the values of the local images over all texts, and of the local texts."""
    empty = jnp.full(len(jax.tree.leaves(images)[0]), 0.0 if reduce == "sum" else -jnp.inf)

    def visit(images, texts, hide):
        paired, padded = _masks(images, texts, hide)
        found = values(images, _rows_first(texts), paired, parameters).astype(jnp.float32)
        found = jnp.where(padded, 0.0 if reduce == "sum" else -jnp.inf, found)
        reduction = jnp.sum if reduce == "sum" else jax.nn.logsumexp
        return reduction(found, axis=1), reduction(found, axis=0)

    merge = jnp.add if reduce == "sum" else jnp.logaddexp
    return ring.all_pairs(visit, merge, images, _rows_last(texts), (empty, empty))


def _backward_trip(values, reduce, ring: Ring, images, texts, parameters):
    """Recompute the values of each tile, and pull the gradients of its sums back through them."""
    (own, _, _), (other, _, _) = images, texts
    zero_rows, zero_columns = _zeros(own), _rows_last(_zeros(other))
    b = len(jax.tree.leaves(own)[0])
    per_row = jax.tree.map(lambda _: jnp.zeros(b), parameters)

    def visit(images, texts, hide):
        (x, d_row, row), (y, d_column, column) = images, texts
        paired, padded = _masks(x, y, hide)
        y = _rows_first(y)

        def of(x_floats, y_floats, parameters):
            full = _joined(x_floats, x), _joined(y_floats, y)
            return values(*full, paired, parameters).astype(jnp.float32)

        found, pull_back = jax.vjp(of, _floats(x), _floats(y), parameters)
        if reduce == "sum":
            g = d_row[:, None] + d_column
        else:
            g = d_row[:, None] * jnp.exp(found - row[:, None])
            g += d_column * jnp.exp(found - column)
        d_x, d_y, d_parameters = pull_back(jnp.where(padded, 0.0, g))
        first = jnp.arange(len(d_row)) == 0  # a tile's gradient of a scalar is kept in one row
        d_parameters = jax.tree.map(lambda d: jnp.where(first, d, 0.0), d_parameters)
        return (_float32(d_x), d_parameters), _rows_last(_float32(d_y))

    (d_images, d_rows), d_texts = ring.all_pairs(
        visit, add, images, _rows_last(texts), ((zero_rows, per_row), zero_columns)
    )
    d_parameters = jax.tree.map(lambda d: ring.total(d.sum()), d_rows)
    return d_images, _rows_first(d_texts), d_parameters


def _masks(images: Any, texts: Any, hide: Hide) -> tuple[Bool[Array, "m n"], Bool[Array, "m n"]]:
    """Return which entries of a tile are pairs, and which are padding."""
    m, n = len(jax.tree.leaves(images)[0]), jax.tree.leaves(texts)[0].shape[-1]
    zeros = jnp.zeros((m, n))
    padded = hide(zeros, positives=False) != 0
    return (hide(zeros) != 0) & ~padded, padded


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _floats(tree: Any) -> list[Array]:
    """Return the arrays of floats in a tree: those with a gradient."""
    return [x for x in jax.tree.leaves(tree) if _is_float(x)]


def _joined(floats: list[Array], tree: Any) -> Any:
    """Return the tree with its arrays of floats replaced."""
    found = iter(floats)
    return jax.tree.map(lambda x: next(found) if _is_float(x) else x, tree)


def _with_float0(floats: Any, tree: Any) -> Any:
    """Return the gradient of a tree from that of its arrays of floats, in their types."""
    found = iter(jax.tree.leaves(floats))

    def gradient(x):
        if _is_float(x):
            return next(found).astype(x.dtype)
        return jnp.zeros(x.shape, jax.dtypes.float0)

    return jax.tree.map(gradient, tree)


def _zeros(tree: Any) -> list[Array]:
    return [jnp.zeros(x.shape, jnp.float32) for x in _floats(tree)]


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _rows_last(tree: Any) -> Any:
    """Move the batch to the last axis, as the ring wants it of texts."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), tree)


def _rows_first(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), tree)
