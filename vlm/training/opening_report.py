"""The log of a run before its first step: data, model, devices, length, and sharding on a mesh."""

import os

import jax
from rich.table import Table
from rich.text import Text

from vlm.config import Experiment
from vlm.config.batch_sizes import BatchSize, batch_sizes
from vlm.display import listed
from vlm.models.float8 import check_float8
from vlm.sharding import placement_rows
from vlm.training.console import as_text, log
from vlm.training.phases import RunPhases
from vlm.training.run import Run
from vlm.training.step import Trainer, TrainState


def report_start(run: Run, phases: RunPhases, state: TrainState) -> None:
    """Log what the run trains on, what it trains, where and for how long."""
    e, step, total = phases.experiment, int(state.step), int(state.total_steps)
    trainer, batches = phases.trainer, phases.batches
    changes = "\n".join(phases.rows(total, step))
    rows = {
        "run folder": str(run.folder),
        "data": f"{e.data.source or 'a mixture'}, {batches.description}",
        "model": _model(e, state),
        "devices": _devices(trainer),
        **({"precision": check_float8(trainer.mesh)} if e.matmul_dtype else {}),
        "length": _length(e, step, total),
        **({"phase": f"{phases.number} of {phases.count}"} if phases.count else {}),
        **({"later phases": changes} if changes else {}),
        "evaluation": phases.evaluations.description,
        "next": "compiling the first step (a minute or so); then the time left is shown",
    }
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(name, Text(text, overflow="fold"))
    log.info(as_text(table))
    if trainer.mesh.size > 1:
        log.info(placement_text(state, trainer.mesh.size))


def _model(e: Experiment, state: TrainState) -> str:
    sizes: dict[str, int] = {"vision": 0, "text": 0}
    for group, _, elements, _ in placement_rows((state.params, state.frozen)):
        tower = group.partition("/")[2].partition("/")[0]
        sizes[tower] = sizes.get(tower, 0) + elements
    trained = sum(x.size for x in jax.tree.leaves(state.params))
    frozen = sum(x.size for x in jax.tree.leaves(state.frozen))
    text = (
        f"vision {_millions(sizes['vision'])} ({e.model.vision.image_size} pixels), "
        f"text {_millions(sizes['text'])} ({e.model.text.context_length} tokens)"
    )
    if frozen:
        text += f"; {_millions(trained)} of them trained"
    start = f", from {e.init_from}" if e.init_from is not None else ""
    return f"{_millions(trained + frozen)} parameters{start}: {text}"


def _devices(trainer: Trainer) -> str:
    devices, processes = jax.devices(), jax.process_count()
    kind = devices[0].device_kind
    text = f"{len(devices)} x {kind}, {os.cpu_count()} CPU cores"
    if processes > 1:
        text += f" on each of {processes} processes"
    if len(devices) > 1:
        text += f", mesh {', '.join(f'{axis} {size}' for axis, size in trainer.mesh.shape.items())}"
    return text


def _length(e: Experiment, step: int, total: int) -> str:
    text = f"{total:,} steps of " + ", ".join(_of_size(size) for size in batch_sizes(e))
    if e.selection is not None:
        text += f", selected from {e.super_batch_size:,}"
    if e.in_parts:
        text += f" in micro-batches of {e.micro_batch_size:,}"
    if step:
        text += f", from step {step:,} on"
    every = f"{e.checkpoint_every:.0%} of the run"
    if e.checkpoint_minutes is not None:
        every += f" or {e.checkpoint_minutes:g} minutes"
    return f"{text}; a checkpoint every {every}"


def _of_size(size: BatchSize) -> str:
    images = "" if size.patches is None else f" with images of {size.patches:,} patches"
    return f"{size.pairs:,} pairs{images}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.{2 if count < 1e8 else 0}f} M"


def placement_text(state: TrainState, devices: int) -> str:
    """Describe the state's sharding: a line if all is replicated, else a table."""
    rows = merged_rows(state)
    total = sum(size for *_, size in rows)
    if [axes for axes, *_ in rows] == ["replicated"]:
        arrays = len(jax.tree.leaves((state.params, state.frozen, state.ema, state.opt_state)))
        return f"sharding {arrays} arrays replicated, {total:,} bytes on each of {devices} devices"
    table = Table(title="sharding", title_justify="left")
    table.add_column("over")
    table.add_column("groups of arrays")
    table.add_column("elements", justify="right")
    table.add_column("bytes per device", justify="right")
    for axes, groups, count, size in rows:
        table.add_row(axes, listed(groups, 3), f"{count:,}", f"{size:,}")
    table.add_section()
    table.add_row("total", "", "", f"{total:,}")
    return as_text(table)


def merged_rows(state: TrainState) -> list[tuple[str, list[str], int, int]]:
    """Return mesh axes, groups of arrays, elements and bytes per device of each sharding."""
    trees = {"": state.params, "frozen": state.frozen, "EMA": state.ema}
    trees |= {"optimizer": state.opt_state}
    rows: dict[str, tuple[list[str], int, int]] = {}
    for name, tree in trees.items():
        for group, axes, elements, size in placement_rows(tree, 0 if name else 2):
            groups, count, bytes_ = rows.get(axes, ([], 0, 0))
            rows[axes] = ([*groups, group or name], count + elements, bytes_ + size)
    return [(axes, *row) for axes, row in rows.items()]
