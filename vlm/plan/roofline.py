"""From operations and bytes to seconds: what bounds a step, and how long it should take.

Each instruction takes at least the longer of its arithmetic and its memory traffic at the chip's
published rates, and they run one after the other. Communication runs beside them: the loss ring
hides behind the tiles it feeds; the rest is counted in full, for the worst case. What share of the
published rates is reached says `vlm.plan.calibration`.
"""

import math
from dataclasses import dataclass
from typing import Literal

from vlm.chips import Chip
from vlm.config import Experiment, ModelConfig, ViTConfig
from vlm.models.flops import model_flops
from vlm.plan.analytic import analytic_operations, unit_padding
from vlm.plan.calibration import Calibration, Range
from vlm.plan.collectives import LOSS_RING, TENSOR, Collective
from vlm.plan.compile import CompiledStep, StateBytes
from vlm.plan.hlo import prefetches
from vlm.plan.lesson import planned_lesson
from vlm.plan.topology import Topology

# A GPU's host starts kernels one by one: about so many a layer, forward and backward, and seconds
# for each. A TPU's step is one program. Both are estimates; they matter to small models alone.
LAUNCHES, LAUNCH_SECONDS = 60, 4e-6
# Tensor-parallel sums stand in the way of every block: of NVLink's rate they reached so much where
# ViT G/14 on 4 was measured beside the same on 1 (JAX-Toolbox; that on 8 fits it too).
TENSOR_SHARE = 0.22


@dataclass(frozen=True)
class Roofline:
    """Seconds of one step on each chip, at the published rates."""

    compute: float  # all arithmetic, in whole matrix units
    memory: float  # all memory traffic
    interconnect: float  # all communication
    operations: float  # instruction by instruction, the longer of arithmetic and memory
    exposed: float  # communication that nothing hides
    launches: float  # starting kernels one by one
    basis: Literal["compiled", "analytic"]

    @property
    def waiting(self) -> float:
        """Memory-bound work: what operations take beyond their arithmetic."""
        return max(0.0, self.operations - self.compute)

    @property
    def seconds(self) -> float:
        """The least time that the published rates allow."""
        return max(self.operations, self.launches) + self.exposed

    def predicted(self, calibration: Calibration) -> Range:
        """The time to expect."""
        shares = calibration.shares
        operations = self.compute / shares.arithmetic + self.waiting / shares.memory
        return calibration.seconds(max(operations, self.launches) + self.exposed)

    @property
    def bound(self) -> str:
        """What takes most of the time: compute, memory, interconnect or launches."""
        shares = {
            "compute": self.compute,
            "memory": self.waiting,
            "interconnect": self.exposed,
            "launches": self.launches if self.launches > self.operations else 0.0,
        }
        return max(shares, key=lambda name: shares[name])


@dataclass(frozen=True)
class Prediction:
    """What is expected of the step: each figure a range, and where its width comes from."""

    step_seconds: Range
    pairs_per_second: Range
    pairs_per_second_per_chip: Range
    mfu: Range
    evidence: str


