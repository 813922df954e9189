"""The training loop: from an experiment to a run folder with a trained model."""

import contextlib
import dataclasses
import os

from etils import epath

from vlm.cluster.processes import stop_all_on_failure
from vlm.config import Experiment, require_bucket
from vlm.data.pipeline import train_batches
from vlm.data.sources import credits, require_source, with_own_splits
from vlm.errors import ConfigError, TrainingError
from vlm.paths import keep_compiled_programs
from vlm.sharding import batch_shard, check_batch, make_mesh
from vlm.training.bucket_sync import BucketSync
from vlm.training.checkpoint import Checkpoints
from vlm.training.console import as_text, log
from vlm.training.evals import Evaluations, finish
from vlm.training.init_from import resolve
from vlm.training.interrupt import Interrupted
from vlm.training.logs import Logs, StepProfiler
from vlm.training.opening_report import report_start
from vlm.training.resolution import image_size_at
from vlm.training.run import Run
from vlm.training.schedule import CheckpointSchedule, Length, is_scheduled, length_in_steps
from vlm.training.start import open_tokenizer, start
from vlm.training.step import Trainer
from vlm.training.supervision import TrainingSupervision, with_templates
from vlm.training.watchdog import DATA, DEVICE, STEP, ActivityTimer


@stop_all_on_failure()
def train(
    experiment: Experiment | None = None,
    *,
    resume: str | os.PathLike | None = None,
    length: Length = length_in_steps,
) -> epath.Path:
    """Train `experiment` in a new run folder, or resume the run in `resume`.

    Returns the run folder. SIGINT, SIGTERM and SIGHUP save a checkpoint and exit; a resumed run
    ends with the same model as an uninterrupted one. Given both arguments, the run resumes as
    `experiment`, whose changes must keep its checkpoints valid. With several processes, call
    `vlm.cluster.processes.start` first. `length` chooses the number of steps of a new run before
    its first step, from the trainer and the batches; by default as the experiment says.

    Raises:
        VlmError: any error that the user can fix, from a wrong batch size to a full disk.

    Example:
        >>> vlm.training.train(resume=folder / "no-run")
        Traceback (most recent call last):
            ...
        vlm.errors.CheckpointError: ...
    """
    keep_compiled_programs()
    with ActivityTimer() as timed:
        return _train(timed, experiment, resume, length)


def _train(
    timed: ActivityTimer,
    experiment: Experiment | None,
    resume: str | os.PathLike | None,
    length: Length,
) -> epath.Path:
    with timed("opening the run"):
        if experiment is not None:
            data = with_own_splits(experiment.data)
            experiment = dataclasses.replace(experiment, data=data)
        if resume is not None:
            run = Run.open(resume, experiment)
        elif experiment is not None:
            require_bucket(experiment)
            require_source(experiment.data)
            run = Run.create(with_templates(resolve(experiment)))
        else:
            raise ConfigError("there is nothing to train: give an experiment, or a run to resume")
    experiment = run.experiment
    with run.starting(), timed("opening the data"):
        mesh = make_mesh(experiment.mesh)
        check_batch(experiment.batch_size, mesh)
        check_batch(experiment.micro_batch_size or experiment.batch_size, mesh, "micro_batch_size")

        tokenizer = open_tokenizer(run)
        supervision = TrainingSupervision(experiment, mesh, tokenizer)
        trainer = Trainer(
            experiment, mesh, tokenizer.config, supervision.class_count, supervision.teacher
        )
        shard, shards = batch_shard(mesh)
        batches = train_batches(
            experiment.data,
            trainer.preprocess,
            supervision.tokenizer,
            batch_size=experiment.batch_size // shards,
            seed=experiment.seed,
            process_index=shard,
            process_count=shards,
            run_folder=run.folder,
            reinforced=supervision.reinforced,
            finish=supervision.add_targets,
        )
        evaluations = Evaluations(experiment, trainer, tokenizer)

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(batches))
        checkpoints = stack.enter_context(
            Checkpoints(run.checkpoints, experiment.keep_checkpoints, experiment.keep_hours)
        )
        with run.starting(), timed("making the state"):
            state = start(run, trainer, batches, checkpoints, supervision.classes, length)
        step, total = int(state.step), int(state.total_steps)
        run.record_start(step, total)
        checkpoint_schedule = CheckpointSchedule(experiment, step, total)
        report_start(run, trainer, state, batches, evaluations)

        bucket_sync = stack.enter_context(BucketSync(run.folder))
        logs = Logs(
            run,
            bucket_sync,
            timed,
            first_step=step,
            total_steps=total,
            supervision=trainer.supervision,
            samples=batches.bad,
        )
        stack.enter_context(logs)
        profiler = stack.enter_context(StepProfiler(bucket_sync, experiment.profile))
        interrupted = stack.enter_context(Interrupted())

        def save() -> None:
            logs.flush()
            with timed("writing a checkpoint"):
                bucket_sync.copy()  # a run resumed from here has its log up to here
                checkpoints.save(step, trainer.checkpoint_state(state), batches.get_state())

        def evaluate() -> None:
            logs.flush()
            with timed("evaluating"):
                logs.write({"step": step, **evaluations.metrics(state)})
            logs.restart_clock()

        if evaluations and step == 0 and experiment.init_from is not None:
            evaluate()  # baseline before training
        while step < total and not interrupted.at(step):
            profiler.before(step, state)
            with timed(DATA):
                batch = trainer.place(next(batches))
            with timed(STEP):
                train_step = trainer.step_at(image_size_at(experiment, step, total))
                state, metrics = train_step(state, batch)
            step += 1
            with timed(DEVICE):
                logs.step(step, metrics)

            if evaluations and is_scheduled(step, total, experiment.eval_every):
                evaluate()
            logs.write(*checkpoints.finished())
            if checkpoint_schedule.is_scheduled(step, checkpoints.writing):
                save()
            timed.step = step
        if step < total:
            log.info(interrupted.announce(step, checkpoints.seconds, checkpoints.newest))
        save()
        with timed("waiting for the last checkpoint"):
            checkpoints.wait()
            logs.write(*checkpoints.finished())
    log.info(timed.summary())
    if bad_samples := batches.bad.report():
        log.warning(bad_samples)
    if step < total:
        log.info(f"stopped at step {step}; resume with `vlm train --resume {run.folder}`")
        return run.folder
    _check_skipped(int(state.skipped), total)
    with timed("writing the bundle"):
        bundle = run.export(trainer, state, tokenizer)
        supervision.save_head(run, trainer, state)
    if evaluations:
        with timed("evaluating"):
            report = finish(run, evaluations, state, bundle, credits(experiment.data))
        log.info(as_text(report))
        if evaluations.held_out is not None:
            log.info(f"report {run.folder / 'report.html'}")
    return run.folder


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
