"""Fine-tuning on labelled images with `vlm.train`, for a length that fits a time budget.

Images are paired with the sentences of their classes, and the loss is the model's contrastive one
(FLYP, arXiv:2212.00638), so the result is a bundle, not a head. The text tower is frozen, so texts
keep their embeddings for all other images.
"""

import contextlib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from flax import nnx

from vlm.adaptation.cost import Estimate, TimeBudget
from vlm.adaptation.labelled import NAMES, Labelled, write_table
from vlm.bundle import Bundle, load
from vlm.config import (
    AdapterConfig,
    AugmentConfig,
    DataConfig,
    DistillConfig,
    Experiment,
    OptimizerConfig,
)
from vlm.data.pipeline import TrainIterator
from vlm.models import adapters
from vlm.training.loop import train
from vlm.training.schedule import step_times
from vlm.training.step import Trainer

BATCH = 64
EPOCHS = 10  # if the time allows
FEWEST_STEPS = 40  # few images are passed more often, up to this many steps
LEAST_STEPS = 8  # with fewer, a run is not worth its start
RATE, ADAPTER_RATE = 5e-5, 3e-4  # adapters start at zero


def batch_and_steps(count: int) -> tuple[int, int]:
    """Return the batch size, at most the number of images, and the steps if the time allows."""
    devices = jax.device_count()
    batch = max(1, min(BATCH, count) // devices) * devices  # equal parts
    return batch, max(FEWEST_STEPS, math.ceil(EPOCHS * count / batch))


def fine_tune(
    model: Bundle,
    labelled: Labelled,
    templates: Sequence[str],
    folder: Path,
    name: str,
    budget: TimeBudget,
    finishing: float = 0.0,
    adapter: AdapterConfig | None = None,
    teacher: Bundle | None = None,
    seed: int = 0,
) -> tuple[Bundle, int, str]:
    """Train on the images; return the model, the number of trained parameters and the length.

    The number of steps is chosen when the first ones are compiled and the next ones measured.

    Args:
        model: where training starts.
        labelled: training images.
        templates: sentences around a class name; one is drawn each time.
        folder: for the run, in `folder/name`, and a table of the images.
        name: of the run.
        budget: time for the run.
        finishing: seconds that are needed after the run.
        adapter: low-rank adapters to train instead of the parameters, merged afterwards.
        teacher: a model to distil, by its similarities within a batch.
        seed: of image order and augmentation.

    Raises:
        VlmError: see `vlm.train`.
        OverBudget: `LEAST_STEPS` do not fit the budget.
    """
    batch, wanted = batch_and_steps(len(labelled))
    began, steps, terminal = time.monotonic(), 0, sys.stderr

    def length(trainer: Trainer, batches: TrainIterator) -> int:
        nonlocal steps
        opened = time.monotonic() - began
        times = step_times(trainer, batches, limit=max(1.0, 0.05 * min(budget.left, 1e3)))
        warm_up = time.monotonic() - began - sum(times)
        # Writing the model and opening it again takes about as long as opening it here.
        estimate = Estimate.of(times, warm_up, once=opened + finishing)
        with contextlib.redirect_stderr(terminal):
            steps = budget.plan(estimate, wanted, LEAST_STEPS, f"steps of {batch} images")
        return steps

    table = write_table(labelled, folder / "data")
    experiment = Experiment(
        name=f"{model.name} {name}",
        model=model.config,
        preprocess=model.preprocess.config,
        tokenizer=model.tokenizer.config,
        data=DataConfig(
            source=str(table),
            label="label",
            class_names=str(table.parent / NAMES),
            captions=(),
            templates=tuple(templates),
            eval_split=None,
            augment=AugmentConfig(crop=(0.8, 1.0)),
            cache=True,
        ),
        optimizer=OptimizerConfig(
            learning_rate=RATE if adapter is None else ADAPTER_RATE, warmup=0.1, max_scale=None
        ),
        objective="flyp",
        batch_size=batch,
        steps=wanted,
        init_from=_source_of(model, folder / "start"),
        adapter=adapter,
        distill=None if teacher is None else DistillConfig(_source_of(teacher, folder / "teacher")),
        lock="text" if adapter is None else "none",
        seed=seed,
        checkpoint_every=1.0,
        checkpoint_minutes=None,
        keep_checkpoints=1,
        run_dir=str(folder / name),
    )
    with (
        open(folder / f"{name}.txt", "w", encoding="utf-8") as log,
        contextlib.redirect_stderr(log),
    ):
        run = train(experiment, length=length)
    if not (run / "bundle").exists():  # the run was stopped
        raise KeyboardInterrupt
    tuned, about = load(run), f"{steps} steps of {batch}"
    if adapter is None:
        return tuned, sum(x.size for x in jax.tree.leaves(nnx.state(tuned.model.vision))), about
    factors = adapters.adapter_of(tuned.model).values()
    arrays = (x for f in factors for x in (f.a, f.b, f.magnitude) if x is not None)
    return tuned.merged(), sum(x.size for x in arrays), about


def _source_of(model: Bundle, copy: Path) -> str:
    """Return where the model was loaded from, or save a copy."""
    if model.source is not None and model.adapter is None:
        return model.source
    if not copy.exists():
        model.save(copy)
    return str(copy)
