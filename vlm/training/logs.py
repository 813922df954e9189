"""Logs of a run: console line, JSONL file, TensorBoard, and profiles of chosen steps."""

import time
from typing import Any

import jax
import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vlm.callbacks import Divergence, in_notebook
from vlm.callbacks.tensorboard import EventWriter
from vlm.chips import published_rate
from vlm.config import Experiment, in_phase
from vlm.config.batch_sizes import BatchSize, at_size, batch_sizes
from vlm.data.batch_schedule import BatchSchedule
from vlm.data.faults import BadSamples
from vlm.display import clock
from vlm.errors import TrainingError
from vlm.models.flops import PAIRS_ALONE, Supervision, model_flops
from vlm.training.bucket_sync import BucketSync
from vlm.training.console import console, log, output_may_close
from vlm.training.divergence import DivergenceMonitor
from vlm.training.goodput_log import GoodputLog
from vlm.training.history import RowWriter, read_rows
from vlm.training.memory_use import memory_row
from vlm.training.resolution import image_size_at
from vlm.training.run import Run
from vlm.training.run_callbacks import RunCallbacks
from vlm.training.selection import ExampleCounts
from vlm.training.step import TrainState
from vlm.training.watchdog import DATA, DEVICE, STEP, ActivityTimer


class Logs:
    """Collector of each step's metrics, which writes a row every `log_every` steps.

    Metrics stay on the device until the host has dispatched two more steps, so that the device
    never waits for the host. A row is written two steps late, and at once at the end of the run.
    """

    def __init__(
        self,
        run: Run,
        sync: BucketSync,
        activity: ActivityTimer,
        *,
        first_step: int,
        total_steps: int,
        callbacks: RunCallbacks | None = None,
        experiment: Experiment | None = None,
        monitor: DivergenceMonitor | None = None,
        goodput: GoodputLog | None = None,
    ):
        self._goodput = goodput
        self._run, self._sync, self._monitor = run, sync, monitor
        self._every, self._skipped = run.experiment.log_every, 0  # steps in a row
        self._started, self._total = False, total_steps
        self._peak = published_rate(jax.devices())
        self._in_flight: list[tuple[int, dict[str, jax.Array]]] = []
        self._done: list[tuple[int, dict[str, jax.Array]]] = []  # for the next row
        self._outliers: set[int] = set()  # steps that may lead to a rollback
        self._activity, self._callbacks = activity, callbacks
        self._counts: ExampleCounts | None = None  # with a selection
        experiment = experiment or run.experiment
        self.set_phase(experiment, first_step)
        self._primary = jax.process_index() == 0
        self._file: RowWriter | None = None
        self._board: Any = None
        self._seconds_before = 0.0  # seconds before the run was resumed
        if self._primary:
            rows = read_rows(run.log)
            self._seconds_before = max((row.get("seconds", 0.0) for row in rows), default=0.0)
            self._open(rows, first_step)
        self._progress = Progress(
            TextColumn("[bold]{task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[message]}"),
            TimeElapsedColumn(),
            console=console,
            disable=in_notebook() or not (self._primary and console.is_terminal),
        )
        self._task = self._progress.add_task(
            "", total=total_steps, completed=first_step, message="compiling"
        )

    def __enter__(self) -> "Logs":
        self._progress.start()
        return self

    def __exit__(self, *error) -> None:
        with output_may_close():
            self._progress.stop()
        if self._file is not None:
            self._file.close()
            self._board.close()

    def set_phase(
        self,
        e: Experiment,
        step: int,
        supervision: Supervision = PAIRS_ALONE,
        samples: BadSamples | None = None,
        row: dict[str, int] | None = None,
    ) -> None:
        """Set the experiment of the steps after `step`, and values of their rows in `row`."""
        sizes, self._samples, self._phase = batch_sizes(e), samples, row or {}
        self._experiment = e
        self._schedule = BatchSchedule(sizes, e.seed)
        if self._counts is not None:
            self._counts.set_phase(e, step)
        self._stop = e.optimizer.on_nonfinite == "stop"
        self._most_skipped = e.optimizer.max_skipped_in_a_row
        # Of the whole mesh by batch size; empty if steps of the same size differ.
        known = () if e.resolution_schedule or e.text_lengths else sizes
        self._flops = {size: model_flops(at_size(e, size), supervision) for size in known}
        self.restart_clock()

    def restart_clock(self) -> None:
        """Restart the timing of steps, to leave out time that was not training."""
        self._waited, self._since = self._activity.seconds[DATA], time.perf_counter()

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Add the metrics of step number `step`, counted from 1.

        Raises:
            TrainingError: a loss or gradient was not finite and `on_nonfinite` is "stop", or too
                many consecutive steps were skipped.
        """
        self._in_flight.append((step, metrics))
        if not self._started:
            self._started = True
            jax.block_until_ready(metrics)
            self._write_start(step)
        self._take_done(2)  # keep the host at most two steps ahead of the device

    def flush(self) -> None:
        """Write a row of all steps since the last row; waits for the device.

        Raises:
            TrainingError: as `step`.
        """
        self._take_done(0)
        if self._done:
            self._write_row()

    def batch_size(self, step: int) -> BatchSize:
        """Return the size of the global batch of step number `step`, counted from 1."""
        return self._schedule.at(step - 1)

    def _input_size(self, step: int) -> str:
        """Describe the size of the images, and of the batch, of step number `step`."""
        image_size = image_size_at(self._experiment, step - 1, self._total)
        return f"{image_size} pixels, {self.batch_size(step)}"

    def _take_done(self, ahead: int) -> None:
        """Wait until at most `ahead` steps are in flight, and write the scheduled rows."""
        while len(self._in_flight) > ahead:
            jax.block_until_ready(self._in_flight[0][1]["loss"])
            self._done.append(self._in_flight.pop(0))
            self._watch(*self._done[-1])
            if self._done[-1][0] % self._every == 0:
                self._write_row()

    def _watch(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Look for a divergence at a step, and report one that is not rolled back."""
        monitor = self._monitor
        if monitor is None or monitor.config.action == "off":
            return
        names = ("loss", "grad_norm", "finite")
        loss, grad_norm, finite = jax.device_get([metrics[name] for name in names])
        monitor.add(step, float(loss), float(grad_norm), bool(finite), self._input_size(step))
        if monitor.config.action == "roll_back":
            if monitor.first is not None:
                self._outliers.add(step)
        elif monitor.diverged is not None:
            self.alert(Divergence(step, monitor.diverged, "warn"))
            monitor.clear()

    def alert(self, divergence: Divergence) -> None:
        """Log a divergence, and pass it to the callbacks."""
        if divergence.action == "warn":
            log.warning(
                f"{divergence.message}; the run goes on (--divergence.action roll_back returns to "
                "the checkpoint before)"
            )
        if self._callbacks is not None:
            self._callbacks.divergence(divergence)

    def roll_back(self, step: int) -> None:
        """Go back to the rows and curves up to `step`, as a resumed run does."""
        self._in_flight.clear()
        self._done.clear()
        self._outliers.clear()
        self._skipped = 0
        self._progress.update(self._task, completed=step)
        if self._file is not None:
            self._file.close()
            self._board.close()
            self._open(read_rows(self._sync.local / self._run.log.name), step)

    def _open(self, rows: list[dict[str, Any]], step: int) -> None:
        """Open the files to go on after `step`, with only the rows up to it."""
        rows = [row for row in rows if row["step"] <= step]
        self._file = RowWriter(self._sync.local / self._run.log.name, rows)
        phases = range(len(self._run.experiment.phases) + 1)
        if any(in_phase(self._run.experiment, number).selection for number in phases):
            self._counts = ExampleCounts(self._experiment, rows, step)
        self._board = EventWriter(str(self._sync.local / "tensorboard"), step)

    def _write_start(self, step: int) -> None:
        """Log the time to the first step, by activity."""
        parts = {name: s for name, s in self._activity.seconds.items() if s >= 0.05}
        seconds = time.monotonic() - self._activity.began
        named = {DATA: "first batch", STEP: "compiling", DEVICE: "first step"}
        parts = {named.get(name, name): s for name, s in parts.items()}
        breakdown = ", ".join(f"{name} {s:.1f} s" for name, s in parts.items())
        log.info(f"first step after {seconds:.1f} s: {breakdown}")
        row = {f"start/{name.replace(' ', '_')}": s for name, s in parts.items()}
        self.write({"step": step, "start/seconds": seconds, **row})
        if self._goodput is not None:
            self._goodput.record(step, force=True)

    def _write_row(self) -> None:
        steps, metrics = zip(*self._done, strict=True)
        values = [{k: float(v) for k, v in m.items()} for m in jax.device_get(metrics)]
        count, self._done = len(steps), []
        sizes = [self.batch_size(step) for step in steps]
        now = time.perf_counter()
        seconds = now - self._since
        row = {
            "step": steps[-1],
            **self._phase,
            **{k: v for k, v in values[-1].items() if k not in ("finite", "tokens")},
            # Losses are means over the steps of the row; other values are those of its last step.
            **{k: float(np.mean([v[k] for v in values])) for k in values[-1] if _is_loss(k)},
            "pairs_per_s": sum(size.pairs for size in sizes) / seconds,
            "tokens_per_s": sum(v["tokens"] for v in values) / seconds,
            "data_wait": (self._activity.seconds[DATA] - self._waited) / seconds,
            "seconds": self._seconds_before + time.monotonic() - self._activity.began,
        }
        if self._goodput is not None:
            self._goodput.record(steps[-1])
            row |= self._goodput.row()
        if self._counts is not None:
            row |= self._counts.at(steps[-1])
        row |= memory_row()
        if self._samples is not None and self._samples.good:
            row["texts_cut"] = self._samples.texts_cut / self._samples.good  # of the run so far
        if self._flops:
            row["model_flops_per_s"] = sum(self._flops[size] for size in sizes) / seconds
            if self._peak:
                row["mfu"] = row["model_flops_per_s"] / self._peak
        self.restart_clock()
        bad = [step for step, v in zip(steps, values, strict=True) if not v["finite"]]
        if bad:
            row["nonfinite"] = len(bad)
        left = (self._total - steps[-1]) * seconds / count
        message = (
            f"loss {row['loss']:.3f}  {row['pairs_per_s']:,.0f} pairs/s  "
            f"data wait {row['data_wait']:.1%}  ETA {clock(left)}"
        )
        self._progress.update(self._task, completed=steps[-1], message=message)
        if not (console.is_terminal or in_notebook()):  # which show it already
            log.info(f"step {steps[-1]}/{self._total}  {message}")
        self.write(row)
        fatal = [step for step in bad if step not in self._outliers]
        if fatal and self._stop:
            raise TrainingError(
                f"the loss or its gradient was not finite at step {fatal[0]}: that step changed "
                "nothing, the run stopped, and its earlier checkpoints are kept; use --resume "
                "with --optimizer.on-nonfinite skip or a lower --optimizer.learning-rate"
            )
        for step, v in zip(steps, values, strict=True):
            self._skipped = 0 if v["finite"] else self._skipped + 1
            if self._skipped >= self._most_skipped:
                raise TrainingError(
                    f"the loss or its gradient was not finite in {self._skipped} steps in a row, "
                    f"up to step {step}: the run stopped, and its earlier checkpoints are kept; "
                    "use --resume with a lower --optimizer.learning-rate, or a higher "
                    "--optimizer.max-skipped-in-a-row"
                )

    def write(self, *rows: dict[str, Any]) -> None:
        """Append rows to the JSONL file and to TensorBoard, and pass them to the callbacks."""
        if self._file is None or not rows:
            return
        self._file.write(*rows)
        for row in rows:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(name, value, row["step"])
            if self._callbacks is not None:
                self._callbacks.row(row)
        self._board.flush()  # a run that is killed loses no row before its checkpoint


class StepProfiler:
    """`jax.profiler` of the steps first to last of `steps`, counted from 1; None profiles none."""

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


def _is_loss(name: str) -> bool:
    return name == "loss" or name.startswith("loss/")
