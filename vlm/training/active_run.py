"""A run in progress: its state, and what the training loop does with it between two steps."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from vlm.callbacks import Divergence
from vlm.errors import TrainingError
from vlm.training.bucket_sync import BucketSync
from vlm.training.changes import settings_digest
from vlm.training.checkpoint import Checkpoints
from vlm.training.console import as_text, log
from vlm.training.divergence import DivergenceMonitor
from vlm.training.evals import evaluate_finished_run
from vlm.training.goodput_log import GoodputLog
from vlm.training.interrupt import Interrupted
from vlm.training.local_checkpoint import LocalCheckpoints
from vlm.training.logs import Logs, StepProfiler
from vlm.training.opening_report import report_start
from vlm.training.phases import RunPhases
from vlm.training.resolution import image_size_at
from vlm.training.result import TrainingResult
from vlm.training.rollback import plan_rollback, write_rollback
from vlm.training.run import Run
from vlm.training.run_callbacks import RunCallbacks
from vlm.training.schedule import CheckpointSchedule, Length, is_scheduled
from vlm.training.start import open_tokenizer
from vlm.training.step import TrainState
from vlm.training.watchdog import DATA, DEVICE, STEP, ActivityTimer

Metrics = dict[str, jax.Array]


class ActiveRun:
    """A run in progress. All processes of the run call the same methods in the same order.

    `recording` is the context of the whole run, and `training` that of its steps in it.

    Attributes:
        phases: trainer, data and evaluations of the open phase.
        state: model and optimizer after `step` steps of `total`; `training` sets all three.
    """

    state: TrainState
    step: int
    total: int

    def __init__(self, run: Run, timed: ActivityTimer, length: Length):
        self._run, self._timed, self._length = run, timed, length
        self._experiment = run.experiment
        with run.starting(), timed("opening the data"):
            self._tokenizer = open_tokenizer(run)
            self.phases = RunPhases(run, self._tokenizer)
            self._callbacks = RunCallbacks(run)
            self._local_checkpoints = LocalCheckpoints(run)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Copy logs to a bucket, call callbacks, and count goodput until the run is over."""
        self._until_the_end = contextlib.ExitStack()
        with BucketSync(self._run.folder) as self._sync, self._callbacks, self._until_the_end:
            yield
            self._callbacks.check()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Make or restore the state; keep data, checkpoints and logs open for the steps."""
        run, experiment, timed = self._run, self._experiment, self._timed
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.closing(self.phases))
            local = stack.enter_context(self._local_checkpoints)
            kept = experiment.keep_checkpoints, experiment.keep_hours
            self._checkpoints = stack.enter_context(Checkpoints(run.checkpoints, *kept, local))
            if run.resumed:  # at once, so that `vlm runs` shows it
                self._open_goodput()
            with run.starting(), timed("making the state"):
                self.state = self.phases.start(self._checkpoints, self._length)
                self.step, self.total = int(self.state.step), int(self.state.total_steps)
            run.record_start(self.step, self.total, self.phases.batches.history)
            self._checkpoint_schedule = CheckpointSchedule(experiment, self.step, self.total)
            self._unsaved = False  # whether a scheduled checkpoint is still to be saved
            report_start(run, self.phases, self.state)

            self._interrupted = stack.enter_context(Interrupted())
            with run.starting():
                stop = self._interrupted.request
                self._callbacks.start(self._sync, self.step, self.total, stop)
            self._monitor = DivergenceMonitor(experiment.divergence, settings_digest(experiment))
            if not run.resumed:  # whose folder is removed if it does not start
                self._open_goodput()
            self._goodput.restored(self.step)
            self._logs = Logs(
                run,
                self._sync,
                timed,
                first_step=self.step,
                total_steps=self.total,
                callbacks=self._callbacks,
                experiment=self.phases.experiment,
                monitor=self._monitor,
                goodput=self._goodput,
            )
            stack.enter_context(self._logs)
            self._profiler = stack.enter_context(StepProfiler(self._sync, experiment.profile))
            self._log_phase()
            self._monitor.restore(self.phases.divergence)
            yield

    def _open_goodput(self) -> None:
        goodput = GoodputLog(self._run.folder, self._sync.local, self._timed)
        self._goodput = self._until_the_end.enter_context(goodput)

    # ------------------------------------------------------------------------ what is to be done

    def goes_on(self) -> bool:
        """Whether there is a step or a rollback to do; call it before each."""
        return (self.step < self.total or self.diverged) and not self._interrupted.is_due()

    @property
    def diverged(self) -> bool:
        """Whether to roll back."""
        return self._monitor.diverged is not None

    @property
    def evaluates(self) -> bool:
        """Whether to evaluate after this step."""
        at_phase_end = self._phase_ends and bool(self._experiment.eval_every)
        return bool(self.phases.evaluations) and (self._eval_scheduled or at_phase_end)

    @property
    def saves(self) -> bool:
        """Whether to save a checkpoint after this step; a scheduled one waits for a spike's end."""
        spikes = self._rolls_back and self._monitor.first is not None
        return self._phase_ends or (self._unsaved and not spikes)

    @property
    def saves_locally(self) -> bool:
        """Whether to save a checkpoint on the hosts' own disks after this step."""
        return self.step < self.total and self._local_checkpoints.is_scheduled(self.step)

    @property
    def _phase_ends(self) -> bool:
        return self.step == self.phases.end

    @property
    def _eval_scheduled(self) -> bool:
        return is_scheduled(self.step, self.total, self._experiment.eval_every)

    @property
    def _rolls_back(self) -> bool:
        return self._experiment.divergence.action == "roll_back"

    # ------------------------------------------------------------------------------ parts of a step

    def begin_phases(self) -> None:
        """Begin the phases whose first step is the next one."""
        while self.phases.begins_next(self.step):
            self._logs.flush()
            with self._timed("changing the phase"):
                self.state = self.phases.begin_next(self.state)
            self._log_phase()
            self._monitor.clear()

    def next_batch(self) -> Any:
        """Return the next batch, on the devices; a profile begins and ends before it."""
        self._profiler.before(self.step, self.state)
        with self._timed(DATA):
            return self.phases.trainer.place(next(self.phases.batches))

    def train_step(self, batch: Any) -> Metrics:
        """Update the state with a batch, and return its metrics, which are still on the devices."""
        with self._timed(STEP):
            image_size = image_size_at(self.phases.experiment, self.step, self.total)
            self.state, metrics = self.phases.trainer.step_at(image_size)(self.state, batch)
        self.step += 1
        return metrics

    def log_step(self, metrics: Metrics) -> None:
        """Log the metrics of a step; all so far if an evaluation or a checkpoint follows it."""
        with self._timed(DEVICE):
            self._logs.step(self.step, metrics)
        first = self._experiment.divergence.first_checkpoint
        schedule = self._checkpoint_schedule
        self._unsaved |= schedule.is_scheduled(self.step, self._checkpoints.writing)
        self._unsaved |= self._rolls_back and self.step == first
        last = self.step == self.total
        if self._unsaved or self._phase_ends or self._eval_scheduled or last:
            with self._timed(DEVICE):
                self._logs.flush()

    def evaluate(self) -> None:
        """Log the metrics of all evaluations.

        Raises:
            TrainingError: an evaluation of the user failed; a checkpoint is saved.
        """
        self._logs.flush()
        with self._timed("evaluating"):
            try:
                metrics = self.phases.evaluations.metrics(self.state)
            except TrainingError:  # of an evaluation of the user
                self.save()
                raise
            self._log_evals(metrics)
        self._logs.restart_clock()

    def evaluate_baseline(self) -> None:
        """Evaluate the model that a new run starts from, if any."""
        fine_tunes = self._experiment.init_from is not None
        if self.phases.evaluations and self.step == 0 and fine_tunes:
            self.evaluate()

    def log_checkpoints(self) -> None:
        """Log the checkpoints that have been written since the last call."""
        self._logs.write(*self._checkpoints.finished())

    def save(self) -> None:
        """Begin to write a checkpoint."""
        self._logs.flush()
        with self._timed("writing a checkpoint"):
            self._sync.copy()  # a run resumed from here has its log up to here
            self._save_to(self._checkpoints)
        self._goodput.record(self.step, force=True)
        self._unsaved = False

    def save_locally(self) -> None:
        """Begin to write a checkpoint on the hosts' own disks."""
        self._logs.flush()
        with self._timed("writing a checkpoint"):
            self._save_to(self._local_checkpoints)
        self._goodput.record(self.step, force=True)

    def _save_to(self, checkpoints: Checkpoints | LocalCheckpoints) -> None:
        state = self.phases.trainer.checkpoint_state(self.state)
        watched = self._experiment.divergence.action != "off"
        own = {"divergence": self._monitor.state()} if watched else {}
        checkpoints.save(self.step, state, self.phases.data_state() | own)

    def roll_back(self) -> None:
        """Return to a checkpoint before the divergence; the data goes on where it is.

        Raises:
            TrainingError: no checkpoint is good, or the budget of rollbacks is used up.
        """
        self._timed.step = self.step
        self._goodput.record(self.step, force=True)
        with self._timed("rolling back"):
            self._checkpoints.wait()
            self.log_checkpoints()
            position, saved = self.phases.batches.get_state(), self._checkpoints.steps()
            number = self.phases.number
            try:
                plan = plan_rollback(self._monitor, saved, self.step, self.total, number, position)
            except TrainingError as error:
                self._logs.alert(Divergence(self.step, str(error), "stop"))
                raise
            log.warning(plan.description())
            self._logs.alert(Divergence(self.step, plan.reason, "roll_back", plan.step))
            write_rollback(self._run, plan)
            for array in jax.tree.leaves(self.state):  # make room for that of the checkpoint
                array.delete()
            self.state = self.phases.start(self._checkpoints, self._length, self.total)
        self._timed.step = self.step = int(self.state.step)
        self._unsaved = False
        self._logs.roll_back(self.step)
        self._goodput.record(self.step, force=True)
        self._log_phase()
        self._monitor.restore(self.phases.divergence)
        self._checkpoint_schedule = CheckpointSchedule(self._experiment, self.step, self.total)

    # ------------------------------------------------------------------------ the end of the run

    def stop(self) -> None:
        """Ask the run to stop, as SIGTERM does."""
        self._interrupted.request()

    def save_last(self) -> None:
        """Save the state after the last step, and wait until it is written."""
        checkpoints = self._checkpoints
        if self.step < self.total:
            seconds, newest = checkpoints.seconds, checkpoints.newest
            log.info(self._interrupted.announce(self.step, seconds, newest))
        self.save()
        self._last_metrics: dict[str, float] = {}  # of the user's evaluations
        if self.step == self.total:
            with self._timed("evaluating"):
                self._last_metrics = self.phases.evaluations.own_metrics(self.state)
            if self._last_metrics:
                self._log_evals(self._last_metrics)
        with self._timed("waiting for the last checkpoint"):
            checkpoints.wait()
            self._local_checkpoints.clear()
            self.log_checkpoints()

    def finish(self) -> TrainingResult:
        """Write the bundle and the report of a run at its last step; return the result."""
        log.info(self._timed.summary())
        if bad_samples := self.phases.batches.bad.report():
            log.warning(bad_samples)
        finished, results = self.step == self.total, {}
        if finished:
            _check_skipped(int(self.state.skipped), self.total)
            results = self._export()
        else:
            resume = f"vlm train --resume {self._run.folder}"
            log.info(f"stopped at step {self.step}; resume with `{resume}`")
        self._goodput.record(self.step, force=True)
        log.info(str(self._goodput.tally))
        if finished:
            self._goodput.finish()
        self._callbacks.end(results, finished=finished)
        return TrainingResult(self._run.folder, self.step, self.total, results)

    def _export(self) -> dict[str, float]:
        """Write the bundle and the report; return the metrics of all evaluations."""
        phases = self.phases
        with self._timed("writing the bundle"):
            bundle = self._run.export(phases.trainer, self.state, self._tokenizer)
            phases.supervision.save_head(self._run, phases.trainer, self.state)
        with self._timed("evaluating"):
            if not phases.evaluations:
                return self._last_metrics
            report, results = evaluate_finished_run(
                self._run, phases.evaluations, self.state, bundle, phases.credits()
            )
            if report.results:  # none if all evaluations are the user's
                log.info(as_text(report))
            if phases.evaluations.held_out is not None:
                log.info(f"report {self._run.folder / 'report.html'}")
            return results | self._last_metrics

    # ----------------------------------------------------------------------------------- logging

    def _log_phase(self) -> None:
        """Tell the logs about the open phase."""
        phases = self.phases
        supervision, samples = phases.trainer.supervision, phases.batches.bad
        self._logs.set_phase(phases.experiment, self.step, supervision, samples, phases.log_row())

    def _log_evals(self, metrics: dict[str, float]) -> None:
        self._logs.write({"step": self.step} | {f"eval/{k}": v for k, v in metrics.items()})


def _check_skipped(skipped: int, total: int) -> None:
    """Log how many steps were skipped; raise a TrainingError if all were."""
    if skipped:
        log.warning(
            f"{skipped:,} of {total:,} steps were skipped: their loss or gradient was not finite"
        )
    if skipped == total:
        raise TrainingError(
            f"the loss or its gradient was not finite at any of the {total:,} steps, so the "
            "model is unchanged: start a new run with a lower --optimizer.learning-rate, or check "
            "its data"
        )
