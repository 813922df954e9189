"""ONNX nodes for the JAX primitives that towers use."""

import math

import numpy as np
from jax.extend.core import JaxprEqn

from vlm.errors import CheckpointError
from vlm.exporting.onnx_graph import (
    Graph,
    Rule,
    Tensor,
    Value,
    dtype_of,
    element_type,
    shape_of,
)


def _unsupported(eqn: JaxprEqn) -> CheckpointError:
    return CheckpointError(
        f"onnx export does not support this use of JAX's {eqn.primitive.name!r}: choose stablehlo"
    )


def _tensor(eqn: JaxprEqn, name: str, shape: tuple | None = None) -> Tensor:
    (out,) = eqn.outvars
    return Tensor(name, tuple(shape_of(out) if shape is None else shape), dtype_of(out))


def _joint(values: tuple[Value, ...]) -> tuple:
    """Return the broadcast shape of values of one rank, or scalars."""
    columns = zip(*(value.shape for value in values if value.shape), strict=True)
    # A dimension is 1, or equal to all others. Symbolic ones cannot be compared with 1.
    sizes = ([d for d in column if not isinstance(d, int) or d != 1] for column in columns)
    return tuple(dims[0] if dims else 1 for dims in sizes)


def elementwise(kind: str) -> Rule:
    """Make the rule of a primitive whose node takes the same inputs."""

    def rule(graph: Graph, eqn: JaxprEqn, *inputs: Value) -> Tensor:
        return _tensor(eqn, graph.node(kind, inputs), _joint(inputs))

    return rule


def not_equal(graph: Graph, eqn: JaxprEqn, x: Value, y: Value) -> Tensor:
    return _tensor(eqn, graph.node("Not", [graph.node("Equal", [x, y])]), _joint((x, y)))


def square(graph: Graph, eqn: JaxprEqn, x: Value) -> Tensor:
    return _tensor(eqn, graph.node("Mul", [x, x]), x.shape)


def integer_pow(graph: Graph, eqn: JaxprEqn, x: Value) -> Tensor:
    power = np.asarray(eqn.params["y"], np.float32)
    return _tensor(eqn, graph.node("Pow", [x, power]), x.shape)


def rsqrt(graph: Graph, eqn: JaxprEqn, x: Value) -> Tensor:
    return _tensor(eqn, graph.node("Reciprocal", [graph.node("Sqrt", [x])]), x.shape)


def select(graph: Graph, eqn: JaxprEqn, which: Value, first: Value, second: Value) -> Tensor:
    if which.dtype != bool:
        raise _unsupported(eqn)
    return _tensor(eqn, graph.node("Where", [which, second, first]), _joint((which, first, second)))


def convert(graph: Graph, eqn: JaxprEqn, x: Value) -> Tensor:
    dtype = eqn.params["new_dtype"]
    return _tensor(eqn, graph.node("Cast", [x], to=element_type(dtype)), x.shape)


def same(graph: Graph, eqn: JaxprEqn, x: Value) -> Value:
    return x


def broadcast(graph: Graph, eqn: JaxprEqn, x: Value, *_: Value) -> Value:
    """Insert axes of size 1; the nodes that use the value broadcast."""
    kept, rank = eqn.params["broadcast_dimensions"], len(eqn.params["shape"])
    axes = [axis for axis in range(rank) if axis not in kept]
    if isinstance(x, np.ndarray):
        return np.expand_dims(x, axes) if axes else x
    if not axes:
        return x
    shape = [1] * rank
    for axis, dim in zip(kept, x.shape, strict=True):
        shape[axis] = dim
    return _tensor(eqn, graph.node("Unsqueeze", [x, np.array(axes, np.int64)]), tuple(shape))


def reshape(graph: Graph, eqn: JaxprEqn, x: Value, *_: Value) -> Tensor:
    x, new = graph.full(x, shape_of(eqn.invars[0])), eqn.params["new_sizes"]
    return _tensor(eqn, graph.node("Reshape", [x, graph.shape(new, inferred=True)]))


