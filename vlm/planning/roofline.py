"""Roofline model of a step: its time at published rates, and its bottleneck.

Instructions run one after another, each for the longer of its arithmetic and its memory traffic at
published rates. The loss ring overlaps with the tiles that it feeds, and a collective that the
compiler spreads over fusions with their work; all other communication is counted as exposed, the
worst case. `vlm.planning.calibration` has the fraction of the published rates that is reached.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from vlm.config import Experiment, ViTConfig
from vlm.models.flops import has_backward, model_flops
from vlm.planning.analytic import analytic_operations, unit_padding
from vlm.planning.calibration import MEMORY, WIDTH, Calibration, Range
from vlm.planning.collectives import LOSS_RING, SELECTION, TENSOR, Collective, in_loss
from vlm.planning.compile import CompiledStep, StateBytes, planned_supervision
from vlm.planning.hlo import prefetches
from vlm.planning.topology import Topology

# Kernel launches of a GPU per layer, forward and backward, and seconds per launch. A TPU's step is
# one program. Both are estimates that matter only for small models.
LAUNCHES, LAUNCH_SECONDS = 60, 4e-6
# Fraction of NVLink's rate that tensor-parallel sums reach, from ViT G/14 on 4 GPUs against 1
# (JAX-Toolbox; 8 GPUs fit too).
TENSOR_SHARE = 0.22


@dataclass(frozen=True)
class Roofline:
    """Seconds of one step per chip, at the published rates."""

    compute: float  # arithmetic, padded to whole matrix units
    memory: float  # memory traffic
    interconnect: float  # communication
    operations: float  # sum over instructions of the longer of arithmetic and memory
    exposed: float  # communication that is not overlapped
    launches: float  # kernel launches
    basis: Literal["compiled", "analytic"]
    layout_share: float | None = None  # of the compiler's estimated cycles: copies, layout changes
    # Seconds of the compiler's estimated cycles, and of kernels at published rates.
    compiler_estimate: float | None = None

    @property
    def waiting(self) -> float:
        """Time of memory-bound work, beyond arithmetic."""
        return max(0.0, self.operations - self.compute)

    @property
    def seconds(self) -> float:
        """Lower bound of the step time at published rates."""
        return max(self.operations, self.launches) + self.exposed

    def predicted(self, calibration: Calibration) -> Range:
        """Expected range of the step time."""
        operations = self.compute / calibration.shares.arithmetic + self.waiting / MEMORY
        middle = max(operations, self.launches) + self.exposed
        # The lower end is at least the compiler's own estimate.
        return calibration.seconds(max(middle, (self.compiler_estimate or 0.0) * WIDTH**0.5))

    @property
    def bound(self) -> str:
        """Bottleneck: compute, memory, interconnect or launches."""
        shares = {
            "compute": self.compute,
            "memory": self.waiting,
            "interconnect": self.exposed,
            "launches": self.launches if self.launches > self.operations else 0.0,
        }
        return max(shares, key=shares.__getitem__)


@dataclass(frozen=True)
class Prediction:
    """Expected time and throughput as ranges, with the evidence for their width."""

    step_seconds: Range
    pairs_per_second: Range
    pairs_per_second_per_chip: Range
    mfu: Range
    evidence: str


def compiled_roofline(
    experiment: Experiment, topology: Topology, state: StateBytes, step: CompiledStep
) -> Roofline:
    """Compute the roofline of a compiled step, instruction by instruction.

    The program does not show the time of elementwise work that is fused into products. So the
    analytic estimate of memory-bound work is used where it is larger.
    """
    chip = topology.rated_chip
    flops_rate = chip.flops / chip.devices
    memory_rate = chip.memory_rate / chip.devices
    compute = memory = operations = loss = kernels = 0.0
    model = experiment.model
    blocks = model.vision if isinstance(model.vision, ViTConfig) else model.text
    heads = blocks.width // getattr(blocks, "heads", 1)
    kernel_padding = unit_padding(heads, chip.unit)
    walked = ((program, *entry) for program in step.programs for entry in program.walk())
    for program, instruction, computation, times in walked:
        arithmetic = times * program.flops(instruction, computation) / flops_rate
        if "tpu_custom_call" in instruction.text:  # attention: a head may fill only part of a unit
            arithmetic *= kernel_padding
            kernels += arithmetic
        traffic = times * program.memory_bytes(instruction, computation) / memory_rate
        compute, memory = compute + arithmetic, memory + traffic
        if prefetches(instruction):
            continue
        operations += max(arithmetic, traffic)
        if in_loss(instruction.op_name):
            loss += max(arithmetic, traffic)
    ring = sum(_seconds(c, topology) for c in step.collectives if c.place == LOSS_RING)
    others = [c for c in step.collectives if c.place != LOSS_RING]
    rest = sum(_seconds(c, topology) for c in others)
    overlapped = sum(_seconds(c, topology) for c in others if c.overlapped)
    exposed = rest - min(overlapped, operations) + max(0.0, ring - loss)
    _, vector = analytic_operations(experiment, chip, topology.chips, state)
    # Prefetched data still takes memory bandwidth.
    operations = max(operations, memory, compute + vector)
    cycles, layout = (sum(x) for x in zip(*(p.cycles() for p in step.programs), strict=True))
    estimate = cycles / chip.clock + kernels if cycles and chip.clock else None
    share = layout / cycles if cycles else None
    return Roofline(
        compute, memory, ring + rest, operations, exposed, 0.0, "compiled", share, estimate
    )


def analytic_roofline(
    experiment: Experiment,
    topology: Topology,
    state: StateBytes,
    sent: dict[str, float],
    mesh: dict[str, int],
) -> Roofline:
    """Compute the roofline of a step from analytic estimates."""
    chip, chips = topology.rated_chip, topology.chips
    compute, memory = analytic_operations(experiment, chip, chips, state)
    ring, rest = sent.get(LOSS_RING, 0.0) / _ring_rate(topology), 0.0
    rest += _between_slices(topology, state, sent, mesh)
    for place, amount in sent.items():
        if place == TENSOR:  # among neighbours
            rest += _group_seconds(amount, mesh["tensor"], topology) / TENSOR_SHARE
        elif place != LOSS_RING:
            rest += _group_seconds(amount, topology.device_count, topology)
    share = 6 * experiment.batch_size**2 * experiment.model.embed_dim / chips / chip.flops
    exposed = rest + max(0.0, ring - share)
    launches = 0.0
    if chip.platform == "gpu":
        e = experiment
        towers = ("vision",) if e.objective == "classification" else ("vision", "text")
        layers = 0.0
        for tower in towers:
            # A backward pass launches twice as many kernels as a forward pass.
            passes = 1 + e.in_parts + 2 * has_backward(e, tower)
            layers += _layers(getattr(e.model, tower)) * passes / 3
        layers *= e.batch_size // (e.micro_batch_size or e.batch_size)
        if (teacher := planned_supervision(experiment).supervision.teacher) is not None:
            layers += (_layers(teacher.vision) + _layers(teacher.text)) / 3  # forward only
        launches = layers * LAUNCHES * LAUNCH_SECONDS
    return Roofline(compute, memory, ring + rest, compute + memory, exposed, launches, "analytic")


def _layers(tower: Any) -> int:
    """Number of a tower's blocks, in one stack or in stages."""
    return getattr(tower, "depth", 0) or sum(getattr(tower, "depths", ()))


