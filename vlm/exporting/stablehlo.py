"""StableHLO by `jax.export`, which JAX runs on CPUs, GPUs and TPUs."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath

from vlm.exporting.programs import ExportProgram

BFLOAT16 = "bfloat16"  # compute type of bfloat16 parameters
PLATFORMS = ("cpu", "cuda", "tpu")
BATCHES = (1, 2, 7, 33)  # to verify; each is compiled

USE = """\
import jax
{program} = jax.export.deserialize(open("{program}.stablehlo", "rb").read())
{output} = {program}.call({input})"""


def write(program: ExportProgram, folder: epath.Path) -> None:
    """Write `NAME.stablehlo`, for any batch size on any of `PLATFORMS`."""
    (batch,) = jax.export.symbolic_shape("batch")
    rows = jax.ShapeDtypeStruct((batch, *program.row), program.dtype)
    exported = jax.export.export(jax.jit(program.function), platforms=PLATFORMS)(rows)
    (folder / f"{program.name}.stablehlo").write_bytes(bytes(exported.serialize()))


def opened(program: ExportProgram, folder: epath.Path) -> Callable[[np.ndarray], np.ndarray]:
    """Load the file as a function of a batch."""
    data = (folder / f"{program.name}.stablehlo").read_bytes()
    exported = jax.export.deserialize(bytearray(data))

    def call(rows: np.ndarray) -> np.ndarray:
        # Each batch size is another program that holds all parameters: keep it for one call only.
        with _without_compilation_cache():
            return np.asarray(jax.jit(exported.call).lower(rows).compile()(rows))

    return call


@contextlib.contextmanager
def _without_compilation_cache() -> Iterator[None]:
    """Keep programs that are compiled inside out of the compilation cache on disk."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)
