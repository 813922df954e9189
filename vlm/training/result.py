"""Result of `vlm.train`."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from vlm.bundle import Bundle, load
from vlm.errors import TrainingError
from vlm.training.history import read_history


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """A run that has ended: its folder, its last step, its metrics, and its model.

    It stands for its folder wherever a path is taken: `vlm.load(result)`, `result / "log.jsonl"`,
    `vlm.train(resume=result)`.

    Attributes:
        folder: the run folder.
        step: steps done.
        total_steps: steps at which the run is finished.
        metrics: final metrics by name, as in log.jsonl without "eval/"; empty if the run is not
            finished.

    Example:
        >>> from etils import epath
        >>> run = vlm.training.TrainingResult(epath.Path("runs/mine"), step=5, total_steps=20)
        >>> run.finished, str(run / "log.jsonl")
        (False, 'runs/mine/log.jsonl')
    """

    folder: epath.Path
    step: int
    total_steps: int
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether all steps are done; otherwise `vlm.train(resume=result)` goes on."""
        return self.step >= self.total_steps

    @property
    def bundle(self) -> Bundle:
        """The trained model, loaded from the folder.

        Raises:
            TrainingError: the run was stopped before its last step.
        """
        if not self.finished:
            raise TrainingError(
                f"the run in {self.folder} stopped at step {self.step:,} of {self.total_steps:,} "
                "and has no bundle yet: resume it with vlm.train(resume=result)"
            )
        return load(self.folder)

    @property
    def history(self) -> list[dict[str, Any]]:
        """A row for each start, phase and rollback: its step, and [old, new] of changed fields."""
        return read_history(self.folder)

    def __fspath__(self) -> str:
        return os.fspath(self.folder)

    def __str__(self) -> str:
        return str(self.folder)

    def __truediv__(self, name: str) -> epath.Path:
        return self.folder / name
