"""`plan`: memory, communication and time of an experiment on a slice."""

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jax.sharding import AbstractMesh, AxisType, Mesh
from rich.console import Console, ConsoleOptions, RenderResult

from vlm import display
from vlm.config import Experiment, MeshConfig
from vlm.config.batch_sizes import at_size, at_text_length, batch_sizes, mean_pairs
from vlm.errors import ConfigError, ShardingError
from vlm.models.flops import PartFlops, step_flops
from vlm.planning.analytic import analytic_memory, analytic_traffic
from vlm.planning.batch import LargestBatch, largest_batch
from vlm.planning.calibration import Calibration, Range, as_values, calibration_of
from vlm.planning.collectives import Collective
from vlm.planning.compile import (
    CompiledStep,
    DoesNotFit,
    StateBytes,
    abstract_state,
    bytes_on,
    checkpoint_bytes,
    compile_loss,
    compile_step,
    on_platform,
    planned_supervision,
    state_bytes,
    total_bytes,
)
from vlm.planning.needs import Needs, needs
from vlm.planning.report import BASES, parts
from vlm.planning.roofline import Prediction, Roofline, analytic_roofline, compiled_roofline, mfu
from vlm.planning.topology import Topology, parse_mesh, parse_topology, topology_devices
from vlm.sharding import AXES, make_mesh, mesh_sizes
from vlm.training.init_from import resolve
from vlm.training.schedule import check_batch_sizes


@dataclass(frozen=True)
class Memory:
    """Bytes per device. `activations` is None if the compiled program does not show them."""

    basis: Literal["compiled", "analytic"]
    parameters: int
    optimizer: int
    averages: int
    teacher: int  # parameters of a distillation teacher
    activations: float | None
    temporaries: float  # including activations
    loss: int | None  # temporaries of the loss and its gradients, compiled separately
    peak: float
    limit: float | None  # None for CPUs

    @property
    def share(self) -> float | None:
        return self.peak / self.limit if self.limit else None


