"""Benchmark of the training step: its time, the time of its parts, and MFU.

Model FLOPs are an analytic estimate (vlm/models/flops.py). They are compared with the published
peak of the chip and with the GEMM throughput measured in the same rounds.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from vlm import display
from vlm._version import __version__
from vlm.bench.measure import best_times, peak_bytes, product, resident_peak
from vlm.chips import CHIPS, published_rate
from vlm.config import Experiment
from vlm.errors import ConfigError
from vlm.inputs.preprocess import Preprocess
from vlm.losses import contrastive_loss
from vlm.models.flops import step_flops
from vlm.planning import plan
from vlm.planning.calibration import (
    Measurement,
    calibration_of,
    read_measurements,
    save_measurement,
)
from vlm.planning.compile import on_platform, peak_of, read_step, state_bytes
from vlm.planning.roofline import compiled_roofline
from vlm.planning.topology import Topology, local_topology
from vlm.sharding import check_batch, global_batch, make_mesh
from vlm.training.objectives import check_pairs_alone
from vlm.training.step import Trainer, compute_dtype


def bench_train(
    experiment: Experiment,
    *,
    rounds: int = 3,
    trace: str | None = None,
    save: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure the training step and its parts on random data; print a table.

    Parts are measured separately and need not add up, since XLA fuses and overlaps them.

    Args:
        rounds: number of interleaved rounds; the best counts.
        trace: a folder for a device trace of one step, by `jax.profiler`.
        save: a file to add the step's time to, for `vlm plan --calibration`.

    Returns:
        the printed figures as JSON values: seconds, bytes, operations per second.

    Raises:
        ConfigError: an objective other than the contrastive loss; `save` on a device without
            published figures, or to a file with other content.
        ShardingError: the mesh does not fit the devices, or the batch the mesh.

    Example:
        >>> from rich.console import Console
        >>> result = vlm.bench.bench_train(experiment, rounds=1, console=Console(quiet=True))
        >>> result["batch_size"]
        8
    """
    e = experiment
    check_pairs_alone(e, "vlm bench train")
    mesh = make_mesh(e.mesh)
    check_batch(e.batch_size, mesh)
    check_batch(e.micro_batch_size or e.batch_size, mesh, "micro_batch_size")
    devices = list(mesh.devices.flat)
    topology = local_topology(devices)
    if save and topology is None:
        raise ConfigError(
            f"--save {save} is for vlm plan, which has no published figures of a "
            f"{devices[0].device_kind}: measure on one of {', '.join(CHIPS)}"
        )
    if save and Path(save).exists():
        read_measurements(save)
    trainer = Trainer(e, mesh)
    batch = global_batch(random_batch(e), mesh)
    compiled = trainer.step.lower(trainer.abstract_state, batch).compile()
    on_cpu = devices[0].platform == "cpu"
    resident = step_resident_peak(trainer, compiled, batch) if on_cpu else None
    holder = {"state": trainer.init(jnp.int32(1000))}

    def step():
        holder["state"], metrics = compiled(holder["state"], batch)
        return metrics

    z = trainer.embed_texts(holder["state"], batch["tokens"])
    scale, bias = jnp.float32(2.0), jnp.float32(-10.0)
    loss = jax.jit(
        jax.grad(
            lambda *inputs: contrastive_loss(*inputs, kind=e.model.loss, mesh=mesh),
            argnums=(0, 1, 2, 3),
        )
    )
    dtype = str(compute_dtype(e.dtype))
    multiply, product_flops = product(dtype, devices)
    runs = {
        "step": step,
        "images, forward": lambda: trainer.embed_images(holder["state"], batch["images"]),
        "texts, forward": lambda: trainer.embed_texts(holder["state"], batch["tokens"]),
        "loss and its gradients": lambda: loss(z, z, scale, bias),
        "product": multiply,
    }
    seconds = best_times(runs, rounds)
    if trace:
        with jax.profiler.trace(trace):
            jax.block_until_ready(step())
    measured_rate = product_flops / seconds.pop("product")
    parts = step_flops(e)
    model = sum(p.model for p in parts.values())
    peak, step_seconds = published_rate(devices), seconds["step"]
    result = {
        "name": e.name,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "batch_size": e.batch_size,
        "dtype": dtype,
        "remat": e.remat,
        "seconds": seconds,
        "pairs_per_second": e.batch_size / step_seconds,
        "model_flops": model,
        "executed_flops": sum(p.executed for p in parts.values()),
        "model_flops_per_second": model / step_seconds,
        "mfu": model / step_seconds / peak if peak else None,
        "product_flops_per_second": measured_rate,
        "of_products": model / step_seconds / measured_rate,
        "planned_peak_bytes": peak_of(compiled),
        "measured_peak_bytes": resident or peak_bytes(devices[0]),
    }
    if save and topology is not None:
        result["predicted_seconds"] = predicted_seconds(trainer, compiled, topology)
        measurement = Measurement(
            chip=topology.rated_chip.name,
            name=e.name,
            devices=len(devices),
            batch_size=e.batch_size,
            remat=e.remat,
            measured=step_seconds,
            predicted=result["predicted_seconds"],
            versions={"jax": jax.__version__, "vlm": __version__},
        )
        save_measurement(save, measurement)
    _print(result, console or Console())
    return result