def squeeze(graph: Graph, eqn: JaxprEqn, x: Value) -> Tensor:
    axes = eqn.params["dimensions"]
    shape = tuple(dim for axis, dim in enumerate(x.shape) if axis not in axes)
    return _tensor(eqn, graph.node("Squeeze", [x, np.array(axes, np.int64)]), shape)


def transpose(graph: Graph, eqn: JaxprEqn, x: Value) -> Tensor:
    order = eqn.params["permutation"]
    shape = tuple(x.shape[axis] for axis in order)
    return _tensor(eqn, graph.node("Transpose", [x], perm=list(order)), shape)


def slices(graph: Graph, eqn: JaxprEqn, x: Value) -> Tensor:
    shape = shape_of(eqn.invars[0])
    x = graph.full(x, shape)
    starts, ends = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or (1,) * len(starts)
    axes = [i for i, dim in enumerate(shape) if (starts[i], ends[i], steps[i]) != (0, dim, 1)]
    bounds = ([part[i] for i in axes] for part in (starts, ends, range(len(shape)), steps))
    return _tensor(eqn, graph.node("Slice", [x, *(np.array(part, np.int64) for part in bounds)]))


def concatenate(graph: Graph, eqn: JaxprEqn, *inputs: Value) -> Tensor:
    broadcast = [graph.full(x, shape_of(var)) for x, var in zip(inputs, eqn.invars, strict=True)]
    return _tensor(eqn, graph.node("Concat", broadcast, axis=eqn.params["dimension"]))


def stack(graph: Graph, eqn: JaxprEqn, *inputs: Value) -> Tensor:
    axis = eqn.params["axis"]
    rows = [
        graph.node("Unsqueeze", [graph.full(x, shape_of(var)), np.array([axis], np.int64)])
        for x, var in zip(inputs, eqn.invars, strict=True)
    ]
    return _tensor(eqn, graph.node("Concat", rows, axis=axis))


def pad(graph: Graph, eqn: JaxprEqn, x: Value, fill: Value) -> Tensor:
    edges = eqn.params["padding_config"]
    if any(inside or low < 0 or high < 0 for low, high, inside in edges):
        raise _unsupported(eqn)
    x = graph.full(x, shape_of(eqn.invars[0]))
    pads = np.array([low for low, _, _ in edges] + [high for _, high, _ in edges], np.int64)
    return _tensor(eqn, graph.node("Pad", [x, pads, fill]))


def gather(graph: Graph, eqn: JaxprEqn, x: Value, indices: Value) -> Tensor:
    """Take a constant slice, rows of a table, or one position of each example."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape, at = shape_of(eqn.invars[0]), shape_of(eqn.invars[1])
    x, indices = graph.full(x, shape), graph.full(indices, at)
    if isinstance(indices, np.ndarray) and indices.ndim == 1:
        return _piece(graph, eqn, x, indices)
    last = np.array([len(at) - 1], np.int64)
    if len(numbers.start_index_map) != 1 or len(at) == 0 or at[-1] != 1:
        raise _unsupported(eqn)
    (axis,) = numbers.start_index_map
    if axis not in numbers.collapsed_slice_dims or sizes[axis] != 1:
        raise _unsupported(eqn)
    places = graph.node("Squeeze", [indices, last])
    if not numbers.operand_batching_dims:
        rank = len(shape) + len(at) - 2
        taken = [d for d in range(rank) if not axis <= d < axis + len(at) - 1]
        others_full = all(sizes[d] == shape[d] for d in range(len(shape)) if d != axis)
        if list(numbers.offset_dims) != taken or not others_full:
            raise _unsupported(eqn)
        return _tensor(eqn, graph.node("Gather", [x, places], axis=axis))
    return _tensor(eqn, _at_each(graph, eqn, x, places))


def _piece(graph: Graph, eqn: JaxprEqn, x: Value, starts: np.ndarray) -> Tensor:
    """Slice at constant starts, as indexing with a symbolic batch does."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    axes = np.array(numbers.start_index_map, np.int64)
    lengths = np.array([sizes[axis] for axis in axes], np.int64)
    starts = starts.astype(np.int64)
    name = graph.node("Slice", [x, starts, starts + lengths, axes])
    if numbers.collapsed_slice_dims:
        name = graph.node("Squeeze", [name, np.array(numbers.collapsed_slice_dims, np.int64)])
    return _tensor(eqn, name)


