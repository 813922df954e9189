"""A validation split that is held out of the training split, for sources without one."""

import collections

import numpy as np

from vlm.config import DataConfig
from vlm.data.examples import Source, Subset, label_of, scan
from vlm.data.faults import BadSample
from vlm.errors import DataError

SEED = 0  # the same split in every run


def part_of(source: Source, config: DataConfig, held: bool) -> Subset:
    """Return the part of a source that `config.hold_out` holds out, or the rest.

    Of each class, `hold_out` of its examples are held out: at least one of two or more, and never
    all. Without labels, the share is of all examples. Examples without a label stay in training.

    Raises:
        DataError: nothing can be held out.
    """
    groups: dict[str, list[int]] = collections.defaultdict(list)
    for index, example in enumerate(scan(source)):
        try:
            if isinstance(example, BadSample):
                continue  # training counts and lists it
            groups[label_of(example, config) if config.label else ""].append(index)
        except BadSample:
            continue
    rng, mask = np.random.default_rng(SEED), np.zeros(len(source), bool)
    for _, rows in sorted(groups.items()):
        count = min(max(1, round(config.hold_out * len(rows))), len(rows) - 1)
        mask[rng.permutation(rows)[:count]] = True
    if not mask.any():
        raise DataError(
            f"{config.source} has no class of two examples, so data.hold_out {config.hold_out:g} "
            "holds out nothing: add examples, or set data.eval_split=None and data.hold_out=0"
        )
    return Subset(source, np.flatnonzero(mask == held))
