"""Ahead-of-time compilation of the training step for described devices, and its costs."""

import dataclasses
import functools
import math
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from vlm.config import Experiment, ModelConfig
from vlm.data.sources import classes_of
from vlm.models.flops import Supervision
from vlm.planning.collectives import Collective, collectives, in_loss
from vlm.planning.hlo import Program, parse
from vlm.sharding import (
    AXES,
    Rules,
    batch_sharding,
    is_stacked,
    path_names,
    placed,
    replicated,
    shardings,
)
from vlm.training.compiler_options import scans_blocks
from vlm.training.objectives import HEADS, Embeddings, objective
from vlm.training.partition import joined
from vlm.training.step import Trainer, TrainState, batch_shapes
from vlm.training.teacher import (
    DescribedTeacher,
    StoredTeacher,
    supervision_of,
    teacher_source,
)


@dataclass(frozen=True)
class PlannedSupervision:
    """Number of classes in the data, and the teacher without its weights."""

    classes: int = 0
    teacher: DescribedTeacher | StoredTeacher | None = None

    @property
    def embedding(self) -> DescribedTeacher | None:
        """The teacher if it embeds batches online, else None."""
        return self.teacher if isinstance(self.teacher, DescribedTeacher) else None

    @property
    def supervision(self) -> Supervision:
        return supervision_of(self.classes, self.teacher)


@functools.lru_cache(maxsize=8)
def planned_supervision(experiment: Experiment) -> PlannedSupervision:
    """Read the extra supervision of an experiment; cached, since sweeps ask often.

    Raises:
        DataError: the classes cannot be counted, or stored embeddings do not exist.
        CheckpointError, ConfigError: the teacher does not exist or is not usable.
    """
    e = experiment
    classes = len(classes_of(e.data).labels) if e.objective == "classification" else 0
    model, stored = teacher_source(e)
    if not (model or stored):
        return PlannedSupervision(classes)
    return PlannedSupervision(classes, (StoredTeacher if stored else DescribedTeacher)(e))


@dataclass(frozen=True)
class DoesNotFit:
    """Out-of-memory error of the compiler: the step needs `used` bytes per device."""

    used: float | None
    limit: float | None
    message: str


@dataclass(frozen=True)
class StateBytes:
    """Bytes per device of the train state, by its shardings."""

    parameters: int  # trained and frozen
    trained: int  # parameters with a gradient
    optimizer: int
    averages: int
    teacher: int = 0  # parameters of a distillation teacher


@dataclass(frozen=True)
class CompiledTeacher:
    """Program with which a teacher embeds a batch before each step; bytes per device."""

    parameters: int
    peak: int  # while it runs, including the train state
    program: Program


@dataclass(frozen=True)
class CompiledStep:
    """Compiled step; bytes are per device."""

    own_peak: int  # without a teacher
    temporaries: int
    program: Program
    collectives: list[Collective]
    kept: int | None  # temporaries that loops over layers save for the backward pass
    seconds: float  # of tracing and compiling
    teacher: CompiledTeacher | None = None

    @property
    def peak(self) -> int:
        """Peak bytes of the step with a teacher's parameters, or of the teacher's program."""
        if self.teacher is None:
            return self.own_peak
        return max(self.own_peak + self.teacher.parameters, self.teacher.peak)

    @property
    def programs(self) -> list[Program]:
        """Programs that run for a step."""
        return [self.program] + ([] if self.teacher is None else [self.teacher.program])


def on_platform(experiment: Experiment, platform: str) -> Experiment:
    """Replace the dtype "auto" and the unset `scan` by those of the platform."""
    dtype = experiment.dtype
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" else "bfloat16"
    return dataclasses.replace(experiment, dtype=dtype, scan=scans_blocks(experiment, platform))


def batch_of(experiment: Experiment) -> dict[str, Any]:
    """Shapes and dtypes of a step's input: a global batch or super-batch."""
    teacher = planned_supervision(experiment).teacher
    return batch_shapes(experiment, None if teacher is None else teacher.width)


