"""Analytic estimates of a step's memory, FLOPs and communication, without compilation.

All figures are per device. They model a pre-norm block, or read the activations of any other tower
from its trace (`vlm.planning.residuals`). They serve to rank configurations and to plan for chips
without an available compiler. They do not replace compiling.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from vlm.chips import Chip
from vlm.config import (
    EncoderTextConfig,
    Experiment,
    ModelConfig,
    NoTextConfig,
    NoVisionConfig,
    TextConfig,
    ViTConfig,
)
from vlm.inputs.preprocess import Preprocess
from vlm.losses.contrastive import tile_side
from vlm.models.flops import has_backward, step_flops
from vlm.nn import tpu_attention
from vlm.nn.cuda_attention import MAX_HEAD_DIM
from vlm.nn.remat import ATTENDED, MLP_HIDDEN, PROJECTED, saved_names
from vlm.planning.collectives import FSDP, GRADIENTS, LOSS_RING, SELECTION, TENSOR
from vlm.planning.compile import PlannedSupervision, StateBytes, planned_supervision, total_bytes
from vlm.planning.residuals import Residuals, teacher_residuals, tower_residuals

FLOAT32 = 4  # bytes
Transformer = ViTConfig | TextConfig | EncoderTextConfig  # of plain blocks, which have a formula


@dataclass(frozen=True)
class AnalyticMemory:
    """Bytes of one device during the backward pass, the peak of a step."""

    state: int  # parameters, optimizer, EMA, and parameters of a teacher
    gradients: int
    activations: float  # saved for the backward pass
    working: float  # of the current block and the loss's tiles
    teacher: float = 0.0  # of a block of the teacher, which runs before the step

    @property
    def peak(self) -> float:
        return self.state + max(self.gradients + self.activations + self.working, self.teacher)


def analytic_memory(
    experiment: Experiment,
    chip: Chip | None,
    state: StateBytes,
    mesh_shape: dict[str, int],
) -> AnalyticMemory:
    """Estimate the memory of a step per device of a mesh."""
    e, extra, size = experiment, planned_supervision(experiment), _itemsize(experiment)
    fsdp, tensor_ways = mesh_shape["fsdp"], mesh_shape["tensor"]
    batch_ways = mesh_shape["data"] * fsdp
    gathers_once = fsdp > 1 and tensor_ways == 1 and e.gathers_once
    rows = (e.micro_batch_size or e.batch_size) / batch_ways
    kept, block, embedding = 0.0, 0.0, 0.0
    for tower, tokens, config in _towers(e):
        width, mlp = config.width, config.mlp_dim
        scores = 0 if fused_attention(e, chip, tokens, config) else config.heads * tokens
        saved = size * (12 * width + _hidden(config) * mlp) + (4 + size) * scores
        saved = saved / tensor_ways + 16 * width
        block = max(block, rows * tokens * (saved + size * width))
        if (names := saved_names(e.remat)) is not None:
            named = {PROJECTED: 3 * width, ATTENDED: width, MLP_HIDDEN: mlp}
            saved = size * sum(named[name] for name in names) / tensor_ways
        if has_backward(e, tower):
            kept += rows * tokens * config.depth * (saved + size * width)
    for tower in _traced_towers(e):
        if has_backward(e, tower):
            found = tower_residuals(e, tower)
            kept, block = kept + rows * found.kept, max(block, rows * found.layer)
    for found in _traced_teachers(extra):
        # Arrays of a layer: its input, its output, and two in between.
        embedding = max(embedding, 4 * rows * found.largest)
    for tokens, config in _teacher_towers(extra):
        block_bytes = FLOAT32 * (10 * config.width + 2 * config.mlp_dim + config.heads * tokens)
        embedding = max(embedding, rows * tokens * block_bytes / tensor_ways)
    local = e.batch_size / batch_ways
    side = min(tile_side("cpu" if chip is None else chip.platform), local)
    # Logits, their softmax and its gradient, in tiles or of a classification head.
    tiles = 3 * 4 * (local * extra.classes if e.objective == "classification" else side**2)
    if e.distill is not None and e.distill.relations:
        tiles += 3 * 4 * side**2
    tiles += 8 * 4 * local * e.model.embed_dim + 2 * 4 * local * extra.supervision.width
    # Pixels in float32 and in the compute dtype.
    image = Preprocess(e.preprocess).image_bytes
    images = image * (4 + 2) * rows
    if e.selection is not None:  # a super-batch, and the exchange of its rows
        tiles += 2 * image * e.super_batch_size / batch_ways
    return AnalyticMemory(
        state=state.parameters + state.optimizer + state.averages + state.teacher,
        # Gathered at once, all parameters and their gradients are whole.
        gradients=fsdp * (state.parameters + state.trained) if gathers_once else state.trained,
        activations=kept + images,
        working=block + tiles,
        teacher=embedding + images,
    )


def analytic_operations(
    experiment: Experiment, chip: Chip, chips: int, state: StateBytes
) -> tuple[float, float]:
    """Seconds of arithmetic and of memory-bound work on one chip, at its published rates.

    Matrix products, padded to whole matrix units, run at the arithmetic rate. Normalisations,
    activations, residual sums, the update and unfused attention weights run at memory bandwidth.
    """
    e, size, extra = experiment, _itemsize(experiment), planned_supervision(experiment)
    padding = {
        f"{tower}/{part}": factor
        for tower, _, config in _towers(e)
        for part, factor in _paddings(config, chip.unit).items()
    }
    parts = step_flops(e, extra.supervision)
    arithmetic = sum(part.executed * padding.get(name, 1.0) for name, part in parts.items())
    rows = e.batch_size / chips
    forwards = {}  # bytes of a forward pass for one example
    for tower, tokens, config in _towers(e):
        moved = size * (8 * config.width + _hidden(config) * config.mlp_dim)
        if not fused_attention(e, chip, tokens, config):
            moved += config.heads * tokens * (2 * 4 + 2 * size)
        forwards[tower] = tokens * config.depth * moved
    forwards |= {tower: tower_residuals(e, tower).saved for tower in _traced_towers(e)}
    traffic = 0.0
    for tower, forward in forwards.items():
        passes = 1 + e.in_parts  # micro-batches run forward twice
        if has_backward(e, tower):
            passes += 3 if e.remat == "full" else 2
        if e.selection is not None and e.selection.score != "easy_reference":
            passes += e.selection.super_batch  # forward
        traffic += rows * passes * forward
    for found in _traced_teachers(extra):
        traffic += rows * e.super_batch_size / e.batch_size * found.saved
    for tokens, config in _teacher_towers(extra):
        forward = FLOAT32 * (8 * config.width + 2 * config.mlp_dim)
        forward += config.heads * tokens * 4 * FLOAT32
        traffic += rows * e.super_batch_size / e.batch_size * tokens * config.depth * forward
    # The update reads parameters, gradients and moments, and writes all but the gradients.
    update = 3 * state.trained + 2 * state.optimizer + 2 * state.averages
    seconds = (traffic + update * chip.devices) / chip.memory_rate
    return arithmetic / chips / chip.flops, seconds


def _itemsize(experiment: Experiment) -> int:
    """Bytes of a number in the compute dtype."""
    return 4 if experiment.dtype == "float32" else 2


def unit_padding(size: int, unit: int) -> float:
    """Slowdown of a product whose axis of `size` is padded to a multiple of `unit`."""
    return math.ceil(size / unit) * unit / size


def _paddings(config, unit: int) -> dict[str, float]:
    """Padding factors of a tower's blocks, by kind of product."""
    width, mlp = unit_padding(config.width, unit), unit_padding(config.mlp_dim, unit)
    head = unit_padding(_head_dim(config), unit)
    return {"projections": width**2, "scores": head, "mlp": width * mlp}


