"""Resume a run on fewer devices: the same global batch, in more micro-batches.

The data axis of the mesh shrinks, and the memory of a micro-batch on each device stays what it was.
"""

import dataclasses
from typing import Any

from jax.sharding import AbstractMesh

from vlm.config import Experiment, in_phase
from vlm.data.interleave import ONE_EACH
from vlm.errors import VlmError
from vlm.sharding import AXES, batch_ways, mesh_sizes
from vlm.training.schedule import check_batch_sizes

# Fields that a user chooses for the devices at hand.
DEVICE_FIELDS = ("batch_size", "micro_batch_size", "mesh")


def devices_before(rows: list[dict[str, Any]]) -> int | None:
    """Return the number of devices that the config of a run was chosen for, from its history.

    They are those of the last start that changed the mesh or the batch, or of the first start.
    """
    starts = [row for row in rows if "phase" not in row]
    chosen = [row for row in starts[1:] if any(n.startswith(DEVICE_FIELDS) for n in row["changes"])]
    row = (starts[:1] + chosen)[-1:]
    return _device_count(row[0]) if row else None


def fitted(experiment: Experiment, before: int, now: int, *, tpu: bool = False) -> Experiment:
    """Return an experiment for `now` devices, TPUs or others, that was chosen for `before`.

    A fixed data axis becomes what is left for it. The micro-batch is the largest that divides the
    batch and has at most as many rows on each device as before. With more devices, and where none
    divides, only the data axis changes.

    Raises:
        ShardingError: the other axes of the mesh do not divide the devices.
    """
    e = experiment
    if now == before:
        return e
    mesh = e.mesh
    fsdp = mesh.fsdp or 1  # None: 1, where data is fixed
    if -1 not in (mesh.data, fsdp, mesh.tensor) and now % (fsdp * mesh.tensor) == 0:
        mesh = dataclasses.replace(mesh, data=-1, fsdp=fsdp)
    e = dataclasses.replace(e, mesh=mesh)
    if now > before:
        return e
    ways_before, ways = batch_ways(_mesh(experiment, before)), batch_ways(_mesh(e, now))
    rows = (e.micro_batch_size or e.batch_size) // ways_before
    _, shards, _ = mesh_sizes(mesh, now, tpu=tpu)
    if shards > 1 and not e.gathers_once:  # by default micro-batches do
        mesh = dataclasses.replace(mesh, gather="layer")
    for parts in range(1, e.batch_size // ways + 1):
        micro = e.batch_size // parts
        if e.batch_size % parts or micro > rows * ways:
            continue
        try:
            changed = dataclasses.replace(e, micro_batch_size=micro, mesh=mesh)
        except VlmError:  # of another field, such as sequence_lengths
            continue
        if not _problem(changed, now):
            return e if micro == (e.micro_batch_size or e.batch_size) else changed
    return e


def problem_of(experiment: Experiment, rows: list[dict[str, Any]], processes: int) -> str:
    """Return why a run cannot train on so many processes, or an empty string.

    `rows` are its history. Before its first row the devices of a process are not known.
    """
    before = devices_before(rows)
    if before is None:
        return ""
    if problem := _problem_of_lanes([r for r in rows if "rollback" not in r][-1], processes):
        return problem
    now = _device_count(rows[-1]) // rows[-1]["processes"] * processes
    for number in range(len(experiment.phases) + 1):
        e = in_phase(experiment, number)
        interleave = e.data.interleave
        if interleave is not None and interleave % processes:
            return f"data.interleave {interleave} does not divide over {processes} processes"
        try:
            if problem := _problem(fitted(e, before, now), now):
                return problem
        except VlmError as error:
            return str(error)
    return ""


def _problem_of_lanes(row: dict[str, Any], processes: int) -> str:
    """Return why so many processes cannot share the readers of a stream, or an empty string."""
    lanes = row.get("lanes", 0)
    if lanes == ONE_EACH:
        same = processes == row["processes"]
        return "" if same else f"each of {row['processes']} processes has its own data iterator"
    if lanes % processes:
        return f"{lanes} readers (data.interleave) do not divide over {processes} processes"
    return ""


def _problem(e: Experiment, devices: int) -> str:
    """Return why the mesh or the batch does not fit a number of devices, or an empty string."""
    try:
        check_batch_sizes(e, _mesh(e, devices))
    except VlmError as error:
        return str(error)
    return ""


def _mesh(e: Experiment, devices: int) -> AbstractMesh:
    return AbstractMesh(mesh_sizes(e.mesh, devices), AXES)


def _device_count(row: dict[str, Any]) -> int:
    """Return the number of devices in a row of the history, such as "4 x TPU v5e"."""
    return int(row["devices"].partition(" ")[0])