def compile_step(experiment: Experiment, mesh: Mesh) -> CompiledStep | DoesNotFit:
    """Compile the step of `experiment` on `mesh`, without allocating or running anything."""
    began = time.perf_counter()
    extra, of_batch = planned_supervision(experiment), batch_of(experiment)
    trainer = Trainer(experiment, mesh, classes=extra.classes, teacher=extra.teacher)
    # With shardings, as in a run, since attention reads the mesh from them.
    rows = batch_sharding(mesh)
    state = jax.tree.map(placed, trainer.abstract_state, trainer.state_shardings)
    batch = jax.tree.map(lambda x: placed(x, rows), of_batch)
    compiled = _compile(trainer.step.lower(state, batch))
    if isinstance(compiled, DoesNotFit):
        return compiled
    step = read_step(compiled, trainer, time.perf_counter() - began)
    return step if extra.embedding is None else _with_teacher(step, extra.embedding, trainer)


def _with_teacher(
    step: CompiledStep, teacher: DescribedTeacher, trainer: Trainer
) -> CompiledStep | DoesNotFit:
    """Add the program of the teacher to a step."""
    began, mesh = time.perf_counter(), trainer.mesh
    assert isinstance(mesh, Mesh)
    compiled = _compile(teacher.trace(mesh).lower())
    if isinstance(compiled, DoesNotFit):
        return compiled
    rules = trainer.experiment.model.partition
    program, state = parse(compiled.as_text()), state_bytes(trainer.abstract_state, mesh, rules)
    sent = collectives(
        program, dict(mesh.shape), layer_shapes(teacher.parameters), slice_count(mesh)
    )
    return dataclasses.replace(
        step,
        collectives=step.collectives + sent,
        seconds=step.seconds + time.perf_counter() - began,
        teacher=CompiledTeacher(
            parameters=bytes_on(teacher.parameters, mesh, teacher.config.partition),
            peak=peak_of(compiled) + state.parameters + state.optimizer + state.averages,
            program=program,
        ),
    )


def read_step(compiled: Any, trainer: Trainer, seconds: float) -> CompiledStep:
    """Read the costs of a compiled step that took `seconds` to compile."""
    program = parse(compiled.as_text())
    mesh, state = trainer.mesh, trainer.abstract_state
    shapes = layer_shapes((state.params, state.frozen))
    return CompiledStep(
        own_peak=peak_of(compiled),
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        program=program,
        collectives=collectives(program, dict(mesh.shape), shapes, slice_count(mesh)),
        kept=_kept_by_loops(program, trainer.experiment.model) if trainer.scan else None,
        seconds=seconds,
    )


def peak_of(compiled: Any) -> int:
    """Peak bytes per device: arguments, temporaries, and outputs that reuse no argument."""
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs


def slice_count(mesh: Mesh | AbstractMesh) -> int:
    """Number of slices that a mesh's devices form."""
    if isinstance(mesh, AbstractMesh):
        return 1
    return len({getattr(device, "slice_index", None) or 0 for device in mesh.devices.flat})


def compile_loss(experiment: Experiment, mesh: Mesh) -> int | None:
    """Temporary bytes per device of only the loss and its gradients; None if it does not fit."""
    e = dataclasses.replace(experiment, selection=None)  # of the chosen batch
    rows, replicated_sharding = batch_sharding(mesh), replicated(mesh)
    z = jax.ShapeDtypeStruct((e.batch_size, e.model.embed_dim), jnp.float32, sharding=rows)
    text = None if e.objective == "classification" else z
    embeddings: Any = Embeddings(z, text)  # pyright: ignore[reportArgumentType] (abstract)
    state = abstract_state(e)
    kept = {"logit_scale", "logit_bias", *HEADS}
    params = {k: v for k, v in joined(state.params, state.frozen).items() if k in kept}
    params = jax.tree.map(lambda x: placed(x, replicated_sharding), params)
    inputs = () if e.losses else ("images", "tokens")  # losses of the user may read them
    batch = {k: placed(v, rows) for k, v in batch_of(e).items() if k not in inputs}

    def loss(params, z, batch):
        return objective(e, mesh, params, batch, z, jax.random.key(0))

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    compiled = _compile(gradient.lower(params, embeddings, batch))
    fits = not isinstance(compiled, DoesNotFit)
    return compiled.memory_analysis().temp_size_in_bytes if fits else None


STATE_FIELDS = (
    "model", "preprocess", "tokenizer", "optimizer", "lock", "freeze", "init_from", "init_towers",
    "adapter", "objective", "distill", "data",
)  # fmt: skip


