"""Config of the optimizer: the update rule, its schedule and its safeguards."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from vlm.config.base import Config
from vlm.config.code import Code, ImportPath
from vlm.errors import ConfigError

T = TypeVar("T")
UNSET: Any = None  # default of `Resolved` fields


class Resolved(Generic[T]):
    """For type checkers: a field that accepts None, which `vlm.training.init_from.resolve` fills.

    It reads as non-optional, because all internal readers run after that.
    """

    def __get__(self, instance: object, owner: type) -> T: ...  # pyright: ignore

    def __set__(self, instance: object, value: T | None) -> None: ...


class Converted(Generic[T]):
    """For type checkers: a field that accepts any object, which the constructor converts to T."""

    def __get__(self, instance: object, owner: type) -> T: ...  # pyright: ignore

    def __set__(self, instance: object, value: Any) -> None: ...


@dataclass(frozen=True)
class OptimizerConfig(Config):
    """The update rule, its schedule and its safeguards.

    Args:
        name: The update rule. One of your own is an `optax.GradientTransformation` without learning
            rate, such as `optax.scale_by_adam()`, or a function that makes it.
        learning_rate: Peak learning rate. None: 1e-3, or for a run that starts from a model a
            rate by width and batch size.
        end_learning_rate: Learning rate at the end of the schedules cosine, rsqrt and wsd.
        schedule: Learning rate schedule after the warm-up. rsqrt: inverse square root of
            the step; wsd: constant, then decay. One of your own is a function of the fraction of
            the run that returns a factor of learning_rate.
        warmup: Fraction of the run in which the learning rate rises from 0. None: 0.05, or 0.1 for
            a run that starts from a model.
        timescale: For rsqrt: number of warm-up steps, in place of warmup. The learning rate then
            depends on the step and not on the length of the run until the cooldown begins, so that
            a run can be made longer without a jump. None: warmup.
        cooldown: Fraction of the run in which rsqrt and wsd decay at the end.
        weight_decay: Strength of weight decay. It applies to matrices, low-rank adapters included,
            and not to norms, biases, and the scale and bias of the logits.
        weight_decay_rule: Factor of weight_decay. open_clip: learning_rate, for every matrix, as in
            PyTorch and optax; big_vision: the schedule relative to its peak, for every kernel.
        l2_sp: Strength of decay of all weights towards their initial values (L2-SP,
            arXiv:1802.01483), in the units of weight_decay, which it replaces. 0: none.
        b1: Decay of the average of gradients.
        b2: Decay of the average of squared gradients; for Adafactor, its maximum.
        eps: Term that avoids division by zero.
        clip_norm: Maximum global norm of the gradient; a larger one is scaled down. None: no
            limit.
        layer_decay: Learning rate of a block relative to the next one (layer-wise decay).
        vision_rate: Learning rate of the vision tower relative to learning_rate.
        text_rate: Learning rate of the text tower relative to learning_rate.
        ema: Decay of the moving average (EMA) of the parameters, which is exported in place of the
            raw parameters. None: no EMA.
        max_scale: Maximum of the logit scale; CLIP's is 100. A scale that starts above it, as
            SigLIP's, may only decrease. None: no limit.
        on_nonfinite: Action at a loss or gradient that is not finite. stop: end the run; skip: skip
            the update.
        max_skipped_in_a_row: For on_nonfinite skip: stop the run when this many steps in a row are
            skipped.
        rates: Factors of the learning rate by regular expressions of parameter names, such as
            {"vision/.*": 0.1}. The first that matches a whole name applies.
        decays: Factors of weight_decay, as in rates. They apply to norms and biases too.
        transformation: A whole optimizer of your own in place of name, schedule, rates, clipping
            and decay: an `optax.GradientTransformation` such as `optax.adamw(1e-3)`, or a function
            that makes it. None: the fields above.

    Example:
        >>> vlm.OptimizerConfig(name="lion", learning_rate=3e-4).schedule
        'cosine'
    """

    name: Literal["adamw", "lion", "adafactor", "muon"] | ImportPath = "adamw"
    if TYPE_CHECKING:
        learning_rate: Resolved[float] = UNSET
        warmup: Resolved[float] = UNSET
    else:
        learning_rate: float | None = None
        warmup: float | None = None
    end_learning_rate: float = 0.0
    schedule: Literal["cosine", "rsqrt", "wsd", "constant"] | ImportPath = "cosine"
    timescale: int | None = None
    cooldown: float = 0.2
    weight_decay: float = 0.1
    weight_decay_rule: Literal["open_clip", "big_vision"] = "open_clip"
    l2_sp: float = 0.0
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    clip_norm: float | None = 1.0
    layer_decay: float = 1.0
    vision_rate: float = 1.0
    text_rate: float = 1.0
    ema: float | None = None
    max_scale: float | None = 100.0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped_in_a_row: int = 25
    if TYPE_CHECKING:
        rates: Converted[tuple[tuple[str, float], ...]] = UNSET
        decays: Converted[tuple[tuple[str, float], ...]] = UNSET
    else:
        rates: tuple[tuple[str, float], ...] = ()
        decays: tuple[tuple[str, float], ...] = ()
    transformation: ImportPath | None = None

    @classmethod
    def from_value(cls, value: Any, where: str) -> "OptimizerConfig":
        """Take an optax transformation, or a function that makes it, for a whole optimizer."""
        if isinstance(value, dict):
            return cls.from_fields(value, where)
        return cls(transformation=value)

    def check(self):
        if self.transformation is not None:
            self.refuse_unused("transformation replaces it", *_REPLACED)
            return
        for field in ("rates", "decays"):
            for pattern, factor in getattr(self, field):
                check_pattern(pattern, f"optimizer.{field}")
                if factor < 0:
                    raise ConfigError(
                        f"optimizer.{field} has the factor {factor} for {pattern!r}: give 0 or more"
                    )
        peak = self.learning_rate
        if peak is not None and self.end_learning_rate > peak:
            raise ConfigError(
                f"optimizer.end_learning_rate {self.end_learning_rate} is above learning_rate "
                f"{peak}, the peak: make it lower"
            )
        if self.end_learning_rate and self.schedule == "constant":
            raise ConfigError(
                'optimizer.schedule "constant" does not decay to end_learning_rate '
                f"{self.end_learning_rate}: choose another schedule or leave it at 0"
            )
        if isinstance(self.schedule, Code):
            why = 'it is the whole schedule: set schedule to "cosine"'
            self.refuse_unused(why, "warmup", "end_learning_rate")
        if self.schedule not in ("rsqrt", "wsd"):
            self.refuse_unused('set schedule to "rsqrt" or "wsd"', "cooldown")
        if self.schedule != "rsqrt":
            self.refuse_unused('set schedule to "rsqrt"', "timescale")
        if self.timescale is not None:
            self.refuse_unused("timescale replaces it: leave timescale out", "warmup")
        if isinstance(self.name, Code):
            self.refuse_unused("the rule of your own has its own", "b1", "b2", "eps")
        if not self.weight_decay or self.l2_sp:
            self.refuse_unused("there is no weight_decay to multiply", "decays")
        if self.name not in ("adamw", "muon"):
            self.refuse_unused('set name to "adamw" or "muon"', "eps")
        if self.on_nonfinite == "stop":
            self.refuse_unused('set on_nonfinite to "skip"', "max_skipped_in_a_row")
        if self.l2_sp and self.weight_decay:
            self.refuse_unused("leave l2_sp out, which replaces it", "weight_decay")
        if self.weight_decay_rule == "big_vision" and peak == 0:
            raise ConfigError(
                'optimizer.weight_decay_rule "big_vision" measures the schedule by its peak, so '
                "learning_rate must be positive"
            )
        by_share = self.weight_decay_rule == "big_vision" and not self.l2_sp
        if by_share and self.weight_decay > 0.05:
            raise ConfigError(
                f"optimizer.weight_decay {self.weight_decay} by big_vision's rule is the fraction "
                "that each step removes from every kernel: set a fraction such as 1e-4, or choose "
                'weight_decay_rule "open_clip"'
            )


# Fields of `OptimizerConfig` that have no effect beside a transformation.
_REPLACED = (
    "name", "learning_rate", "end_learning_rate", "schedule", "warmup", "timescale", "cooldown",
    "weight_decay", "weight_decay_rule", "l2_sp", "b1", "b2", "eps", "clip_norm", "layer_decay",
    "vision_rate", "text_rate", "rates", "decays",
)  # fmt: skip


def check_pattern(pattern: str, where: str) -> None:
    """Raise a ConfigError unless `pattern` is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{where} has {pattern!r}, which is no regular expression ({error}): give one such as "
            "'vision/.*'"
        ) from None
