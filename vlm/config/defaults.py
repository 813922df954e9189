"""Default values for unset Experiment fields: model, inputs, learning rate and warm-up."""

import dataclasses
import math

from vlm.config.code import Code
from vlm.config.inputs import PreprocessConfig, TokenizerConfig
from vlm.config.model import ModelConfig
from vlm.config.training import Experiment

RATE, WARMUP = 1e-3, 0.05  # from scratch

# Full fine-tuning of a ViT-B with AdamW at a batch of 512 (FLYP, arXiv:2212.00638, section 4).
FINE_TUNING_RATE, REFERENCE_WIDTH, REFERENCE_BATCH = 1e-5, 768, 512
FINE_TUNING_WARMUP = 0.1
ADAPTER_FACTOR = 10  # learning rate of adapters relative to full fine-tuning
LION_FACTOR = 0.2  # relative to Adam: three to ten times smaller (arXiv:2302.06675, section 4.1)


def with_defaults(experiment: Experiment) -> Experiment:
    """Fill in model, preprocessing, tokenizer, learning rate and warm-up where they are unset."""
    return with_default_rates(with_default_model(experiment))


def with_default_model(experiment: Experiment) -> Experiment:
    """Fill in a ViT-B/16, its preprocessing and its tokenizer where they are unset."""
    return dataclasses.replace(
        experiment,
        model=experiment.model or ModelConfig(),
        preprocess=experiment.preprocess or PreprocessConfig(),
        tokenizer=experiment.tokenizer or TokenizerConfig(),
    )


def with_default_rates(experiment: Experiment) -> Experiment:
    """Fill in the learning rate and warm-up, which depend on the model."""
    e = experiment
    fine_tunes = e.init_from is not None and e.init_towers == "both"
    rate, warmup = e.optimizer.learning_rate, e.optimizer.warmup
    if e.optimizer.transformation is not None:
        return e
    if rate is None:
        rate = fine_tuning_rate(e) if fine_tunes else RATE
    has_own = isinstance(e.optimizer.schedule, Code) or e.optimizer.timescale is not None
    if warmup is None and not has_own:
        warmup = FINE_TUNING_WARMUP if fine_tunes else WARMUP
    optimizer = dataclasses.replace(e.optimizer, learning_rate=rate, warmup=warmup)
    return dataclasses.replace(e, optimizer=optimizer)


def resumed_experiment(experiment: Experiment, before: Experiment) -> Experiment:
    """Fill in unset fields of a resumed run from its experiment so far."""
    e = experiment
    optimizer = {
        name: getattr(before.optimizer, name)
        for name in ("learning_rate", "warmup")
        if getattr(e.optimizer, name) is None
        and not (name == "warmup" and e.optimizer.timescale is not None)
    }
    return dataclasses.replace(
        e,
        model=e.model or before.model,
        preprocess=e.preprocess or before.preprocess,
        tokenizer=e.tokenizer or before.tokenizer,
        data=dataclasses.replace(e.data, templates=e.data.templates or before.data.templates),
        optimizer=dataclasses.replace(e.optimizer, **optimizer),
        init_image_size=None,
        init_context_length=None,
        run_dir=e.run_dir or before.run_dir,
    )


def fine_tuning_rate(experiment: Experiment) -> float:
    """Compute a learning rate for fine-tuning that is low enough to avoid forgetting.

    The rate is inversely proportional to the width, because an Adam step changes every weight by
    about the rate (arXiv:2203.03466). It is proportional to the square root of a batch size below
    the reference (arXiv:2205.10287), and constant above it.
    """
    e = experiment
    width = max(e.model.vision.width, e.model.text.width)
    rate = FINE_TUNING_RATE * REFERENCE_WIDTH / width
    rate *= math.sqrt(min(1.0, e.batch_size / REFERENCE_BATCH))
    if e.optimizer.name == "lion":
        rate *= LION_FACTOR
    if e.adapter is not None:
        rate *= ADAPTER_FACTOR
    return float(f"{rate:.3g}")  # short in the run's config
