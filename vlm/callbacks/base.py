"""Interface of callbacks."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from etils import epath


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """A run, as callbacks see it.

    Args:
        folder: The run folder, perhaps in a bucket.
        local: A folder on this machine whose files are copied to `folder`, for files that grow;
            `folder` itself if it is on this machine.
        config: The experiment as JSON values.
        step: Steps done before this start: 0 in a new run.
        total_steps: Steps at which the run ends.
        resumed: Whether the run is resumed.

    Example:
        >>> from etils import epath
        >>> at = epath.Path(folder)
        >>> run = vlm.callbacks.RunInfo(at, folder, {}, step=0, total_steps=9, resumed=False)
        >>> vlm.callbacks.TensorBoard().on_start(run)
        >>> (folder / "tensorboard").is_dir()
        True
    """

    folder: epath.Path
    local: pathlib.Path
    config: dict[str, Any]
    step: int
    total_steps: int
    resumed: bool


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A divergence of the training, as callbacks see it.

    Args:
        step: Steps done when it was found.
        message: A sentence with the steps, the value and the usual value.
        action: warn: the run goes on; roll_back: it returns to `to_step`; stop: it ends with an
            error.
        to_step: Step of the checkpoint that the run returns to.

    Example:
        >>> alert = vlm.callbacks.Divergence(90, "the training diverges at step 88: ...", "warn")
        >>> alert.to_step is None
        True
    """

    step: int
    message: str
    action: Literal["warn", "roll_back", "stop"]
    to_step: int | None = None


class Callback:
    """Base class of callbacks: override any of its methods; each does nothing by default.

    Only process 0 calls them. Metrics have their names of log.jsonl, such as "loss" and
    "eval/top1".

    Example:
        >>> class PrintLoss(vlm.callbacks.Callback):
        ...     def on_step(self, step, metrics):
        ...         print(step, metrics["loss"])
        >>> PrintLoss().on_step(10, {"loss": 2.5})
        10 2.5
    """

    def on_start(self, run: RunInfo) -> None:
        """Start: before the first step of a new or resumed run."""

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take a row of the log, every `log_every` steps."""

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of an evaluation after step `step`."""

    def on_checkpoint(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note a complete checkpoint; `metrics` are its seconds and bytes."""

    def on_divergence(self, divergence: Divergence) -> None:
        """Take an alert: the training diverges. After a rollback, steps are counted from before."""

    def on_end(self, run: RunInfo, results: Mapping[str, float], finished: bool) -> None:
        """End, also of an interrupted run; `results` are the final metrics of a finished one."""
