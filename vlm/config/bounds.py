"""What a size in a config may be and which fit together, checked before anything is built."""

import dataclasses
import math
from typing import Any

from vlm.errors import ConfigError

# Far beyond every published model, and small enough that nothing made from them fills a machine.
_LARGEST = {
    "depth": 1_000,
    "depths": 1_000,
    "image_size": 16_384,
    "patch_size": 16_384,
    "vocab_size": 2**24,
    "pad_id": 2**24,
    "bos_id": 2**24,
    "eos_id": 2**24,
    "end_id": 2**24,
    "fill": 255,
    "background": 255,
}
_LARGEST_OTHER = 2**18
# Those that may be 0, wherever they stand or in one class.
_FROM_ZERO = {
    "depth", "depths", "mlp_dim", "rotary", "registers", "pad_id", "bos_id", "eos_id", "end_id",
    "fill", "background", "FastViTStage.heads", "FastViTStage.squeeze",
}  # fmt: skip
_POSITIVE = {"norm_eps", "init_scale", "std"}
_SHARES = {"dropout", "patch_dropout"}


def check_bounds(config: Any) -> None:
    """Refuse a number of a config that no model has: too large, negative, not finite.

    Raises:
        ConfigError: it names the class, the field and the value.
    """
    for field in dataclasses.fields(config):
        value, where = getattr(config, field.name), f"{type(config).__name__}.{field.name}"
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, bool):
                continue
            if isinstance(one, int):
                _check_whole(one, field.name, where)
            elif isinstance(one, float):
                _check_real(one, field.name, where)


def _check_whole(value: int, name: str, where: str) -> None:
    low = int(name not in _FROM_ZERO and where not in _FROM_ZERO)
    high = _LARGEST.get(name, _LARGEST_OTHER)
    if not low <= value <= high:
        raise ConfigError(f"{where} is {value}: choose a number from {low} to {high:,}")


def _check_real(value: float, name: str, where: str) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"{where} is {value}: choose a finite number")
    if name in _POSITIVE and value <= 0:
        raise ConfigError(f"{where} is {value}: choose a number greater than 0")
    if name in _SHARES and not 0 <= value < 1:
        raise ConfigError(f"{where} is {value}: choose a share from 0 to below 1")


def check_heads(tower) -> None:
    """Refuse a width that the heads do not divide."""
    if tower.width % tower.heads:
        raise ConfigError(
            f"{type(tower).__name__}.width {tower.width} is not a multiple of heads "
            f"{tower.heads}: choose a width that the heads divide"
        )


def check_image_size(tower) -> None:
    """Refuse an image smaller than a patch."""
    if tower.image_size < tower.patch_size:
        raise ConfigError(
            f"image_size {tower.image_size} holds no patch of patch_size {tower.patch_size}: "
            "choose an image size that the patches tile"
        )


def check_projection(tower, embed_dim: int) -> None:
    """Refuse a tower without a projection whose width is not `embed_dim`."""
    if tower.projection == "none" and tower.width != embed_dim:
        raise ConfigError(
            f"{type(tower).__name__} has no projection, so its width {tower.width} must equal "
            f'embed_dim {embed_dim}: set projection="linear" or make them equal'
        )
