"""TensorBoard event files."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from vlm.callbacks.base import Callback, Divergence, RunInfo
from vlm.paths import as_path


class EventWriter:
    """A TensorBoard event file that continues after `step`; later points are hidden.

    It writes at once. tensorboardX's `SummaryWriter` writes in a thread, and its `flush` does not
    wait for that, so a killed run would lose rows.
    """

    def __init__(self, folder: str, step: int):
        os.makedirs(folder, exist_ok=True)
        self._event, self._summary, events = _tensorboardx()
        # Without the suffix, writers that start in the same second would share a file.
        suffix = f".{time.time_ns()}"
        self._file = events.EventsWriter(os.path.join(folder, "events"), suffix)
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._write(step + 1, session_log=start)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._write(step, summary=self._summary.scalar(name, value))

    def add_text(self, name: str, text: str, step: int) -> None:
        self._write(step, summary=self._summary.text(name, text))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, step: int, **content: Any) -> None:
        event = self._event.Event(wall_time=time.time(), step=step, **content)
        self._file.write_event(event)


def _tensorboardx() -> tuple[Any, Any, Any]:
    """Import parts of tensorboardX without PyTorch, which takes seconds and is not needed."""
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType] (cannot be imported now)
    try:  # only in the process that writes files
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2
    finally:
        if absent:
            del sys.modules["torch"]
    return event_pb2, summary, event_file_writer


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
        self._run["folder"] = os.fspath(folder)
        writer = self._run["writer"] = EventWriter(self._run["folder"], run.step)
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

    def on_divergence(self, divergence: Divergence) -> None:
        if self.folder is not None and divergence.to_step is not None:
            self._run["writer"].close()
            self._run["writer"] = EventWriter(self._run["folder"], divergence.to_step)

    def on_end(self, run: RunInfo, results: Mapping[str, float], finished: bool) -> None:
        if "writer" in self._run:
            self._write(run.total_steps, {f"final/{name}": v for name, v in results.items()})
            self._run.pop("writer").close()
