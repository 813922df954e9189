"""Modules under a mesh with Explicit axes, the default of `jax.make_mesh`.

Explicit axes put shardings into the types of arrays, and each operation must determine the sharding
of its result. A tower leaves that to XLA's partitioner: during its call, the axes are Auto.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, cast

import jax
import numpy as np
from flax import nnx

from vlm.nn.intermediates import Intermediates
from vlm.sharding import explicit_mesh, leading_axes, under_auto_axes

Method = TypeVar("Method", bound=Callable[..., Any])


def auto_axes(method: Method) -> Method:
    """Decorate a module's method to run with Explicit mesh axes as Auto ones.

    Rows (the leading axis) of its result are sharded like those of its arguments. Without Explicit
    axes this changes nothing.
    """

    @functools.wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        if explicit_mesh((arguments, options)) is None:
            return method(*arguments, **options)
        return _call(method, *arguments, **options)

    return cast(Method, call)


def _call(
    method: Callable,
    module: nnx.Module,
    *arguments: Any,
    intermediates: Intermediates | None = None,
    **options: Any,
) -> Any:
    graph, state = nnx.split(module)
    leaves, structure = jax.tree.flatten((arguments, options))
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array | np.ndarray)}
    rows = leading_axes(arrays)
    changes = {} if intermediates is None else dict(intermediates.changes)

    @under_auto_axes((rows, rows, jax.P(None, *rows)))
    def run(state, arrays, changes):
        values = [arrays.get(i, x) for i, x in enumerate(leaves)]
        arguments, options = jax.tree.unflatten(structure, values)
        found = {}
        if intermediates is not None:
            options["intermediates"] = replace(intermediates, changes=changes, found=found)
        result = method(nnx.merge(graph, state), *arguments, **options)
        stacked = {name: found.pop(name) for name in tuple(found) if "blocks/" in name}
        return result, found, stacked  # stacked ones have a leading layer axis

    result, *found = run(state, arrays, changes)
    if intermediates is not None:
        intermediates.found.update(found[0] | found[1])
    return result
