"""Profile chosen steps with `jax.profiler`, for XProf or Perfetto."""

import jax

from vlm.training.bucket_sync import BucketSync
from vlm.training.step import TrainState


class StepProfiler:
    """Profiler of the steps first to last of `steps`, counted from 1; of none if it is None."""

    def __init__(self, sync: BucketSync, steps: tuple[int, int] | None):
        self._folder = sync.local / "profile"
        self._first, self._last = steps or (-1, -1)
        self._on = False

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *error) -> None:
        self._stop()

    def before(self, step: int, state: TrainState) -> None:
        """Start or stop the profiler at its steps; `state` is the result of `step` steps."""
        if step not in (self._first - 1, self._last):
            return
        jax.block_until_ready(state.step)  # steps are dispatched ahead of the device
        self._stop()
        if step == self._first - 1:
            jax.profiler.start_trace(self._folder)
            self._on = True

    def _stop(self) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
