"""Parser of optimised HLO: instructions, their costs, and how often each runs.

A loop body appears once in the text, whatever its trip count, so costs are multiplied by the trip
counts on the way from the entry to the instruction.
The format is that of XLA's HLO text (openxla.org/xla/operation_semantics).
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

BITS = {"pred": 8, "token": 0, "opaque": 0, "tuple": 0}

# Instructions that move no data of their own.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "while", "conditional", "call", "optimization-barrier", "domain", "iota",
}  # fmt: skip


# Instructions that only change where or in which layout data lie.
LAYOUT = {"copy", "pad", "slice", "transpose", "reshape", "concatenate", "reverse"}
# Instructions of a fusion that computes nothing.
MOVES = LAYOUT | {"dynamic-slice", "dynamic-update-slice"} | FREE - {"iota"}


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True  # False: in a chip's own fast memory (a layout with S(...))

    @property
    def bytes(self) -> int:
        return math.prod(self.dims) * dtype_bits(self.dtype) // 8


@dataclass
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # the result, with tuples flattened
    operands: tuple[str, ...]
    text: str  # the attributes after the operands
    root: bool = False
    inside: str = ""  # raw text between the parentheses, such as a constant's value

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @functools.cached_property
    def op_name(self) -> str:
        """Path of JAX transformations and functions that the instruction comes from."""
        return _first(r'op_name="([^"]*)"', self.text)

    @property
    def cycles(self) -> int:
        """Cycles that the TPU compiler estimates for one run; 0 for kernels."""
        return int(_first(r'"estimated_cycles":"(\d+)"', self.text) or 0)

    def called(self, attribute: str) -> str | None:
        """Name of the computation in an attribute such as `body`."""
        return _first(rf"\b{attribute}=%?([\w.\-]+)", self.text) or None

    def calls(self, attribute: str) -> str:
        """Name of the computation in a required attribute."""
        name = self.called(attribute)
        assert name is not None, f"{self.name} has no {attribute}"
        return name


@dataclass
class Computation:
    """A function of the program."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    def parameter(self, number: int) -> str | None:
        """Name of a parameter by its number."""
        for i in self.instructions.values():
            if i.opcode == "parameter" and int(i.inside) == number:
                return i.name
        return None


