"""Device mesh, shardings of parameters and batches, and global arrays from per-process data."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vlm._deprecation import renamed
from vlm.config import MeshConfig
from vlm.errors import ShardingError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # a batch is sharded over both

SUBLANES = 8  # rows of float32 in a vector register of a TPU

Function = TypeVar("Function", bound=Callable[..., Any])

OUTPUTS, INPUTS = ("query", "key", "value", "up"), ("out", "down")
# Dimension of a parameter that is sharded over `tensor`, by the last two names of its path (three
# in an adapter). Heads and MLP columns are independent: each device computes its own, and an
# all-reduce adds them (Megatron, arXiv:1909.08053). Counted from the end: stacked blocks have a
# leading layer axis.
TENSOR_DIMENSION: dict[tuple[str, ...], int] = {
    **{(layer, part): -2 for layer in ("query", "key", "value") for part in ("kernel", "bias")},
    ("out", "kernel"): -3,
    ("up", "kernel"): -1,
    ("up", "bias"): -1,
    ("down", "kernel"): -2,
    ("text", "embedding"): -2,
    # An adapter and the scales of an int8 kernel are sharded like the kernel's heads or columns.
    **{(layer, "lora", part): -1 for layer in OUTPUTS for part in ("b", "magnitude")},
    **{(layer, "kernel_scale"): -1 for layer in OUTPUTS},
    **{(layer, "lora", "a"): -2 for layer in INPUTS},
}

__getattr__ = renamed(__name__, {"batch_share": "vlm.sharding.batch_shard"})

# Devices of a TPU slice that share the optimizer's work and memory, if the mesh does not say. The
# compiled step of a ViT-B/16 on 256 v5e chips takes 10% less by the compiler's estimate.
DEFAULT_FSDP = 16

# Smaller parameters of a layer are replicated: an all-gather would cost more than it saves.
SMALLEST_SHARDED = 2**14  # elements


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Make the mesh of axes ("data", "fsdp", "tensor") over all devices.

    On TPUs the inner axes are placed on neighbours of the torus, and slices are joined along
    `data` only: the data-center network carries the gradient all-reduce and the loss ring.

    Raises:
        ShardingError: the sizes do not multiply to the number of devices, or `data` does not
            divide over the slices.
    """
    devices = jax.devices() if devices is None else devices
    if devices[0].platform != "tpu":  # GPUs of a machine and CPU devices are in order
        grid = np.asarray(devices).reshape(mesh_sizes(config, len(devices)))
    else:
        slices: dict[int, list[Any]] = {}
        for device in devices:
            slices.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
        data, fsdp, tensor = mesh_sizes(config, len(devices), len(slices), tpu=True)
        shape = (data // len(slices), fsdp, tensor)
        grid = np.concatenate(
            [
                mesh_utils.create_device_mesh(shape, part, allow_split_physical_axes=True)
                for _, part in sorted(slices.items())
            ]
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def platform_of(mesh: Mesh | AbstractMesh) -> str:
    """Return the platform of a mesh's devices, such as "tpu"; empty for an abstract mesh."""
    return "" if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0].platform


def mesh_sizes(
    config: MeshConfig, devices: int, slices: int = 1, *, tpu: bool = False
) -> tuple[int, int, int]:
    """Return the sizes of a mesh over `devices` devices, with sizes of -1 and None filled in.

    Raises:
        ShardingError: they do not multiply to the devices, or `data` does not divide over slices.
    """
    fsdp = config.fsdp
    if fsdp is None:
        shards_state = tpu and config.data == -1
        per_slice = max(1, devices // slices // config.tensor)
        fsdp = math.gcd(per_slice, DEFAULT_FSDP) if shards_state else 1
    sizes = [config.data, fsdp, config.tensor]
    wanted = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, devices // math.prod(s for s in sizes if s != -1))
    if math.prod(sizes) != devices:
        raise ShardingError(
            f"mesh {wanted} does not multiply to the number of devices, and there are "
            f"{devices}: change the mesh, or leave one size at -1"
        )
    if sizes[0] % slices:
        raise ShardingError(
            f"mesh {wanted} gives data {sizes[0]}, and {slices} slices are joined along data: make "
            f"data a multiple of {slices}, and fsdp x tensor at most the {devices // slices} "
            "devices of a slice"
        )
    data, fsdp, tensor = sizes
    return data, fsdp, tensor


def placed(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """Describe an array with a sharding, without its values."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def free_batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Return the axes of a batch that are not mapped by a surrounding `jax.shard_map`."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(axis for axis in BATCH_AXES if kinds[axis] != AxisType.Manual)


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """Return the number of shards of a batch on a mesh."""
    return math.prod(mesh.shape[axis] for axis in free_batch_axes(mesh))


def check_batch(batch_size: int, mesh: Mesh | AbstractMesh, what: str = "batch_size") -> None:
    """Raise a ShardingError unless `batch_size` rows divide over the mesh."""
    shards = batch_ways(mesh)
    if batch_size % shards:
        lower = batch_size // shards * shards
        nearest = f"{lower} or {lower + shards}" if lower else f"{shards}"
        raise ShardingError(
            f"{what} {batch_size} does not divide over the {shards} devices of mesh axes "
            f"data x fsdp: choose {nearest}"
        )


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return the sharding of a batch: rows over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return the sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, P())


# Rules of module towers: tower, regular expression of a parameter's name in it, and mesh axes.
Rules = Sequence[tuple[str, str, tuple[str | None, ...]]]


def parameter_spec(
    path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules: Rules = ()
) -> P:
    """Return a parameter's spec: `tensor` by its name, `fsdp` on rows or the largest dimension.

    The first of `rules` that fits takes precedence.

    Raises:
        ShardingError: a dimension does not divide over the mesh axis of its rule.
    """
    if (own := _own_spec(path, shape, mesh, rules)) is not None:
        return own
    spec: list[str | None] = [None] * len(shape)
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    dimension = TENSOR_DIMENSION.get(path[-3:] if "lora" in path else path[-2:])
    if dimension is not None and -dimension <= len(shape) and shape[dimension] % tensor == 0:
        spec[dimension] = "tensor" if tensor > 1 else None
    # The layer axis of stacked blocks is scanned over and cannot be sharded.
    first = 1 if is_stacked(path) else 0
    free = [d for d in range(first, len(shape)) if spec[d] is None and shape[d] % fsdp == 0]
    if free and fsdp > 1 and math.prod(shape[first:]) >= SMALLEST_SHARDED:
        # Shards of the first dimension are gathered without a change of layout.
        in_rows = first in free and shape[first] // fsdp % SUBLANES == 0
        spec[first if in_rows else max(free, key=lambda d: shape[d])] = "fsdp"
    return P(*spec)


def _own_spec(
    path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules: Rules
) -> P | None:
    """Return the spec of the first of `rules` that fits an array; None if there is none."""
    for tower, pattern, axes in rules:
        ends = [i + 1 for i, name in enumerate(path) if name == tower]
        match = [i for i in ends if re.fullmatch(pattern, "/".join(path[i:]))]
        if not match or len(axes) != len(shape):  # moments may be factored
            continue
        uneven = [
            i for i, axis in enumerate(axes) if axis is not None and shape[i] % mesh.shape[axis]
        ]
        if not uneven:
            return P(*(a if a is not None and mesh.shape[a] > 1 else None for a in axes))
        if match[0] == 1 or path[0] in ("params", "frozen", "ema"):  # a parameter
            i, axis = uneven[0], axes[uneven[0]]
            raise ShardingError(
                f"partition {pattern!r} shards dimension {i} of {'/'.join(path[match[0] :])}, of "
                f"{shape[i]}, over the {mesh.shape[axis]} devices of mesh axis {axis}: choose a "
                "dimension that they divide"
            )
    return None


def is_stacked(path: Sequence[str]) -> bool:
    """Whether a parameter has a leading axis of layers: below `blocks`, and not in a list."""
    return "blocks" in path and not any(name.isdigit() for name in path[path.index("blocks") :])


def shardings(tree: Any, mesh: Mesh | AbstractMesh, rules: Rules = ()) -> Any:
    """Return the sharding of every array in a tree of parameters or optimizer state.

    Paths of optimizer moments and EMA parameters end in their parameter's names, so the same rules
    apply to them.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, parameter_spec(path_names(path), x.shape, mesh, rules)),
        tree,
    )


def mesh_of(x: jax.Array) -> AbstractMesh | None:
    """Return the mesh of a traced array from its type; None if it has no mesh of these axes."""
    mesh = jax.typeof(x).sharding.mesh
    known = tuple(mesh.axis_names) == AXES and AxisType.Explicit not in mesh.axis_types
    return mesh if known else None


def explicit_mesh(tree: Any) -> AbstractMesh | None:
    """Return the context's mesh, or that of the arrays in a tree, if it has Explicit axes."""
    context = jax.sharding.get_abstract_mesh()
    arrays = (x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
    meshes = (jax.typeof(x).sharding.mesh for x in arrays) if context.empty else (context,)
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def leading_axes(tree: Any) -> P:
    """Return the spec of the leading axis of the first array with explicitly sharded rows."""
    specs = (jax.typeof(x).sharding.spec for x in jax.tree.leaves(tree))
    return P(next((spec[0] for spec in specs if spec and spec[0] is not None), None))


def under_auto_axes(specs: Any) -> Callable[[Function], Function]:
    """Decorate a function of arrays to run with Explicit mesh axes as Auto ones.

    XLA's partitioner then shards it; results get the sharding `specs`. Without Explicit axes this
    changes nothing.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            mesh = explicit_mesh((arguments, options))
            if mesh is None:
                return function(*arguments, **options)
            out = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
            make = jax.sharding.auto_axes(axes=_axes(mesh, AxisType.Explicit), out_sharding=out)
            return make(lambda a, o: function(*a, **o))(arguments, options)

        return cast(Function, call)

    return decorate


def manual_axes() -> frozenset[str]:
    """Return the mesh axes of a surrounding `jax.shard_map`."""
    return frozenset(_axes(jax.sharding.get_abstract_mesh(), AxisType.Manual))


def _axes(mesh: AbstractMesh, kind: AxisType) -> tuple[str, ...]:
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, axis_type in types if axis_type == kind)


def varying_axes(tree: Any) -> frozenset[str]:
    """Return the manual axes of a `jax.shard_map` over which arrays differ between devices."""
    types = (jax.typeof(x).manual_axis_type for x in jax.tree.leaves(tree))
    return frozenset().union(*(kind.varying for kind in types))


def varying_like(tree: Any, *others: Any) -> Any:
    """Mark arrays in a `jax.shard_map` as varying over the manual axes of other arrays too.

    Branches of a conditional and carries of a loop need it; the compiled program is unchanged.
    """
    axes = varying_axes(others)
    return jax.tree.map(
        lambda x: jax.lax.pcast(x, tuple(sorted(axes - varying_axes(x))), to="varying"), tree
    )


def by_rows(x: jax.Array) -> jax.Array:
    """Constrain traced activations to be sharded by rows over the batch axes only.

    Without this the partitioner may follow the parameters' `fsdp` axis, and move activations,
    which are large, instead of parameters.
    """
    mesh = mesh_of(x)
    if mesh is None or batch_ways(mesh) == 1 or x.shape[0] % batch_ways(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(free_batch_axes(mesh))))


@functools.cache
def batch_shard(mesh: Mesh | AbstractMesh) -> tuple[int, int]:
    """Return (index, count): this process reads part `index` of `count` equal parts of a batch.

    Processes that hold copies of the same rows, as along `tensor`, read the same part.

    Raises:
        ShardingError: the rows of two processes overlap partially.
    """
    count = batch_ways(mesh)
    rows: dict[int, set[int]] = {}
    for device, (index, *_) in batch_sharding(mesh).devices_indices_map((count,)).items():
        rows.setdefault(device.process_index, set()).add(index.start or 0)
    shards = sorted({tuple(sorted(r)) for r in rows.values()})
    if sum(map(len, shards)) != count or len(set(map(len, shards))) > 1:
        raise ShardingError(
            f"mesh {dict(mesh.shape)} gives the {len(rows)} processes batches that overlap "
            "partially: make data x fsdp a multiple of the devices per process"
        )
    return shards.index(tuple(sorted(rows[jax.process_index()]))), len(shards)


def global_batch(batch: dict[str, Any], mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """Make global arrays from this process's part of a batch, a tree of NumPy arrays."""
    sharding, (_, count) = batch_sharding(mesh), batch_shard(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(
            sharding, x, (len(x) * count, *x.shape[1:])
        ),
        batch,
    )


def maximum_over_processes(values: np.ndarray) -> np.ndarray | jax.Array:
    """Return the maximum of each value over all processes, which must call it at the same step.

    With several processes the result is an array on the devices, to be read later: it is computed
    between two steps.
    """
    if jax.process_count() == 1:
        return values
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    rows = np.tile(values, (jax.local_device_count(), 1))
    shape = (jax.device_count(), len(values))
    sharded = NamedSharding(mesh, P("devices"))
    return _maximum(mesh)(jax.make_array_from_process_local_data(sharded, rows, shape))


@functools.cache
def _maximum(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x.max(0), out_shardings=NamedSharding(mesh, P()))


def place_padded(rows: Any, count: int, size: int, mesh: Mesh | None) -> Any:
    """Pad a batch of `count` rows to a power of two up to `size`, and shard it over a mesh."""
    sizes = {} if mesh is None else dict(mesh.shape)
    axes = tuple(name for name in sizes if name != "tensor")
    shards = math.prod(sizes[name] for name in axes)
    padded = -(-min(1 << (count - 1).bit_length(), size) // shards) * shards
    # Padding repeats the last row, because zeros may be invalid inputs.
    if padded > count:
        spread = np.minimum(np.arange(padded), count - 1)
        rows = jax.tree.map(lambda x: x[spread], rows)
    return rows if mesh is None else jax.device_put(rows, NamedSharding(mesh, P(axes)))


def to_host(array: jax.Array) -> np.ndarray:
    """Copy an array to the host, including shards on other hosts."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def placement_rows(tree: Any, depth: int = 2) -> list[tuple[str, str, int, int]]:
    """Return table rows: parameter group, mesh axes of its shards, elements, bytes per device."""
    groups: dict[str, tuple[set[str], int, int]] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        group = "/".join(path_names(path)[:depth])
        axes, elements, bytes_ = groups.get(group, (set(), 0, 0))
        local = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        over = " x ".join(axis for axis in x.sharding.spec if axis) or "replicated"
        groups[group] = (axes | {over}, elements + x.size, bytes_ + local)
    return [(g, ", ".join(sorted(s)), n, size) for g, (s, n, size) in groups.items()]


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Convert the path of a pytree leaf to plain names."""
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
