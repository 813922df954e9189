"""All-pairs reduction over a global batch: in tiles on a device, around a ring between devices.

The logits of a global batch of B pairs form a B x B matrix that is too large to store. Both losses
need only sums along its rows (one per image) and its columns (one per text), so it is enough to
compute one tile at a time and accumulate. Device k of n keeps its b = B / n images; blocks of b
texts travel the ring, each **with the sums of its columns**, until every device has seen them:

              device 0      device 1      device 2
    step 0    I0 . T0       I1 . T1       I2 . T2       the local block, with the positives
    step 1    I0 . T2       I1 . T0       I2 . T1       T is sent on before the products
    step 2    I0 . T1       I1 . T2       I2 . T0       sums of T follow
    home      sums of T0    sums of T1    sums of T2

A text block is sent on before it is multiplied, and each step starts new column sums while the
earlier ones are still in transit, so no product waits for the network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from vlm.sharding import varying_like

# Logit of a masked pair. Finite, so that the difference of two is not NaN.
MASKED_LOGIT = jnp.finfo(jnp.float32).min

Hide = Callable[..., Float[Array, "t t"]]


@dataclass(frozen=True)
class Ring:
    """Partition of a global batch over `devices` along mesh `axes`, then into tiles.

    Its methods run on each device of a `jax.shard_map` over `axes`, or on one device if `axes` is
    empty. `tile` is the side of a tile.
    """

    tile: int
    axes: tuple[str, ...]
    devices: int

    def all_pairs(
        self,
        visit: Callable[[Any, Any, Hide], tuple[Any, Any]],
        merge: Callable[[Any, Any], Any],
        images: Any,
        texts: Any,
        empty: tuple[Any, Any],
    ) -> tuple[Any, Any]:
        """Apply `visit` to all tiles of negative pairs; merge the partial sums of both sides.

        Images are rows and texts are columns: arrays of images are (b, ...), of texts (..., b).

        Args:
            visit: `visit(images, texts, hide) -> (image_sums, text_sums)` for t images and t texts;
                `hide` sets the logits of positives and padding to `MASKED_LOGIT`.
            merge: combines two partial sums, of images or of texts.
            images, texts: trees of local arrays that `visit` needs.
            empty: trees of identity elements of `merge`, for the local images and texts.

        Returns:
            the merged sums of the local images and of the local texts.
        """
        empty = varying_like(empty, images, texts)
        b = jax.tree.leaves(images)[0].shape[0]
        count = -(-b // self.tile)
        t = -(-b // count)
        images, image_sums = (_cut(x, count, t, axis=0) for x in (images, empty[0]))
        texts, no_sums = (_cut(x, count, t, axis=-1) for x in (texts, empty[1]))

        def block(image_sums, texts, *, own):
            """Visit one block of texts; `own`: it contains the positives of the local images."""

            def tile(i, j, sums):
                image_sums, text_sums = sums
                hide = _hide(i * t, j * t, b, own=own, padded=count * t != b)
                image_part, text_part = visit(_at(images, i), _at(texts, j), hide)
                image_sums = _put(image_sums, i, merge(_at(image_sums, i), image_part))
                return image_sums, merge(text_sums, text_part)

            def column_of_tiles(j, sums):
                image_sums, text_sums = sums
                start = image_sums, _at(no_sums, j)
                image_sums, column = lax.fori_loop(0, count, lambda i, s: tile(i, j, s), start)
                return image_sums, _put(text_sums, j, column)

            return lax.fori_loop(0, count, column_of_tiles, (image_sums, no_sums))

        def step(_, carry):
            image_sums, texts, text_sums = carry
            next_texts, earlier = self._send(texts), self._send(text_sums)
            image_sums, later = block(image_sums, texts, own=False)
            return image_sums, next_texts, merge(earlier, later)

        next_texts = self._send(texts)
        image_sums, text_sums = block(image_sums, texts, own=True)
        if self.devices > 1:
            carry = image_sums, next_texts, text_sums
            image_sums, _, text_sums = lax.fori_loop(1, self.devices, step, carry)
        return _join(image_sums, b, axis=0), _join(self._send(text_sums), b, axis=-1)

    def total(self, x: Float[Array, ""]) -> Float[Array, ""]:
        """Sum a scalar over the devices."""
        return lax.psum(x, self.axes) if self.axes else x

    def _send(self, block):
        """Send each device's block to the next device."""
        if not self.axes:
            return block
        onward = [(k, (k + 1) % self.devices) for k in range(self.devices)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axes, onward), block)


def at_least_float32(x: Array) -> Array:
    """Convert `x` to float32, unless it is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def add(a: Any, b: Any) -> Any:
    """Add two trees: the `merge` of plain sums."""
    return jax.tree.map(jnp.add, a, b)


def mask_same_group(
    logits: Float[Array, "m n"], own: Int[Array, " m"] | None, other: Int[Array, " n"] | None
) -> Float[Array, "m n"]:
    """Mask the logits of pairs of the same group, which are not negatives."""
    return logits if own is None else jnp.where(own[:, None] == other, MASKED_LOGIT, logits)


def dot(x: Float[Array, "m d"], y: Float[Array, "d n"]) -> Float[Array, "m n"]:
    """Compute x @ y in the dtype of the inputs, accumulated in float32."""
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def pull_back(
    g: Float[Array, "m n"], x: Float[Array, "m d"], y: Float[Array, "d n"]
) -> tuple[Float[Array, "m d"], Float[Array, "d n"]]:
    """Gradients of the inputs of `dot`, given the gradient `g` of its output, in float32."""
    g = g.astype(x.dtype)
    return dot(g, y.T), dot(x.T, g)


def dot_pairs(x: Float[Array, "b d"], y: Float[Array, "b d"]) -> Float[Array, " b"]:
    """Dot product of each image with its own text."""
    return jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)


def _hide(row: Array, column: Array, b: int, *, padded: bool, own: bool) -> Hide:
    """Make a function that masks positives of the own block, and padding from index b on.

    Its argument `positives=False` leaves positives out.
    """

    def hide(logits, positives=own):
        if not padded and not positives:
            return logits
        rows = row + lax.broadcasted_iota(jnp.int32, logits.shape, 0)
        columns = column + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        hidden = jnp.zeros((), bool)
        if positives:
            hidden |= rows == columns
        if padded:
            hidden |= (rows >= b) | (columns >= b)
        return jnp.where(hidden, MASKED_LOGIT, logits)

    return hide


def _cut(tree, count, t, axis):
    """Split axis b into (count, t), with count first; pad by repeating the last entry."""

    def cut(x):
        before, after = x.shape[: axis % x.ndim], x.shape[axis % x.ndim + 1 :]
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, count * t - x.shape[axis])
        tiles = jnp.pad(x, pad, mode="edge").reshape(*before, count, t, *after)
        return jnp.moveaxis(tiles, len(before), 0)

    return jax.tree.map(cut, tree)


def _join(tree, b, axis):
    """Inverse of `_cut`."""

    def join(tiles):
        at = axis % (tiles.ndim - 1)
        x = jnp.moveaxis(tiles, 0, at)
        x = x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :])
        return jax.lax.slice_in_dim(x, 0, b, axis=at)

    return jax.tree.map(join, tree)


def _at(tree, i):
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _put(tree, i, values):
    return jax.tree.map(lambda x, v: lax.dynamic_update_index_in_dim(x, v, i, 0), tree, values)
