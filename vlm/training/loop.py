"""The training loop: from an experiment to a run folder with a trained model."""

import contextlib
import dataclasses
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import jax

from vlm.bundle import Bundle
from vlm.callbacks import Divergence
from vlm.cluster.processes import stop_all_on_failure
from vlm.config import Experiment, in_phase, require_bucket
from vlm.data.sources import require_source, with_own_splits
from vlm.errors import ConfigError, TrainingError, brief
from vlm.paths import keep_compiled_programs
from vlm.training.bucket_sync import BucketSync
from vlm.training.changes import settings_digest
from vlm.training.checkpoint import Checkpoints
from vlm.training.console import as_text, log
from vlm.training.custom_parts import (
    Loss,
    report_changed_code,
    with_code_hashes,
    with_parts,
    without_lost_callbacks,
)
from vlm.training.divergence import DivergenceMonitor
from vlm.training.evals import finish
from vlm.training.goodput_log import GoodputLog
from vlm.training.init_from import resolve
from vlm.training.interrupt import Interrupted
from vlm.training.logs import Logs, StepProfiler
from vlm.training.opening_report import report_start
from vlm.training.phases import RunPhases
from vlm.training.resolution import image_size_at
from vlm.training.result import TrainingResult
from vlm.training.rollback import plan_rollback, write_rollback
from vlm.training.run import Run
from vlm.training.run_callbacks import RunCallbacks
from vlm.training.schedule import CheckpointSchedule, Length, is_scheduled, length_in_steps
from vlm.training.start import open_tokenizer
from vlm.training.step import Trainer, TrainState
from vlm.training.supervision import with_templates
from vlm.training.watchdog import DATA, DEVICE, STEP, ActivityTimer


def train(
    experiment: Experiment | None = None,
    *,
    loss: Loss | Mapping[Loss, float] | None = None,
    optimizer: Any = None,
    data: Any = None,
    evals: Any = (),
    callbacks: Sequence[Any] = (),
    resume: str | os.PathLike | None = None,
    length: Length = length_in_steps,
) -> TrainingResult:
    """Train `experiment` in a new run folder, or resume the run in `resume`.

    SIGINT, SIGTERM and SIGHUP save a checkpoint and exit, as interrupting a notebook's kernel does;
    a resumed run ends with the same model as an uninterrupted one. With several processes, call
    `vlm.cluster.processes.start` first.

    Your own parts are fields of the experiment too, where they may be import paths such as
    "my_parts:my_loss". An object without an import path, such as what a notebook defines, must be
    given again to resume the run.

    Args:
        experiment: the config. With `resume`, the run goes on as `experiment`, whose changes must
            keep its checkpoints valid.
        loss: in place of the model's loss: a function of `vlm.losses.LossInputs`, or a mapping of
            such functions and "softmax" or "sigmoid" to weights.
        optimizer: an `optax.GradientTransformation`, or a function that makes it, in place of the
            experiment's optimizer.
        data: in place of `experiment.data`: a data set, or a function that makes it.
        evals: functions of (bundle, step) that return metrics, besides the experiment's evals. The
            bundle is valid until the function returns.
        callbacks: besides those of the experiment: see `vlm.callbacks.Callback`.
        resume: a run folder, or the result of a run.
        length: chooses the number of steps of a new run before its first step, from the trainer
            and the batches; by default as the experiment says.

    Returns:
        the run, which stands for its folder and has the trained model as `bundle`.

    Raises:
        VlmError: any error that the user can fix, from a wrong batch size to a full disk.

    Example:
        >>> vlm.train(resume=folder / "no-run")
        Traceback (most recent call last):
            ...
        vlm.errors.CheckpointError: ...
    """
    run = steps(
        experiment,
        loss=loss,
        optimizer=optimizer,
        data=data,
        evals=evals,
        callbacks=callbacks,
        resume=resume,
        length=length,
    )
    for _ in run:
        pass
    assert run.result is not None  # the loop is over
    return run.result


class steps(Iterator[tuple[TrainState, dict[str, jax.Array]]]):
    """The steps of `train`, as an iterator of (state, metrics), for a custom training loop.

    Logs, checkpoints, evaluations, callbacks and resuming are those of `train`, which takes the
    same arguments. A state is valid until the next step, which reuses its memory; metrics are
    arrays on the device. Leaving the `with` block saves a checkpoint and ends the run. After a
    rollback (`Experiment.divergence`) the steps go on from an earlier one.

    Attributes:
        trainer: the compiled step and the shardings of the state, once the loop has begun; each
            phase has its own.
        result: the run, once the loop is over; before, None.

    Example:
        >>> with vlm.steps(experiment) as loop:
        ...     for state, metrics in loop:
        ...         if metrics["loss"] < 0.5:
        ...             break
    """

    def __init__(
        self,
        experiment: Experiment | None = None,
        *,
        resume: str | os.PathLike | None = None,
        length: Length = length_in_steps,
        **parts: Any,
    ):
        self._run = _Progress()
        self._steps = _train(self._run, experiment, resume, length, parts)

    @property
    def trainer(self) -> Trainer:
        return self._run.phases.trainer

    @property
    def result(self) -> TrainingResult | None:
        return self._run.result

    def __next__(self) -> tuple[TrainState, dict[str, jax.Array]]:
        return next(self._steps)

    def __enter__(self) -> "steps":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception):
            return self.close()
        with contextlib.suppress(type(error)):  # it goes on after this block
            self._steps.throw(error)  # several processes stop together

    def close(self) -> None:
        """Save a checkpoint and end the run, if it is not over."""
        self._steps.close()

    def bundle(self, state: TrainState) -> Bundle:
        """Return the model of a state, with its EMA parameters if EMA is on.

        It shares memory with the state, and is valid until the next step.
        """
        return self._run.phases.evaluations.bundle(state)


