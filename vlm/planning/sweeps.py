"""`sweep`: plans of all combinations of topologies, meshes and rematerialisation policies."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from vlm.config import Experiment, MeshConfig, RematPolicy
from vlm.errors import ConfigError, VlmError
from vlm.planning.prediction import Plan, plan
from vlm.planning.report import order
from vlm.planning.topology import parse_topology
from vlm.training.init_from import resolve

REMATS = get_args(RematPolicy)


def sweep(
    experiment: Experiment,
    topologies: Sequence[str],
    meshes: Sequence[str | MeshConfig] = (),
    remats: Sequence[str] = REMATS,
    *,
    compiles: int = 4,
    batch_per_chip: int | None = None,
    calibration: str | Path | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> list[Plan]:
    """Plan every combination; compiled plans come first, then by speed per chip.

    All are estimated analytically. Then the `compiles` best ones with a compiler are compiled.
    Compiled and analytic plans are not ranked against each other.

    Args:
        meshes: if empty, try data parallelism, and fsdp over 8 and over all devices.
        batch_per_chip: if set, the global batch is this times the number of chips, without
            micro-batches.
        report: called with a line for each compilation.

    Raises:
        ConfigError: an unknown topology, or no valid combination.

    Example:
        >>> plans = vlm.planning.sweep(experiment, ["h100:8"], ["data=8"], ["none"], compiles=0)
        >>> len(plans)
        1
    """
    experiment = resolve(experiment)
    plans, errors = [], []
    for name in topologies:
        topology = parse_topology(name)
        sizes: dict[str, Any] = {}
        if batch_per_chip:
            sizes = {"batch_size": batch_per_chip * topology.chips, "micro_batch_size": None}
        combinations = itertools.product(meshes or default_meshes(topology.device_count), remats)
        for mesh, remat in combinations:
            e = dataclasses.replace(experiment, **sizes, remat=remat)
            try:
                plans.append(plan(e, topology, mesh, compiled=False, calibration=calibration))
            except VlmError as error:
                errors.append(str(error))
    if not plans:
        raise ConfigError(f"no combination is valid: {errors[0]}")
    plans.sort(key=order)
    promising = [i for i, rough in enumerate(plans) if rough.topology.compiles][:compiles]
    for i in promising:
        rough = plans[i]
        report(f"compiling {rough.topology.name} {rough.mesh} remat {rough.experiment.remat}")
        mesh = MeshConfig(**rough.mesh)
        plans[i] = plan(rough.experiment, rough.topology, mesh, loss=False, calibration=calibration)
    return sorted(plans, key=order)


def default_meshes(devices: int) -> list[MeshConfig]:
    """Data parallelism, fsdp over 8 devices, and fsdp over all."""
    sizes = sorted({1, math.gcd(devices, 8), devices})
    return [MeshConfig(data=devices // n, fsdp=n) for n in sizes]