@dataclass
class Program:
    """All computations of a compiled module."""

    computations: dict[str, Computation]
    entry: str

    def walk(self) -> Iterator[tuple[Instruction, Computation, int]]:
        """Yield every executed instruction with its count; do not enter fusion bodies."""
        yield from self._walk(self.entry, 1)

    def _walk(self, name: str, times: int) -> Iterator[tuple[Instruction, Computation, int]]:
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            yield instruction, computation, times
            if instruction.opcode == "while":
                trips = self.trip_count(instruction)
                yield from self._walk(instruction.calls("body"), times * trips)
            elif instruction.opcode in ("call", "call-start", "async-start"):
                inner = instruction.called("to_apply") or instruction.called("calls")
                if inner:
                    yield from self._walk(inner, times)
            elif instruction.opcode == "conditional":
                branches = _first(r"branch_computations=\{([^}]*)\}", instruction.text).split(",")
                branches += [
                    instruction.called(f"{kind}_computation") for kind in ("true", "false")
                ]
                for branch in filter(None, branches):
                    yield from self._walk(branch.strip().lstrip("%"), times)

    def trip_count(self, loop: Instruction) -> int:
        """Trip count of a `while`: from XLA's annotation, or from its condition."""
        if known := _first(r'known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)', loop.text):
            return int(known)
        condition = self.computations[loop.calls("condition")]
        bounds = [
            int(i.inside)
            for i in condition.instructions.values()
            if i.opcode == "constant" and re.fullmatch(r"\d+", i.inside)
        ]
        return max(bounds, default=1)

    def fused(self, instruction: Instruction) -> Computation | None:
        """Computation of a fusion."""
        name = instruction.called("calls") if instruction.opcode == "fusion" else None
        return self.computations.get(name) if name else None

    # ---------------------------------------------------------------------- costs

    def cycles(self) -> tuple[int, int]:
        """Estimated cycles of one run of the program, and those of copies and layout changes."""
        total = layout = 0
        for instruction, _, times in self.walk():
            cycles = times * instruction.cycles
            total += cycles
            layout += cycles if cycles and self.changes_layout(instruction) else 0
        return total, layout

    def changes_layout(self, instruction: Instruction) -> bool:
        """Whether an instruction computes nothing, and only copies, pads, slices or transposes.

        Loads of one layer from a stacked array are not counted: a loop over layers needs them.
        """
        inside = self.fused(instruction)
        if inside is None:
            return instruction.opcode in LAYOUT
        parts = inside.instructions.values()
        return any(self.changes_layout(i) for i in parts) and all(
            i.opcode in MOVES or self.changes_layout(i) for i in parts
        )

    def flops(self, instruction: Instruction, computation: Computation) -> float:
        """FLOPs of products, convolutions and kernels in one run of an instruction."""
        inside = self.fused(instruction)
        if inside is not None:
            return sum(self.flops(i, inside) for i in inside.instructions.values())
        if instruction.opcode == "dot":
            return _dot_flops(instruction, computation)
        if instruction.opcode == "convolution":
            return _convolution_flops(instruction, computation)
        if instruction.opcode == "custom-call":  # a kernel declares its FLOPs
            return float(_first(r'"cost_estimate":\{"flops":"(\d+)"', instruction.text) or 0)
        return 0.0

    def total_flops(self) -> float:
        """FLOPs of all products in one run of the program, on one device."""
        return sum(times * self.flops(i, computation) for i, computation, times in self.walk())

    def memory_bytes(self, instruction: Instruction, computation: Computation) -> float:
        """Bytes between memory and chip in one run of an instruction: operands and results once.

        Slices of a larger array and in-place updates count only the part that they touch.
        """
        if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
            return 0.0
        if instruction.opcode.startswith(("async", "collective", "all-", "reduce-scatter")):
            return 0.0  # counted as communication
        # Slices that are adjacent already; buffers that a loop will fill.
        if re.search(r'"(ConcatBitcast|AllocateBuffer)"', instruction.text):
            return 0.0
        if prefetches(instruction):  # (source, part in fast memory, context)
            return float(instruction.arrays[1].bytes) if len(instruction.arrays) > 1 else 0.0
        inside = self.fused(instruction)
        operands = [computation.instructions.get(name) for name in instruction.operands]
        if inside is None:
            if instruction.opcode in ("dynamic-slice", "slice", "gather"):
                return 2 * _hbm(instruction.arrays)
            if instruction.opcode in ("dynamic-update-slice", "scatter") and len(operands) > 1:
                return 2 * _hbm(operands[1].arrays) if operands[1] else 0.0
            read = sum(_hbm(x.arrays) for x in operands if x is not None)
            return read + _hbm(instruction.arrays)
        total = 0.0
        for number, operand in enumerate(operands):
            operand_bytes = 0.0 if operand is None else _hbm(operand.arrays)
            if operand_bytes:
                total += min(operand_bytes, self._touched(inside, number))
        return total + _written(inside, instruction)

    def _touched(self, inside: Computation, number: int) -> float:
        """Bytes that a fusion reads of an operand; only the slices if it only slices it."""
        same, total = {inside.parameter(number)}, 0.0  # all names of the operand's array
        for i in inside.instructions.values():
            if not same & set(i.operands):
                continue
            within = self.fused(i)  # fusions are nested where a product has fused operands
            if i.opcode == "bitcast" or (within and "output_to_operand_aliasing" in i.text):
                same.add(i.name)
            elif within is not None:
                for place, name in enumerate(i.operands):
                    total += self._touched(within, place) if name in same else 0.0
            elif i.opcode in ("dynamic-slice", "slice", "gather"):
                total += i.bytes
            elif i.opcode != "dynamic-update-slice" or i.operands[0] not in same:
                return math.inf  # an update keeps the rest of the array in place
        return total


def prefetches(instruction: Instruction) -> bool:
    """Whether an instruction starts an asynchronous data transfer."""
    return instruction.opcode in ("copy-start", "slice-start", "dynamic-slice-start")


