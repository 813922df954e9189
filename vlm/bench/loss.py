"""Benchmark of the contrastive losses: errors, memory, and time relative to GEMM throughput.

The loss with its backward pass takes 8 B^2 d FLOPs if logits are not stored: twice the logits
(2 B^2 d each) and one product for each embedding's gradient. Divided by the GEMM throughput of
this machine, measured in the same rounds, that is the reference bound. (The sigmoid loss computes
its logits once, so it can beat the bound.)
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from vlm import display
from vlm.bench.measure import best_times, product
from vlm.errors import ShardingError
from vlm.losses import contrastive_loss, sigmoid_loss, softmax_loss

DENSE = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}
DENSE_LIMIT = 2**31  # bytes of a B x B matrix; larger dense losses are skipped
CHECKED_BATCH = 2048  # batch for the errors, small enough for a float64 reference


def bench_loss(
    batch_size: int = 16_384,
    embed_dim: int = 512,
    *,
    kinds: Sequence[Literal["softmax", "sigmoid"]] = ("softmax", "sigmoid"),
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    tile: int | None = None,
    dense: bool = True,
    devices: Sequence[Any] | None = None,
    rounds: int = 5,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure the tiled losses and their gradients against dense losses; print a table.

    Times are the best of `rounds` interleaved rounds, after warm-up. Memory is the compiler's
    temporary allocation per device. Errors are relative to the dense loss in float64.

    Args:
        batch_size, embed_dim: B pairs over all devices, and d.
        dtype: of the embeddings; auto is float32 on a CPU and bfloat16 elsewhere.
        dense: also measure the dense loss if its B x B matrix is under 2 GiB.
        devices: all of JAX's devices unless given.

    Returns:
        the printed figures as JSON values: seconds, bytes, operations per second.

    Raises:
        ShardingError: the devices do not divide the batch.

    Example:
        >>> from rich.console import Console
        >>> quiet = Console(quiet=True)
        >>> result = vlm.bench.bench_loss(64, 16, kinds=("softmax",), rounds=1, console=quiet)
        >>> result["batch_size"]
        64
    """
    devices = list(devices or jax.devices())
    if batch_size % len(devices):
        raise ShardingError(
            f"a batch of {batch_size} does not divide over {len(devices)} devices: choose a "
            f"multiple of {len(devices)}"
        )
    if dtype == "auto":
        dtype = "float32" if devices[0].platform == "cpu" else "bfloat16"
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    inputs = _place(_inputs(batch_size, embed_dim, dtype), mesh)

    runs, memory = {}, {}
    for kind in kinds:
        forms = {"tiles": _in_tiles(kind, mesh, tile)}
        if dense and 4 * batch_size**2 <= DENSE_LIMIT:
            forms["dense"] = DENSE[kind]
        for form, loss in forms.items():
            compiled = _with_gradients(loss).lower(*inputs).compile()
            runs[kind, form] = lambda run=compiled: run(*inputs)
            analysis: Any = compiled.memory_analysis()
            memory[kind, form] = analysis.temp_size_in_bytes
    multiply, product_flops = product(dtype, devices)
    seconds = best_times({"product": multiply, **runs}, rounds)
    rate = product_flops / seconds.pop("product")
    floor = 8 * batch_size**2 * embed_dim / rate

    result = {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "batch_size": batch_size,
        "embed_dim": embed_dim,
        "dtype": dtype,
        "product_flops_per_second": rate,
        "floor_seconds": floor,
        "losses": [
            {
                "loss": kind,
                "form": form,
                "seconds": seconds[kind, form],
                "times_floor": seconds[kind, form] / floor,
                "temporary_bytes": memory[kind, form],
            }
            for kind, form in runs
        ],
    }
    checked = max(len(devices), min(batch_size, CHECKED_BATCH) // len(devices) * len(devices))
    result["checked_batch_size"] = checked
    result["errors"] = {k: _errors(k, mesh, tile, checked, embed_dim, dtype) for k in kinds}
    _print(result, console or Console())
    return result


def _inputs(batch_size, embed_dim, dtype) -> tuple:
    """Unit-norm embeddings with similar pairs; scale and bias as early in training."""
    image, noise = jax.random.normal(jax.random.key(0), (2, batch_size, embed_dim))
    pairs = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (image, image + 3 * noise))
    return *(x.astype(dtype) for x in pairs), jnp.log(20.0), jnp.float32(-10.0)


def _place(inputs, mesh):
    rows, number = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    return jax.device_put(inputs, (rows, rows, number, number))


def _in_tiles(kind, mesh, tile) -> Callable:
    return lambda *inputs: contrastive_loss(*inputs, kind=kind, mesh=mesh, tile=tile)


def _with_gradients(loss):
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))


def _errors(kind, mesh, tile, batch_size, embed_dim, dtype) -> dict[str, float]:
    """Relative errors, in Euclidean norm, of the loss and of the gradient of each input."""
    inputs = _inputs(batch_size, embed_dim, dtype)
    run = _with_gradients(_in_tiles(kind, mesh, tile))
    value, gradients = run(*_place(inputs, mesh))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        exact = [jnp.asarray(np.asarray(x, np.float64)) for x in inputs]
        true_value, true_gradients = _with_gradients(DENSE[kind])(*exact)
    names = ("value", "z_image", "z_text", "logit_scale", "logit_bias")
    pairs = zip(names, (value, *gradients), (true_value, *true_gradients), strict=True)
    errors = {}
    for name, ours, true in pairs:
        ours, true = np.asarray(ours, np.float64), np.asarray(true)
        size = np.linalg.norm(true)
        # The softmax loss is invariant to the bias: its true gradient is zero up to rounding.
        errors[name] = float(np.linalg.norm(ours - true) / (size if size > 1e-12 else 1.0))
    return errors


def _print(result, console):
    console.print(
        f"[bold]Contrastive loss and gradients[/] on {result['devices']} x {result['device']}: "
        f"batch {result['batch_size']:,}, width {result['embed_dim']}, {result['dtype']}; "
        f"GEMM at {result['product_flops_per_second'] / 1e9:,.0f} GFLOP/s, "
        f"bound {result['floor_seconds']:.3g} s"
    )
    names = ("loss", "form", "time", "x bound", "temporaries / device")
    table = display.number_table(*names, text=2)
    for row in result["losses"]:
        table.add_row(
            row["loss"],
            row["form"],
            f"{row['seconds']:.3g} s",
            f"{row['times_floor']:.2f}",
            f"{row['temporary_bytes'] / 1e6:,.0f} MB",
        )
    console.print(table)
    errors = display.number_table("loss", *next(iter(result["errors"].values())))
    errors.title = f"relative error against float64 at batch {result['checked_batch_size']:,}"
    for kind, values in result["errors"].items():
        errors.add_row(kind, *(f"{value:.1e}" for value in values.values()))
    console.print(errors)