class _Progress:
    """What `steps` shows of a run. The generator holds this and not `steps`, which can end it."""

    phases: RunPhases
    result: TrainingResult | None = None


Generated = Generator[tuple[TrainState, dict[str, jax.Array]]]


def _train(
    progress: _Progress,
    experiment: Experiment | None,
    resume: str | os.PathLike | None,
    length: Length,
    parts: dict[str, Any],
) -> Generated:
    keep_compiled_programs()
    with stop_all_on_failure(), ActivityTimer() as timed:
        with timed("opening the run"):
            run = _open(experiment, resume, parts)
        yield from _loop(progress, run, timed, length)


def _loop(progress: _Progress, run: Run, timed: ActivityTimer, length: Length) -> Generated:
    experiment = run.experiment
    with run.starting(), timed("opening the data"):
        tokenizer = open_tokenizer(run)
        phases = progress.phases = RunPhases(run, tokenizer)
        callbacks = RunCallbacks(run)

    with BucketSync(run.folder) as bucket_sync, callbacks, contextlib.ExitStack() as outer:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.closing(phases))
            checkpoints = stack.enter_context(
                Checkpoints(run.checkpoints, experiment.keep_checkpoints, experiment.keep_hours)
            )
            with run.starting(), timed("making the state"):
                state = phases.start(checkpoints, length)
                step, total = int(state.step), int(state.total_steps)
            run.record_start(step, total, phases.batches.position_change)
            checkpoint_schedule = CheckpointSchedule(experiment, step, total)
            report_start(run, phases, state)

            interrupted = stack.enter_context(Interrupted())
            with run.starting():
                callbacks.start(bucket_sync, step, total, interrupted.request)
            monitor = DivergenceMonitor(experiment.divergence, settings_digest(experiment))
            rolls_back = experiment.divergence.action == "roll_back"
            goodput = GoodputLog(run.folder, bucket_sync.local, timed, step)
            outer.enter_context(goodput)
            logs = Logs(
                run,
                bucket_sync,
                timed,
                first_step=step,
                total_steps=total,
                callbacks=callbacks,
                experiment=phases.experiment,
                monitor=monitor,
                goodput=goodput,
            )
            stack.enter_context(logs)
            profiler = stack.enter_context(StepProfiler(bucket_sync, experiment.profile))

            def kind_of(step: int) -> str:
                """Return what the losses that a step may be compared with have in common."""
                size = image_size_at(phases.experiment, step - 1, total)
                return f"{size} pixels, {logs.batch_size(step)}"

            def log_phase() -> None:
                supervision, samples = phases.trainer.supervision, phases.batches.bad
                logs.set_phase(phases.experiment, step, supervision, samples, phases.log_row())
                monitor.set_phase(kind_of)

            def save() -> None:
                logs.flush()
                with timed("writing a checkpoint"):
                    bucket_sync.copy()  # a run resumed from here has its log up to here
                    saved = phases.trainer.checkpoint_state(state)
                    watched = experiment.divergence.action != "off"
                    own = {"divergence": monitor.state()} if watched else {}
                    checkpoints.save(step, saved, phases.data_state() | own)
                goodput.record(step, force=True)

            def evaluate() -> None:
                logs.flush()
                with timed("evaluating"):
                    try:
                        metrics = phases.evaluations.metrics(state)
                    except TrainingError:  # of an evaluation of the user
                        save()
                        raise
                    logs.write({"step": step} | {f"eval/{k}": v for k, v in metrics.items()})
                logs.restart_clock()

            def roll_back() -> None:
                nonlocal state, step, unsaved, checkpoint_schedule
                timed.step = step
                goodput.record(step, force=True)
                with timed("rolling back"):
                    checkpoints.wait()
                    logs.write(*checkpoints.finished())
                    position = phases.batches.get_state()
                    saved = checkpoints.steps()
                    try:
                        plan = plan_rollback(monitor, saved, step, total, phases.number, position)
                    except TrainingError as error:
                        logs.alert(Divergence(step, str(error), "stop"))
                        raise
                    log.warning(plan.description())
                    logs.alert(Divergence(step, plan.reason, "roll_back", plan.step))
                    write_rollback(run, plan)
                    for array in jax.tree.leaves(state):  # make room for that of the checkpoint
                        array.delete()
                    state = phases.start(checkpoints, length, total)
                timed.step = step = int(state.step)
                unsaved = False
                logs.roll_back(step)
                goodput.record(step, force=True)
                log_phase()
                monitor.restore(phases.divergence)
                checkpoint_schedule = CheckpointSchedule(experiment, step, total)

            closed = unsaved = False
            log_phase()
            monitor.restore(phases.divergence)
            if phases.evaluations and step == 0 and experiment.init_from is not None:
                evaluate()  # baseline before training
            # Steps of the sync point of all processes may only rise.
            while (step < total or monitor.diverged) and not interrupted.at(step + monitor.skipped):
                if monitor.diverged:
                    roll_back()
                    continue
                while phases.begins_next(step):
                    logs.flush()
                    with timed("changing the phase"):
                        state = phases.begin_next(state)
                    log_phase()
                    monitor.clear()
                profiler.before(step, state)
                with timed(DATA):
                    batch = phases.trainer.place(next(phases.batches))
                with timed(STEP):
                    image_size = image_size_at(phases.experiment, step, total)
                    state, metrics = phases.trainer.step_at(image_size)(state, batch)
                step += 1
                with timed(DEVICE):
                    logs.step(step, metrics)

                ends = step == phases.end
                evaluates = is_scheduled(step, total, experiment.eval_every)
                unsaved |= checkpoint_schedule.is_scheduled(step, checkpoints.writing)
                unsaved |= rolls_back and step == experiment.divergence.first_checkpoint
                if unsaved or ends or evaluates or step == total:
                    with timed(DEVICE):
                        logs.flush()
                if phases.evaluations and (evaluates or (ends and experiment.eval_every)):
                    evaluate()
                logs.write(*checkpoints.finished())
                if ends or (unsaved and not (rolls_back and monitor.first)):
                    save()
                    unsaved = False
                timed.step = step
                if not closed:
                    try:
                        with timed("in the body of the loop"):
                            yield state, metrics
                    except GeneratorExit:  # `close`
                        closed = True
                        interrupted.request()
            if step < total:
                log.info(interrupted.announce(step, checkpoints.seconds, checkpoints.newest))
            save()
            own: dict[str, float] = {}
            if step == total:
                with timed("evaluating"):
                    own = phases.evaluations.own_metrics(state)
                if own:
                    logs.write({"step": step} | {f"eval/{k}": v for k, v in own.items()})
            with timed("waiting for the last checkpoint"):
                checkpoints.wait()
                logs.write(*checkpoints.finished())
        log.info(timed.summary())
        if bad_samples := phases.batches.bad.report():
            log.warning(bad_samples)
        results: dict[str, float] = {}
        if step < total:
            log.info(f"stopped at step {step}; resume with `vlm train --resume {run.folder}`")
        else:
            _check_skipped(int(state.skipped), total)
            with timed("writing the bundle"):
                bundle = run.export(phases.trainer, state, tokenizer)
                phases.supervision.save_head(run, phases.trainer, state)
            with timed("evaluating"):
                results = _evaluate_at_the_end(run, phases, state, bundle) | own
        goodput.record(step, force=True)
        log.info(str(goodput.tally))
        if step == total:
            goodput.finish()
        callbacks.end(results, finished=step == total)
        progress.result = TrainingResult(run.folder, step, total, results)
        callbacks.check()