def compiled_roofline(
    experiment: Experiment, topology: Topology, state: StateBytes, step: CompiledStep
) -> Roofline:
    """The roofline of a compiled step, instruction by instruction.

    Elementwise work that is fused into products keeps the vector units busy beside them, which the
    program does not tell: where the count by hand is more than the memory-bound instructions', it
    stands.
    """
    chip = topology.rated_chip
    flops_rate = chip.flops / chip.devices
    memory_rate = chip.memory_rate / chip.devices
    compute = memory = operations = loss = 0.0
    model = experiment.model
    blocks = model.vision if isinstance(model.vision, ViTConfig) else model.text
    kernel_padding = unit_padding(blocks.width // blocks.heads, chip.unit)
    walked = ((program, *found) for program in step.programs for found in program.walk())
    for program, instruction, computation, times in walked:
        arithmetic = times * program.flops(instruction, computation) / flops_rate
        if "tpu_custom_call" in instruction.text:  # attention: a head may fill half a unit
            arithmetic *= kernel_padding
        traffic = times * program.memory_bytes(instruction, computation) / memory_rate
        compute, memory = compute + arithmetic, memory + traffic
        if prefetches(instruction):
            continue
        operations += max(arithmetic, traffic)
        if "shard_map" in instruction.op_name:
            loss += max(arithmetic, traffic)
    ring = sum(_seconds(c, topology) for c in step.collectives if c.place == LOSS_RING)
    rest = sum(_seconds(c, topology) for c in step.collectives if c.place != LOSS_RING)
    exposed = rest + max(0.0, ring - loss)
    _, vector = analytic_operations(experiment, chip, topology.chips, state)
    # What is fetched ahead still has to be fetched.
    operations = max(operations, memory, compute + vector)
    return Roofline(compute, memory, ring + rest, operations, exposed, 0.0, "compiled")


def analytic_roofline(
    experiment: Experiment,
    topology: Topology,
    state: StateBytes,
    sent: dict[str, float],
    mesh: dict[str, int],
) -> Roofline:
    """The roofline of a step counted by hand."""
    chip, chips = topology.rated_chip, topology.chips
    compute, memory = analytic_operations(experiment, chip, chips, state)
    ring = sent.get(LOSS_RING, 0.0) / _ring_rate(chip, topology)
    rest = 0.0
    for place, amount in sent.items():
        if place == LOSS_RING:
            continue
        if place == TENSOR:  # among neighbours
            rest += _group_seconds(amount, mesh["tensor"], topology) / TENSOR_SHARE
        else:
            rest += _group_seconds(amount, topology.device_count, topology)
    share = 6 * experiment.batch_size**2 * experiment.model.embed_dim / chips / chip.flops
    exposed = rest + max(0.0, ring - share)
    launches = 0.0
    if chip.platform == "gpu":
        layers = _layers(experiment.model)
        if experiment.objective == "classification":
            layers = getattr(experiment.model.vision, "depth", 0)
        if (teacher := planned_lesson(experiment).taught.teacher) is not None:
            layers += _layers(teacher) / 3  # forward alone
        launches = layers * LAUNCHES * LAUNCH_SECONDS
    return Roofline(compute, memory, ring + rest, compute + memory, exposed, launches, "analytic")


def _layers(model: ModelConfig) -> int:
    return sum(getattr(tower, "depth", 0) for tower in (model.vision, model.text))


def mfu(experiment: Experiment, topology: Topology, seconds: float) -> float:
    """Model FLOPs utilisation (arXiv:2204.02311, appendix B) of steps that take so long."""
    flops = model_flops(experiment, planned_lesson(experiment).taught)
    return flops / (seconds * topology.chips * topology.rated_chip.flops)


def _seconds(collective: Collective, topology: Topology) -> float:
    chip = topology.rated_chip
    if collective.between_slices:
        return collective.sent / (chip.network / chip.devices)
    if collective.kind == "collective-permute":
        return collective.sent / _ring_rate(chip, topology)
    return _group_seconds(collective.sent, collective.group, topology)


def _ring_rate(chip: Chip, topology: Topology) -> float:
    """To one neighbour: one link of a torus; all links where a switch joins the chips."""
    if chip.platform == "gpu" and topology.chips > chip.box:
        # One GPU of a box sends to the next box, by all of its adapters together.
        return min(chip.link_rate, chip.box * chip.network)
    return chip.link_rate / chip.devices


def _group_seconds(sent: float, group: int, topology: Topology) -> float:
    """Of reductions and gathers in which `group` devices take part, each sending so many bytes.

    GPUs reduce inside their box first, so that a device sends its share of the box's bytes alone
    to other boxes (NCCL's trees and rings over all adapters). On a torus, both directions of every
    dimension that the group spans carry them; a dimension without wrap-around has half the rate,
    and a group that is not the whole slice is taken to span one dimension.
    """
    chip = topology.rated_chip
    if chip.platform == "gpu":
        inside = sent / chip.link_rate if chip.box > 1 else 0.0
        return inside + (sent / chip.box / chip.network if group > chip.box else 0.0)
    wraps = 16 if chip.dimensions == 2 else 4
    spans = [n for n in topology.shape if n > 1] or [1]
    links = [2 if n % wraps == 0 else 1 for n in spans]
    whole = group == math.prod(topology.shape) * chip.devices
    total = sum(links) if whole else max(links)
    # Devices of one chip reduce between themselves first: the links carry a chip's bytes once.
    return sent / (total * chip.link_rate)
