"""How a checkpoint's parameters become ours and back: tables of rules, and what applies them.

A family is a table of `Rule`s. Applying it is all or nothing: a parameter that no rule takes, one
of ours that no rule fills, and a shape that differs are collected into one error.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Shaped
from numpy.typing import DTypeLike

from vlm.errors import CheckpointError
from vlm.weights.fields import list_names
from vlm.weights.files import Tensors, part_rows, read_parameter

Model = TypeVar("Model", bound=nnx.Module)
Shape = tuple[int, ...]
ANY = -1  # a size that a rule leaves open
Spans = tuple[tuple[int, int], ...]  # the first and past the last index along each axis
_THREADS = 4  # that read and copy at most, each a part or a tensor at a time


@dataclass(frozen=True)
class Transform:
    """A change of layout: what shape they have for one of ours, and the way there and back."""

    shape: Callable[[Shape], Shape]
    read: Callable[[np.ndarray, Shape], np.ndarray]  # theirs, our shape -> ours
    write: Callable[[np.ndarray], np.ndarray]  # ours -> theirs


SAME = Transform(lambda s: s, lambda x, s: x, lambda x: x)
FLAT = Transform(  # biases of heads, probes, anything whose axes merely merge
    lambda s: (math.prod(s),), lambda x, s: x.reshape(s), lambda x: x.reshape(-1)
)
LINEAR = Transform(  # torch's (out, in); heads split the last axis of ours
    lambda s: (math.prod(s[1:]), s[0]),
    lambda x, s: x.T.reshape(s),
    lambda x: x.reshape(x.shape[0], -1).T,
)
OUT = Transform(  # torch's (out, in) of the projection after the heads
    lambda s: (s[-1], math.prod(s[:-1])),
    lambda x, s: x.T.reshape(s),
    lambda x: x.reshape(-1, x.shape[-1]).T,
)
CONV = Transform(  # torch's OIHW, ours HWIO
    lambda s: (s[3], s[2], s[0], s[1]),
    lambda x, s: x.transpose(2, 3, 1, 0),
    lambda x: x.transpose(3, 2, 0, 1),
)
SCALAR = Transform(lambda s: (), lambda x, s: x.reshape(s), lambda x: x.reshape(()))
SCALAR_1 = Transform(lambda s: (1,), lambda x, s: x.reshape(s), lambda x: x.reshape(1))


# Theirs has any number of rows, and ours is the first of them; there is no way back.
FIRST_ROW = Transform(lambda s: (ANY, *s), lambda x, s: x[0], lambda x: x[None])


def leading(count: int) -> Transform:
    """Ours with `count` axes of length one in front."""
    ones = (1,) * count
    return Transform(
        lambda s: ones + s, lambda x, s: x.reshape(s), lambda x: x.reshape(ones + x.shape)
    )


# Their class token has no position; ours has the first row, which is then zero.
WITHOUT_FIRST = Transform(
    lambda s: (1, s[0] - 1, s[1]),
    lambda x, s: np.concatenate([np.zeros_like(x[0, :1]), x[0]]),
    lambda x: x[None, 1:],
)


@dataclass(frozen=True)
class Rule:
    """One row: their name, our name, the change of layout. "{}" is the number of a layer.

    With several names of ours, theirs is their concatenation along its first axis. Layers are
    counted from `first`.

    Example:
        >>> rule = vlm.weights.Rule("visual.ln_post.weight", "vision.norm.scale")
        >>> rule.theirs
        'visual.ln_post.weight'
    """

    theirs: str
    ours: str | tuple[str, ...]
    transform: Transform = SAME
    first: int = 0


@dataclass(frozen=True)
class LayerRule:
    """A part of one of our arrays: the whole, or one layer; and where it comes from."""

    theirs: str
    ours: str
    layer: int | None
    transform: Transform
    shape: Shape  # of ours, without the layer axis
    part: int = 0
    parts: int = 1

    @property
    def their_shape(self) -> Shape:
        """The shape of the whole tensor of theirs."""
        shape = self.transform.shape(self.shape)
        return shape if self.parts == 1 else (shape[0] * self.parts, *shape[1:])

    @property
    def row_by_row(self) -> bool:
        """Whether our rows are theirs, so that some can be read without the others."""
        return self.transform is SAME and self.parts == 1 and len(self.shape) > 1

    def read(
        self, tensors: Tensors, start: int = 0, stop: int | None = None
    ) -> Shaped[np.ndarray, "..."]:
        """Our array, or its rows `start:stop` where they are `row_by_row`.

        Raises:
            CheckpointError: theirs are not floating-point numbers.
        """
        if not self.row_by_row and self.parts > 1:
            rows = self.transform.shape(self.shape)[0]
            start, stop = self.part * rows, (self.part + 1) * rows
        theirs = read_parameter(tensors, self.theirs, start, stop)
        return theirs if self.row_by_row else self.transform.read(theirs, self.shape)


def expand(rules: Sequence[Rule], shapes: dict[str, Shape]) -> list[LayerRule]:
    """The rules spelled out, layer by layer, for a model whose arrays have these `shapes`."""
    pieces = []
    for rule in rules:
        names = (rule.ours,) if isinstance(rule.ours, str) else rule.ours
        for part, name in enumerate(names):
            if name not in shapes:
                pieces.append(LayerRule(rule.theirs, name, None, rule.transform, ()))
                continue
            shape = shapes[name]
            layered = "{}" in rule.theirs
            for layer in range(shape[0]) if layered else [None]:
                theirs = rule.theirs if layer is None else rule.theirs.format(rule.first + layer)
                one = shape[1:] if layered else shape
                pieces.append(LayerRule(theirs, name, layer, rule.transform, one, part, len(names)))
    return pieces


def check(
    pieces: Sequence[LayerRule],
    shapes: dict[str, Shape],
    tensors: Tensors,
    ignored: Callable[[str], bool] = lambda name: False,
) -> None:
    """Refuse what does not match on either side, all of it in one error.

    Raises:
        CheckpointError: says how many parameters are missing, left over or of another shape, and
            names the first of each.
    """
    expected = {piece.theirs: piece for piece in pieces}
    filled = {piece.ours for piece in pieces}
    missing = [name for name in expected if name not in tensors.shapes]
    over = [name for name in tensors.shapes if name not in expected and not ignored(name)]
    empty = [name for name in shapes if name not in filled]
    unknown = sorted(filled - set(shapes))
    other = [
        f"{name} {tensors.shapes[name]} (the model has {piece.their_shape})"
        for name, piece in expected.items()
        if name in tensors.shapes
        and piece.ours in shapes
        and not _fits(tuple(tensors.shapes[name]), piece.their_shape)
    ]
    faults = [
        (missing, "missing from the file"),
        (over, "in the file without a place in the model"),
        (empty, "of the model that nothing fills"),
        (unknown, "that the model does not have"),
        (other, "of another shape"),
    ]
    found = [
        f"{len(names)} parameter{'s' * (len(names) > 1)} {what}: {list_names(names)}"
        for names, what in faults
        if names
    ]
    if found:
        without = _without(pieces, set(missing))
        kind = f" (it has no {without} at all)" if without else ""
        raise CheckpointError(
            f"{tensors.where} does not fit the architecture that its configuration describes{kind};"
            f" {'; '.join(found)}"
        )


def _without(pieces: Sequence[LayerRule], missing: set[str]) -> str:
    """The towers of which a file has nothing, as in a classifier made from a vision tower."""
    towers = {"vision": "vision tower", "text": "text tower"}
    theirs = {
        said: {piece.theirs for piece in pieces if piece.ours.startswith(f"{tower}.")}
        for tower, said in towers.items()
    }
    return " and no ".join(said for said, names in theirs.items() if names and names <= missing)


def _fits(shape: Shape, wanted: Shape) -> bool:
    return len(shape) == len(wanted) and all(
        b in (a, ANY) for a, b in zip(shape, wanted, strict=True)
    )


def flat_shapes(model: nnx.Module) -> dict[str, Shape]:
    """The shape of each parameter of a model, abstract or real, by its dotted name."""
    return {name: tuple(value.shape) for name, value in _flat(model)}


def flat_arrays(model: nnx.Module) -> list[tuple[str, jax.Array]]:
    """Each parameter of a model by its dotted name, sorted."""
    return sorted((name, value.get_value()) for name, value in _flat(model))


def fill(
    model: Model,
    rules: Sequence[Rule],
    tensors: Tensors,
    *,
    dtype: DTypeLike,
    placement: Callable[[str, Shape], jax.sharding.Sharding] | None = None,
    ignored: Callable[[str], bool] = lambda name: False,
) -> Model:
    """The abstract `model` made real with what the rules find in `tensors`.

    A few threads read: each holds one tensor of theirs at a time, of a table no more than a part,
    and of each of our arrays the shards of this host's devices alone. Floating tensors take
    `dtype`, but the scale and bias of the logits stay float32.
    """
    shapes = flat_shapes(model)
    pieces = expand(rules, shapes)
    check(pieces, shapes, tensors, ignored)
    by_name: dict[str, list[LayerRule]] = {}
    for piece in pieces:
        by_name.setdefault(piece.ours, []).append(piece)
    graph, state = nnx.split(model)

    def make(path: tuple) -> jax.Array:
        name = ".".join(map(str, path))
        kind = np.dtype(np.float32) if name.startswith("logit_") else np.dtype(dtype)
        sharding = None if placement is None else placement(name, shapes[name])
        return _array(by_name[name], shapes[name], tensors, kind, sharding)

    variables = dict(nnx.to_flat_state(state))
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "vlm-weights") as pool:
        arrays = [pool.submit(make, path) for path in variables]
        try:
            flat = {
                path: variable.replace(array.result())
                for (path, variable), array in zip(variables.items(), arrays, strict=True)
            }
        finally:  # after an error the rest is not read
            pool.shutdown(cancel_futures=True)
    return nnx.merge(graph, nnx.from_flat_state(flat))


def read_all(
    model: nnx.Module,
    rules: Sequence[Rule],
    tensors: Tensors,
    ignored: Callable[[str], bool] = lambda name: False,
) -> Iterator[tuple[str, jax.Array]]:
    """Each parameter of an abstract model in float32 by its name, one at a time."""
    shapes = flat_shapes(model)
    pieces = expand(rules, shapes)
    check(pieces, shapes, tensors, ignored)
    for name, shape in shapes.items():
        own = [piece for piece in pieces if piece.ours == name]
        yield name, _array(own, shape, tensors, np.dtype(np.float32), None)


def write(model: nnx.Module, rules: Sequence[Rule]) -> Iterator[tuple[str, "LazyTensor"]]:
    """Their names and tensors, in the order of the rules; each is made when it is asked for."""
    arrays = dict(flat_arrays(model))
    pieces: dict[str, list[LayerRule]] = {}
    for piece in expand(rules, flat_shapes(model)):
        pieces.setdefault(piece.theirs, []).append(piece)
    for name, parts in pieces.items():
        yield name, LazyTensor(parts, arrays)


class LazyTensor:
    """A tensor of theirs that is made from ours when numpy asks for it."""

    def __init__(self, pieces: list[LayerRule], arrays: dict[str, jax.Array]):
        self.shape = pieces[0].their_shape
        self.dtype = arrays[pieces[0].ours].dtype
        self._pieces, self._arrays = pieces, arrays

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        parts = []
        for piece in self._pieces:
            ours = self._arrays[piece.ours]
            ours = np.asarray(ours if piece.layer is None else ours[piece.layer])
            parts.append(piece.transform.write(ours))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _flat(model: nnx.Module) -> Iterable[tuple[str, nnx.Variable]]:
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return [(".".join(map(str, path)), variable) for path, variable in state]


def _array(pieces, shape, tensors, dtype, sharding) -> jax.Array:
    """One of our arrays from its pieces, by way of the buffers of this host's shards."""
    whole = tuple((0, size) for size in shape)
    spans = {None: whole}
    if sharding is not None:
        places = sharding.addressable_devices_indices_map(shape)
        spans = {device: _spans(index, shape) for device, index in places.items()}
    buffers = {span: _aligned([b - a for a, b in span], dtype) for span in set(spans.values())}
    for piece in pieces:
        _copy_slices(piece, tensors, buffers)
    if sharding is None:
        return jax.device_put(buffers[whole], may_alias=True)
    shards = [jax.device_put(buffers[span], device) for device, span in spans.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _copy_slices(piece: LayerRule, tensors: Tensors, buffers: dict[Spans, np.ndarray]) -> None:
    """What each buffer wants of one piece, read no more than once and a large table in parts."""
    targets = []
    for span, buffer in buffers.items():
        if piece.layer is None:
            targets.append((span, buffer))
        elif span[0][0] <= piece.layer < span[0][1]:
            targets.append((span[1:], buffer[piece.layer - span[0][0]]))
    if not targets:
        return
    if not piece.row_by_row:
        value = piece.read(tensors)
        for span, buffer in targets:
            buffer[...] = value[tuple(slice(a, b) for a, b in span)]
        return
    step = part_rows(piece.shape)
    first, last = min(span[0][0] for span, _ in targets), max(span[0][1] for span, _ in targets)
    for part in range(first // step, -(-last // step)):
        start, stop = max(part * step, first), min((part + 1) * step, last)
        value = piece.read(tensors, start, stop)
        for (rows, *rest), buffer in targets:
            low, high = max(rows[0], start), min(rows[1], stop)
            if low < high:
                cut = (slice(low - start, high - start), *(slice(a, b) for a, b in rest))
                buffer[low - rows[0] : high - rows[0]] = value[cut]


def _spans(index: tuple[slice, ...], shape: Shape) -> Spans:
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory on a cache line, which the CPU's runtime takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