@dataclass(frozen=True)
class Plan:
    """Predicted memory, communication and time of an experiment on a slice.

    Example:
        >>> result = vlm.planning.plan(experiment, "h100:8", compiled=False, loss=False)
        >>> result.mesh
        {'data': 8, 'fsdp': 1, 'tensor': 1}
    """

    experiment: Experiment
    topology: Topology
    mesh: dict[str, int]
    flops: dict[str, PartFlops]
    memory: Memory
    collectives: list[Collective]
    sent: dict[str, float]  # bytes that each device sends in a step, by purpose
    roofline: Roofline | None  # None if it does not fit, or for CPUs
    calibration: Calibration | None
    state_bytes: int  # unsharded bytes of what a checkpoint stores: see `checkpoint_bytes`
    fits: bool
    refusal: str | None  # the compiler's message if the step does not fit
    largest: LargestBatch | None
    compile_seconds: float | None
    compiled_flops: float | None  # of matrix products in the program of one device
    # Plans of the batches at each of `sequence_lengths`; memory and FLOPs are those of the one with
    # the highest peak, and times are means.
    sizes: tuple["Plan", ...] = ()
    texts: tuple["Plan", ...] = ()  # of steps whose texts all have one of `text_lengths`

    @property
    def compiled(self) -> bool:
        """True if the numbers come from XLA (including an out-of-memory verdict)."""
        return self.memory.basis == "compiled" or self.refusal is not None

    @functools.cached_property
    def prediction(self) -> Prediction | None:
        steps, calibration = self.sizes or (self,), self.calibration
        times = [p.roofline.predicted(calibration) for p in steps if p.roofline and calibration]
        if calibration is None or len(times) < len(steps):
            return None
        seconds = Range(
            sum(time.low for time in times) / len(steps),
            sum(time.high for time in times) / len(steps),
        )
        rate = seconds.inverse(mean_pairs(self.experiment))
        at_one_second = sum(mfu(p.experiment, self.topology, 1.0) for p in steps) / len(steps)
        return Prediction(
            step_seconds=seconds,
            pairs_per_second=rate,
            pairs_per_second_per_chip=rate.scaled(1 / self.topology.chips),
            mfu=seconds.inverse(at_one_second),
            evidence=calibration.evidence,
        )

    @property
    def step_seconds(self) -> Range | None:
        return self.prediction.step_seconds if self.prediction else None

    @property
    def pairs_per_second(self) -> Range | None:
        return self.prediction.pairs_per_second if self.prediction else None

    @property
    def mfu(self) -> Range | None:
        return self.prediction.mfu if self.prediction else None

    def needs(self, price: float | None = None) -> Needs | None:
        """Estimate the requirements of the whole run; None if the step time is unknown.

        Raises:
            ConfigError: a negative price.
        """
        if price is not None and not 0 <= price < math.inf:
            raise ConfigError(
                f"a price of {price} per chip-hour is invalid: give a number of at least 0"
            )
        seconds = self.step_seconds
        if seconds is None:
            return None
        return needs(self.experiment, self.topology, seconds, self.state_bytes, price)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from parts(self)

    def _repr_html_(self) -> str:
        return display.as_html(self)

    def to_dict(self, price: float | None = None) -> dict[str, Any]:
        """Convert to JSON values: bytes per device, seconds, FLOPs of the whole step."""
        e = self.experiment
        result = {
            "name": e.name,
            "topology": self.topology.name,
            "chips": self.topology.chips,
            "devices": self.topology.device_count,
            "mesh": self.mesh,
            "batch_size": e.batch_size,
            "micro_batch_size": e.micro_batch_size,
            "dtype": e.dtype,
            "remat": e.remat,
            "scan": e.scan,
            "fits": self.fits,
            "refusal": self.refusal,
            "memory": dataclasses.asdict(self.memory) | {"share": self.memory.share},
            "flops": {
                "basis": "analytic",
                "model": sum(p.model for p in self.flops.values()),
                "executed": sum(p.executed for p in self.flops.values()),
                "compiled_per_device": self.compiled_flops,
                "parts": {name: dataclasses.asdict(p) for name, p in self.flops.items()},
            },
            "collectives": {
                "basis": self.memory.basis,
                "sent": self.sent,
                "rows": [dataclasses.asdict(c) | {"axes": list(c.axes)} for c in self.collectives],
            },
            "largest_batch": self.largest.to_dict() if self.largest else None,
            "compile_seconds": self.compile_seconds,
            "sequence_lengths": [_of_shape(p) for p in self.sizes],
            "text_lengths": [_of_shape(p) for p in self.texts],
            "bases": BASES,
        }
        if (r := self.roofline) and (prediction := self.prediction):
            result["roofline"] = dataclasses.asdict(r) | {"seconds": r.seconds, "bound": r.bound}
            result["prediction"] = {"basis": "expected"} | as_values(prediction)
            needed = self.needs(price)
            result["needs"] = needed.to_dict() if needed else None
            result["chip"] = dataclasses.asdict(self.topology.rated_chip)
        return result