def abstract_state(experiment: Experiment) -> TrainState:
    """Shapes of the train state; cached by the few fields that they depend on."""
    return _abstract_trainer(_of_state(experiment)).abstract_state


def checkpoint_bytes(experiment: Experiment) -> int:
    """Unsharded bytes of the part of a train state that a checkpoint stores."""
    trainer = _abstract_trainer(_of_state(experiment))
    return total_bytes(trainer.checkpoint_state(trainer.abstract_state))


def _of_state(experiment: Experiment) -> Experiment:
    """Keep only the fields that the train state depends on, so that caches are hit."""
    return Experiment(**{name: getattr(experiment, name) for name in STATE_FIELDS})


@functools.lru_cache(maxsize=8)
def _abstract_trainer(experiment: Experiment) -> Trainer:
    one = AbstractMesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    extra = planned_supervision(experiment)
    return Trainer(experiment, one, None, extra.classes, extra.teacher)


def state_bytes(state: TrainState, mesh: Mesh | AbstractMesh, rules: Rules = ()) -> StateBytes:
    """Bytes of a train state per device of a mesh; parameters include frozen ones."""
    return StateBytes(
        parameters=bytes_on(state.params, mesh, rules) + bytes_on(state.frozen, mesh, rules),
        trained=bytes_on(state.params, mesh, rules),
        optimizer=bytes_on(state.opt_state, mesh, rules),
        averages=bytes_on(state.ema, mesh, rules),
    )


def total_bytes(tree: Any) -> int:
    """Bytes of all arrays, unsharded."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def bytes_on(tree: Any, mesh: Mesh | AbstractMesh, rules: Rules = ()) -> int:
    """Bytes per device of arrays that are sharded like parameters."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings(tree, mesh, rules)), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in leaves)


def layer_shapes(parameters: Any) -> set[tuple[int, ...]]:
    """Shapes of all parameter matrices, stacked and of one layer."""
    shapes = set()
    for path, x in jax.tree_util.tree_leaves_with_path(parameters):
        stacked = is_stacked(path_names(path))
        if x.ndim - stacked >= 2:
            shapes |= {x.shape[1:], x.shape} if stacked else {x.shape}
    return shapes


def _compile(lowered: Any) -> Any:
    try:
        return lowered.compile()
    except Exception as error:  # of the compiler's type; only out-of-memory is handled
        refusal = parse_refusal(str(error))
        if refusal is None:
            raise
        return refusal


# "Used 17.37G of 15.75G hbm", and from newer compilers "the total memory required for HLO
# temporaries (35.44G) exceeds available HBM (30.75G)", where the first number excludes arguments.
REFUSALS = (
    r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
    r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
    r"requires ([\d.]+)([KMGT]?)i?B? .{0,80}?(?:only|have|capacity of) ([\d.]+)([KMGT]?)",
)


def parse_refusal(message: str) -> DoesNotFit | None:
    """Parse the compiler's out-of-memory message; None for other messages."""
    text = " ".join(message.split())
    full = ("RESOURCE_EXHAUSTED", "Ran out of memory", "Out of memory", "exceeds available HBM")
    if not any(words in text for words in full):
        return None
    for pattern in REFUSALS:
        if match := re.search(pattern, text):
            pairs = match.group(1, 2), match.group(3, 4)
            used, limit = (float(n) * 1024 ** " KMGT".index(unit or " ") for n, unit in pairs)
            return DoesNotFit(used, limit, text[:300])
    return DoesNotFit(None, None, text[:300])


def _kept_by_loops(program: Program, model: ModelConfig) -> int:
    """Bytes of stacked arrays that forward loops over layers save for the backward pass."""
    depths = {getattr(tower, "depth", None) for tower in (model.vision, model.text)} - {None}
    total = 0
    for loop, _, _ in program.walk():
        if loop.opcode != "while" or "transpose(" in loop.op_name or in_loss(loop.op_name):
            continue
        if program.trip_count(loop) not in depths:
            continue
        body = program.computations[loop.calls("body")]
        for array, name in zip(loop.arrays, body.root.operands, strict=False):
            element = body.instructions[name]  # from the loop's state or a fusion
            source = body.instructions.get(next(iter(element.operands), ""))
            of_state = source is not None and source.opcode == "parameter"
            passed = element.opcode == "get-tuple-element" and of_state
            if not passed and array.dims[:1] and array.dims[0] in depths:
                total += array.bytes
    return total
