"""Towers on the shards of a batch, with parameters that are sharded over `fsdp`."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from vlm.sharding import BATCH_AXES, free_batch_axes, mesh_of, parameter_spec, path_names

PER_BATCH_SHARD = "per_batch_shard"  # scope of the operations of towers, in the names of a program
Function = TypeVar("Function", bound=Callable[..., Any])
# Dimension of each parameter that is sharded over `fsdp`, by its path.
Dimensions = Mapping[tuple[str, ...], int]


def maps_batch(mesh: Mesh | AbstractMesh) -> bool:
    """Whether `per_batch_shard` maps over a mesh: several devices, none along `tensor`."""
    return mesh.size > 1 and mesh.shape["tensor"] == 1


def per_batch_shard(function: Function, mesh: Mesh | AbstractMesh, specs: Any) -> Function:
    """Map `function(params, *rows)` over the shards of its rows along `data` and `fsdp`.

    It treats every example alone, and returns rows. Of `params` it gets the shards of `specs`, and
    gathers them with `gather_shards`. The gradient of `params` is then summed over the devices in
    the type of `params`; over `data` once, after each device has added up that of its own rows.
    XLA's partitioner would sum it in each micro-batch, and in the type of the activations, as it
    still does on meshes with `tensor`.
    """
    if not maps_batch(mesh):
        return function

    def call(params: Any, *rows: Any) -> Any:
        return jax.shard_map(
            jax.named_scope(PER_BATCH_SHARD)(function),
            mesh=mesh,
            axis_names={*BATCH_AXES},
            in_specs=(specs, *(P(BATCH_AXES) for _ in rows)),
            out_specs=P(BATCH_AXES),
            check_vma=False,
        )(params, *rows)

    return cast(Function, call)


def fsdp_dimensions(specs: Any) -> Dimensions:
    """Return the dimension of each parameter that a tree of specs shards over `fsdp`, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, P))
    return {path_names(path): spec.index("fsdp") for path, spec in leaves if "fsdp" in spec}


def gather_shards(x: jax.Array, dimension: int, dtype: DTypeLike) -> jax.Array:
    """All-gather the shards of a parameter over `fsdp` in a `jax.shard_map`, cast to `dtype`.

    The gradient is summed in the type of the parameter, and each device keeps its shard
    (reduce-scatter; ZeRO, arXiv:1910.02054).
    """
    # Axes of heads are merged: the layout of a separate one would be padded.
    shape = x.shape
    before, after = math.prod(shape[:dimension]), math.prod(shape[dimension + 1 :])
    merged = [n for n in (before, -1, after) if n != 1]
    axis = merged.index(-1)

    def gather(_, x: jax.Array) -> jax.Array:
        x = x.astype(dtype).reshape(merged)
        whole = jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True)
        return whole.reshape(*shape[:dimension], -1, *shape[dimension + 1 :])

    def scatter(_, gradient: jax.Array) -> jax.Array:
        gradient = gradient.astype(x.dtype).reshape(merged)
        part = jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=axis, tiled=True)
        return part.reshape(shape)

    return linear_call(gather, scatter, (), x)


def gather_parameters(params: Any, dimensions: Dimensions) -> Any:
    """Gather the shards of `params` that have `dimensions`, in a `jax.shard_map`."""

    def gather(path, x):
        dimension = dimensions.get(path_names(path))
        return x if dimension is None else gather_shards(x, dimension, x.dtype)

    return jax.tree_util.tree_map_with_path(gather, params)


def partitioned_over_fsdp(x: jax.Array) -> bool:
    """Whether XLA's partitioner shards parameters over `fsdp` where an array is traced."""
    mesh = mesh_of(x)
    return mesh is not None and mesh.shape["fsdp"] > 1 and "fsdp" in free_batch_axes(mesh)


def gathered(block: Any, layers: int, dtype: DTypeLike, shards: Dimensions) -> Any:
    """All-gather one of `layers` stacked blocks over `fsdp`; kernels are cast to `dtype`.

    Each device holds its shard and gathers the parameters where they are used. In a `jax.shard_map`
    over `fsdp`, `shards` has the dimensions of the parameters that are shards, by their paths in
    the block. Else the shardings are constraints for XLA's partitioner.
    """

    def gather(path, x):
        # Half the bytes; norms compute in float32, and int8 kernels are a quarter already.
        narrow = x.ndim > 1 and jnp.issubdtype(x.dtype, jnp.floating)
        own_dtype = dtype if narrow else x.dtype
        if (dimension := shards.get(path_names(path))) is not None:
            return gather_shards(x, dimension, own_dtype)
        if not partitioned_over_fsdp(x):
            return x
        mesh = mesh_of(x)
        assert mesh is not None
        _, *spec = parameter_spec(("blocks", *path_names(path)), (layers, *x.shape), mesh)
        return _constrained_gather(x.astype(own_dtype), spec, mesh) if "fsdp" in spec else x

    return jax.tree_util.tree_map_with_path(gather, block)


def _constrained_gather(x: jax.Array, spec: list[str | None], mesh: AbstractMesh) -> jax.Array:
    constrain = jax.lax.with_sharding_constraint
    sharded = NamedSharding(mesh, P(*spec))
    whole = NamedSharding(mesh, P(*(None if axis == "fsdp" else axis for axis in spec)))
    return linear_call(
        lambda _, x: constrain(constrain(x, sharded), whole),
        lambda _, gradient: constrain(gradient, sharded),
        (),
        x,
    )
