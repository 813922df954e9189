"""Shapes of the batches of an experiment: image sequence lengths and text lengths."""

import dataclasses
from typing import Any, NamedTuple

from vlm.config.encoders import EncoderTextConfig
from vlm.config.model import TextConfig, TextTowerConfig
from vlm.errors import ConfigError

STEPS_IN_SIZE = 16  # batch sizes are multiples of this fraction of the whole batch


class BatchSize(NamedTuple):
    """Size of a global batch: its pairs, and the sequence length of its images in patches."""

    pairs: int
    patches: int | None = None  # None: that of the preprocessing


def sizes_within(
    batch_size: int, max_patches: int, lengths: tuple[int, ...]
) -> tuple[BatchSize, ...]:
    """Return the batch size at each of `lengths` with the patches of a whole batch.

    The pairs are a multiple of `batch_size` / 16, or of its largest smaller divisor, so that all
    sizes divide over the same devices.
    """
    count = range(STEPS_IN_SIZE, batch_size + 1)
    unit = next((batch_size // n for n in count if batch_size % n == 0), 1)
    return tuple(BatchSize(batch_size * max_patches // n // unit * unit, n) for n in lengths)


def batch_sizes(experiment: Any) -> tuple[BatchSize, ...]:
    """Return the size of the global batch at each of `sequence_lengths`; one without them.

    Each has at most as many patches as `batch_size` images of `max_patches`; see `sizes_within`.

    Example:
        >>> from vlm.config.batch_sizes import batch_sizes
        >>> batch_sizes(experiment)
        (BatchSize(pairs=8, patches=None),)
    """
    e = experiment
    if not e.sequence_lengths:
        return (BatchSize(e.batch_size),)
    assert e.preprocess.max_patches is not None  # `Experiment.check` has checked it
    return sizes_within(e.batch_size, e.preprocess.max_patches, e.sequence_lengths)


def at_size(experiment: Any, size: BatchSize) -> Any:
    """Return an experiment whose batches all have `size`, one of its `batch_sizes`."""
    e = experiment
    if size.patches is None:
        return e
    micro = e.micro_batch_size
    return dataclasses.replace(
        e,
        batch_size=size.pairs,
        micro_batch_size=None if micro is None else size.pairs * micro // e.batch_size,
        sequence_lengths=(),
        model=dataclasses.replace(
            e.model, vision=dataclasses.replace(e.model.vision, max_patches=size.patches)
        ),
        preprocess=dataclasses.replace(e.preprocess, max_patches=size.patches),
    )


def at_text_length(experiment: Any, length: int) -> Any:
    """Return an experiment whose texts all have `length` tokens."""
    e = experiment
    return dataclasses.replace(
        e,
        text_lengths=(),
        model=dataclasses.replace(
            e.model, text=dataclasses.replace(e.model.text, context_length=length)
        ),
        tokenizer=e.tokenizer and dataclasses.replace(e.tokenizer, context_length=length),
    )


def mean_pairs(experiment: Any) -> float:
    """Return the mean number of pairs in a batch."""
    sizes = batch_sizes(experiment)
    return sum(size.pairs for size in sizes) / len(sizes)


def check_sequence_lengths(experiment: Any, max_patches: int) -> None:
    """Check the image sequence lengths of a NaFlex model."""
    e = experiment
    if not e.sequence_lengths:
        return
    if e.phases:
        raise ConfigError(
            f"sequence_lengths {e.sequence_lengths} are of a whole run, and this one has phases: "
            "leave one out, or train the phases as runs of their own with --init-from"
        )
    longest = max(e.sequence_lengths)
    if longest > max_patches:
        raise ConfigError(
            f"sequence_lengths has {longest} patches, and preprocess.max_patches is "
            f"{max_patches}: choose lengths of at most that many"
        )
    parts = e.batch_size // (e.micro_batch_size or e.batch_size)
    for pairs, length in sizes_within(e.batch_size, max_patches, e.sequence_lengths):
        if pairs % parts:
            raise ConfigError(
                f"batch_size {e.batch_size} is {pairs} pairs at the sequence length "
                f"{length}, which do not divide into {parts} micro-batches: make batch_size a "
                f"multiple of {STEPS_IN_SIZE * parts}"
            )


def check_text_lengths(experiment: Any, text: TextTowerConfig) -> None:
    """Check the text lengths against the text tower and the rest of the experiment."""
    e = experiment
    if not e.text_lengths:
        return
    if max(e.text_lengths) >= text.context_length:
        raise ConfigError(
            f"text_lengths has {max(e.text_lengths)} tokens, and the context is "
            f"{text.context_length}, which is always a length: choose shorter ones"
        )
    if not isinstance(text, TextConfig | EncoderTextConfig) or not text.ignores_padding:
        why = "is a module of your own"
        if isinstance(text, TextConfig):
            why = f'pools "{text.pool}" and '
            masked = text.pad_id is not None
            why += "reads a position after the padding" if masked else "has no pad_id"
        raise ConfigError(
            f"text_lengths needs a text tower that ignores padding, and this one {why}: leave "
            "it empty"
        )
    others = {
        "text_masking": (e.text_masking, "drops padding first already"),
        "model.text.dropout": (text.dropout, "draws its masks for a length"),
        "objective": (e.objective == "classification" and e.objective, "reads no text"),
        "selection": (
            e.selection and e.selection.score,
            "chooses rows of super-batches of the whole context",
        ),
        "seconds": (
            e.seconds,
            "is measured in the first steps, before all shapes are compiled",
        ),
    }
    for name, (value, why) in others.items():
        if value:
            raise ConfigError(
                f"text_lengths does not fit {name} {value!r}, which {why}: leave one out"
            )
    for name in e.loss_intermediates:
        if name.startswith("text/"):
            raise ConfigError(
                f"text_lengths gives {name!r} of loss_intermediates several lengths: leave one out"
            )
