"""`vlm plan`: estimate memory, step time and cost of a config on a TPU/GPU slice."""

import dataclasses
import json as jsonlib
import os
from typing import Any

from vlm.cli import options
from vlm.cli.parse import UsageError
from vlm.cli.terminal import print_status
from vlm.config import RematPolicy, load_config


def plan(
    config: str,
    /,
    topology: tuple[str, ...] = ("v5e:16x16",),
    mesh: tuple[str, ...] = (),
    batch_size: int | None = None,
    micro_batch_size: int | None = None,
    batch_per_chip: int | None = None,
    remat: tuple[RematPolicy, ...] = (),
    scan: bool | None = None,
    largest_batch: bool = False,
    sweep: bool = False,
    compiles: int | None = None,
    calibration: str | None = None,
    price: float | None = None,
    json: options.Json = False,
) -> None:
    """Estimate memory, step time and cost of a config by compiling its training step.

    No such chips are needed. Memory, communication and FLOPs are read from the compiled program;
    times are ranges, calibrated on published and measured throughputs. TPU slices need the extra
    `tpu`; GPUs are estimated analytically (no compilation). Each phase of a run is planned alone.

    Examples:
      vlm plan configs/siglip_b16.py --topology v5e:16x16
      vlm plan configs/siglip_b16.py --topology v5p:4x4x4 --mesh data=8,fsdp=8 --largest-batch
      vlm plan configs/siglip_b16.py --sweep --topology v5e:4x4 v6e:4x4 h100:8 --batch-per-chip 256
      vlm plan configs/siglip_b16.py --topology 2xv5e:16x16 --price 1.2

    Args:
        config: a config file, such as configs/siglip_b16.py, or a run's config.json.
        topology: a slice: v3, v4, v5e, v5p, v6e or tpu7x and its shape, with a prefix for several
            slices (2xv5e:16x16); a100, a100-40, h100, h100-pcie, h200, gh200, b200, l4 or l40s and
            their number; cpu and its number of devices. Several with --sweep.
        mesh: mesh axes, such as data=32,fsdp=8. Several with --sweep. Default: the config's.
        batch_size: global batch size. None: the config's.
        micro_batch_size: pairs that the towers process at a time. None: the config's.
        batch_per_chip: set the global batch to this many pairs per chip.
        remat: rematerialisation policy. Several with --sweep. Default: the config's.
        scan: compile the blocks as a loop over one of them, which takes less time. Default: the
            config's.
        largest_batch: also search for the largest batch that fits; for TPUs it compiles several
            times.
        sweep: compare all combinations in one table.
        compiles: number of the best rows of a sweep to compile, by default 4; the others are
            estimated analytically.
        calibration: file of step times measured on this kind of chip, by vlm bench train --save.
        price: price of one chip for an hour, to estimate the cost of the run.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # only compiles
    from rich.console import Console

    from vlm.planning import phases
    from vlm.planning import plan as make
    from vlm.planning import sweep as compare
    from vlm.planning.report import show, show_sweep
    from vlm.planning.topology import parse_topology

    if price is not None and not 0 <= price < float("inf"):
        raise UsageError(f"--price {price} is invalid: give at least 0, per chip-hour")
    if batch_per_chip is not None and batch_per_chip < 1:
        raise UsageError(f"--batch-per-chip {batch_per_chip} is invalid: give at least 1")
    if batch_per_chip and batch_size is not None:
        raise UsageError(
            f"--batch-size {batch_size} and --batch-per-chip {batch_per_chip} both set the global "
            "batch: leave one of them out"
        )
    if sweep and largest_batch:
        raise UsageError(
            "--sweep does not search for the largest batch: leave --largest-batch out, or plan one "
            "slice without --sweep"
        )
    if sweep and batch_per_chip and micro_batch_size is not None:
        raise UsageError(
            "--sweep with --batch-per-chip plans batches without micro-batches: leave "
            "--micro-batch-size out, or give --batch-size in place of --batch-per-chip"
        )
    if compiles is not None and not sweep:
        raise UsageError("--compiles is for the rows of a sweep: leave it out, or add --sweep")
    experiment = load_config(config)
    console = Console(stderr=json)
    if not console.is_terminal:
        console = Console(stderr=json, width=132)
    if not sweep:
        for name, values in (("topology", topology), ("mesh", mesh), ("remat", remat)):
            if len(values) > 1:
                raise UsageError(
                    f"--{name} has several values, {' '.join(values)}: give one, or add --sweep"
                )
    given = {"batch_size": batch_size, "micro_batch_size": micro_batch_size, "scan": scan}
    changes: dict[str, Any] = {n: value for n, value in given.items() if value is not None}
    if batch_per_chip is not None and not sweep:
        changes["batch_size"] = batch_per_chip * parse_topology(topology[0]).chips
    if remat and not sweep:
        changes["remat"] = remat[0]
    experiment = dataclasses.replace(experiment, **changes)
    if sweep and experiment.phases:
        raise UsageError("--sweep compares runs of one phase: plan this config without --sweep")
    if sweep:
        chosen: dict[str, Any] = {"remats": remat} if remat else {}
        if compiles is not None:
            chosen["compiles"] = compiles
        plans = compare(
            experiment,
            topology,
            mesh,
            **chosen,
            batch_per_chip=batch_per_chip,
            calibration=calibration,
            report=print_status,
        )
        show_sweep(plans, console, price)
        results = [p.to_dict(price) for p in plans]
    else:
        of_mesh = mesh[0] if mesh else None
        sizes = {"largest": largest_batch, "calibration": calibration}
        parts = phases.phase_experiments(experiment) if experiment.phases else [experiment]
        plans = [make(part, topology[0], of_mesh, **sizes) for part in parts]
        if experiment.phases:
            phases.show_phases(experiment, plans, console, price)
            results = phases.to_dict(experiment, plans, price)
        else:
            show(plans[0], console, price)
            results = plans[0].to_dict(price)
    if json:
        print(jsonlib.dumps(results))