def _at_each(graph: Graph, eqn: JaxprEqn, x: Value, places: str) -> str:
    """Take one position along the axis after the batching dimensions: `take_along_axis`."""
    numbers = eqn.params["dimension_numbers"]
    batching = len(numbers.operand_batching_dims)
    in_front = tuple(range(batching))
    if numbers.operand_batching_dims != in_front or numbers.start_indices_batching_dims != in_front:
        raise _unsupported(eqn)
    if numbers.start_index_map != (batching,) or numbers.collapsed_slice_dims != (batching,):
        raise _unsupported(eqn)
    at = shape_of(eqn.invars[1])
    if list(numbers.offset_dims) != list(range(len(at) - 1, len(shape_of(eqn.outvars[0])))):
        raise _unsupported(eqn)
    places = graph.node("Cast", [places], to=element_type(np.int64))
    places = graph.node("Unsqueeze", [places, np.array([-1], np.int64)])
    return graph.node("GatherND", [x, places], batch_dims=batching)


def iota(graph: Graph, eqn: JaxprEqn, *_: Value) -> np.ndarray:
    shape, axis = eqn.params["shape"], eqn.params["dimension"]
    if not isinstance(shape[axis], int):
        raise _unsupported(eqn)
    ones = [1] * len(shape)
    ones[axis] = shape[axis]
    return np.arange(shape[axis], dtype=eqn.params["dtype"]).reshape(ones)


def reduction(kind: str) -> Rule:
    """Make the rule of a sum or maximum over some axes."""

    def rule(graph: Graph, eqn: JaxprEqn, x: Value) -> Tensor:
        x = graph.full(x, shape_of(eqn.invars[0]))
        axes = np.array(eqn.params["axes"], np.int64)
        return _tensor(eqn, graph.node(kind, [x, axes], keepdims=0))

    return rule


def argmax(graph: Graph, eqn: JaxprEqn, x: Value) -> Tensor:
    (axis,) = eqn.params["axes"]
    x = graph.full(x, shape_of(eqn.invars[0]))
    if x.dtype == bool:
        x = Tensor(graph.node("Cast", [x], to=element_type(np.int32)), x.shape, np.dtype(np.int32))
    index = graph.node("ArgMax", [x], axis=axis, keepdims=0)
    return _tensor(eqn, graph.node("Cast", [index], to=element_type(eqn.params["index_dtype"])))


def dot(graph: Graph, eqn: JaxprEqn, x: Value, y: Value) -> Tensor:
    """Make a MatMul if the axes allow, else an Einsum."""
    (x_sum, y_sum), (x_batch, y_batch) = eqn.params["dimension_numbers"]
    x, y = (graph.full(v, shape_of(var)) for v, var in zip((x, y), eqn.invars, strict=True))
    x_rank, y_rank = len(x.shape), len(y.shape)
    rows_by_matrix = (tuple(x_sum), tuple(y_sum), y_rank) == ((x_rank - 1,), (0,), 2)
    if rows_by_matrix and not x_batch:
        return _tensor(eqn, graph.node("MatMul", [x, y]))
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    x_names = [next(letters) for _ in range(x_rank)]
    y_names = [next(letters) for _ in range(y_rank)]
    for a, b in (*zip(x_sum, y_sum, strict=True), *zip(x_batch, y_batch, strict=True)):
        y_names[b] = x_names[a]
    out = [x_names[a] for a in x_batch]
    out += [name for a, name in enumerate(x_names) if a not in (*x_batch, *x_sum)]
    out += [name for b, name in enumerate(y_names) if b not in (*y_batch, *y_sum)]
    equation = f"{''.join(x_names)},{''.join(y_names)}->{''.join(out)}"
    return _tensor(eqn, graph.node("Einsum", [x, y], equation=equation))


