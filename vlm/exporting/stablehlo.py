"""StableHLO by `jax.export`: a file that JAX alone opens, on a CPU, a GPU or a TPU."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath

from vlm.exporting.programs import Program

BFLOAT16 = "bfloat16"  # what bfloat16 parameters are computed with
PLATFORMS = ("cpu", "cuda", "tpu")
BATCHES = (1, 2, 7, 33)  # that are tried: each is compiled

USE = """\
import jax
{program} = jax.export.deserialize(open("{program}.stablehlo", "rb").read())
{output} = {program}.call({input})"""


def write(program: Program, folder: epath.Path) -> None:
    """Write `NAME.stablehlo`, whose batch may be of any size on any of `PLATFORMS`."""
    (batch,) = jax.export.symbolic_shape("batch")
    rows = jax.ShapeDtypeStruct((batch, *program.row), program.dtype)
    exported = jax.export.export(jax.jit(program.function), platforms=PLATFORMS)(rows)
    (folder / f"{program.name}.stablehlo").write_bytes(bytes(exported.serialize()))


def opened(program: Program, folder: epath.Path) -> Callable[[np.ndarray], np.ndarray]:
    """The file as a function of a batch."""
    data = (folder / f"{program.name}.stablehlo").read_bytes()
    exported = jax.export.deserialize(bytearray(data))

    def call(rows: np.ndarray) -> np.ndarray:
        # Each size of batch is another program with all parameters inside: it is held for one call.
        with _not_kept():
            return np.asarray(jax.jit(exported.call).lower(rows).compile()(rows))

    return call


@contextlib.contextmanager
def _not_kept() -> Iterator[None]:
    """What is compiled in here does not go to the cache of compiled programs on disk."""
    name = "jax_persistent_cache_min_compile_time_secs"
    least = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, least)
