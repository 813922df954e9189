"""Config of the detection of a diverging run, and of its remedy."""

from dataclasses import dataclass
from typing import Literal

from vlm.config.base import Config
from vlm.errors import ConfigError


@dataclass(frozen=True)
class DivergenceConfig(Config):
    """Detection of loss spikes, and rollbacks to the last good checkpoint.

    A step is an outlier if its loss is more than `threshold` robust standard deviations above the
    median of the last `window` steps, or its gradient norm is and its loss is above the median. The
    robust standard deviation is 1.4826 times the median absolute deviation. A window of 128 steps
    and a threshold of 6 are those of OLMo 2 (SkipStepOptimizer of OLMo-core). `in_a_row` outliers
    are a divergence.

    A rollback is that of PaLM (arXiv:2204.02311, section 5.1): the run returns to a checkpoint from
    before the spike, and goes on with the data after it. The batches between are skipped.

    Args:
        action: Action at a divergence. warn: log it and call the callbacks; roll_back: return to
            the last good checkpoint; off: do nothing. With roll_back, a step whose loss or gradient
            is not finite is an outlier, whatever on_nonfinite says, once the window is full.
        window: Number of steps that a step is compared with. None is found before a run, or a phase
            of it, has so many.
        threshold: Number of robust standard deviations.
        in_a_row: Number of consecutive outliers.
        max_rollbacks: Number of rollbacks of a run; one more stops it with an error.
        max_skipped: Batches that the rollbacks of a run skip at most, as a fraction of its steps;
            more stop it with an error.

    Example:
        >>> from vlm.config import DivergenceConfig
        >>> DivergenceConfig(action="roll_back", max_rollbacks=5).window
        128
    """

    action: Literal["warn", "roll_back", "off"] = "warn"
    window: int = 128
    threshold: float = 6.0
    in_a_row: int = 8
    max_rollbacks: int = 3
    max_skipped: float = 0.5

    @property
    def first_checkpoint(self) -> int:
        """Step of an early checkpoint, so that each divergence has one to return to."""
        return self.window // 2

    def check(self):
        if 2 * self.in_a_row > self.window:
            raise ConfigError(
                f"divergence.in_a_row {self.in_a_row} is more than half of divergence.window "
                f"{self.window}: make the window longer"
            )
        if self.action != "roll_back":
            why = 'nothing is rolled back: set divergence.action to "roll_back"'
            self.refuse_unused(why, "max_rollbacks", "max_skipped")
