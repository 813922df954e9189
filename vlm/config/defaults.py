"""What an experiment leaves open, filled in: the model of a run from scratch, rate and warm-up."""

import dataclasses
import math

from vlm.config.inputs import PreprocessConfig, TokenizerConfig
from vlm.config.model import ModelConfig
from vlm.config.training import Experiment

RATE, WARMUP = 1e-3, 0.05  # from scratch

# Full fine-tuning of a ViT-B with AdamW at a batch of 512 (FLYP, arXiv:2212.00638, section 4).
FINE_TUNING_RATE, REFERENCE_WIDTH, REFERENCE_BATCH = 1e-5, 768, 512
FINE_TUNING_WARMUP = 0.1
ADAPTER_FACTOR = 10  # of a low-rank adapter, which learns as fast as its model at so much more
LION_SHARE = 0.2  # of Adam's rate: three to ten times smaller (arXiv:2302.06675, section 4.1)


def with_defaults(experiment: Experiment) -> Experiment:
    """The experiment with a model, pixels, tokens, a rate and a warm-up, where it names none."""
    return with_default_rates(with_default_model(experiment))


def with_default_model(experiment: Experiment) -> Experiment:
    """The experiment with a ViT-B/16 and its pixels and tokens, where it names none."""
    return dataclasses.replace(
        experiment,
        model=experiment.model or ModelConfig(),
        preprocess=experiment.preprocess or PreprocessConfig(),
        tokenizer=experiment.tokenizer or TokenizerConfig(),
    )


def with_default_rates(experiment: Experiment) -> Experiment:
    """The experiment, its model known, with a learning rate and a warm-up."""
    e = experiment
    fine_tunes = e.init_from is not None and e.init_towers == "both"
    rate, warmup = e.optimizer.learning_rate, e.optimizer.warmup
    if rate is None:
        rate = fine_tuning_rate(e) if fine_tunes else RATE
    if warmup is None:
        warmup = FINE_TUNING_WARMUP if fine_tunes else WARMUP
    optimizer = dataclasses.replace(e.optimizer, learning_rate=rate, warmup=warmup)
    return dataclasses.replace(e, optimizer=optimizer)


def resumed_experiment(experiment: Experiment, before: Experiment) -> Experiment:
    """The experiment of a resumed run, with what it leaves open as the run has had it so far."""
    e = experiment
    optimizer = {
        name: getattr(before.optimizer, name)
        for name in ("learning_rate", "warmup")
        if getattr(e.optimizer, name) is None
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
    )


def fine_tuning_rate(experiment: Experiment) -> float:
    """A rate at which a trained model of this width keeps what it knows.

    Adam moves every weight by about the rate, so that the outputs of a wider layer move more: the
    rate falls as the width grows (arXiv:2203.03466). It falls with the square root of a batch
    below the reference, whose gradients are noisier (arXiv:2205.10287), and never grows with one
    above it.
    """
    e = experiment
    width = max(e.model.vision.width, e.model.text.width)
    rate = FINE_TUNING_RATE * REFERENCE_WIDTH / width
    rate *= math.sqrt(min(1.0, e.batch_size / REFERENCE_BATCH))
    if e.optimizer.name == "lion":
        rate *= LION_SHARE
    if e.adapter is not None:
        rate *= ADAPTER_FACTOR
    return float(f"{rate:.3g}")  # a number to read in the run's config
