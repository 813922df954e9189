"""Communication of a step, by purpose and mesh axes, read from a compiled program."""

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from vlm.nn.fsdp import PER_BATCH_SHARD
from vlm.planning.hlo import Computation, Instruction, Program
from vlm.training.selection import SCOPE

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
# Transfers between slices, which the TPU compiler sends through the hosts.
BETWEEN_SLICES = {
    "ONE_TO_ONE": "collective-permute",
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
}

# Calls in the first and the last of the fusions that one collective is spread over.
STARTS, ENDS = "AsyncCollectiveStart", "AsyncCollectiveDone"

# Attention maps its own kernel over devices where XLA partitions the towers: on meshes with tensor.
# It chooses the kernel by platform, and the loss does not.
ATTENTION = re.compile(r"/branch_\d+_fun/shard_map\b")

LOSS_RING, LOSS_SUMS, SELECTION = "loss ring", "loss sums", "selection of pairs"
GRADIENTS, FSDP = "gradient reduction", "FSDP gathers"
TENSOR, ACTIVATIONS, NORMS = "tensor-parallel sums", "activations", "norms and metrics"


@dataclass(frozen=True)
class Collective:
    """One kind of communication for one purpose, summed over a step."""

    place: str  # purpose: one of the names above
    kind: str  # one of KINDS
    axes: tuple[str, ...]  # mesh axes that a group of devices spans
    group: int  # devices in a group
    count: int  # executions in a step
    payload: float  # bytes per device and step of the full array that is reduced or gathered
    sent: float  # bytes that each device sends in a step, by the ring algorithm
    between_slices: bool = False  # over the data center's network
    overlapped: bool = False  # runs inside fusions with other work


def collectives(
    program: Program,
    mesh_shape: dict[str, int],
    parameter_shapes: Collection[tuple[int, ...]] = (),
    slices: int = 1,
) -> list[Collective]:
    """List the communication of one step, largest first.

    Args:
        program: the optimised module.
        mesh_shape: sizes of the mesh axes by name, in the order of the devices.
        parameter_shapes: unsharded shapes of one layer's parameters; a gathered array with such a
            shape is a parameter, any other an activation.
        slices: number of slices, joined along `data`.
    """
    known = {_plain(cut) for shape in parameter_shapes for cut in _cuts(shape, mesh_shape)}
    sums: dict[tuple, list] = {}  # count, payload and bytes sent
    for instruction, computation, times, overlapped in _found(program):
        between = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.text)
        if between:
            kind, axes, group = BETWEEN_SLICES.get(between[1], "all-to-all"), ("data",), slices
            payload, sent = _traffic(kind, instruction.arrays[0].bytes, group)
            place = LOSS_RING if kind == "collective-permute" else GRADIENTS
        else:
            kind = instruction.opcode.removesuffix("-start")
            if "all-reduce-scatter" in computation.name:  # a sliced all-reduce on TPUs
                kind = "reduce-scatter"
            operand = sum(
                computation.instructions[name].bytes
                for name in instruction.operands
                if name in computation.instructions
            )
            axes, group = _group(instruction, mesh_shape)
            if group < 2 or not operand:
                continue
            payload, sent = _traffic(kind, operand, group)
            of_parameter = any(
                _is_known(array.dims, known, kind, group) for array in instruction.arrays
            )
            place = _place(kind, instruction.op_name, axes, of_parameter)
            if place == LOSS_SUMS and axes == ("data",) and mesh_shape.get("fsdp", 1) > 1:
                place = GRADIENTS  # of shards; sums of the loss are over all devices of the batch
        key = (place, kind, axes, group, bool(between), overlapped)
        row = sums.setdefault(key, [0, 0.0, 0.0])
        row[0] += times
        row[1] += times * payload
        row[2] += times * sent
    rows = [
        Collective(place, kind, axes, group, count, payload, sent, between, overlapped)
        for (place, kind, axes, group, between, overlapped), (count, payload, sent) in sums.items()
    ]
    return sorted(rows, key=lambda row: -row.sent)


def _found(program: Program) -> Iterator[tuple[Instruction, Computation, int, bool]]:
    """Yield each collective, its computation, how often it runs, and whether it is overlapped."""
    for instruction, computation, times in program.walk():
        if _is_collective(instruction):
            yield instruction, computation, times, False
        inside = program.fused(instruction)
        found = [i for i in inside.instructions.values() if _is_collective(i)] if inside else []
        if inside is None or not found:
            continue
        # The TPU compiler may spread one over a chain of fusions, to overlap it with their work.
        begins, ends = (
            any(call in i.text for i in inside.instructions.values()) for call in (STARTS, ENDS)
        )
        if begins or not (ends or inside.name.startswith("async_collective_fusion")):
            yield from ((i, inside, times, begins) for i in found)


def _is_collective(instruction: Instruction) -> bool:
    if instruction.opcode == "send":
        return "_xla_megascale_transfer_type" in instruction.text
    return instruction.opcode.removesuffix("-start") in KINDS


