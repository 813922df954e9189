"""From operations and bytes to seconds: what bounds a step, and how long it should take.

Each instruction takes at least the longer of its arithmetic and its memory traffic at the chip's
published rates, and they run one after the other. Communication runs beside them: the loss ring
hides behind the tiles it feeds; the rest is counted in full, for the worst case.
"""

from dataclasses import dataclass
from typing import Literal

from vlm.chips import Chip
from vlm.config import Experiment
from vlm.models.flops import model_flops
from vlm.plan.analytic import analytic_operations
from vlm.plan.collectives import LOSS_RING, Collective
from vlm.plan.compile import CompiledStep, StateBytes
from vlm.plan.hlo import prefetches
from vlm.plan.topology import Topology

# The share of its published rates that a chip reaches on well-shaped work. A guess.
ATTAINED = 0.85
# Bytes per second and chip between boxes of NVIDIA GPUs: one 400 Gb/s adapter for each. A guess.
NETWORK = 50e9
BOX = 8  # GPUs that NVLink joins


@dataclass(frozen=True)
class Roofline:
    """Seconds of one step on each chip."""

    compute: float  # all arithmetic at the peak rate
    memory: float  # all memory traffic at the peak rate
    interconnect: float  # all communication at the links' rate
    operations: float  # instruction by instruction, the longer of arithmetic and memory
    exposed: float  # communication that nothing hides
    basis: Literal["compiled", "analytic"]

    @property
    def seconds(self) -> float:
        """The least time that the published rates allow."""
        return self.operations + self.exposed

    @property
    def predicted(self) -> float:
        """The time to expect: at the attained share of the published rates."""
        return self.seconds / ATTAINED

    @property
    def bound(self) -> str:
        """What takes most of the time: compute, memory or interconnect."""
        waiting = max(0.0, self.operations - self.compute)
        shares = {"compute": self.compute, "memory": waiting, "interconnect": self.exposed}
        return max(shares, key=shares.get)


def compiled_roofline(topology: Topology, step: CompiledStep) -> Roofline:
    """The roofline of a compiled step, instruction by instruction."""
    chip = topology.chip
    flops_rate = chip.flops / chip.devices
    memory_rate = chip.memory_rate / chip.devices
    compute = memory = operations = loss = 0.0
    program = step.program
    for instruction, computation, times in program.walk():
        arithmetic = times * program.flops(instruction, computation) / flops_rate
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
    operations = max(operations, memory)  # what is fetched ahead still has to be fetched
    return Roofline(compute, memory, ring + rest, operations, exposed, "compiled")


def analytic_roofline(
    experiment: Experiment,
    topology: Topology,
    state: StateBytes,
    sent: dict[str, float],
) -> Roofline:
    """The roofline of a step counted by hand."""
    chip, chips = topology.chip, topology.chips
    compute, memory, operations = analytic_operations(experiment, chip, chips, state)
    rate = _rate(chip, topology, everyone=True)
    ring = sent.get(LOSS_RING, 0.0) / _ring_rate(chip, topology)
    rest = sum(b for place, b in sent.items() if place != LOSS_RING) / rate
    share = 6 * experiment.batch_size**2 * experiment.model.embed_dim / chips / chip.flops
    exposed = rest + max(0.0, ring - share)
    return Roofline(compute, memory, ring + rest, operations, exposed, "analytic")


def mfu(experiment: Experiment, topology: Topology, seconds: float) -> float:
    """Model FLOPs utilisation (arXiv:2204.02311, appendix B) of steps that take so long."""
    return model_flops(experiment) / (seconds * topology.chips * topology.chip.flops)


def _seconds(collective: Collective, topology: Topology) -> float:
    chip = topology.chip
    if collective.kind == "collective-permute":
        return collective.sent / _ring_rate(chip, topology)
    everyone = collective.group == topology.device_count
    return collective.sent / _rate(chip, topology, everyone=everyone)


def _ring_rate(chip: Chip, topology: Topology) -> float:
    """To one neighbour: one link of a torus; all links where a switch joins the chips."""
    if chip.platform == "gpu" and topology.chips > BOX:
        return NETWORK
    return chip.link_rate / chip.devices


def _rate(chip: Chip, topology: Topology, *, everyone: bool) -> float:
    """Of reductions and gathers: both directions of every dimension that the group spans.

    A dimension without wrap-around has half the rate. A group that is not the whole slice is taken
    to span one dimension.
    """
    if chip.platform == "gpu":
        return chip.link_rate if topology.chips <= BOX else NETWORK
    wraps = 16 if chip.dimensions == 2 else 4
    spans = [n for n in topology.shape if n > 1] or [1]
    links = [2 if n % wraps == 0 else 1 for n in spans]
    total = sum(links) if everyone else max(links)
    return total * chip.link_rate / chip.devices