def parse(text: str) -> Program:
    """Parse the text of `jax.stages.Compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None or not line.startswith(" "):
            head = re.match(r"(ENTRY )?%?([\w.\-]+) (\(.*)?.*\{\s*$", line)
            if head and not line.startswith("HloModule"):
                current = computations.setdefault(head[2], Computation(head[2]))
                entry = head[2] if head[1] else entry
            continue
        if line.strip() == "}":
            current = None
            continue
        instruction = _instruction(line)
        if instruction is not None:
            current.instructions[instruction.name] = instruction
    return Program(computations, entry)


def dtype_bits(name: str) -> int:
    """Bits of one element: "bf16" is 16, "f8e4m3fn" is 8, "pred" takes a byte."""
    if name in BITS:
        return BITS[name]
    return int(_first(r"^[a-z]+(\d+)", name) or 32)


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s*(ROOT )?%?([\w.\-]+) = ", line)
    if not match:
        return None
    rest = line[match.end() :]
    shape, rest = _shape(rest)
    head = re.match(r"\s*([\w\-]+)\(", rest)
    if not head:
        return None
    inside, after = _balanced(rest[head.end() - 1 :])
    return Instruction(
        match[2],
        head[1],
        _arrays(shape),
        tuple(re.findall(r"%([\w.\-]+)", inside)),
        after,
        bool(match[1]),
        inside.strip(),
    )


def _shape(text: str) -> tuple[str, str]:
    if text.startswith("("):
        inside, rest = _balanced(text)
        return inside, rest
    end = text.index(" ")
    return text[:end], text[end:]


def _balanced(text: str) -> tuple[str, str]:
    """Split at the matching parenthesis: the text inside, and the rest."""
    depth = 0
    for end, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[1:end], text[end + 1 :]
    return text[1:], ""


def _arrays(shape: str) -> tuple[Array, ...]:
    arrays = []
    for dtype, dims, layout in re.findall(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\](\{[^}]*\})?", shape):
        sizes = tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)
        arrays.append(Array(dtype, sizes, "S(" not in layout))
    return tuple(arrays)


def _hbm(arrays) -> float:
    return float(sum(array.bytes for array in arrays if array.in_hbm))


def _written(inside: Computation, fusion: Instruction) -> float:
    """Bytes that a fusion writes; only the update if its root updates in place."""
    root = inside.root
    while root.opcode in ("bitcast", "copy", "convert") and root.operands:
        root = inside.instructions.get(root.operands[0], root)
        if root.opcode == "parameter":
            break
    roots = [root]
    if root.opcode == "tuple":
        roots = [inside.instructions[name] for name in root.operands]
    total = 0.0
    for array, r in zip(fusion.arrays, roots, strict=False):
        if r.opcode == "dynamic-update-slice":
            update = inside.instructions.get(r.operands[1])
            total += update.bytes if update is not None and array.in_hbm else 0.0
        else:
            total += _hbm([array])
    return total


def _dot_flops(instruction: Instruction, computation: Computation) -> float:
    left = computation.instructions[instruction.operands[0]].arrays[0]
    contracted = _first(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
    dims = [int(d) for d in contracted.split(",") if d]
    return 2.0 * math.prod(instruction.arrays[0].dims) * math.prod(left.dims[d] for d in dims)


def _convolution_flops(instruction: Instruction, computation: Computation) -> float:
    """Number of products of a convolution, without padding and dilation holes.

    The TPU compiler writes every matrix product as a convolution, batch axes as windows.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    left, right = (computation.instructions[name].arrays[0] for name in instruction.operands[:2])
    out = instruction.arrays[0]
    assert labels is not None, f"{instruction.name} has no dim_labels"
    source, kernel, result = labels.groups()
    spatial = sorted(c for c in kernel if c.isdigit())
    window = _first(r"window=\{([^}]*)\}", instruction.text)
    fields = dict(re.findall(r"(\w+)=([\dx_\-]+)", window))

    def values(name: str, default: int) -> list[int]:
        if name not in fields:
            return [default] * len(spatial)
        return [int(value.split("_")[0]) for value in fields[name].split("x")]

    names = {"stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}
    pairs = 1
    for d, *rest in zip(spatial, *(values(*item) for item in names.items()), strict=True):
        sizes = left.dims[source.index(d)], right.dims[kernel.index(d)], out.dims[result.index(d)]
        pairs *= _meetings(*sizes, *rest)
    batch = out.dims[result.index("b")] / int(
        _first(r"batch_group_count=(\d+)", instruction.text) or 1
    )
    return 2.0 * pairs * batch * out.dims[result.index("f")] * right.dims[kernel.index("i")]


@functools.cache
def _meetings(
    size: int, window: int, outputs: int, stride: int, pad: int, hole: int, gap: int
) -> int:
    """Number of (output, window) position pairs along one axis that hit an input element."""
    places = np.arange(outputs)[:, None] * stride + np.arange(window) * gap - pad
    hits = (places >= 0) & (places <= (size - 1) * hole) & (places % hole == 0)
    return int(hits.sum())


def _first(pattern: str, text: str) -> str:
    """Return the first group of the first match; empty if there is none."""
    match = re.search(pattern, text)
    return match[1] if match else ""
