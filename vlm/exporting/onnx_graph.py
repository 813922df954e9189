"""Conversion of a JAX function to an ONNX graph: each primitive of its jaxpr becomes nodes.

Loops are unrolled, calls are inlined and constants are folded. `jax2onnx` 0.17.1 is no alternative:
it has no rule for `platform_index` (of `jax.lax.platform_dependent`), and needs an older orbax.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from vlm.errors import CheckpointError

OPSET, IR_VERSION = 18, 9  # of 2022 and 2023: read by current runtimes


class Tensor(NamedTuple):
    """Output of a node.

    Where its shape has a 1, the value in the jaxpr may be larger: the nodes that use it broadcast.
    """

    name: str
    shape: tuple[Any, ...]  # numbers, and multiples of the symbolic batch
    dtype: np.dtype


Value = Tensor | np.ndarray  # an array is a constant
Rule = Callable[..., Value]


class Graph:
    """Nodes and initializers of the graph so far."""

    def __init__(self, batch: Any):
        self.batch = batch  # JAX's symbolic dimension
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._count = 0
        self._constant_names: dict[tuple, str] = {}
        self._constants: list[np.ndarray] = []  # so that no id is reused
        self._batch_name: str | None = None

    def node(self, kind: str, inputs: Sequence[Value | str], **attributes: Any) -> str:
        """Add a node and return the name of its output."""
        self._count += 1
        name = f"{kind.lower()}_{self._count}"
        names = [value if isinstance(value, str) else self.name_of(value) for value in inputs]
        self.nodes.append(onnx.helper.make_node(kind, names, [name], **attributes))
        return name

    def name_of(self, value: Value) -> str:
        """Return the name of a value; a constant becomes an initializer, once."""
        if isinstance(value, Tensor):
            return value.name
        small = value.size <= 16
        key = (value.dtype.str, value.shape, value.tobytes()) if small else (id(value),)
        if key not in self._constant_names:
            self._constant_names[key] = f"constant_{len(self._constant_names)}"
            self._constants.append(value)
            self.initializers.append(
                onnx.TensorProto(
                    name=self._constant_names[key],
                    data_type=element_type(value.dtype),
                    dims=value.shape,
                    raw_data=np.ascontiguousarray(value).tobytes(),
                )
            )
        return self._constant_names[key]

    def shape(self, dims: Sequence[Any], *, inferred: bool = False) -> str:
        """Return a shape as a node input; with `inferred`, the runtime infers the batch size."""
        if inferred and sum(not isinstance(dim, int) for dim in dims) == 1:
            dims = [dim if isinstance(dim, int) else -1 for dim in dims]
        if all(isinstance(dim, int) for dim in dims):
            return self.name_of(np.asarray(dims, np.int64))
        if self._batch_name is None:
            input_shape = self.node("Shape", ["input"])
            self._batch_name = self.node("Slice", [input_shape, np.array([0]), np.array([1])])
        parts = []
        for dim in dims:
            if isinstance(dim, int):
                parts.append(self.name_of(np.array([dim], np.int64)))
                continue
            times = dim // self.batch
            if not isinstance(times, int) or times * self.batch != dim:
                raise CheckpointError(
                    f"onnx export does not support a shape of {dim}: choose stablehlo"
                )
            parts.append(self.node("Mul", [self._batch_name, np.array([times], np.int64)]))
        return self.node("Concat", parts, axis=0)

    def full(self, value: Value, shape: tuple[Any, ...]) -> Value:
        """Broadcast a value to its full shape."""
        if tuple(value.shape) == tuple(shape):
            return value
        if isinstance(value, np.ndarray) and all(isinstance(dim, int) for dim in shape):
            return np.broadcast_to(value, shape)
        name = self.node("Expand", [value, self.shape(shape)])
        return Tensor(name, tuple(shape), np.dtype(value.dtype))


def shape_of(var: Any) -> tuple[Any, ...]:
    """Return the shape of a jaxpr variable; the batch may be symbolic."""
    return var.aval.shape


def dtype_of(var: Any) -> np.dtype:
    """Return the dtype of a jaxpr variable."""
    return np.dtype(var.aval.dtype)


def element_type(dtype: Any) -> int:
    """Return the ONNX element type of a dtype."""
    return onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def from_jax(
    function: Callable, row: tuple[int, ...], dtype: Any, names: tuple[str, str], rules: dict
) -> onnx.ModelProto:
    """Convert a function of one batch; `names` are those of its input and output.

    Raises:
        CheckpointError: the function uses a primitive that has no rule.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(
        jax.ShapeDtypeStruct((batch, *row), dtype)
    )
    graph = Graph(batch)
    rows = Tensor("input", (batch, *row), np.dtype(dtype))
    with jax.default_device(jax.devices("cpu")[0]):
        (result,) = _run(graph, jaxpr.jaxpr, jaxpr.consts, [rows], rules)
    result = graph.full(result, shapes.shape)
    graph.nodes.append(onnx.helper.make_node("Identity", [graph.name_of(result)], ["output"]))
    renamed = {"input": names[0], "output": names[1]}
    for node in graph.nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    ends = [
        onnx.helper.make_tensor_value_info(name, element_type(kind), ["batch", *shape])
        for name, kind, shape in zip(
            names, (dtype, shapes.dtype), (row, shapes.shape[1:]), strict=True
        )
    ]
    proto = onnx.helper.make_graph(graph.nodes, "vlm", ends[:1], ends[1:], graph.initializers)
    return onnx.helper.make_model(
        proto, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )


