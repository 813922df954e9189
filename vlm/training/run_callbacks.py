"""Calls the callbacks of a run in process 0, and stops the run if one fails."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from vlm.callbacks import Callback, Divergence, Live, RunInfo, in_notebook
from vlm.config import Code, to_dict
from vlm.errors import ConfigError, TrainingError, first_line
from vlm.training.bucket_sync import BucketSync
from vlm.training.run import Run


class RunCallbacks:
    """The callbacks of an experiment, and a live display in a notebook.

    A callback that raises is not called again, the run is stopped with a checkpoint, and `check`
    raises at its end. As a context, it calls `on_end` of a run that failed.

    Raises:
        ConfigError: something in `callbacks` is no callback.
    """

    def __init__(self, run: Run):
        e = run.experiment
        first = jax.process_index() == 0
        self._callbacks = [_callback(code) for code in e.callbacks] if first else []
        if first and in_notebook() and not any(isinstance(c, Live) for c in self._callbacks):
            self._callbacks.append(Live())
        self._run = run
        self._info: RunInfo | None = None  # of a run that has started and not ended
        self._failure, self._error = "", None

    def __enter__(self) -> "RunCallbacks":
        return self

    def __exit__(self, *error) -> None:
        self.end({}, finished=False)  # the run failed

    def start(self, sync: BucketSync, step: int, total: int, stop: Callable[[], None]) -> None:
        """Call `on_start`; `stop` is called once a callback has failed.

        Raises:
            TrainingError: a callback failed.
        """
        run, local = self._run, pathlib.Path(sync.local)
        config = to_dict(run.experiment)
        self._info = RunInfo(run.folder, local, config, step, total, run.resumed)
        self._stop = stop
        self._call("on_start", self._info)
        self.check()

    def row(self, row: Mapping[str, Any]) -> None:
        """Pass a row of the log on: of steps, of an evaluation, or of a checkpoint."""
        step = row["step"]
        metrics = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        if "loss" in row:
            self._call("on_step", step, metrics)
        elif any(name.startswith("eval/") for name in row):
            self._call("on_eval", step, metrics)
        elif "checkpoint/seconds" in row:
            self._call("on_checkpoint", step, metrics)

    def divergence(self, divergence: Divergence) -> None:
        """Call `on_divergence`."""
        self._call("on_divergence", divergence)

    def end(self, results: Mapping[str, float], finished: bool) -> None:
        """Call `on_end`, once."""
        if self._info is not None:
            info, self._info = self._info, None
            self._call("on_end", info, results, finished)

    def check(self) -> None:
        """Raise a TrainingError if a callback failed."""
        if self._failure:
            raise TrainingError(self._failure) from self._error

    def _call(self, method: str, *arguments: Any) -> None:
        for callback in list(self._callbacks):
            try:
                getattr(callback, method)(*arguments)
            except Exception as error:
                self._callbacks.remove(callback)
                reason = first_line(error)
                self._error = self._error or error
                again = f"resume the run in {self._run.folder}, whose checkpoints are kept"
                if method == "on_start" and not self._run.resumed:  # its files are removed
                    again = "start the run again"
                self._failure = self._failure or (
                    f"the callback {type(callback).__name__} failed in {method} with "
                    f"{type(error).__name__}: {reason}: fix it, and {again}"
                )
                self._stop()


def _callback(code: Code) -> Any:
    """Load a callback; a class is called without arguments."""
    found = code.load("callbacks")
    found = found() if isinstance(found, type) else found
    methods = [name for name in vars(Callback) if name.startswith("on_")]
    unknown = [n for n in dir(found) if n.startswith("on_") and n not in methods]
    if unknown:
        raise ConfigError(
            f"callbacks has {code}, whose method {unknown[0]} is never called: choose among "
            f"{', '.join(methods)}"
        )
    if not any(hasattr(found, name) for name in methods):
        raise ConfigError(
            f"callbacks has {code}, which is a {type(found).__name__} without any of "
            f"{', '.join(methods)}: give a vlm.callbacks.Callback"
        )
    return found if isinstance(found, Callback) else _Partial(found)


class _Partial(Callback):
    """An object with some of the methods of a callback."""

    def __init__(self, callback: Any):
        for name in vars(Callback):
            if name.startswith("on_") and hasattr(callback, name):
                setattr(self, name, getattr(callback, name))
