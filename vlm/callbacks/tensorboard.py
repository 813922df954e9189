"""TensorBoard event files."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from vlm.callbacks.base import Callback, RunInfo
from vlm.paths import as_path


def summary_writer(folder: str, step: int) -> Any:
    """Make a TensorBoard writer that continues after `step`; later points are hidden.

    tensorboardX would import PyTorch, which takes seconds and is not needed.
    """
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType] (cannot be imported now)
    try:
        from tensorboardX import SummaryWriter  # only in the process that writes files
    finally:
        if absent:
            del sys.modules["torch"]
    # Without the suffix, writers that start in the same second would share a file.
    return SummaryWriter(folder, purge_step=step + 1, filename_suffix=f".{time.time_ns()}")


@dataclasses.dataclass(frozen=True, eq=False)
class TensorBoard(Callback):
    """Write TensorBoard event files of several runs into one folder, with config and results.

    Args:
        folder: Each run has a subfolder in it, by the name of its run folder. If None, config and
            results are added to the run's own `tensorboard` folder, whose curves each run writes.

    Example:
        >>> vlm.callbacks.TensorBoard("boards")
        TensorBoard(folder='boards')
    """

    folder: str | os.PathLike | None = None
    _run: dict[str, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def on_start(self, run: RunInfo) -> None:
        own = run.local / "tensorboard"
        folder = own if self.folder is None else as_path(self.folder) / run.folder.name
        writer = self._run["writer"] = summary_writer(os.fspath(folder), run.step)
        config = json.dumps(run.config, indent=2, ensure_ascii=False)
        writer.add_text("config", f"```json\n{config}\n```", run.step)

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.folder is not None:
            self._write(step, metrics)

    on_eval = on_checkpoint = on_step

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._run["writer"].add_scalar(name, value, step)
        self._run["writer"].flush()  # a run that is killed loses no row before its checkpoint

    def on_end(self, run: RunInfo, results: Mapping[str, float], finished: bool) -> None:
        if "writer" in self._run:
            self._write(run.total_steps, {f"final/{name}": v for name, v in results.items()})
            self._run.pop("writer").close()