def plan(
    experiment: Experiment,
    topology: str | Topology,
    mesh: str | MeshConfig | None = None,
    *,
    largest: bool = False,
    loss: bool = True,
    compiled: bool = True,
    calibration: str | Path | None = None,
) -> Plan:
    """Plan `experiment` on a slice such as "v5e:16x16", "v5p:8x8x8", "h100:8" or "cpu:8".

    Args:
        topology: "2xv5e:16x16" is two slices, joined by the data center network.
        mesh: "data=32,fsdp=8", a `MeshConfig`, or None for the experiment's own.
        largest: also search for the largest batch that fits, with more compilations; for GPUs by
            analytic estimates.
        loss: also compile the loss separately, for its temporaries.
        compiled: False estimates analytically, without compilation.
        calibration: a file of measurements on this kind of chip (`vlm bench train --save`).

    Raises:
        ConfigError: an unknown topology, no compiler for it, a calibration of another chip, or
            a model that fits at no batch size.
        ShardingError: the mesh does not fit the slice, or the batch the mesh.

    Example:
        >>> result = vlm.planning.plan(experiment, "h100:8", compiled=False)
        >>> result.fits, result.memory.basis
        (True, 'analytic')
    """
    if isinstance(topology, str):
        topology = parse_topology(topology)
    experiment = resolve(experiment)
    e = on_platform(experiment, "cpu" if topology.chip is None else topology.chip.platform)
    if mesh is not None:
        mesh = parse_mesh(mesh) if isinstance(mesh, str) else mesh
        mesh = dataclasses.replace(mesh, gather=mesh.gather or e.mesh.gather)
        e = dataclasses.replace(e, mesh=mesh)
    compiled = compiled and topology.compiles
    if calibration and topology.chip is None:
        raise ConfigError(f"{topology.name} has no published rates: leave --calibration out")
    if e.sequence_lengths or e.text_lengths:
        if largest:
            raise ConfigError(
                "the largest batch is searched for one shape, and this config has several: leave "
                "--largest-batch out, or sequence_lengths and text_lengths empty"
            )
        return _plan_of_shapes(e, topology, loss=loss, compiled=compiled, calibration=calibration)
    if largest and topology.chip is None:
        raise ConfigError(
            f"{topology.name} has no published memory: leave --largest-batch out, or plan for a "
            "TPU or GPU"
        )
    calibrated = calibration_of(topology.chip.name, calibration) if topology.chip else None
    grid = plan_mesh(e, topology, compiled=compiled)
    check_batch_sizes(e, grid)

    abstract = abstract_state(e)
    state, extra = state_bytes(abstract, grid, e.model.partition), planned_supervision(e)
    if extra.embedding is not None:
        rules = extra.embedding.config.partition
        teacher_bytes = bytes_on(extra.embedding.parameters, grid, rules)
        state = dataclasses.replace(state, teacher=teacher_bytes)
    sizes = dict(grid.shape)
    check_state(state, topology, sizes)
    step = compile_step(e, grid) if isinstance(grid, Mesh) else None
    memory = _memory(e, topology, grid, state, step, loss=loss and compiled)
    refusal = step.message if isinstance(step, DoesNotFit) else None
    fits = refusal is None and (memory.limit is None or memory.peak <= memory.limit)
    collectives, sent, flops, roofline = [], {}, None, None
    if isinstance(step, CompiledStep):
        collectives = step.collectives
        flops = sum(program.total_flops() for program in step.programs)
        for c in collectives:
            sent[c.place] = sent.get(c.place, 0.0) + c.sent
    else:
        sent = analytic_traffic(e, total_bytes(abstract.params), sizes, abstract.frozen)
    if fits and topology.chip is not None:
        if isinstance(step, CompiledStep):
            roofline = compiled_roofline(e, topology, state, step)
        else:
            roofline = analytic_roofline(e, topology, state, sent, sizes)
    largest_fit = None
    if largest and memory.limit is not None:
        largest_fit = largest_batch(e, topology, grid, state, memory.limit)
    return Plan(
        experiment=e,
        topology=topology,
        mesh=sizes,
        flops=step_flops(e, extra.supervision),
        memory=memory,
        collectives=collectives,
        sent=sent,
        roofline=roofline,
        calibration=calibrated,
        state_bytes=checkpoint_bytes(e),
        fits=fits,
        refusal=refusal,
        largest=largest_fit,
        compile_seconds=getattr(step, "seconds", None),
        compiled_flops=flops,
    )


