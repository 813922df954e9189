"""XLA options of a training step, by its devices."""

import functools
import os
import platform

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

# Gathers of parameters over `fsdp` run inside the products before them; v5e does so by default. On
# v5p the compiled step of a ViT-So400m then waits for 5% of the bytes that it gathers, not for all.
OVERLAPPED_GATHERS = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
}
# Matrix products by Eigen with oneDNN's kernels instead of YNNPACK's: 5 to 18% faster on an AMD
# EPYC for the shapes of ViTs, at hundreds of rows or more. YNNPACK keeps its other defaults.
PRODUCTS_BY_EIGEN = {
    "xla_cpu_experimental_ynn_fusion_type": ",".join(
        f"LIBRARY_FUSION_TYPE_{kind}" for kind in ("REDUCE", "INDIVIDUAL_CONVOLUTION")
    )
}


def compiler_options(mesh: Mesh | AbstractMesh, dtype: DTypeLike) -> dict[str, str]:
    """Return the `compiler_options` of `jax.jit` for a step with products of `dtype` on `mesh`.

    Options that the environment variable LIBTPU_INIT_ARGS names are left to it. On CPUs only
    float32 on x86 has any: the kernels are made for it.
    """
    device = "" if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0].platform
    if device == "tpu":
        given = os.environ.get("LIBTPU_INIT_ARGS", "")
        return {name: value for name, value in OVERLAPPED_GATHERS.items() if name not in given}
    has_kernels = platform.machine() in ("x86_64", "AMD64") and dtype == jnp.float32
    return dict(PRODUCTS_BY_EIGEN) if device == "cpu" and has_kernels and _accepted() else {}


@functools.cache
def _accepted() -> bool:
    """Whether this version of XLA has the options, which are experimental."""
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            jax.jit(lambda: 0, compiler_options=PRODUCTS_BY_EIGEN).lower().compile()
    except JaxRuntimeError:
        return False
    return True