def _open(
    experiment: Experiment | None, resume: str | os.PathLike | None, parts: dict[str, Any]
) -> Run:
    """Create the folder of a new run, or open that of a run to resume."""
    if resume is None:
        if experiment is None:
            raise ConfigError("there is nothing to train: give an experiment, or a run to resume")
        experiment = _with_splits(with_parts(experiment, **parts))
        require_bucket(experiment)
        require_source(experiment.data)
        experiment = resolve(experiment)
        for number in range(1, len(experiment.phases) + 1):
            require_source(in_phase(experiment, number).data)
        return Run.create(with_code_hashes(with_templates(experiment)))

    def change(before: Experiment) -> Experiment:
        changed = without_lost_callbacks(with_parts(experiment or before, **parts))
        changed = with_code_hashes(_with_splits(changed))
        report_changed_code(before, changed)
        return changed

    run = Run.open(resume, change)
    for name, (old, new) in run.changes.items():
        if name != "code":
            log.info(f"{name} is {brief(new)} from now on; it was {brief(old)}")
    return run


def _with_splits(experiment: Experiment) -> Experiment:
    return dataclasses.replace(experiment, data=with_own_splits(experiment.data))


def _evaluate_at_the_end(
    run: Run, phases: RunPhases, state: TrainState, bundle: Bundle
) -> dict[str, float]:
    """Write and log the report of a finished run; return its metrics."""
    evaluations = phases.evaluations
    if not evaluations:
        return {}
    report, results = finish(run, evaluations, state, bundle, phases.credits())
    if report.results:  # none if all evaluations are the user's
        log.info(as_text(report))
    if evaluations.held_out is not None:
        log.info(f"report {run.folder / 'report.html'}")
    return results


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