def _run(
    graph: Graph, jaxpr: Jaxpr, consts: Sequence, inputs: Sequence[Value], rules: dict[str, Rule]
) -> list[Value]:
    known: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    known |= {var: np.asarray(value) for var, value in zip(jaxpr.constvars, consts, strict=True)}

    def value_of(atom: Any) -> Value:
        return np.asarray(atom.val, dtype_of(atom)) if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        kinds: list[Any] = [getattr(v.aval, "dtype", None) for v in eqn.outvars]
        if any(jnp.issubdtype(kind, jax.dtypes.prng_key) for kind in kinds if kind):
            raise CheckpointError(
                "onnx export does not support random keys, which this model makes: choose stablehlo"
            )
        values = _values(graph, eqn, [value_of(atom) for atom in eqn.invars], rules)
        known |= dict(zip(eqn.outvars, values, strict=True))
    return [value_of(atom) for atom in jaxpr.outvars]


def _values(graph: Graph, eqn: JaxprEqn, inputs: list[Value], rules: dict) -> list[Value]:
    name, params = eqn.primitive.name, eqn.params
    if name == "platform_index":  # the default implementation
        return [np.asarray(params["platforms"].index(None), np.int32)]
    if name == "cond" and isinstance(inputs[0], np.ndarray):
        branch = params["branches"][int(inputs[0])]
        return _run(graph, branch.jaxpr, branch.consts, inputs[1:], rules)
    if name == "scan":
        return _unrolled(graph, eqn, inputs, rules)
    for inner in ("jaxpr", "call_jaxpr"):
        if inner in params and name not in rules:
            called = params[inner]
            if not isinstance(called, ClosedJaxpr):
                return _run(graph, called, (), inputs, rules)
            return _run(graph, called.jaxpr, called.consts, inputs, rules)
    if (folded := _folded(eqn, inputs)) is not None:
        return folded
    if name not in rules:
        raise CheckpointError(
            f"onnx export does not support JAX's {name!r}, which this model uses: choose stablehlo"
        )
    return [rules[name](graph, eqn, *inputs)]


def _unrolled(graph: Graph, eqn: JaxprEqn, inputs: list[Value], rules: dict) -> list[Value]:
    """Unroll a scan."""
    consts, carried = eqn.params["num_consts"], eqn.params["num_carry"]
    body, length = eqn.params["jaxpr"], eqn.params["length"]
    fixed, carry, rows = inputs[:consts], inputs[consts:][:carried], inputs[consts + carried :]
    if len(eqn.outvars) > carried or eqn.params["reverse"]:
        raise CheckpointError(
            "onnx export supports no scans with outputs per step: choose stablehlo"
        )
    for number in range(length):
        step = []
        for value in rows:
            if isinstance(value, np.ndarray):
                step.append(np.asarray(value[number]))
            else:
                name = graph.node("Gather", [value, np.asarray(number, np.int64)], axis=0)
                step.append(Tensor(name, value.shape[1:], value.dtype))
        carry = _run(graph, body.jaxpr, body.consts, [*fixed, *carry, *step], rules)
    return carry


def _folded(eqn: JaxprEqn, inputs: list[Value]) -> list[Value] | None:
    """Compute an equation whose inputs are constants; None if it cannot be folded."""
    shapes = [shape_of(var) for var in (*eqn.invars, *eqn.outvars)]
    known = all(isinstance(value, np.ndarray) for value in inputs)
    if not known or not all(isinstance(dim, int) for shape in shapes for dim in shape):
        return None
    (out,) = eqn.outvars
    name = eqn.primitive.name
    if name == "broadcast_in_dim":
        return None  # the nodes that use it broadcast
    if name == "convert_element_type" and dtype_of(out).itemsize > inputs[0].dtype.itemsize:
        return None  # parameters stay narrow in the file
    full = [np.broadcast_to(np.asarray(x), shape) for x, shape in zip(inputs, shapes, strict=False)]
    result = eqn.primitive.bind(*full, **eqn.params)
    return [np.asarray(x) for x in (result if eqn.primitive.multiple_results else [result])]
