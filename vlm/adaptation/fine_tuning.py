"""Fine-tuning on labelled images as a run of `vlm train`, of a length that fits into a budget.

The images are paired with the sentences of their classes, and the loss is the model's own
contrastive one (FLYP, arXiv:2212.00638): what comes out is a model as before, not a head. The text
tower is left alone, so that the words keep the meaning that they had for all other images.
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
EPOCHS = 10  # where there is time for them
FEWEST_EPOCH_STEPS = 40  # of few images more passes are taken, up to so many steps
START = 30.0  # seconds that a run takes before its first step, on a machine that is not known yet
RATE, ADAPTER_RATE = 5e-5, 3e-4  # adapters start at nothing and have further to go


@dataclass(frozen=True)
class Plan:
    """How long a run is: its steps and batch, and what they are expected to take, in seconds."""

    steps: int
    batch_size: int
    step: float
    start: float = START


def plan(model: Bundle, labelled: Labelled, pace: float, seconds: float) -> Plan:
    """The run that fits into `seconds`, at `pace` seconds of training for an image."""
    devices = jax.device_count()
    batch = max(1, min(BATCH, len(labelled)) // devices) * devices  # each takes as many
    wanted = max(FEWEST_EPOCH_STEPS, math.ceil(EPOCHS * len(labelled) / batch))
    step = batch * pace
    left = seconds - START
    fits = wanted if math.isinf(left) else int(left / step)
    return Plan(max(0, min(wanted, fits)), batch, step)


def fine_tune(
    model: Bundle,
    labelled: Labelled,
    templates: Sequence[str],
    folder: Path,
    name: str,
    length: Plan,
    adapter: AdapterConfig | None = None,
    teacher: Bundle | None = None,
    seed: int = 0,
) -> tuple[Bundle, int]:
    """The model after a run of training on the images, and how many parameters were trained.

    The folder of the run is `folder/name`.

    Args:
        model: where training starts.
        labelled: the images to learn from.
        templates: sentences around a class's name, one of which is drawn each time.
        folder: for the run, and a table of the images.
        name: of the run.
        length: how long it is.
        adapter: low-rank adapters, which are trained in place of the parameters, and merged.
        teacher: a model whose similarities within a batch are learned beside the labels.
        seed: of the order of the images and how they are changed.

    Raises:
        VlmError: what `vlm.train` refuses.
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
        init_from=_place_of(model, folder / "start"),
        adapter=adapter,
        distill=None if teacher is None else DistillConfig(_place_of(teacher, folder / "teacher")),
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
    if not (run / "bundle").exists():  # it was asked to stop
        raise KeyboardInterrupt
    tuned = load(run)
    if adapter is None:
        return tuned, sum(x.size for x in jax.tree.leaves(nnx.state(tuned.model.vision)))
    factors = adapters.adapter_of(tuned.model).values()
    arrays = (x for f in factors for x in (f.a, f.b, f.magnitude) if x is not None)
    return tuned.merged(), sum(x.size for x in arrays)


def _place_of(model: Bundle, copy: Path) -> str:
    """Where a run finds the model: where it was loaded from, or a copy of it."""
    if model.source is not None and model.adapter is None:
        return model.source
    if not copy.exists():
        model.save(copy)
    return str(copy)
