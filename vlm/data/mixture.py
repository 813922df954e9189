"""Mixture of sources as one stream: each sample of a lane is drawn from one of the parts.

All parts are read in the same lanes. The position of a lane is its number of samples and the
positions of its parts, for any kind of source.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np

from vlm.config import DataConfig, MixturePart
from vlm.data.examples import PART, Example
from vlm.data.interleave import Stream
from vlm.data.randomness import key, uniforms
from vlm.data.shards import SHARD_READERS, Lane, Sample
from vlm.errors import ConfigError


def part_configs(config: DataConfig) -> list[DataConfig]:
    """Return the config of each part: that of the mixture, with the fields set in the part."""
    configs = []
    for part in config.mixture:
        own = {
            field.name: value
            for field in dataclasses.fields(part)
            if field.name not in ("weight", "epochs", "examples")
            and (value := getattr(part, field.name)) is not None
        }
        # Captions of a part replace a label of the mixture, and a label of a part its captions.
        label = part.label or (config.label if part.captions is None else None)
        own["label"] = label
        if label:
            own |= {"captions": (), "caption_weights": ()}
        else:
            own |= {"templates": DataConfig.templates, "class_names": None}
        if own.get("access", config.access) == "random":
            own |= {"interleave": None, "shuffle": DataConfig.shuffle}
        alone = {"mixture": (), "mixture_temperature": None}
        configs.append(dataclasses.replace(config, **alone, **own))
    return configs


class Mixture:
    """Stream over several parts with sampling weights; ConfigError if these are invalid."""

    def __init__(self, config: DataConfig, parts: list[Stream], *, lanes: int, seed: int):
        self.parts, self.lanes, self.seed = parts, lanes, seed
        weights = np.array(_weights(config, parts))
        self.shares = weights / weights.sum()
        self._bounds = np.cumsum(self.shares)
        self.fingerprint = " + ".join(part.fingerprint for part in parts)
        self.examples = sum(part.examples for part in parts)
        named = zip(config.mixture, self.shares, strict=True)
        shares = ", ".join(f"{part.source} {share:.1%}" for part, share in named)
        self.description = f"about {self.examples:,} examples read as a stream: {shares}"
        self.shard_length = max(part.shard_length for part in parts)
        self.readers = max(getattr(part, "readers", SHARD_READERS) for part in parts)
        fixes = [getattr(part, "fix_mixing", None) for part in parts]
        self.fix_mixing = "; ".join(dict.fromkeys(fix for fix in fixes if fix)) or None
        self.faults: Sequence[dict[str, Any]] = [f for part in parts for f in part.faults]

    def lane(self, number: int, position: list[Any] | None, pool: Executor) -> "MixtureLane":
        """Open lane `number`, at its start or at an earlier `position()`."""
        taken, *places = position or [0, *[None] * len(self.parts)]
        lanes = [
            part.lane(number, place, pool) for part, place in zip(self.parts, places, strict=True)
        ]
        return MixtureLane(self, number, lanes, taken)

    def part_of(self, lane: int, number: int) -> int:
        """Draw the part of sample `number` of a lane."""
        u = uniforms(key(self.seed, 4, lane), np.array([number]), 1)[0, 0]
        return min(int(np.searchsorted(self._bounds, u, "right")), len(self.parts) - 1)


class MixtureLane:
    """Lane of a mixture: draws samples from the lanes of its parts."""

    def __init__(self, mixture: Mixture, number: int, lanes: list[Lane], taken: int):
        self._mixture, self._number, self._lanes, self._taken = mixture, number, lanes, taken

    def __next__(self) -> Sample:
        part = self._mixture.part_of(self._number, self._taken)
        self._taken += 1
        example, position = next(self._lanes[part])
        if isinstance(example, dict):
            example[PART] = part + 1  # 0 is the config of the mixture
        elif callable(example):
            example = functools.partial(_tagged, example, part + 1)
        return Sample(example, position * len(self._lanes) + part)

    def position(self) -> list[Any]:
        """Return the number of samples already taken, and the position of each part."""
        return [self._taken, *(lane.position() for lane in self._lanes)]

    def close(self) -> None:
        """Close the parts."""
        for lane in self._lanes:
            lane.close()


def _tagged(read: Callable[[], Example], part: int) -> Example:
    return {**read(), PART: part}


def _weights(config: DataConfig, parts: list[Stream]) -> list[float]:
    mixture = config.mixture
    if config.mixture_temperature is not None:
        pairs = zip(mixture, parts, strict=True)
        power = 1 / config.mixture_temperature
        counts = [_length(*pair, "data.mixture_temperature") for pair in pairs]
        return [count**power for count in counts]
    by_passes = any(part.epochs is not None for part in mixture)
    weights = []
    for part, stream in zip(mixture, parts, strict=True):
        if not by_passes:
            weights.append(1.0 if part.weight is None else part.weight)
            continue
        if part.epochs is None or part.weight is not None:
            raise ConfigError(
                f"the part {part.source} of data.mixture has "
                f"{'a weight' if part.weight is not None else 'no epochs'} beside parts with "
                "epochs: give every part a weight, or every part epochs"
            )
        weights.append(part.epochs * _length(part, stream, "epochs"))
    if min(weights) < 0 or sum(weights) <= 0:
        raise ConfigError(
            f"data.mixture has weights {weights}: set each to at least 0, and one above 0"
        )
    return weights


def _length(part: MixturePart, stream: Stream, what: str) -> int:
    """Return the number of examples of a part, which `what` needs."""
    source = getattr(stream, "source", None)
    examples = part.examples or (len(source) if source is not None else None)
    if examples is None:
        raise ConfigError(
            f"the part {part.source} of data.mixture is a stream of unknown length: set "
            f"examples=N, or give weights instead of {what}"
        )
    return examples
