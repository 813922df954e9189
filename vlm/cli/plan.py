"""`vlm plan`: what a slice of chips will do with a config, before it is rented."""

import dataclasses
import json as jsonlib
import os
from typing import Any

from vlm.cli import parse
from vlm.cli.terminal import print_status
from vlm.config import RematPolicy, load_config


def main(args: list[str]) -> None:
    parse.call(plan, "vlm plan", args)


def plan(
    config: str,
    /,
    topology: tuple[str, ...] = ("v5e:16x16",),
    mesh: tuple[str, ...] = (),
    batch_size: int | None = None,
    micro_batch_size: int | None = None,
    batch_per_chip: int | None = None,
    remat: tuple[RematPolicy, ...] = (),
    unroll: bool = False,
    largest_batch: bool = False,
    sweep: bool = False,
    compiles: int = 4,
    calibration: str | None = None,
    price: float | None = None,
    json: bool = False,
) -> None:
    """Compile the training step of a config for chips that are not here, and say what it takes.

    Memory, communication and operations are read from the compiled program; times are ranges, from
    what such steps reached on such chips elsewhere. TPU slices need the extra `tpu`; GPUs are
    estimated analytically (no compilation).

    Examples:
      vlm plan configs/siglip_b16.py --topology v5e:16x16
      vlm plan configs/siglip_b16.py --topology v5p:4x4x4 --mesh data=8,fsdp=8 --largest-batch
      vlm plan configs/siglip_b16.py --sweep --topology v5e:4x4 v6e:4x4 h100:8 --batch-per-chip 256

      vlm plan configs/siglip_b16.py --topology 2xv5e:16x16 --price 1.2

    Args:
        config: a config file, such as configs/siglip_b16.py, or a run's config.json.
        topology: a slice: v3, v4, v5e, v5p, v6e or tpu7x and its shape, after the number of slices
            if there are several; a100, a100-40, h100, h100-pcie, h200, gh200, b200, l4 or l40s and
            their number; cpu and its number of devices. Several with --sweep.
        mesh: such as data=32,fsdp=8; the config's own where not given. Several with --sweep.
        batch_size: the global batch, in place of the config's.
        micro_batch_size: in place of the config's.
        batch_per_chip: the global batch as so many pairs on each chip.
        remat: what blocks compute again, in place of the config's. Several with --sweep.
        unroll: one program for every block in place of a loop over them: minutes to compile.
        largest_batch: also look for the largest batch that fits; some more compilations.
        sweep: compare all combinations in one table.
        compiles: number of the best rows of a sweep to compile; the others are estimated
            analytically.
        calibration: a file of steps measured on this kind of chip, by vlm bench train --save FILE.
        price: of one chip for an hour, to say what the run costs.
        json: print the plan as JSON, and the table on stderr.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: leave devices alone
    from rich.console import Console

    from vlm.planning import plan as make
    from vlm.planning import sweep as compare
    from vlm.planning.report import show, show_sweep
    from vlm.planning.topology import parse_topology

    if price is not None and not 0 <= price < float("inf"):
        raise parse.UsageError(f"--price {price} is invalid: give at least 0, per chip-hour")
    experiment = load_config(config)
    console = Console(stderr=json)
    if not console.is_terminal:
        console = Console(stderr=json, width=132)
    if not sweep:
        for name, values in (("topology", topology), ("mesh", mesh), ("remat", remat)):
            if len(values) > 1:
                raise parse.UsageError(
                    f"--{name} {' '.join(values)} are several: give one, or compare with --sweep"
                )
    sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size}
    changes: dict[str, Any] = {n: size for n, size in sizes.items() if size is not None}
    if batch_per_chip and not sweep:
        changes["batch_size"] = batch_per_chip * parse_topology(topology[0]).chips
    if remat and not sweep:
        changes["remat"] = remat[0]
    if unroll:
        changes["scan"] = False
    experiment = dataclasses.replace(experiment, **changes)
    if sweep:
        plans = compare(
            experiment,
            topology,
            mesh,
            **({"remats": remat} if remat else {}),
            compiles=compiles,
            batch_per_chip=batch_per_chip,
            calibration=calibration,
            report=print_status,
        )
        show_sweep(plans, console)
        found = [p.to_dict(price) for p in plans]
    else:
        made = make(
            experiment,
            topology[0],
            mesh[0] if mesh else None,
            largest=largest_batch,
            calibration=calibration,
        )
        show(made, console, price)
        found = made.to_dict(price)
    if json:
        print(jsonlib.dumps(found))
