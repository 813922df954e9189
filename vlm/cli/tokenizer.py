"""`vlm data tokenizer`: write the vocabulary that `vlm train --tokenizer-file` reads."""

import itertools
from collections.abc import Iterator
from typing import Annotated

from tyro.conf import arg

from vlm.cli import options
from vlm.cli.parse import UsageError
from vlm.config import Clean, DataConfig

LENGTH = 77  # context length in the saved rules; a config has its own


def tokenizer(
    out: options.NewFolder,
    /,
    model: Annotated[str | None, arg(metavar="MODEL")] = None,
    source: Annotated[str | None, arg(metavar="SOURCE")] = None,
    vocab_size: int = 32_000,
    clean: Clean = "none",
    captions: tuple[str, ...] = ("caption",),
    split: str = "train",
    data_dir: str | None = None,
    limit: int = 1_000_000,
) -> None:
    """Write a tokenizer.json for --tokenizer-file: that of a model, or a new one from captions.

    A new vocabulary is a byte-level BPE, with <pad> as token 0 and <eos> as token 1.

    Examples:
      vlm data tokenizer gs://my-bucket/tokenizers/c4_en --model google/siglip-base-patch16-224
      vlm data tokenizer bpe --source 'shards/*.tar' --captions txt --clean siglip

    Args:
        model: take the vocabulary of this model: a bundle, a folder or a public checkpoint.
        source: train a vocabulary on the captions of this data, as data.source of a config.
        vocab_size: number of tokens of a new vocabulary.
        clean: text cleaning before training, as tokenizer.clean of the config.
        captions: names of the features with texts, as data.captions.
        split: name of the split.
        data_dir: folder of prepared data.
        limit: number of examples to read, from the start.
    """
    if (model is None) == (source is None):
        raise UsageError("vlm data tokenizer needs one of --model and --source: give one of them")
    if limit < 1:
        raise UsageError(f"--limit {limit} reads nothing: give at least 1")
    folder = options.new_folder(out)
    if model is not None:
        from vlm.weights.registry import describe

        made = describe(model)[0].tokenizer
    else:
        from vlm.inputs.cleaning import CLEANERS
        from vlm.inputs.tokenizer import train_bpe

        config = DataConfig(source or "", captions=captions, data_dir=data_dir, eval_split=None)
        texts = map(CLEANERS[clean], _texts(config, split, limit))
        made = train_bpe(texts, vocab_size, LENGTH)
    made.save(folder)
    print(f"{folder / 'tokenizer.json'}: {made.vocab_size:,} tokens")


def _texts(config: DataConfig, split: str, limit: int) -> Iterator[str]:
    """Yield all captions of the first examples; bad samples are skipped."""
    import dataclasses

    from vlm.data.example_reader import ExampleReader
    from vlm.data.examples import captions_of
    from vlm.data.faults import BadSample

    config = dataclasses.replace(config, train_split=split)
    for read in itertools.islice(ExampleReader(config, split).read(), limit):
        try:
            if not isinstance(read.example, BadSample):
                yield from captions_of(read.example, config)
        except BadSample:
            continue
