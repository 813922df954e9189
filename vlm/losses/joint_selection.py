"""Joint example selection: sample a batch from a super-batch by its contrastive loss.

JEST (Evans et al., 2024, arXiv:2406.17711) samples a batch in chunks. A batch S has a score

    s(S) = sum over models m of w_m b L_m(S)

where L is the contrastive loss, b the size of S, and the weights are +1 for the learner and -1 for
the reference (learnability), or one of these alone. Pair i gets the conditional score
s(S + i) - s(S), and the next chunk is drawn without replacement with probabilities proportional to
exp(s(S + i) - s(S)): Gumbel noise is added, and the largest are taken.

The sigmoid loss is a sum over pairs, so what a chunk adds to the conditional scores stays:

    s(S + i) - s(S) = w [softplus(-l_ii) + sum_{j in S} softplus(l_ij) + softplus(l_ji)]

For the softmax loss, R_j = log sum_{k in S} exp(l_jk) grows with S, and C_j is that of columns:

    s(S + i) - s(S) = w/2 [log(exp(l_ii) + sum_{j in S} exp(l_ij)) - l_ii + (the same of column i)
                           + sum_{j in S} softplus(l_ji - R_j) + softplus(l_ij - C_j)]

which is 0 for an empty S: the first chunk is uniform.

Each device computes the conditional scores of its own rows, in tiles of the chosen pairs. Scores of
all rows are gathered, one number per pair, so that every device draws the same pairs, and draws on
any mesh differ only by rounding.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from vlm.config import Loss
from vlm.errors import ConfigError
from vlm.losses.contrastive import on_mesh, placement, ring_of
from vlm.losses.ring import Ring, dot, dot_pairs


class ScoredEmbeddings(NamedTuple):
    """Embeddings of a super-batch by one model, and the weight of its loss in the score."""

    weight: float
    z_image: Float[Array, "b d"]
    z_text: Float[Array, "b d"]
    logit_scale: Float[Array, ""]  # logarithm of the factor on the cosines
    logit_bias: Float[Array, ""] | None = None


def select_jointly(
    key: Key[Array, ""],
    models: Sequence[ScoredEmbeddings],
    count: int,
    *,
    chunks: int,
    kind: Loss,
    mesh: Mesh | AbstractMesh | None = None,
    batch_axes: tuple[str, ...] = ("data", "fsdp"),
    tile: int = 1024,
) -> Int[Array, " count"]:
    """Sample `count` pairs of a super-batch jointly; return their indices in increasing order.

    Chunk c of size `count / chunks` takes the largest of the conditional scores plus row c of
    `jax.random.gumbel(key, (chunks, B))`. Memory is B x `tile` numbers over all devices, and for
    the softmax loss the chosen embeddings on each device.

    Args:
        models: learner, reference or both, over the same pairs.
        count: pairs to choose.
        kind: loss of the scores.
        mesh, batch_axes: as in `contrastive_loss`.
        tile: upper bound on the chosen pairs that are compared at a time.

    Raises:
        ConfigError: unknown loss, no model, shapes that differ, or chunks that do not divide
            `count`.
        ShardingError: as in `contrastive_loss`.

    Source: arXiv:2406.17711, algorithm 1.

    Example:
        >>> from vlm.losses.joint_selection import ScoredEmbeddings, select_jointly
        >>> z = jnp.eye(8)
        >>> wrong = ScoredEmbeddings(-1.0, z, z.at[:4].set(z[:4][::-1]), jnp.log(50.0))
        >>> found = select_jointly(jax.random.key(0), [wrong], 4, chunks=4, kind="sigmoid")
        >>> found.tolist()  # the pairs that the reference finds easy
        [4, 5, 6, 7]
    """
    if kind not in _KINDS:
        raise ConfigError(f"there is no {kind!r} loss: choose one of {', '.join(_KINDS)}")
    if not models:
        raise ConfigError("a joint selection needs the embeddings of a learner or a reference")
    total = len(models[0].z_image)
    if any(len(model.z_image) != total for model in models):
        sizes = ", ".join(str(len(model.z_image)) for model in models)
        raise ConfigError(f"models embed super-batches of {sizes} pairs: embed the same pairs")
    if not 0 < count <= total or count % chunks:
        raise ConfigError(
            f"{count} of {total} pairs cannot be chosen in {chunks} chunks: choose a number of "
            "chunks that divides the batch"
        )
    mesh, batch_axes = placement(models[0].z_image, mesh, batch_axes)
    rings = [ring_of(m.z_image, m.z_text, mesh, batch_axes, tile) for m in models]
    noise = jax.random.gumbel(key, (chunks, total), jnp.float32)
    rows, number = PartitionSpec(rings[0].axes), PartitionSpec()
    arrays = tuple(
        (m.z_image, m.z_text, jnp.exp(m.logit_scale), jnp.asarray(_zero_if_none(m.logit_bias)))
        for m in models
    )
    specs = (number, tuple((rows, rows, number, number) for _ in models))
    choose = functools.partial(_choose, _KINDS[kind], count, tuple(m.weight for m in models))
    return on_mesh(choose, mesh, rings[0], specs, number)(noise, arrays)


def _choose(
    kind: "_Kind", count: int, weights: tuple[float, ...], ring: Ring, noise: Array, models: tuple
) -> Int[Array, " count"]:
    """Draw all chunks on the devices of a ring; each device has its rows of the models."""
    chunks, size = len(noise), count // len(noise)
    b = len(models[0][0])
    own = _first_row(ring, b) + jnp.arange(b)  # global indices of the local rows
    pairs = [scale * dot_pairs(x, y) + bias for x, y, scale, bias in models]

    def draw(chunk: Array, carry: tuple) -> tuple:
        sums, chosen, picked = carry
        scores = kind.scores(ring, models, weights, pairs, sums, chosen, size * chunk)
        everywhere = lax.all_gather(scores, ring.axes, tiled=True) if ring.axes else scores
        _, new = lax.top_k(jnp.where(picked, -jnp.inf, everywhere + noise[chunk]), size)
        chosen = lax.dynamic_update_slice(chosen, new.astype(jnp.int32), (size * chunk,))
        sums = kind.grow(ring, models, weights, own, sums, new, size * chunk)
        return sums, chosen, picked.at[new].set(True)

    start = kind.start(models, weights, pairs, count)
    none = jnp.zeros(count, jnp.int32), jnp.zeros(noise.shape[1], bool)
    _, chosen, _ = lax.fori_loop(0, chunks, draw, (start, *none))
    return jnp.sort(chosen)


class _Kind(NamedTuple):
    """How a loss scores candidates: sums at the start, their growth by a chunk, and the scores."""

    start: Callable[..., Any]
    grow: Callable[..., Any]
    scores: Callable[..., Float[Array, " b"]]


# ------------------------------------------------------------------------------------- sigmoid


def _sigmoid_start(models, weights, pairs, count):
    return sum(w * jax.nn.softplus(-own) for w, own in zip(weights, pairs, strict=True))


def _sigmoid_grow(ring, models, weights, own, sums, new, filled):
    for weight, (x, y, scale, bias) in zip(weights, models, strict=True):

        def visit(other, valid, x=x, y=y, scale=scale, bias=bias):
            u, v = other
            negatives = jax.nn.softplus(scale * dot(x, v.T) + bias)
            negatives += jax.nn.softplus(scale * dot(y, u.T) + bias)
            return jnp.where(valid, negatives, 0.0).sum(1)

        others = _take(ring, (x, y), new)
        sums += weight * _over_tiles(visit, jnp.add, others, ring.tile, jnp.zeros(len(x)))
    return sums


def _sigmoid_scores(ring, models, weights, pairs, sums, chosen, filled):
    return sums


# ------------------------------------------------------------------------------------- softmax


class _SoftmaxSums(NamedTuple):
    """Of one model: log sums of exponentials without the own pair, and the chosen embeddings."""

    row: Float[Array, " b"]
    column: Float[Array, " b"]
    z_image: Float[Array, "count d"]
    z_text: Float[Array, "count d"]


def _softmax_start(models, weights, pairs, count):
    none = jnp.full(len(pairs[0]), -jnp.inf)
    chosen = (jnp.zeros((count, x.shape[1]), x.dtype) for x, *_ in models)
    return tuple(_SoftmaxSums(none, none, empty, empty) for empty in chosen)


def _softmax_grow(ring, models, weights, own, sums, new, filled):
    grown = []
    for (x, y, scale, _), old in zip(models, sums, strict=True):
        u, v = _take(ring, (x, y), new)

        def visit(other, valid, x=x, y=y, scale=scale):
            u, v, indices = other
            negative = valid & (own[:, None] != indices)
            logits = scale * dot(x, v.T), scale * dot(y, u.T)
            hidden = (jnp.where(negative, part, -jnp.inf) for part in logits)
            return tuple(jax.nn.logsumexp(part, axis=1) for part in hidden)

        merge = functools.partial(jax.tree.map, jnp.logaddexp)
        row, column = _over_tiles(visit, merge, (u, v, new), ring.tile, (old.row, old.column))
        put = functools.partial(lax.dynamic_update_slice, start_indices=(filled, 0))
        grown.append(_SoftmaxSums(row, column, put(old.z_image, u), put(old.z_text, v)))
    return tuple(grown)


def _softmax_scores(ring, models, weights, pairs, sums, chosen, filled):
    total = jnp.zeros(len(pairs[0]))
    for weight, (x, y, scale, bias), own, old in zip(weights, models, pairs, sums, strict=True):
        own = own - bias  # a bias cancels out
        with_own = jnp.logaddexp(old.row, own), jnp.logaddexp(old.column, own)

        def visit(other, valid, x=x, y=y, scale=scale):
            u, v, in_row, in_column = other
            added = jax.nn.softplus(scale * dot(y, u.T) - in_row)
            added += jax.nn.softplus(scale * dot(x, v.T) - in_column)
            return jnp.where(valid, added, 0.0).sum(1)

        others = (old.z_image, old.z_text, *_take(ring, with_own, chosen))
        valid = jnp.arange(len(chosen)) < filled
        added = _over_tiles(visit, jnp.add, others, ring.tile, jnp.zeros(len(x)), valid)
        total += weight / 2 * (with_own[0] + with_own[1] - 2 * own + added)
    return total


_KINDS = {
    "softmax": _Kind(_softmax_start, _softmax_grow, _softmax_scores),
    "sigmoid": _Kind(_sigmoid_start, _sigmoid_grow, _sigmoid_scores),
}

# ------------------------------------------------------------------------------- rows and tiles


def _first_row(ring: Ring, b: int) -> Any:
    """Return the global index of the first local row."""
    return lax.axis_index(ring.axes) * b if ring.axes else 0


def _take(ring: Ring, tree: Any, indices: Int[Array, " n"]) -> Any:
    """Copy rows of arrays that are sharded over the ring to every device."""
    b = len(jax.tree.leaves(tree)[0])
    local = indices - _first_row(ring, b)
    here = (local >= 0) & (local < b)

    def take(x):
        rows = x[jnp.clip(local, 0, b - 1)]
        if not ring.axes:
            return rows
        rows = jnp.where(here.reshape(-1, *(1,) * (x.ndim - 1)), rows, 0)
        return lax.psum(rows, ring.axes)

    return jax.tree.map(take, tree)


def _over_tiles(
    visit: Callable[[Any, Bool[Array, " t"]], Any],
    merge: Callable[[Any, Any], Any],
    others: Any,
    tile: int,
    start: Any,
    valid: Bool[Array, " n"] | None = None,
) -> Any:
    """Merge `start` and `visit(tile of others, which of them are valid)` of all tiles."""
    n = len(jax.tree.leaves(others)[0])
    count = -(-n // tile)
    t = -(-n // count)

    def cut(x):
        pad = [(0, count * t - n)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, pad).reshape(count, t, *x.shape[1:])

    def step(total, part):
        return merge(total, visit(*part)), None

    tiles = jax.tree.map(cut, (others, jnp.ones(n, bool) if valid is None else valid))
    return lax.scan(step, start, tiles)[0]


def _zero_if_none(logit_bias: Any) -> Any:
    return 0.0 if logit_bias is None else logit_bias
