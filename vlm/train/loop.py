"""The training loop: from an experiment to a run folder with a model that can be used."""

import contextlib
import os

from etils import epath

from vlm.cluster.processes import stop_all_on_failure
from vlm.config import Experiment
from vlm.data.pipeline import train_batches
from vlm.data.sources import credits, require_source
from vlm.errors import ConfigError, TrainingError
from vlm.paths import keep_compiled_programs
from vlm.sharding import batch_share, check_batch, make_mesh
from vlm.train.activity import DATA, DEVICE, STEP, Activity
from vlm.train.checkpoint import Checkpoints
from vlm.train.classes import with_templates
from vlm.train.console import print_on_first_process
from vlm.train.held_out import Evaluations, finish
from vlm.train.interrupt import Interrupted
from vlm.train.leaving import leave_bundle
from vlm.train.length import CheckpointRhythm, is_due
from vlm.train.lesson import Lesson
from vlm.train.logs import Logs, placement_table
from vlm.train.mirror import Mirror
from vlm.train.resolution import image_size_at
from vlm.train.run import Run
from vlm.train.start import open_tokenizer, start
from vlm.train.starting_model import resolve
from vlm.train.step import Trainer
from vlm.train.trace import Trace


@stop_all_on_failure()
def train(
    experiment: Experiment | None = None, *, resume: str | os.PathLike | None = None
) -> epath.Path:
    """Train `experiment` in a new run folder, or go on with the run in `resume`.

    Returns the run folder. SIGINT and SIGTERM save a checkpoint and leave; a resumed run ends as if
    it had not been left. Given both, the run goes on as `experiment`, which may differ where its
    checkpoints stay valid. With several processes, `vlm.cluster.processes.start` comes first.

    Raises:
        VlmError: whatever a user can mend, from a wrong batch size to a full disk.

    Example:
        >>> vlm.train.train(resume=folder / "no-run")
        Traceback (most recent call last):
            ...
        vlm.errors.CheckpointError: ...
    """
    keep_compiled_programs()
    with Activity() as doing:
        return _train(doing, experiment, resume)


def _train(
    doing: Activity, experiment: Experiment | None, resume: str | os.PathLike | None
) -> epath.Path:
    with doing("opening the run"):
        if resume is not None:
            run = Run.open(resume, experiment)
        elif experiment is not None:
            require_source(experiment.data)
            run = Run.create(with_templates(resolve(experiment)))
        else:
            raise ConfigError("there is nothing to train: give an experiment, or a run to resume")
    experiment = run.experiment
    with run.starting(), doing("opening the data"):
        mesh = make_mesh(experiment.mesh)
        check_batch(experiment.batch_size, mesh)
        check_batch(experiment.micro_batch_size or experiment.batch_size, mesh, "micro_batch_size")

        tokenizer = open_tokenizer(run)
        lesson = Lesson(experiment, mesh, tokenizer)
        trainer = Trainer(experiment, mesh, tokenizer.config, lesson.class_count, lesson.teacher)
        share, shares = batch_share(mesh)
        batches = train_batches(
            experiment.data,
            trainer.preprocess,
            lesson.tokenizer,
            batch_size=experiment.batch_size // shares,
            seed=experiment.seed,
            process_index=share,
            process_count=shares,
            run_folder=run.folder,
            reinforced=lesson.reinforced,
            finish=lesson.added,
        )
        evaluations = Evaluations(experiment, trainer, tokenizer)

    with (
        contextlib.closing(batches),
        Checkpoints(
            run.checkpoints, experiment.keep_checkpoints, experiment.keep_hours
        ) as checkpoints,
    ):
        with run.starting(), doing("making the state"):
            state = start(run, trainer, batches, checkpoints, lesson.classes)
        step, total = int(state.step), int(state.total_steps)
        run.record_start(step, total)
        rhythm = CheckpointRhythm(experiment, step, total)
        print_on_first_process(f"run folder {run.folder}")
        print_on_first_process(placement_table(state))
        with (
            Mirror(run.folder) as mirror,
            Logs(
                run,
                mirror,
                doing,
                first_step=step,
                total_steps=total,
                supervision=trainer.supervision,
                samples=batches.bad,
            ) as logs,
            Trace(mirror, experiment.profile) as trace,
            Interrupted() as interrupted,
        ):

            def save() -> None:
                logs.flush()
                with doing("writing a checkpoint"):
                    mirror.copy()  # a run that goes on from here has its log up to here
                    checkpoints.save(step, trainer.kept(state), batches.get_state())

            def evaluate() -> None:
                logs.flush()
                with doing("evaluating"):
                    logs.write({"step": step, **evaluations.metrics(state)})
                logs.restart_clock()

            if evaluations and step == 0 and experiment.init_from is not None:
                evaluate()  # what the model can do before it learns more
            while step < total and not interrupted.at(step):
                trace.before(step, state)
                with doing(DATA):
                    batch = trainer.place(next(batches))
                with doing(STEP):
                    step_once = trainer.step_at(image_size_at(experiment, step, total))
                    state, metrics = step_once(state, batch)
                step += 1
                with doing(DEVICE):
                    logs.step(step, metrics)

                if evaluations and is_due(step, total, experiment.eval_every):
                    evaluate()
                logs.write(*checkpoints.finished())
                if rhythm.is_due(step, checkpoints.writing):
                    save()
                doing.step = step
            if step < total:
                print_on_first_process(
                    interrupted.announce(step, checkpoints.seconds, checkpoints.newest)
                )
            save()
            with doing("waiting for the last checkpoint"):
                checkpoints.wait()
                logs.write(*checkpoints.finished())
    print_on_first_process(doing.summary())
    if said := batches.bad.report():
        print_on_first_process(said)
    if step < total:
        print_on_first_process(f"left at step {step}; go on with `vlm train --resume {run.folder}`")
        return run.folder

    if skipped := int(state.skipped):
        print_on_first_process(
            f"{skipped:,} of {total:,} steps were skipped: their loss or gradient was not finite"
        )
    if skipped == total:
        raise TrainingError(
            f"the loss or its gradient was not finite at every one of the {total:,} steps, so the "
            "model is as it began: start a new run with a lower --optimizer.learning-rate, or look "
            "at its data"
        )
    with doing("writing the bundle"):
        bundle = leave_bundle(run, trainer, state, tokenizer)
        lesson.leave(run, trainer, state)
    if evaluations:
        with doing("evaluating"):
            report = finish(run, evaluations, state, bundle, credits(experiment.data))
        print_on_first_process(report)
        if evaluations.held is not None:
            print_on_first_process(f"report {run.folder / 'report.html'}")
    return run.folder