def predicted_seconds(trainer: Trainer, compiled: Any, topology: Topology) -> float:
    """Midpoint of the planned time range of a compiled step, without calibration."""
    chip = topology.rated_chip
    e = on_platform(trainer.experiment, chip.platform)
    calibration = calibration_of(chip.name)
    if chip.platform == "tpu":
        step = read_step(compiled, trainer, 0.0)
        state = state_bytes(trainer.abstract_state, trainer.mesh, e.model.partition)
        return compiled_roofline(e, topology, state, step).predicted(calibration).middle
    expected = plan(e, topology, compiled=False, loss=False).step_seconds
    assert expected is not None  # a chip with published figures
    return expected.middle


def step_resident_peak(trainer: Trainer, compiled: Any, batch: dict[str, jax.Array]) -> int | None:
    """Peak resident bytes of a step per CPU device; None where it cannot be measured."""

    def two_steps():
        state = trainer.init(jnp.int32(1000))
        for _ in range(2):
            state, _metrics = jax.block_until_ready(compiled(state, batch))

    peak = resident_peak(two_steps)
    if peak is None:
        return None
    local = len(trainer.mesh.local_devices or ())
    batch_bytes = sum(x.nbytes for x in jax.tree.leaves(batch))
    return (peak + batch_bytes // jax.process_count()) // local


def random_batch(e: Experiment) -> dict[str, Any]:
    rng, text, prepare = np.random.default_rng(0), e.model.text, Preprocess(e.preprocess)
    rows = e.batch_size // jax.process_count()
    images = prepare.blank(rows)
    shape = prepare.pixels(np.zeros((3, 4, 3), np.uint8)).shape
    for row in range(rows):
        prepare.put(images, row, rng.integers(0, 256, shape, np.uint8))
    return {
        "images": images,
        "tokens": rng.integers(0, text.vocab_size, (rows, text.context_length), np.int32),
    }


def _print(result, console):
    step = result["seconds"]["step"]
    console.print(
        f"[bold]{result['name']}[/] on {result['devices']} x {result['device']}: batch "
        f"{result['batch_size']:,}, {result['dtype']}, remat {result['remat']}",
        highlight=False,
    )
    table = display.number_table("part", "time", "of the step")
    for name, seconds in result["seconds"].items():
        table.add_row(name, f"{seconds:.3g} s", f"{seconds / step:.0%}")
    console.print(table)
    rates = f"{result['pairs_per_second']:,.1f} pairs/s, "
    rates += f"{result['model_flops_per_second'] / 1e12:,.2f} model TFLOP/s"
    if result["mfu"] is not None:
        rates += f", MFU {result['mfu']:.1%}"
    rates += f"; {result['of_products']:.0%} of the measured GEMM throughput"
    console.print(rates, highlight=False)
    planned, measured = result["planned_peak_bytes"], result["measured_peak_bytes"]
    memory = f"memory of a device: {planned / 2**30:,.2f} GiB planned by the compiler"
    if measured is not None:
        memory += f", {measured / 2**30:,.2f} GiB measured ({planned / measured:.0%})"
    console.print(memory, highlight=False)