def analytic_traffic(
    experiment: Experiment,
    parameters: int,
    mesh_shape: dict[str, int],
    frozen: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Estimate the bytes that each device sends in a step, by purpose.

    Assumes ring algorithms and float32 parameters.

    Args:
        parameters: bytes of the trained parameters, unsharded.
        frozen: tree of the frozen parameters, which are gathered too and have no gradients.
    """
    data, fsdp, tensor = (mesh_shape[axis] for axis in ("data", "fsdp", "tensor"))
    ways, extra = data * fsdp, planned_supervision(experiment)
    parts = experiment.batch_size // (experiment.micro_batch_size or experiment.batch_size)
    gathers_once = experiment.gathers_once and tensor == 1
    sent = {}
    if ways > 1:
        # Each device of `fsdp` gets the sum of its shard, which is then summed over `data`.
        scattered, reduced = (fsdp - 1) / fsdp, 2 * (data - 1) / data
        scattered *= 1 if gathers_once else parts
        sent[GRADIENTS] = parameters / tensor * (scattered + reduced / fsdp)
    if ways > 1 and experiment.objective != "classification":
        ours = experiment.model.embed_dim
        trips = 2 if experiment.model.loss == "softmax" else 1
        # Each trip carries the text block; the last one also its gradient.
        carried = (trips + 1) * ours
        if experiment.distill is not None and experiment.distill.relations:
            carried += 3 * ours + 2 * extra.supervision.width  # two trips, with the teacher's texts
        sent[LOSS_RING] = FLOAT32 * experiment.batch_size * carried * (ways - 1) / ways
    if ways > 1 and experiment.selection is not None:
        image = Preprocess(experiment.preprocess).image_bytes
        sent[SELECTION] = experiment.batch_size * image * (ways - 1) / ways  # the chosen rows
    if tensor > 1:
        # Two all-reduces of activations per block and pass.
        rows, size, moved = experiment.batch_size / ways, _itemsize(experiment), 0.0
        for tower, n, c in _towers(experiment):
            passes = 1 + experiment.in_parts  # micro-batches run forward twice
            if has_backward(experiment, tower):
                passes += 2 if experiment.remat == "full" else 1
            moved += passes * rows * n * c.width * c.depth * size
        moved += sum(rows * n * c.width * c.depth * FLOAT32 for n, c in _teacher_towers(extra))
        sent[TENSOR] = 2 * moved * 2 * (tensor - 1) / tensor
    if fsdp > 1:
        # Once in float32; or for each forward and backward pass, in the type of the products.
        passes = 3 if parts > 1 else 2
        narrow = _itemsize(experiment)
        moved = parameters * (1 if gathers_once else parts * passes * narrow / FLOAT32)
        for tower, tree in (frozen or {}).items():
            if experiment.objective == "classification" and tower == "text":
                continue  # it does not run
            if gathers_once:
                moved += total_bytes(tree)
            else:  # int8 kernels as they are
                runs = passes if has_backward(experiment, tower) else passes - 1
                sizes = (x.size * min(x.dtype.itemsize, narrow) for x in jax.tree.leaves(tree))
                moved += parts * runs * sum(sizes)
        if extra.embedding is not None:
            moved += total_bytes(extra.embedding.parameters)  # once, in float32
        sent[FSDP] = moved / tensor * (fsdp - 1) / fsdp
    return sent


def fused_attention(experiment: Experiment, chip: Chip | None, tokens: int, config) -> bool:
    """Whether a tower's attention is fused: see `vlm.nn.attention.attend`."""
    if chip is None or experiment.dtype == "float32":
        return False
    if config.kind == "encoder" or getattr(config, "positions", None) == "alibi":
        return False  # no kernel takes a bias, or a mask by pairs of tokens
    if getattr(config, "softcap", None):
        return False
    head_dim = _head_dim(config)
    if chip.platform == "tpu":
        return tpu_attention.takes(tokens, head_dim)
    masked = isinstance(config, TextConfig) and config.pad_id is not None and config.causal
    return not masked and head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM


def _head_dim(config: Transformer) -> int:
    return getattr(config, "head_dim", config.width // config.heads)


def _hidden(config: Transformer) -> int:
    """Number of arrays of the hidden width that an MLP keeps: gated ones have two layers of it."""
    return 2 if getattr(config, "mlp", "gated") == "plain" else 4


def _towers(experiment: Experiment) -> Iterator[tuple[str, int, Transformer]]:
    """Yield name, token count and config of the towers of a step that are plain transformers."""
    vision, text = experiment.model.vision, experiment.model.text
    if isinstance(vision, ViTConfig):
        yield "vision", vision.tokens(training=True), vision
    if experiment.objective != "classification" and isinstance(text, Transformer):
        yield "text", text.tokens(masking=experiment.text_masking), text


def _traced_towers(experiment: Experiment) -> Iterator[str]:
    """Yield the names of the other towers of a step, whose activations are read from a trace."""
    names = ("vision",) if experiment.objective == "classification" else ("vision", "text")
    yield from _without_formula(experiment.model, names)


def _traced_teachers(extra: PlannedSupervision) -> Iterator[Residuals]:
    """Yield the activations of an online teacher's towers that are no plain transformers."""
    if (model := extra.supervision.teacher) is not None:
        for tower in _without_formula(model, ("vision", "text")):
            yield teacher_residuals(model, tower)


def _without_formula(model: ModelConfig, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        if not isinstance(getattr(model, name), Transformer | NoVisionConfig | NoTextConfig):
            yield name


def _teacher_towers(extra: PlannedSupervision) -> Iterator[tuple[int, Transformer]]:
    """Yield token count and config of the plain transformers of an online teacher (float32)."""
    if (config := extra.supervision.teacher) is None:
        return
    if isinstance(config.vision, ViTConfig):
        yield config.vision.tokens(), config.vision
    if isinstance(config.text, Transformer):
        yield config.text.tokens(), config.text
