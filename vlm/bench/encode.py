"""Benchmark of encoding: images and texts per second by batch size, relative to the peak."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console

from vlm import display
from vlm.bench.measure import product, times
from vlm.chips import published_rate
from vlm.config import ModelConfig
from vlm.models.dual_encoder import DualEncoder
from vlm.models.flops import encode_flops
from vlm.nn.transformer import Execution


def bench_encode(
    config: ModelConfig,
    *,
    name: str = "model",
    batch_sizes: Sequence[int] = (1, 8, 32),
    dtype: str = "float32",
    rounds: int = 3,
    trace: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure both towers on one device with random weights and inputs; print a table.

    Args:
        batch_sizes: of images and of texts.
        rounds: number of interleaved rounds. The figures are those of the best; the mean is what a
            server reaches on a machine with other work.
        trace: a folder for a device trace of the largest batch, by `jax.profiler`.

    Returns:
        the printed figures as JSON values: seconds, inputs and operations per second.

    Example:
        >>> from rich.console import Console
        >>> result = vlm.bench.bench_encode(
        ...     experiment.model, batch_sizes=(2,), rounds=1, console=Console(quiet=True)
        ... )
        >>> result["flops"]["image"] > 0
        True
    """
    device = jax.devices()[0]
    execution = Execution(dtype=jnp.dtype(dtype))
    model = DualEncoder(config, execution=execution, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    image = jax.jit(lambda state, x: nnx.merge(graph, state).encode_image(x))
    text = jax.jit(lambda state, x: nnx.merge(graph, state).encode_text(x))
    size, length = config.vision.image_size, config.text.context_length
    key = jax.random.key(0)
    runs = {}
    for n in batch_sizes:
        pixels = jax.random.normal(key, (n, size, size, 3))
        tokens = jax.random.randint(key, (n, length), 0, config.text.vocab_size)
        runs["image", n] = lambda x=pixels: image(state, x)
        runs["text", n] = lambda x=tokens: text(state, x)
    multiply, product_flops = product(dtype, [device])
    seconds = times({**runs, "product": multiply}, rounds)
    if trace:
        with jax.profiler.trace(trace):
            jax.block_until_ready(runs["image", max(batch_sizes)]())
    rate = product_flops / min(seconds.pop("product"))
    peak = published_rate([device])
    flops = dict(zip(("image", "text"), encode_flops(config), strict=True))
    rows = []
    for (tower, n), found in seconds.items():
        time, mean = min(found), sum(found) / len(found)
        done = n * flops[tower] / time
        rows.append(
            {
                "tower": tower,
                "batch_size": n,
                "seconds": time,
                "mean_seconds": mean,
                "per_second": n / time,
                "mean_per_second": n / mean,
                "flops_per_second": done,
                "of_products": done / rate,
                "of_peak": done / peak if peak else None,
            }
        )
    result = {
        "name": name,
        "device": device.device_kind,
        "dtype": dtype,
        "flops": flops,
        "product_flops_per_second": rate,
        "rows": rows,
    }
    _print(result, console or Console())
    return result


def _print(result, console):
    console.print(
        f"[bold]{result['name']}[/] on {result['device']}, {result['dtype']}: "
        f"{result['flops']['image'] / 1e9:,.2f} GFLOP an image, "
        f"{result['flops']['text'] / 1e9:,.2f} a text; large products at "
        f"{result['product_flops_per_second'] / 1e9:,.0f} GFLOP/s",
        highlight=False,
    )
    rates = ("per second", "mean", "GFLOP/s", "of products", "of the peak")
    table = display.number_table("tower", "batch", "time", *rates)
    for row in result["rows"]:
        table.add_row(
            row["tower"],
            f"{row['batch_size']:,}",
            f"{1e3 * row['seconds']:.3g} ms",
            f"{row['per_second']:,.1f}",
            f"{row['mean_per_second']:,.1f}",
            f"{row['flops_per_second'] / 1e9:,.0f}",
            f"{row['of_products']:.0%}",
            "" if row["of_peak"] is None else f"{row['of_peak']:.1%}",
        )
    console.print(table)
