"""Range and consistency checks for config fields."""

from typing import Any, NamedTuple

from vlm.config.code import JAX_NN, Code
from vlm.errors import ConfigError, brief


class Bounds(NamedTuple):
    """Range of a numeric field; open ends are excluded."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, int | float)
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        if self.open_low and self.open_high:
            return f"above {self.low:,} and below {self.high:,}"
        if self.open_low:
            return f"above {self.low:,} and at most {self.high:,}"
        return f"from {self.low:,} to {'below ' if self.open_high else ''}{self.high:,}"


def _by_field(groups: dict[Bounds, tuple[str, ...]]) -> dict[str, Bounds]:
    return {field: bounds for bounds, fields in groups.items() for field in fields}


# By field or by "Class.field". The limits are far beyond every published model, and small enough
# that no allocation exhausts memory. Counts of steps and rows are int32 in the state of a run.
_SIZE = Bounds(1, 2**18)  # any other integer
_INTEGERS = _by_field(
    {
        Bounds(0, 2**18): (
            "mlp_dim", "registers", "rotary", "rank", "groups", "FastViTStage.heads",
            "FastViTStage.squeeze", "head_width",
        ),
        Bounds(0, 1_000): ("depth", "head_depth"),
        Bounds(1, 1_000): ("EfficientNetStage.depth", "depths", "conv_depths"),
        Bounds(1, 127): ("EfficientNetStage.kernel",),
        Bounds(1, 1_024): ("chunks",),
        Bounds(1, 16_384): (
            "image_size", "init_image_size", "resolution_schedule", "patch_size", "short_side",
        ),
        Bounds(0, 255): ("pad_value", "background"),
        Bounds(1, 2**24): ("vocab_size",),
        Bounds(0, 2**24): ("pad_id", "bos_id", "eos_id", "end_id", "zeroed_id"),
        Bounds(0, 30): ("randaugment",),
        Bounds(0, 4_096): ("workers", "prefetch"),
        Bounds(1, 2**31 - 1): (
            "steps", "batch_size", "micro_batch_size", "log_every", "keep_checkpoints", "profile",
            "shuffle", "max_bad_in_a_row", "max_skipped_in_a_row", "timescale", "step",
            "LocalCheckpointConfig.every",
        ),
        Bounds(0, 2**31 - 1): ("seed",),
        Bounds(1, 2**53): ("examples",),
        Bounds(-(2**63), 2**63): ("options",),
        Bounds(-1, 2**20): ("MeshConfig.data", "MeshConfig.fsdp", "MeshConfig.tensor"),
    }
)  # fmt: skip
_FLOAT = Bounds(-1e9, 1e9)  # any other number
_FLOATS = _by_field(
    {
        Bounds(0, 1): (
            "mean", "jitter", "grey", "blur", "solarise", "morphology", "max_bad_share", "cooldown",
            "eval_every", "max_skipped",
        ),
        Bounds(0, 1, open_low=True): (
            "norm_eps", "mlp_norm_eps", "EfficientNetConfig.squeeze", "crop", "layer_decay",
            "resolution_schedule", "checkpoint_every",
        ),
        Bounds(0, 1, open_high=True): (
            "dropout", "patch_dropout", "text_masking", "hold_out", "warmup", "b1", "b2", "ema",
        ),
        Bounds(0, 1, open_low=True, open_high=True): ("fraction",),
        Bounds(0, 0.5): ("hue",),
        Bounds(0, 0.99): ("filter_ratio",),
        Bounds(0, 1_000): (
            "learning_rate", "end_learning_rate", "vision_rate", "text_rate", "weight_decay",
            "l2_sp",
        ),
        Bounds(0, 1_000, open_low=True): ("std", "aspect"),
        Bounds(0, 1e9): ("alpha", "weight", "caption_weights", "task", "relations", "features"),
        Bounds(0, 1e9, open_low=True): (
            "init_scale", "epochs", "temperature", "mixture_temperature", "eps", "clip_norm",
            "max_scale", "seconds", "checkpoint_minutes", "keep_hours", "rotary_base",
            "rotary_bases", "softcap", "threshold",
        ),
        Bounds(-1e300, 1e300): ("at_least", "at_most", "options"),
    }
)  # fmt: skip


def bounds_of(cls: str, name: str, kind: type) -> Bounds:
    """Return the range of a number of type `kind` in the field `name` of the class `cls`."""
    table, default = (_INTEGERS, _SIZE) if issubclass(kind, int) else (_FLOATS, _FLOAT)
    return table.get(f"{cls}.{name}") or table.get(name, default)


def check_bounds(cls: str, name: str, value: Any, where: str) -> None:
    """Check the numbers in the field `name` of the class `cls`, also those in a tuple.

    Raises:
        ConfigError: it names `where`, the value and the bounds.
    """
    if isinstance(value, tuple):
        for part in value:
            check_bounds(cls, name, part, where)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        bounds = bounds_of(cls, name, type(value))
        if value not in bounds:  # NaN is outside all bounds
            raise ConfigError(f"{where} is {brief(value)}: choose a number {bounds}")


def check_heads(tower) -> None:
    """Raise a ConfigError if the heads do not divide the width."""
    if tower.width % tower.heads:
        raise ConfigError(
            f"{type(tower).__name__}.width {tower.width} is not a multiple of heads "
            f"{tower.heads}: choose a width that the heads divide"
        )


def check_activation(tower) -> None:
    """Raise a ConfigError if the activation is code that a model folder may not name."""
    value = tower.activation
    if isinstance(value, Code) and not value.startswith(JAX_NN):
        raise ConfigError(
            f"{type(tower).__name__}.activation is {str(value)!r}: give one of its names, or a "
            "function of jax.nn; a tower of your own (VisionModuleConfig) takes any"
        )


def check_image_size(tower) -> None:
    """Raise a ConfigError if an image is smaller than a patch."""
    if tower.image_size < tower.patch_size:
        raise ConfigError(
            f"image_size {tower.image_size} holds no patch of patch_size {tower.patch_size}: "
            "choose an image size that the patches tile"
        )


# Attention pools of convolutional towers; their last layer projects to the shared space.
GRID_POOLS = ("attention", "rotary_attention")
POOL_HEAD = 64  # channels of a head of them


def check_grid_pool(tower) -> None:
    """Raise a ConfigError if the heads of an attention pool do not divide the tower's channels."""
    if tower.pool in GRID_POOLS and tower.width % POOL_HEAD:
        raise ConfigError(
            f"{type(tower).__name__} pools {tower.width} channels by attention, with heads of "
            f'{POOL_HEAD}: choose a multiple, or pool="mean"'
        )


def check_projection(tower, embed_dim: int) -> None:
    """Raise a ConfigError if a tower has no projection, and another width than `embed_dim`."""
    if getattr(tower, "pool", "mean") in GRID_POOLS:  # which project
        return
    width = getattr(tower, "pooled_width", tower.width)
    if getattr(tower, "projection", None) == "none" and width != embed_dim:
        raise ConfigError(
            f"{type(tower).__name__} has no projection, so its width {width} must equal "
            f'embed_dim {embed_dim}: set projection="linear" or make them equal'
        )
