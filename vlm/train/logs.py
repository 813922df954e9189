"""What a run says while it goes: a console line, a JSONL file and TensorBoard."""

import json
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vlm.chips import published_rate
from vlm.errors import TrainingError
from vlm.models.flops import model_flops
from vlm.sharding import placement_rows
from vlm.train.run import Run
from vlm.train.step import TrainState

console = Console(stderr=True)


class Logs:
    """Collects the metrics of every step and writes a row every `log_every` steps.

    Metrics stay on the device until a row is due, so that the host never waits inside the loop.
    """

    def __init__(self, run: Run, *, first_step: int, total_steps: int):
        experiment = run.experiment
        self._batch_size, self._every = experiment.batch_size, experiment.log_every
        self._stop = experiment.optimizer.nonfinite == "stop"
        self._total = total_steps
        # Of the whole mesh; with a resolution schedule the steps are not all alike.
        self._flops = None if experiment.image_sizes else model_flops(experiment)
        self._peak = published_rate(jax.devices())
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._wait, self._since, self._start = 0.0, time.perf_counter(), time.perf_counter()
        self._primary = jax.process_index() == 0
        self._file = self._board = None
        if self._primary:
            self._file = _reopen(run, first_step)
            from tensorboardX import SummaryWriter  # 0.1 s, and only where files are written

            self._board = SummaryWriter(str(run.tensorboard), purge_step=first_step)
        self._progress = Progress(
            TextColumn("[bold]{task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[said]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not (self._primary and console.is_terminal),
        )
        self._task = self._progress.add_task(
            "", total=total_steps, completed=first_step, said="compiling"
        )

    def __enter__(self) -> "Logs":
        self._progress.start()
        return self

    def __exit__(self, *error) -> None:
        self._progress.stop()
        if self._primary:
            self._file.close()
            self._board.close()

    def restart_clock(self) -> None:
        """Begin to measure now: what came before was not training."""
        self._wait, self._since = 0.0, time.perf_counter()

    def step(self, step: int, metrics: dict[str, jax.Array], waited: float) -> None:
        """Take the metrics of step number `step` (counted from 1), which waited for data so long.

        Raises:
            TrainingError: a loss or gradient was not finite and the run is told to stop.
        """
        self._pending.append((step, metrics))
        self._wait += waited
        if len(self._pending) > 2:  # keep the host at most two steps ahead of the device
            jax.block_until_ready(self._pending[-3][1]["loss"])
        if step % self._every == 0 or step == self._total:
            self.flush()

    def flush(self) -> None:
        """Write a row for the steps since the last one.

        Raises:
            TrainingError: as `step`.
        """
        if not self._pending:
            return
        steps, metrics = zip(*self._pending, strict=True)
        values = [{k: float(v) for k, v in m.items()} for m in jax.device_get(metrics)]
        count, self._pending = len(steps), []
        now = time.perf_counter()
        seconds = now - self._since
        row = {
            "step": steps[-1],
            **{k: v for k, v in values[-1].items() if k not in ("finite", "tokens")},
            "loss": float(np.mean([v["loss"] for v in values])),
            "pairs_per_s": count * self._batch_size / seconds,
            "tokens_per_s": sum(v["tokens"] for v in values) / seconds,
            "data_wait": self._wait / seconds,
            "seconds": now - self._start,
        }
        if self._flops:
            row["model_flops_per_s"] = self._flops * count / seconds
            if self._peak:
                row["mfu"] = row["model_flops_per_s"] / self._peak
        self._wait, self._since = 0.0, now
        bad = [step for step, v in zip(steps, values, strict=True) if not v["finite"]]
        if bad:
            row["nonfinite"] = len(bad)
        left = (self._total - steps[-1]) * seconds / count
        said = (
            f"loss {row['loss']:.3f}  {row['pairs_per_s']:,.0f} pairs/s  "
            f"data wait {row['data_wait']:.1%}  left {_clock(left)}"
        )
        self._progress.update(self._task, completed=steps[-1], said=said)
        if self._primary and not console.is_terminal:
            console.print(f"step {steps[-1]}/{self._total}  {said}", highlight=False)
        self.write(row)
        if bad and self._stop:
            raise TrainingError(
                f"the loss or its gradient was not finite at step {bad[0]}: that step changed "
                "nothing, the run stopped, and its earlier checkpoints are kept; lower "
                "--optimizer.learning-rate, or skip such steps with --optimizer.nonfinite skip"
            )

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to the JSONL file and to TensorBoard."""
        if not self._primary:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._board.add_scalar(name, value, row["step"])


def print_on_first_process(text: RenderableType) -> None:
    """Something for the reader, from the first process alone; above the progress display."""
    if jax.process_index() == 0:
        console.print(text, highlight=False)


def placement_table(state: TrainState) -> Table:
    """Where the state lives: each group of arrays, over which mesh axes, and its size."""
    table = Table(title="placement", title_justify="left")
    table.add_column("group")
    table.add_column("over")
    table.add_column("elements", justify="right")
    table.add_column("bytes per device", justify="right")
    groups = {"": state.params, "locked": state.frozen, "average": state.ema}
    groups |= {"optimizer": state.opt_state}
    total = 0
    for name, tree in groups.items():
        depth = 0 if name else 2
        for group, axes, elements, size in placement_rows(tree, depth):
            table.add_row(group or name, axes, f"{elements:,}", f"{size:,}")
            total += size
    table.add_section()
    table.add_row("in all", "", "", f"{total:,}")
    return table


def read_log(run: Run) -> list[dict[str, Any]]:
    """The rows of a run's log; a line that a crash left unfinished is passed over."""
    rows = []
    if run.log.exists():
        for line in run.log.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def _reopen(run: Run, first_step: int):
    """The log file, without the rows of steps that the resumed run will take again."""
    rows = [row for row in read_log(run) if row["step"] <= first_step]
    file = run.log.open("w")
    file.writelines(json.dumps(row) + "\n" for row in rows)
    file.flush()
    return file


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