def _plan_of_shapes(e: Experiment, topology: Topology, **options: Any) -> Plan:
    """Plan a step of each shape of batch; memory is that of the largest."""
    check_batch_sizes(e, plan_mesh(e, topology, compiled=False))
    whole = dataclasses.replace(e, text_lengths=())
    sizes = batch_sizes(whole)
    known = {s: plan(at_size(whole, s), topology, **options) for s in dict.fromkeys(sizes)}
    one = dataclasses.replace(whole, sequence_lengths=())
    lengths = sorted(set(e.text_lengths))
    texts = tuple(plan(at_text_length(one, length), topology, **options) for length in lengths)
    largest = max(known.values(), key=lambda p: p.memory.peak)
    seconds = [p.compile_seconds for p in (*known.values(), *texts)]
    return dataclasses.replace(
        largest,
        experiment=e,
        sizes=tuple(known[s] for s in sizes),
        texts=texts,
        fits=all(p.fits for p in known.values()),
        refusal=next((p.refusal for p in known.values() if p.refusal), None),
        compile_seconds=None if None in seconds else sum(s for s in seconds if s is not None),
    )


def _of_shape(p: Plan) -> dict[str, Any]:
    """Return the figures of a plan that differ between shapes of a batch, as JSON values."""
    e = p.experiment
    values = {
        "pairs": e.batch_size,
        "patches": e.preprocess.max_patches,
        "text_tokens": e.model.text.context_length,
        "peak": p.memory.peak,
        "fits": p.fits,
    }
    return values if p.prediction is None else values | as_values(p.prediction)


def plan_mesh(experiment: Experiment, topology: Topology, *, compiled: bool) -> Mesh | AbstractMesh:
    """Make the experiment's mesh over the devices of a slice; abstract without compilation.

    Raises:
        ShardingError: the sizes do not multiply to the number of devices.
    """
    try:
        if compiled:
            return make_mesh(experiment.mesh, topology_devices(topology))
        chip = topology.chip
        tpu = chip is not None and chip.platform == "tpu"
        sizes = mesh_sizes(experiment.mesh, topology.device_count, topology.slices, tpu=tpu)
        return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    except ShardingError as error:
        raise ShardingError(f"topology {topology.name}: {error}") from None


def check_state(state: StateBytes, topology: Topology, mesh: dict[str, int]) -> None:
    """Raise a ConfigError if parameters, gradients and optimizer exceed a chip's memory."""
    if topology.chip is None:
        return
    limit = topology.chip.usable
    # Only trained parameters have gradients.
    needed = state.parameters + state.trained + state.optimizer + state.averages + state.teacher
    if needed <= limit:
        return
    ways = 2 ** math.ceil(math.log2(needed / limit * mesh["fsdp"] * 1.25))
    if ways <= topology.device_count:
        fix = f"shard them with --mesh fsdp={ways}"
    else:
        fix = "use more chips, chips with more memory, or optimizer adafactor without EMA"
    raise ConfigError(
        f"parameters, gradients and optimizer take {needed / 2**30:.1f} GiB of each device of "
        f"{topology.name}, which has {limit / 2**30:.1f} usable: no batch fits, so {fix}"
    )


def _memory(
    e: Experiment,
    topology: Topology,
    grid: Mesh | AbstractMesh,
    state: StateBytes,
    step: CompiledStep | DoesNotFit | None,
    *,
    loss: bool,
) -> Memory:
    make = functools.partial(
        Memory,
        limit=topology.chip.usable if topology.chip else None,
        parameters=state.parameters,
        optimizer=state.optimizer,
        averages=state.averages,
        teacher=state.teacher,
    )
    if e.loss_intermediates:  # the loss cannot be compiled without the towers
        loss = False
    if isinstance(step, CompiledStep):
        return make(
            basis="compiled",
            activations=step.kept,
            temporaries=step.temporaries,
            loss=compile_loss(e, grid) if loss and isinstance(grid, Mesh) else None,
            peak=step.peak,
        )
    estimate = analytic_memory(e, topology.chip, state, dict(grid.shape))
    known = step.used if step is not None else None
    return make(
        basis="compiled" if known else "analytic",
        activations=estimate.activations,
        temporaries=estimate.peak - estimate.state,
        loss=None,
        peak=known or estimate.peak,
    )
