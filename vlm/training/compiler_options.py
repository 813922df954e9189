"""How a training step is compiled for its devices: options of XLA, and loops over blocks."""

import functools
import os
import platform

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from vlm.config import Experiment
from vlm.sharding import platform_of

# Gathers of parameters over `fsdp` run inside the products before them; v5e does so by default. On
# v5p the compiled step of a ViT-So400m then waits for 5% of the bytes that it gathers, not for all.
OVERLAPPED_GATHERS = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
}
# A step of a ViT-B/16 on v5p takes 10% less by the compiler's estimate if its blocks are unrolled,
# and up to twice as long to compile. Two cores did not compile bigG/14, of 48 and 32 blocks, in 14
# minutes.
DEEPEST_UNROLLED = 32
# Matrix products by Eigen with oneDNN's kernels instead of YNNPACK's: 5 to 18% faster on an AMD
# EPYC for the shapes of ViTs, at hundreds of rows or more. YNNPACK keeps its other defaults.
PRODUCTS_BY_EIGEN = {
    "xla_cpu_experimental_ynn_fusion_type": ",".join(
        f"LIBRARY_FUSION_TYPE_{kind}" for kind in ("REDUCE", "INDIVIDUAL_CONVOLUTION")
    )
}


def compiler_options(mesh: Mesh | AbstractMesh, dtype: DTypeLike) -> dict[str, str]:
    """Return the `compiler_options` of `jax.jit` for a step with products of `dtype` on `mesh`.

    Options that the environment variables LIBTPU_INIT_ARGS and XLA_FLAGS name are left to them. On
    CPUs only float32 on x86 has any: the kernels are made for it.
    """
    device = platform_of(mesh)
    options: dict[str, str] = {}
    if device == "tpu":
        options = OVERLAPPED_GATHERS
    elif device == "cpu" and platform.machine() in ("x86_64", "AMD64") and dtype == jnp.float32:
        options = PRODUCTS_BY_EIGEN
    given = os.environ.get("LIBTPU_INIT_ARGS", "") + os.environ.get("XLA_FLAGS", "")
    options = {name: value for name, value in options.items() if name not in given}
    return options if options and _accepted(device, tuple(options.items())) else {}


def scans_blocks(experiment: Experiment, platform: str) -> bool:
    """Whether the blocks of the towers are compiled as a loop: see `Experiment.scan`."""
    if experiment.scan is not None:
        return experiment.scan
    towers = (experiment.model.vision, experiment.model.text)
    depth = max(getattr(tower, "depth", 0) for tower in towers)
    return platform != "tpu" or depth > DEEPEST_UNROLLED


@functools.cache
def _accepted(kind: str, options: tuple[tuple[str, str], ...]) -> bool:
    """Whether XLA has these options, of which some are experimental; true for described devices."""
    if kind not in ("cpu", jax.default_backend()):
        return True
    try:
        with jax.default_device(jax.local_devices(backend=kind)[0]):
            jax.jit(lambda: 0, compiler_options=dict(options)).lower().compile()
    except JaxRuntimeError:
        return False
    return True
