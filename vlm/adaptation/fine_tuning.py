"""Fine-tuning on labelled images with `vlm.train`, for a length that fits a time budget.

Images are paired with the sentences of their classes, and the loss is the model's contrastive one
(FLYP, arXiv:2212.00638), so the result is a bundle, not a head. The text tower is frozen, so texts
keep their embeddings for all other images.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from flax import nnx

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
from vlm.models import adapters
from vlm.training.loop import train

BATCH = 64
EPOCHS = 10  # if the time allows
MIN_STEPS = 40  # few images are passed more often, up to this many steps
START = 30.0  # seconds before the first step, on an unknown machine
RATE, ADAPTER_RATE = 5e-5, 3e-4  # adapters start at zero


@dataclass(frozen=True)
class RunLength:
    """Steps and batch size of a run, and the expected seconds per step and before the first."""

    steps: int
    batch_size: int
    step: float
    start: float = START


def run_length(count: int, seconds_per_image: float, seconds: float) -> RunLength:
    """Compute the run on `count` images that fits into `seconds`."""
    devices = jax.device_count()
    batch = max(1, min(BATCH, count) // devices) * devices  # equal parts
    wanted = max(MIN_STEPS, math.ceil(EPOCHS * count / batch))
    step = batch * seconds_per_image
    left = seconds - START
    fits = wanted if math.isinf(left) else int(left / step)
    return RunLength(max(0, min(wanted, fits)), batch, step)


def fine_tune(
    model: Bundle,
    labelled: Labelled,
    templates: Sequence[str],
    folder: Path,
    name: str,
    length: RunLength,
    adapter: AdapterConfig | None = None,
    teacher: Bundle | None = None,
    seed: int = 0,
) -> tuple[Bundle, int]:
    """Train on the images; return the model and the number of trained parameters.

    Args:
        model: where training starts.
        labelled: training images.
        templates: sentences around a class name; one is drawn each time.
        folder: for the run, in `folder/name`, and a table of the images.
        name: of the run.
        length: of the run.
        adapter: low-rank adapters to train instead of the parameters, merged afterwards.
        teacher: a model to distil, by its similarities within a batch.
        seed: of image order and augmentation.

    Raises:
        VlmError: see `vlm.train`.
    """
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
        batch_size=length.batch_size,
        steps=length.steps,
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
        run = train(experiment)
    if not (run / "bundle").exists():  # the run was stopped
        raise KeyboardInterrupt
    tuned = load(run)
    if adapter is None:
        return tuned, sum(x.size for x in jax.tree.leaves(nnx.state(tuned.model.vision)))
    factors = adapters.adapter_of(tuned.model).values()
    arrays = (x for f in factors for x in (f.a, f.b, f.magnitude) if x is not None)
    return tuned.merged(), sum(x.size for x in arrays)


def _source_of(model: Bundle, copy: Path) -> str:
    """Return where the model was loaded from, or save a copy."""
    if model.source is not None and model.adapter is None:
        return model.source
    if not copy.exists():
        model.save(copy)
    return str(copy)
