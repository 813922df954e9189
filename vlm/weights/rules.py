"""Tables of rules that convert a checkpoint's parameters to ours and back, and their application.

Each family has a table of `Rule`s. Every parameter must match: one in the file without a rule, one
of ours without a source, and a different shape are collected into one error.
"""

import itertools
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Shaped
from numpy.typing import DTypeLike

from vlm.errors import CheckpointError
from vlm.nn.lora import KernelScale
from vlm.weights.fields import list_names
from vlm.weights.files import Tensors, part_rows, read_parameter

Model = TypeVar("Model", bound=nnx.Module)
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
ANY = -1  # any size
Spans = tuple[tuple[int, int], ...]  # start and stop along each axis
_THREADS = 4  # maximum that read and copy, each one part or tensor at a time


@dataclass(frozen=True)
class Transform:
    """Change of layout between a checkpoint's tensor and our array."""

    shape: Callable[[Shape], Shape]  # our shape -> theirs
    read: Callable[[np.ndarray, Shape], np.ndarray]  # theirs, our shape -> ours
    write: Callable[[np.ndarray], np.ndarray]  # ours -> theirs


SAME = Transform(lambda s: s, lambda x, s: x, lambda x: x)
FLAT = Transform(  # biases of heads, probes: axes that are merged
    lambda s: (math.prod(s),), lambda x, s: x.reshape(s), lambda x: x.reshape(-1)
)
LINEAR = Transform(  # torch's (out, in); heads split our last axis
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
# The first of any number of rows. The others are lost: there is no way back.
FIRST_ROW = Transform(lambda s: (ANY, *s), lambda x, s: x[0], lambda x: x[None])


def leading(count: int) -> Transform:
    """Add `count` axes of length one in front of ours."""
    ones = (1,) * count
    return Transform(
        lambda s: ones + s, lambda x, s: x.reshape(s), lambda x: x.reshape(ones + x.shape)
    )


# Their class token has no position; ours has the first row, which becomes zero.
WITHOUT_FIRST = Transform(
    lambda s: (1, s[0] - 1, s[1]),
    lambda x, s: np.concatenate([np.zeros_like(x[0, :1]), x[0]]),
    lambda x: x[None, 1:],
)


@dataclass(frozen=True)
class Rule:
    """Name in the checkpoint, name in our model, and the change of layout.

    "{}" in `theirs` is the number of a layer, counted from `first` by `step`. With several names in
    `ours`, the checkpoint's tensor is their concatenation along its first axis.

    Example:
        >>> rule = vlm.weights.Rule("visual.ln_post.weight", "vision.norm.scale")
        >>> rule.theirs
        'visual.ln_post.weight'
    """

    theirs: str
    ours: str | tuple[str, ...]
    transform: Transform = SAME
    first: int = 0
    step: int = 1


@dataclass(frozen=True)
class LayerRule:
    """Rule for one layer, or for an array without layers."""

    theirs: str
    ours: str
    layer: int | None
    transform: Transform
    shape: Shape  # of ours, without the layer axis
    part: int = 0  # number among the `parts` of their tensor
    parts: int = 1

    @property
    def their_shape(self) -> Shape:
        """Shape of their tensor, with all parts."""
        shape = self.transform.shape(self.shape)
        return shape if self.parts == 1 else (shape[0] * self.parts, *shape[1:])

    @property
    def row_by_row(self) -> bool:
        """Whether rows of our array equal theirs, so that some can be read alone."""
        return self.transform is SAME and self.parts == 1 and len(self.shape) > 1

    def read(
        self, tensors: Tensors, start: int = 0, stop: int | None = None
    ) -> Shaped[np.ndarray, "..."]:
        """Read our array, or its rows `start:stop` if `row_by_row`.

        Raises:
            CheckpointError: their tensor does not hold floating-point numbers.
        """
        if not self.row_by_row and self.parts > 1:
            rows = self.transform.shape(self.shape)[0]
            start, stop = self.part * rows, (self.part + 1) * rows
        theirs = read_parameter(tensors, self.theirs, start, stop)
        return theirs if self.row_by_row else self.transform.read(theirs, self.shape)


def expand(rules: Sequence[Rule], shapes: Shapes) -> list[LayerRule]:
    """Apply rules to each layer of a model whose arrays have these `shapes`."""
    expanded = []
    for rule in rules:
        names = (rule.ours,) if isinstance(rule.ours, str) else rule.ours
        for part, name in enumerate(names):
            shape = shapes.get(name)
            if shape is None:  # `check` reports it
                expanded.append(LayerRule(rule.theirs, name, None, rule.transform, ()))
                continue
            layered = "{}" in rule.theirs
            for layer in range(shape[0]) if layered else [None]:
                number = rule.first + rule.step * (layer or 0)
                theirs = rule.theirs if layer is None else rule.theirs.format(number)
                layer_shape = shape[1:] if layered else shape
                expanded.append(
                    LayerRule(theirs, name, layer, rule.transform, layer_shape, part, len(names))
                )
    return expanded


def check(
    layers: Sequence[LayerRule],
    shapes: Shapes,
    tensors: Tensors,
    ignored: Callable[[str], bool] = lambda name: False,
) -> None:
    """Check that a model with these `shapes` and a checkpoint match.

    Raises:
        CheckpointError: it counts the parameters that are missing, left over or of another shape,
            and names the first of each.
    """
    expected = {layer.theirs: layer for layer in layers}
    filled = {layer.ours for layer in layers}
    missing = [name for name in expected if name not in tensors.shapes]
    unused = [
        name
        for name, shape in tensors.shapes.items()
        if name not in expected and 0 not in shape and not ignored(name)
    ]  # an array without elements, such as no registers, holds nothing
    different = [
        f"{name} {tensors.shapes[name]} (the model has {layer.their_shape})"
        for name, layer in expected.items()
        if name in tensors.shapes
        and layer.ours in shapes
        and not _fits(tuple(tensors.shapes[name]), layer.their_shape)
    ]
    faults = {
        "missing from the file": missing,
        "in the file without a place in the model": unused,
        "of the model without a rule": [name for name in shapes if name not in filled],
        "that the model does not have": sorted(filled - set(shapes)),
        "of another shape": different,
    }
    problems = [
        f"{len(names)} parameter{'s' * (len(names) > 1)} {fault}: {list_names(names)}"
        for fault, names in faults.items()
        if names
    ]
    if not problems:
        return
    absent = []  # towers without any parameter, as in a classifier made from a vision tower
    for tower, label in (("vision", "vision tower"), ("text", "text tower")):
        names = {layer.theirs for layer in layers if layer.ours.startswith(f"{tower}.")}
        if names and names <= set(missing):
            absent.append(label)
    kind = f" (it has no {' and no '.join(absent)} at all)" if absent else ""
    raise CheckpointError(
        f"{tensors.where} does not fit the architecture that its configuration describes{kind}; "
        f"{'; '.join(problems)}"
    )


def _fits(shape: Shape, wanted: Shape) -> bool:
    return len(shape) == len(wanted) and all(
        b in (a, ANY) for a, b in zip(shape, wanted, strict=True)
    )


def count_layers(shapes: Shapes, theirs: str) -> int:
    """Count the layers with a parameter named `theirs`, where "{}" is the layer's number."""
    return next(n for n in itertools.count() if theirs.format(n) not in shapes)


def flat_shapes(model: nnx.Module) -> dict[str, Shape]:
    """Shape of each parameter of a model, abstract or real, by its dotted name."""
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
    """Fill the abstract `model` with the parameters that the rules find in `tensors`.

    A few threads read. Each holds one tensor at a time, or one part of a table, and of each of our
    arrays only the shards of this host's devices. Parameters get `dtype`, except the scale and bias
    of the logits, which stay float32.
    """
    shapes = flat_shapes(model)
    by_name = _checked(shapes, rules, tensors, ignored)
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
        finally:  # after an error, do not read the rest
            pool.shutdown(cancel_futures=True)
    return nnx.merge(graph, nnx.from_flat_state(flat))


def read_all(
    model: nnx.Module,
    rules: Sequence[Rule],
    tensors: Tensors,
    ignored: Callable[[str], bool] = lambda name: False,
) -> Iterator[tuple[str, jax.Array]]:
    """Read each parameter of an abstract model in float32, one at a time."""
    shapes = flat_shapes(model)
    by_name = _checked(shapes, rules, tensors, ignored)
    for name, shape in shapes.items():
        yield name, _array(by_name[name], shape, tensors, np.dtype(np.float32), None)


def write(
    model: nnx.Module, rules: Sequence[Rule], computed: Collection[str] = ()
) -> Iterator[tuple[str, "LazyTensor"]]:
    """Yield their names and tensors, in the order of the rules; each is made on demand.

    Raises:
        CheckpointError: no rule has one of our parameters, except those that the other library has
            `computed`, so that it would be lost; or a rule has one that the model lacks.
    """
    arrays = dict(flat_arrays(model))
    ours = {layer.ours for layer in expand(rules, flat_shapes(model))}
    if absent := sorted(ours - arrays.keys()):
        raise CheckpointError(
            f"the other format needs {list_names(absent)}, which the model does not have: save the "
            "model as a vlm bundle"
        )
    if lost := sorted(arrays.keys() - ours - set(computed)):
        raise CheckpointError(
            f"the other format has no place for {list_names(lost)}: save the model as a vlm bundle"
        )
    for name, parts in _grouped(expand(rules, flat_shapes(model)), "theirs").items():
        yield name, LazyTensor(parts, arrays)


class LazyTensor:
    """Tensor of another library that is made from our arrays when numpy asks for it."""

    def __init__(self, layers: list[LayerRule], arrays: dict[str, jax.Array]):
        self.shape = layers[0].their_shape
        self.dtype = arrays[layers[0].ours].dtype
        self._layers, self._arrays = layers, arrays

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        parts = []
        for layer in self._layers:
            ours = self._arrays[layer.ours]
            ours = np.asarray(ours if layer.layer is None else ours[layer.layer])
            parts.append(layer.transform.write(ours))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _checked(
    shapes: Shapes, rules: Sequence[Rule], tensors: Tensors, ignored: Callable
) -> dict[str, list[LayerRule]]:
    """Expand rules, `check` them, and group them by our names."""
    layers = expand(rules, shapes)
    check(layers, shapes, tensors, ignored)
    return _grouped(layers, "ours")


def _grouped(layers: Iterable[LayerRule], key: str) -> dict[str, list[LayerRule]]:
    groups: dict[str, list[LayerRule]] = {}
    for layer in layers:
        groups.setdefault(getattr(layer, key), []).append(layer)
    return groups


def _flat(model: nnx.Module) -> Iterable[tuple[str, nnx.Variable]]:
    state = nnx.to_flat_state(nnx.state(model))
    return [
        (".".join(map(str, path)), variable)
        for path, variable in state
        if not isinstance(variable, KernelScale)  # of a quantized copy
    ]


def _array(layers, shape, tensors, dtype, sharding) -> jax.Array:
    """Read one of our arrays, by way of the buffers of this host's shards."""
    full = tuple((0, size) for size in shape)
    spans = {None: full}
    if sharding is not None:
        places = sharding.addressable_devices_indices_map(shape)
        spans = {device: _spans(index, shape) for device, index in places.items()}
    buffers = {span: _aligned([b - a for a, b in span], dtype) for span in set(spans.values())}
    for layer in layers:
        _copy_slices(layer, tensors, buffers)
    if sharding is None:
        return jax.device_put(buffers[full], may_alias=True)
    shards = [jax.device_put(buffers[span], device) for device, span in spans.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _copy_slices(rule: LayerRule, tensors: Tensors, buffers: dict[Spans, np.ndarray]) -> None:
    """Copy to each buffer its slice of one layer, read at most once; a large table in parts."""
    targets = []
    for span, buffer in buffers.items():
        if rule.layer is None:
            targets.append((span, buffer))
        elif span[0][0] <= rule.layer < span[0][1]:
            targets.append((span[1:], buffer[rule.layer - span[0][0]]))
    if not targets:
        return
    if not rule.row_by_row:
        value = rule.read(tensors)
        for span, buffer in targets:
            buffer[...] = value[tuple(slice(a, b) for a, b in span)]
        return
    step = part_rows(rule.shape)
    first, last = min(span[0][0] for span, _ in targets), max(span[0][1] for span, _ in targets)
    for part in range(first // step, -(-last // step)):
        start, stop = max(part * step, first), min((part + 1) * step, last)
        value = rule.read(tensors, start, stop)
        for (rows, *rest), buffer in targets:
            low, high = max(rows[0], start), min(rows[1], stop)
            if low < high:
                cut = (slice(low - start, high - start), *(slice(a, b) for a, b in rest))
                buffer[low - rows[0] : high - rows[0]] = value[cut]


def _spans(index: tuple[slice, ...], shape: Shape) -> Spans:
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Allocate memory on a cache line, which the CPU's runtime takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