def _between_slices(
    topology: Topology, state: StateBytes, sent: dict[str, float], mesh: dict[str, int]
) -> float:
    """Seconds of what devices send to other slices, over the data center network.

    Gradients are summed within a slice first, so that its replicas each send a part of them.
    """
    if topology.slices == 1:
        return 0.0
    chip, others = topology.rated_chip, (topology.slices - 1) / topology.slices
    replicas = mesh["data"] // topology.slices
    amount = 2 * others * state.trained / replicas + others * sent.get(SELECTION, 0.0)
    return amount / (chip.network / chip.devices)


def mfu(experiment: Experiment, topology: Topology, seconds: float) -> float:
    """Model FLOPs utilisation (arXiv:2204.02311, appendix B) of a step that takes `seconds`."""
    flops = model_flops(experiment, planned_supervision(experiment).supervision)
    return flops / (seconds * topology.chips * topology.rated_chip.flops)


def _seconds(collective: Collective, topology: Topology) -> float:
    chip = topology.rated_chip
    if collective.between_slices:
        return collective.sent / (chip.network / chip.devices)
    if collective.kind == "collective-permute":
        return collective.sent / _ring_rate(topology)
    return _group_seconds(collective.sent, collective.group, topology)


def _ring_rate(topology: Topology) -> float:
    """Bandwidth to one neighbour: one link of a torus, or all links of a switch."""
    chip = topology.rated_chip
    if chip.platform == "gpu" and topology.chips > chip.box:
        # One GPU of a node sends to the next node over all network adapters.
        return min(chip.link_rate, chip.box * chip.network)
    if topology.slices > 1:  # the last device of a slice sends to the next slice
        return min(chip.link_rate, chip.network) / chip.devices
    return chip.link_rate / chip.devices


def _group_seconds(sent: float, group: int, topology: Topology) -> float:
    """Seconds of a reduction or gather over `group` devices that each send `sent` bytes.

    GPUs reduce within their node first, then each sends its part to other nodes (NCCL's trees and
    rings over all adapters). On a torus, both directions of every dimension of the group are used.
    A dimension without wrap-around has half the rate, and a group smaller than the slice is
    assumed to span one dimension.
    """
    chip = topology.rated_chip
    if chip.platform == "gpu":
        inside = sent / chip.link_rate if chip.box > 1 else 0.0
        return inside + (sent / chip.box / chip.network if group > chip.box else 0.0)
    wraps = 16 if chip.dimensions == 2 else 4
    spans = [n for n in topology.shape if n > 1] or [1]
    links = [2 if n % wraps == 0 else 1 for n in spans]
    spans_slice = group == math.prod(topology.shape) * chip.devices
    total = sum(links) if spans_slice else max(links)
    # Devices of one chip reduce first, so links carry the bytes of a chip once.
    return sent / (total * chip.link_rate)
