"""Rollbacks of a diverging run: back to a good checkpoint, then on with the data after the spike.

`rollback.json` of the run folder has the last rollback. It is written before anything else changes,
and a resumed run carries it out as the running one does. So a run that is killed in the middle of a
rollback ends as one that is not.
"""

import dataclasses
import json
from typing import Any

import jax

from vlm.cluster.processes import broadcast_text
from vlm.errors import TrainingError
from vlm.paths import as_config_error, replace_text
from vlm.training.checkpoint import Checkpoints
from vlm.training.divergence import DivergenceMonitor
from vlm.training.run import Run

# Fields of the state of the data that stay those of the checkpoint.
_KEPT_FIELDS = ("step", "samples", "bad")


@dataclasses.dataclass(frozen=True)
class Rollback:
    """A rollback, as JSON values.

    Attributes:
        step: step of the checkpoint to return to.
        left: step that the run had reached.
        total: steps of the run.
        phase: phase whose data was read.
        data: position in the data that was reached, without the number of steps.
        reason: description of the divergence.
        rollbacks, skipped: those of the run so far, with this one.
        discarded: steps of the checkpoints after `step`, until they are deleted.
        pending: whether it is still to be carried out.
    """

    step: int
    left: int
    total: int
    phase: int
    data: dict[str, Any]
    reason: str
    rollbacks: int
    skipped: int
    discarded: list[int]
    pending: bool = True

    def description(self) -> str:
        """Describe the rollback in a sentence."""
        return (
            f"{self.reason}; the run returns to step {self.step:,} and skips the "
            f"{self.left - self.step:,} batches up to step {self.left:,} (rollback "
            f"{self.rollbacks})"
        )

    def counts(self) -> dict[str, int]:
        """Return the part of it that a `DivergenceMonitor` continues from."""
        return {"rollbacks": self.rollbacks, "skipped": self.skipped}


def data_after(data_state: dict[str, Any]) -> dict[str, Any]:
    """Return the position of a state of the data, to add to the state of an earlier step."""
    return {name: value for name, value in data_state.items() if name not in _KEPT_FIELDS}


def plan_rollback(
    monitor: DivergenceMonitor,
    saved: list[int],
    step: int,
    total: int,
    phase: int,
    data_state: dict[str, Any],
) -> Rollback:
    """Choose the checkpoint among those of the steps `saved`; all processes choose the same.

    It is the newest with `in_a_row` steps after it that were no outliers: the step that causes a
    spike comes before the first loss that shows it.

    Raises:
        TrainingError: the budget of the run is exhausted, or no checkpoint is good.
    """
    config, first = monitor.config, monitor.first
    assert monitor.diverged is not None
    assert first is not None
    kept = "the run stopped, and its earlier checkpoints are kept"
    if monitor.rollbacks >= config.max_rollbacks:
        raise TrainingError(
            f"{monitor.diverged}; {config.max_rollbacks} rollbacks (divergence.max_rollbacks) are "
            f"used up: {kept}; use --resume with a lower --optimizer.learning-rate, or a higher "
            "--divergence.max-rollbacks"
        )
    good = [number for number in saved if number + config.in_a_row < first]
    if not good:
        raise TrainingError(
            f"{monitor.diverged}; there is no checkpoint from {config.in_a_row} steps before it or "
            f"earlier to return to: {kept}; use --resume with a lower --optimizer.learning-rate"
        )
    skipped = step - max(good)
    most = round(config.max_skipped * total)
    if monitor.skipped + skipped > most:
        raise TrainingError(
            f"{monitor.diverged}; a rollback to step {max(good):,} would skip {skipped:,} batches "
            f"more than the {monitor.skipped:,} so far, and at most {most:,} may be skipped "
            f"(divergence.max_skipped): {kept}; use --resume with a lower "
            "--optimizer.learning-rate, a higher --divergence.max-skipped, or a lower "
            "--checkpoint-minutes"
        )
    return Rollback(
        step=max(good),
        left=step,
        total=total,
        phase=phase,
        data=data_after(data_state),
        reason=monitor.diverged,
        rollbacks=monitor.rollbacks + 1,
        skipped=monitor.skipped + skipped,
        discarded=[number for number in saved if number > max(good)],
    )


def write_rollback(run: Run, rollback: Rollback) -> None:
    """Write the last rollback of a run."""
    if jax.process_index() == 0:
        with as_config_error(f"{run.rollback} cannot be written", "make it writable, and resume"):
            replace_text(run.rollback, json.dumps(dataclasses.asdict(rollback)))


def carry_out_rollback(run: Run, checkpoints: Checkpoints) -> Rollback | None:
    """Return the last rollback of a run; if it is pending, delete the checkpoints after it first.

    All processes must call it.
    """
    text = run.rollback.read_text() if _has_rollback(run) else ""
    if not (text := broadcast_text(text)):
        return None
    rollback = Rollback(**json.loads(text))
    if not rollback.pending:
        return rollback
    checkpoints.delete(rollback.discarded)
    run.record_rollback(dataclasses.asdict(rollback))
    done = dataclasses.replace(rollback, pending=False, discarded=[])
    write_rollback(run, done)
    return done


def _has_rollback(run: Run) -> bool:
    return jax.process_index() == 0 and run.rollback.exists()
