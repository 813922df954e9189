"""The training loop: from an experiment to a run folder with a model that can be used."""

import contextlib
import os
import time

from etils import epath

from vlm.bundle import Bundle
from vlm.cluster.processes import stop_all_on_failure
from vlm.config import Experiment
from vlm.data.pipeline import train_batches
from vlm.data.sources import credits
from vlm.sharding import batch_share, check_batch, global_batch, make_mesh
from vlm.train.checkpoint import Checkpoints
from vlm.train.held_out import Evaluations, finish
from vlm.train.interrupt import Interrupted
from vlm.train.length import is_due
from vlm.train.logs import Logs, placement_table, print_on_first_process
from vlm.train.resolution import image_size_at
from vlm.train.run import Run
from vlm.train.start import open_tokenizer, start
from vlm.train.step import Trainer
from vlm.train.trace import Trace


@stop_all_on_failure()
def train(
    experiment: Experiment | None = None, *, resume: str | os.PathLike | None = None
) -> epath.Path:
    """Train `experiment` in a new run folder, or go on with the run in `resume`.

    Returns the run folder. SIGINT and SIGTERM save a checkpoint and leave; a resumed run ends as if
    it had not been left. With several processes, `vlm.cluster.processes.start` comes first.

    Raises:
        VlmError: whatever a user can mend, from a wrong batch size to a full disk.
    """
    run = Run.create(experiment) if resume is None else Run.open(resume)
    experiment = run.experiment
    with run.starting():
        mesh = make_mesh(experiment.mesh)
        check_batch(experiment.batch_size, mesh)
        check_batch(experiment.micro_batch_size or experiment.batch_size, mesh, "micro_batch_size")

        tokenizer = open_tokenizer(run)
        trainer = Trainer(experiment, mesh, tokenizer.config)
        share, shares = batch_share(mesh)
        batches = train_batches(
            experiment.data,
            trainer.preprocess,
            tokenizer,
            batch_size=experiment.batch_size // shares,
            seed=experiment.seed,
            process_index=share,
            process_count=shares,
            run_folder=run.folder,
        )
        evaluations = Evaluations(experiment, trainer, tokenizer)

    with (
        contextlib.closing(batches),
        Checkpoints(run.checkpoints, experiment.keep_checkpoints) as checkpoints,
    ):
        with run.starting():
            state = start(trainer, batches, checkpoints, resumed=resume is not None)
        step, total = int(state.step), int(state.total_steps)
        print_on_first_process(f"run folder {run.folder}")
        print_on_first_process(placement_table(state))
        with (
            Logs(run, first_step=step, total_steps=total) as logs,
            Trace(run, experiment.profile) as trace,
            Interrupted() as interrupted,
        ):
            while step < total and not interrupted.at(step):
                trace.before(step, state)
                waited = time.perf_counter()
                batch = global_batch(next(batches), mesh)
                waited = time.perf_counter() - waited
                step_once = trainer.step_at(image_size_at(experiment, step, total))
                state, metrics = step_once(state, batch)
                step += 1
                logs.step(step, metrics, waited)

                if evaluations and is_due(step, total, experiment.eval_every):
                    logs.flush()
                    logs.write({"step": step, **evaluations.metrics(state)})
                    logs.restart_clock()
                if is_due(step, total, experiment.checkpoint_every):
                    logs.flush()
                    checkpoints.save(step, state, batches.get_state())
            logs.flush()
            checkpoints.save(step, state, batches.get_state())
            checkpoints.wait()
    if said := batches.bad.report():
        print_on_first_process(said)
    if step < total:
        print_on_first_process(f"left at step {step}; go on with `vlm train --resume {run.folder}`")
        return run.folder

    bundle = Bundle(trainer.model(state), trainer.preprocess, tokenizer, name=experiment.name)
    bundle.save(run.bundle)
    if evaluations:
        report = finish(run, evaluations, state, bundle, credits(experiment.data))
        print_on_first_process(report)
        if evaluations.held is not None:
            print_on_first_process(f"report {run.folder / 'report.html'}")
    return run.folder