def convolution(graph: Graph, eqn: JaxprEqn, x: Value, kernel: Value) -> Tensor:
    p = eqn.params
    if any(d != 1 for d in p["lhs_dilation"]) or p["batch_group_count"] != 1:
        raise _unsupported(eqn)
    numbers = p["dimension_numbers"]
    image = graph.full(x, shape_of(eqn.invars[0]))
    by_channel = graph.node("Transpose", [image], perm=list(numbers.lhs_spec))
    by_output: np.ndarray | str = (
        np.ascontiguousarray(kernel.transpose(numbers.rhs_spec))
        if isinstance(kernel, np.ndarray)
        else graph.node("Transpose", [kernel], perm=list(numbers.rhs_spec))
    )
    y = graph.node(
        "Conv",
        [by_channel, by_output],
        strides=list(p["window_strides"]),
        pads=[int(low) for low, _ in p["padding"]] + [int(high) for _, high in p["padding"]],
        dilations=list(p["rhs_dilation"]),
        group=p["feature_group_count"],
    )
    back = [int(axis) for axis in np.argsort(numbers.out_spec)]
    return _tensor(eqn, graph.node("Transpose", [y], perm=back))


def window(kind: str | None) -> Rule:
    """Make the rule of a sum or maximum over windows of (b, h, w, c).

    None: by the jaxpr of the primitive.
    """

    def rule(graph: Graph, eqn: JaxprEqn, x: Value, *_: Value) -> Tensor:
        p = eqn.params
        sizes, strides, edges = p["window_dimensions"], p["window_strides"], p["padding"]
        reduction = kind or {"add": "sum", "max": "max"}.get(p["jaxpr"].eqns[0].primitive.name)
        dilated = any(d != 1 for d in (*p["base_dilation"], *p["window_dilation"]))
        if dilated or reduction is None or len(sizes) != 4 or sizes[0] != 1 or sizes[3] != 1:
            raise _unsupported(eqn)
        options = {
            "kernel_shape": list(sizes[1:3]),
            "strides": list(strides[1:3]),
            "pads": [int(low) for low, _ in edges[1:3]] + [int(high) for _, high in edges[1:3]],
        }
        y = graph.node("Transpose", [graph.full(x, shape_of(eqn.invars[0]))], perm=[0, 3, 1, 2])
        if reduction == "max":
            y = graph.node("MaxPool", [y], **options)
        else:
            mean = graph.node("AveragePool", [y], count_include_pad=1, **options)
            y = graph.node("Mul", [mean, np.asarray(math.prod(sizes), np.float32)])
        return _tensor(eqn, graph.node("Transpose", [y], perm=[0, 2, 3, 1]))

    return rule


# Node of each primitive that takes the same inputs.
_SAME_INPUTS = {
    "add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max",
    "min": "Min", "neg": "Neg", "abs": "Abs", "exp": "Exp", "log": "Log", "erf": "Erf",
    "tanh": "Tanh", "sqrt": "Sqrt", "logistic": "Sigmoid", "eq": "Equal", "lt": "Less",
    "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual", "and": "And", "or": "Or",
    "not": "Not",
}  # fmt: skip

RULES: dict[str, Rule] = {name: elementwise(kind) for name, kind in _SAME_INPUTS.items()} | {
    "ne": not_equal,
    "square": square,
    "integer_pow": integer_pow,
    "rsqrt": rsqrt,
    "select_n": select,
    "convert_element_type": convert,
    "stop_gradient": same,
    "name": same,
    "copy": same,
    "optimization_barrier": same,
    "broadcast_in_dim": broadcast,
    "reshape": reshape,
    "squeeze": squeeze,
    "transpose": transpose,
    "slice": slices,
    "concatenate": concatenate,
    "stack": stack,
    "pad": pad,
    "gather": gather,
    "iota": iota,
    "reduce_sum": reduction("ReduceSum"),
    "reduce_max": reduction("ReduceMax"),
    "argmax": argmax,
    "dot_general": dot,
    "conv_general_dilated": convolution,
    "reduce_window": window(None),
    "reduce_window_sum": window("sum"),
    "reduce_window_max": window("max"),
}
