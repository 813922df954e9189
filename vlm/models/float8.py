"""Models whose blocks compute in float8, and the devices that can."""

from typing import Any, TypeVar, cast

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from vlm.errors import ConfigError
from vlm.models.adapters import linear_layers
from vlm.nn.cuda_attention import compute_capability
from vlm.nn.fsdp import maps_batch

MIN_CAPABILITY = 8.9  # compute capability of Ada; Hopper's is 9.0
Model = TypeVar("Model", bound=nnx.Module)


def in_float8(model: Model) -> Model:
    """Make the linear layers of the towers' blocks compute in float8, in training.

    First and last layers, norms, attention and LoRA's factors stay in the type of the model.

    Raises:
        ConfigError: the towers have no such layer.
    """
    layers = {n: layer for n, layer in linear_layers(model).items() if "blocks" in n.split(".")}
    if not layers:
        raise ConfigError(
            "matmul_dtype 'float8' is for linear layers in a tower's blocks, and this model has "
            "none: leave it out"
        )
    for layer in layers.values():
        cast(Any, layer).float8 = True  # read by vlm.nn.layers.linear
    return model


def check_float8(mesh: Mesh | AbstractMesh) -> str:
    """Return how the devices of a mesh compute float8, for a log.

    Raises:
        ConfigError: they would only emulate it, slower than bfloat16; on a CPU this is allowed.
    """
    kind = jax.devices()[0].device_kind
    scales = ""
    if mesh.size > 1 and not maps_batch(mesh):
        scales = (
            "; with tensor the devices exchange the largest element of each array before "
            "its product, which is slower than without tensor"
        )
    if compute_capability() >= MIN_CAPABILITY:
        return f"the blocks' products in float8 by {kind}{scales}"
    if jax.default_backend() == "cpu":
        return f"the blocks' products in float8, emulated: slower on a CPU than without{scales}"
    raise ConfigError(
        f"matmul_dtype 'float8' needs an NVIDIA GPU from Ada or Hopper on, and {kind} would "
        "emulate it: leave it out"
    )
