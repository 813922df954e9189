"""Phases of a run: what each of them trains with, and the change from one to the next.

A checkpoint at a phase's begin has the state and the data position of the phase before it. So a run
that is killed there makes the change again when it resumes.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from vlm.cluster.processes import broadcast_text
from vlm.config import Experiment, in_phase
from vlm.config.phases import check_transition
from vlm.config.resume import changes_between, option_of
from vlm.data.pipeline import TrainIterator, train_batches
from vlm.data.sources import credits, open_source, with_own_splits
from vlm.errors import ConfigError, VlmError, brief
from vlm.inputs.tokenizer import Tokenizer
from vlm.models.float8 import check_float8
from vlm.paths import on_disk
from vlm.sharding import batch_shard, make_mesh
from vlm.training.carry_over import carried_over, check_layouts
from vlm.training.checkpoint import Checkpoints
from vlm.training.console import log
from vlm.training.evals import Evaluations
from vlm.training.resolution import image_size_at
from vlm.training.rollback import Rollback, carry_out_rollback
from vlm.training.run import Run
from vlm.training.schedule import (
    Length,
    batch_schedule,
    check_batch_sizes,
    check_starts,
    phase_starts,
    text_buckets,
)
from vlm.training.start import OtherPhase, phase_starts_of, start
from vlm.training.step import Trainer, TrainState
from vlm.training.supervision import TrainingSupervision, with_templates


class RunPhases:
    """The phases of a run, of which one is open; a run without phases has one.

    Attributes:
        number: of the open phase. 0 is the begin of the run.
        experiment: of the open phase.
        trainer, batches, evaluations, supervision: made from `experiment`.
        end: step at which the next phase begins; None in the last phase.

    Raises:
        ConfigError: a phase that the run cannot change to; it is found before the first step.
    """

    experiment: Experiment
    supervision: TrainingSupervision
    trainer: Trainer
    batches: TrainIterator
    evaluations: Evaluations

    def __init__(self, run: Run, tokenizer: Tokenizer):
        self._run, self._tokenizer = run, tokenizer
        self.mesh = make_mesh(run.for_devices(run.experiment).mesh)
        self.count = len(run.experiment.phases)
        self.starts: list[int] = []  # first steps of phases that have begun
        self.end: int | None = None
        self.divergence: dict[str, Any] = {}  # state of the monitor in the checkpoint
        self._rollback: Rollback | None = None  # the last one
        self._open(self._likely())
        try:
            for number in range(self.number + 1, self.count + 1):
                phase = run.experiment.phases[number - 1]
                try:
                    self._check_phase(number)
                except VlmError as error:
                    raise ConfigError(f"phase {number} ({phase.begin}): {error}") from error
            check_layouts(run.experiment, self.trainer)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the readers of the open phase."""
        self.batches.close()

    def start(
        self, checkpoints: Checkpoints, length: Length, total: int | None = None
    ) -> TrainState:
        """Restore the state of the newest checkpoint and open its phase, or make a new state.

        A pending rollback is carried out first. `total` is the number of steps after one.
        """
        self._rollback = carry_out_rollback(self._run, checkpoints)
        while True:
            trainer = self.trainer
            try:
                state, data_state = start(
                    self._run,
                    trainer,
                    self.batches,
                    checkpoints,
                    self.supervision.classes,
                    length,
                    self.number,
                    self._check_changes,
                    total,
                )
            except OtherPhase as other:
                if len(other.starts) > self.count:
                    raise ConfigError(
                        f"the run has begun its phase {len(other.starts)}, and --phases has "
                        f"{self.count}: give the phases that have begun, too"
                    ) from None
                self.close()
                self._open(len(other.starts))
                continue
            step, total = int(state.step), int(state.total_steps)
            self.starts = phase_starts_of(data_state)
            self.divergence = data_state.get("divergence", {})
            if self._rollback is not None and step <= self._rollback.step:
                self.divergence |= self._rollback.counts()
            self._skip_data(step)
            later = phase_starts(self.experiment, total, step, self.batches.samples)
            check_starts(self.experiment, later, total, step)
            self._set_bounds(later)
            trainer.check_losses(state, image_size_at(self.experiment, step, total))
            return state

    def data_state(self) -> dict[str, Any]:
        """Return the position of the data, and the phases that have begun, for a checkpoint."""
        begun = {"phase_starts": self.starts} if self.starts else {}
        return self.batches.get_state() | begun

    def _skip_data(self, step: int) -> None:
        """Move the data on to where the last rollback left it.

        Checkpoints that were written after a rollback are of later steps. One of an earlier step
        takes the place of a corrupt one.
        """
        rollback = self._rollback
        if rollback and step <= rollback.step and rollback.phase == self.number:
            self.batches.resume(self.batches.get_state() | rollback.data)

    def begins_next(self, step: int) -> bool:
        """Whether the next phase begins before the step that follows `step` steps."""
        return self.end is not None and step >= self.end

    def begin_next(self, state: TrainState) -> TrainState:
        """Open the next phase, and return the state in its layout."""
        position = json.loads(json.dumps(self.batches.get_state()))  # as from a checkpoint
        self.close()
        before, trainer = self.experiment, self.trainer
        step, total = int(state.step), int(state.total_steps)
        self._open(self.number + 1)
        self.starts = [*self.starts, step]
        state = carried_over(trainer, self.trainer, state)
        self.batches.resume(position)
        self._skip_data(step)
        self._set_bounds(phase_starts(self.experiment, total, step, self.batches.samples))
        self.trainer.check_losses(state, image_size_at(self.experiment, step, total))
        changes = {
            change.name: [change.old, change.new]
            for change in changes_between(before, self.experiment)
            if not change.name.startswith("phases")
        }
        self._run.record_phase(self.number, step, total, changes, self.batches.history)
        log.info(f"phase {self.number} of {self.count} from step {step:,} on")
        for name, (old, new) in changes.items():
            log.info(f"{name} is {brief(new)} from now on; it was {brief(old)}")
        if self._phase.restart_schedule:
            log.info("the schedule of the learning rate starts again")
        if self.batches.position_change:
            log.info(f"the data {self.batches.position_change}")
        return state

    def rows(self, total: int, step: int) -> Iterator[str]:
        """Describe the phases that are still to begin."""
        later = phase_starts(self.experiment, total, step, self.batches.samples)
        for phase, begin in zip(self.experiment.phases, later, strict=True):
            yield f"from step {begin:,}: {phase.description()}"

    def log_row(self) -> dict[str, int]:
        """Return the columns of the open phase in the log; none in a run without phases."""
        return {"phase": self.number} if self.count else {}

    def credits(self) -> str:
        """Return the licences and authors of the data of all phases."""
        data = [in_phase(self._run.experiment, n).data for n in range(self.count + 1)]
        return "\n".join(dict.fromkeys(filter(None, map(credits, dict.fromkeys(data)))))

    @property
    def _phase(self) -> Any:
        return self._run.experiment.phases[self.number - 1]

    def _likely(self) -> int:
        """Return the likely phase of the newest checkpoint; `start` opens another if it is not."""
        total = self._run.last_total() if self.count and self._run.resumed else None
        if total is None:
            return 0
        steps = ocp.utils.checkpoint_steps(on_disk(self._run.checkpoints))
        newest = int(broadcast_text(str(max(steps, default=0))))
        return sum(start < newest for start in phase_starts(self._run.experiment, total))

    def _open(self, number: int) -> None:
        e = in_phase(self._run.experiment, number)
        if number:
            e = with_templates(dataclasses.replace(e, data=with_own_splits(e.data)))
        self._run.report_fitted(e)
        e = self._run.for_devices(e)
        self._check_sizes(e)
        self.number, self.experiment = number, e
        self.supervision = TrainingSupervision(e, self.mesh, self._tokenizer)
        self.trainer = Trainer(
            e,
            self.mesh,
            self._tokenizer.config,
            self.supervision.class_count,
            self.supervision.teacher,
        )
        self.batches = self._open_batches(e, self._run.folder)
        try:
            self.evaluations = Evaluations(e, self.trainer, self._tokenizer)
        except BaseException:
            self.close()
            raise

    def _check_phase(self, number: int) -> None:
        """Check the batch size of a later phase, its precision, and that its data can be opened."""
        before, e = (in_phase(self._run.experiment, n) for n in (number - 1, number))
        if e.matmul_dtype:
            check_float8(self.mesh)
        self._check_sizes(self._run.for_devices(e))
        if e.data == before.data or (self._run.resumed and not self._run.changes):
            return
        self._open_batches(e, None).close()
        if e.data.eval_split and e.eval_every != 0:
            open_source(e.data, e.data.eval_split)

    def _check_sizes(self, e: Experiment) -> None:
        check_batch_sizes(e, self.mesh)

    def _set_bounds(self, later: list[int]) -> None:
        """Set the end of the open phase, and the steps that its learning rate schedule covers."""
        self.end = later[0] if later else None
        phases = zip(self._run.experiment.phases, [*self.starts, *later], strict=True)
        restarts = [(n, begin) for n, (p, begin) in enumerate(phases, 1) if p.restart_schedule]
        first = max((begin for n, begin in restarts if n <= self.number), default=0)
        last = min((begin for n, begin in restarts if n > self.number), default=None)
        self.trainer.schedule_span = (first, last)

    def _check_changes(self) -> None:
        """Check the changes of a resumed run in the phase of its checkpoint.

        Raises:
            ConfigError: a changed field of a phase that has begun would make the state invalid, or
                a changed field of the run has no effect, since such a phase sets it.
        """
        run, number = self._run, self.number
        if not run.changes or not number:
            return
        phases = run.experiment.phases[:number]
        for n, (old, new) in enumerate(zip(run.before.phases, phases, strict=False), 1):
            if old.begin != new.begin:
                raise ConfigError(
                    f"phase {n} has begun at {old.begin}, and --phases has one at {new.begin} in "
                    "its place: give the phases that have begun, too"
                )
        if number <= len(run.before.phases):
            before = in_phase(run.before, number)
            check_transition(before, in_phase(run.experiment, number), "a resumed run", begun=True)
        owners = {name: n for n, phase in enumerate(phases, 1) for name, _ in phase.changes}
        for name in run.changes:
            for own, owner in owners.items():
                if f"{name}.".startswith(f"{own}."):
                    raise ConfigError(
                        f"{option_of(name)} has no effect, since phase {owner} of the run sets it "
                        "and has begun: change that phase with --phases"
                    )

    def _open_batches(self, e: Experiment, run_folder: epath.Path | None) -> TrainIterator:
        """Open the batches of an experiment; bad samples are listed in the run folder."""
        shard, shards = batch_shard(self.mesh)
        return train_batches(
            e.data,
            self.trainer.preprocess,
            self.supervision.tokenizer,
            batch_size=e.super_batch_size // shards,
            seed=e.seed,
            process_index=shard,
            process_count=shards,
            run_folder=run_folder,
            reinforced=self.supervision.reinforced,
            finish=self.supervision.add_targets,
            schedule=batch_schedule(e),
            texts=text_buckets(e, self.mesh),
        )
