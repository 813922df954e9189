"""The training loop: from an experiment to a run folder with a trained model."""

import contextlib
import dataclasses
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import jax

from vlm.bundle import Bundle
from vlm.cluster.processes import stop_all_on_failure
from vlm.config import Experiment, in_phase, require_bucket
from vlm.data.sources import require_source, with_own_splits
from vlm.errors import ConfigError, brief
from vlm.paths import keep_compiled_programs
from vlm.training.active_run import ActiveRun
from vlm.training.console import log
from vlm.training.custom_parts import (
    Loss,
    report_changed_code,
    with_code_hashes,
    with_parts,
    without_lost_callbacks,
)
from vlm.training.init_from import resolve
from vlm.training.phases import RunPhases
from vlm.training.result import TrainingResult
from vlm.training.run import Run
from vlm.training.schedule import Length, length_in_steps
from vlm.training.step import Trainer, TrainState
from vlm.training.supervision import with_templates
from vlm.training.watchdog import ActivityTimer


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
    active, closed = ActiveRun(run, timed, length), False
    progress.phases = active.phases
    with active.recording():
        with active.training():
            active.evaluate_baseline()
            while active.goes_on():
                if active.diverged:
                    active.roll_back()
                    continue
                active.begin_phases()
                batch = active.next_batch()
                metrics = active.train_step(batch)
                active.log_step(metrics)
                if active.evaluates:
                    active.evaluate()
                active.log_checkpoints()
                if active.saves:
                    active.save()
                if active.saves_locally:
                    active.save_locally()
                timed.step = active.step
                if not closed:
                    try:
                        with timed("in the body of the loop"):
                            yield active.state, metrics
                    except GeneratorExit:  # `close`
                        closed = True
                        active.stop()
            active.save_last()
        progress.result = active.finish()


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