def _traffic(kind: str, operand: float, group: int) -> tuple[float, float]:
    """Payload and bytes sent per device, for `operand` bytes per device."""
    others = (group - 1) / group
    if kind == "all-reduce":
        return operand, 2 * others * operand
    if kind == "all-gather":
        return group * operand, (group - 1) * operand
    if kind in ("reduce-scatter", "all-to-all"):
        return operand, others * operand
    return operand, operand


def in_loss(op_name: str) -> bool:
    """Whether an operation is mapped over devices, and not one of a tower."""
    mapped = "shard_map" in op_name and f"/{PER_BATCH_SHARD}/" not in op_name
    return mapped and not ATTENTION.search(op_name)


def _place(kind: str, op_name: str, axes: tuple[str, ...], of_parameter: bool) -> str:
    if f"/{SCOPE}/" in op_name and "shard_map" in op_name:
        return SELECTION
    if f"/{PER_BATCH_SHARD}/" in op_name:  # towers treat every example alone
        return GRADIENTS if op_name.endswith("reduce_scatter") else FSDP
    if kind == "collective-permute" and in_loss(op_name):
        return LOSS_RING
    # The compiler merges small reductions under the name of one of them, so check shapes too.
    if in_loss(op_name) and not of_parameter:
        return LOSS_SUMS
    if axes == ("tensor",):
        return TENSOR
    if kind == "all-gather" and of_parameter:
        return FSDP
    if kind == "collective-permute" and of_parameter:
        # A gather or reduction, decomposed into the steps of an overlapped product.
        return GRADIENTS if "transpose(" in op_name else FSDP
    if kind in ("all-reduce", "reduce-scatter") and ("transpose(" in op_name or of_parameter):
        return GRADIENTS
    if kind == "reduce-scatter" and "jvp" not in op_name:
        return GRADIENTS
    if "jvp" in op_name:
        return ACTIVATIONS
    return NORMS


def _group(instruction: Instruction, mesh_shape: dict[str, int]) -> tuple[tuple[str, ...], int]:
    """Mesh axes that a collective's groups span, and the devices per group."""
    if instruction.opcode.startswith("collective-permute"):
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.text)
        return _axes(_cycle(pairs[1] if pairs else ""), mesh_shape)
    text = instruction.text
    order = r", device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)"
    if named := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:{order})? ?\{{([^}}]*)\}}", text):
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        used = re.findall(r"'(\w+)'", named[4])
        ids = np.arange(math.prod(sizes.values()))
        if named[2]:
            ids = _reordered(ids, named[2], named[3])
        ids = ids.reshape(tuple(sizes.values()))
        one_group = tuple(slice(None) if axis in used else 0 for axis in sizes)
        return _axes(ids[one_group].ravel().tolist(), mesh_shape)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape = [int(n) for n in iota[1].split(",")]
        ids = _reordered(np.arange(math.prod(shape)), iota[2], iota[3])
        return _axes(ids.reshape(shape)[0].tolist(), mesh_shape)
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return _axes([int(n) for n in listed[1].split(",") if n], mesh_shape)
    return tuple(mesh_shape), math.prod(mesh_shape.values())  # {}: all of them


def _reordered(ids: np.ndarray, shape: str, axes: str | None) -> np.ndarray:
    """Reorder ids by a shape such as "2,4" and a permutation of its axes such as "1,0"."""
    ids = ids.reshape([int(n) for n in shape.split(",")])
    return ids.transpose([int(n) for n in axes.split(",")]) if axes else ids


def _cycle(pairs: str) -> list[int]:
    """Cycle of devices in a permutation, from the first member."""
    numbers = [int(n) for n in re.findall(r"\d+", pairs)]
    onward = dict(zip(numbers[::2], numbers[1::2], strict=False))
    cycle = numbers and [min(numbers)]
    while numbers and (here := onward.get(cycle[-1], cycle[0])) != cycle[0]:
        cycle.append(here)
    return cycle


def _axes(group: list[int], mesh_shape: dict[str, int]) -> tuple[tuple[str, ...], int]:
    if len(group) < 2:
        return (), len(group)
    places = np.array(np.unravel_index(group, tuple(mesh_shape.values())))
    varies = [len(set(row)) > 1 for row in places.tolist()]
    axes = tuple(axis for axis, v in zip(mesh_shape, varies, strict=True) if v)
    return axes, len(group)


def _is_known(dims: tuple[int, ...], known: set, kind: str, group: int) -> bool:
    """Whether an array has the shape of a parameter, or of a shard of one for permutes."""
    if kind != "collective-permute":
        return _plain(dims) in known
    wholes = ((*dims[:i], n * group, *dims[i + 1 :]) for i, n in enumerate(dims))
    return any(_plain(shape) in known for shape in wholes)


def _cuts(shape: tuple[int, ...], mesh_shape: dict[str, int]):
    """Yield a parameter's shape, and its shape when `tensor` shards each dimension."""
    yield shape
    ways = mesh_shape.get("tensor", 1)
    for i, n in enumerate(shape):
        if ways > 1 and n % ways == 0:
            yield (*shape[:i], n // ways, *shape[i + 1 :])


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Normalise a shape: sort it and drop axes of size one."""
    return tuple(sorted(n for n in shape if n > 1))
