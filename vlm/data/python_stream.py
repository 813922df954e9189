"""Streams of users' data sets that are read in their own order.

A grain `MapDataset` is read by index: element g is sample g of the run, and an index beyond its
length is the next epoch, with new random numbers where the data set has them. So any number of
processes and workers reads it exactly.

An iterable, such as a grain `IterDataset` or `DataLoader`, is read by one lane in each process:
its own part if a function makes that, else every n-th element. A position is a state of the
iterator, the number of elements read since, and a checksum of the last one. Without a state, a
resumed run reads the elements before its position again. At its end, an iterable starts again.
"""

import base64
import contextlib
import copy
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any

import grain
import numpy as np

from vlm.config import DataConfig
from vlm.data.examples import Example, check_features, passes, wanted_features
from vlm.data.faults import BadSample
from vlm.data.interleave import Stream, count_lanes
from vlm.data.python_source import (
    ENDLESS,
    NO_EXAMPLE,
    Elements,
    find_data,
    naming_errors,
    open_indexed,
    takes_process,
)
from vlm.data.random_access import IndexedStream
from vlm.data.shards import FILTERED, Sample
from vlm.errors import ConfigError, DataError

_BLOCK = 64  # elements between two states of an iterator
_END = object()

_log = logging.getLogger(__name__)


def open_stream(
    config: DataConfig,
    global_batch: int,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    lanes: int | None = None,
) -> Stream:
    """Open training data in its own order, in `lanes` (default: as the config says).

    Raises:
        DataError: a feature that the config names is missing, or there are no elements.
        ConfigError: an option that this data cannot follow.
    """
    config.refuse_unused('set access="random"', "shuffle")
    data = find_data(config, config.train_split, process_index, process_count)
    if isinstance(data, grain.MapDataset):
        lanes = lanes or count_lanes(config, global_batch, 2**31, process_count)
        return MapStream(config, lanes, seed)
    if lanes is not None:
        raise ConfigError(
            f"the part {config.source} of data.mixture is an iterable, which has no random access: "
            "give a data set with len and [], or mix with grain before training"
        )
    config.refuse_unused("an iterable is read by one iterator in each process", "interleave")
    if config.workers:
        raise ConfigError(
            f"data.workers {config.workers} cannot share the one iterator of {config.source}: set "
            "it to 0, and read ahead in the data set, as grain does with .mp_prefetch"
        )
    return IterableStream(config, process_index, process_count, seed)


def read_iterable(config: DataConfig, split: str) -> Iterator[Example | BadSample]:
    """Yield the examples of an iterable once, in order."""
    data = find_data(config, split)
    elements, where = Elements(config, data), f"{config.source} {split}"
    iterator, index = _start(data, where), 0
    while (element := _next(iterator, index, where)) is not _END:
        yield _example(elements, element, f"element {index} of {where}")
        index += 1


class _InOrder:
    """Source over a grain data set, whose index may exceed its length; None where it filters."""

    def __init__(self, config: DataConfig):
        self._source, self._config = open_indexed(config, config.train_split), config

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        try:
            example = self._source[index]
        except BadSample as fault:
            example = fault
        example = _or_filtered(example, self._config)
        if isinstance(example, BadSample):
            raise example
        return example


class MapStream(IndexedStream):
    """Stream over a grain `MapDataset`, in its own order."""

    def __init__(self, config: DataConfig, lanes: int, seed: int):
        super().__init__(_InOrder(config), lanes, seed, shuffle=False)
        count = len(self.source)
        size = "endless" if count == ENDLESS else f"{count:,} elements, repeated"
        self.description = f"{size}; in the order of the grain data set, not shuffled by vlm"


class IterableStream:
    """Stream over an iterable: one lane for each process."""

    fix_lanes = "each process reads one, so resume with as many processes"
    shard_length = examples = 0  # unknown
    faults: Sequence[dict[str, Any]] = ()

    def __init__(self, config: DataConfig, process_index: int, process_count: int, seed: int):
        self.config, self.lanes, self.seed = config, process_count, seed
        self.where = f"{config.source} {config.train_split}"
        self.own_parts = takes_process(config)
        data = self.data(process_index)
        iterator = _start(data, self.where)
        if isinstance(data, Iterator) and self.data(process_index) is data:
            raise DataError(
                f"{self.where} is an iterator, which can be read only once, so a run could not be "
                "resumed: give the data set, or a function that makes it"
            )
        self.fingerprint = f"{type(data).__name__}, by {'part' if self.own_parts else 'turns'}"
        first = _next(iterator, 0, self.where)
        if first is _END:
            raise DataError(f"{self.where} has no elements: give a data set that has")
        example = Elements(config, data).example(first, f"element 0 of {self.where}")
        known = [name for name in example if not name.startswith("\0")]
        check_features(config, known, f"the data set {self.where}")
        methods = _state_methods(iterator, data)
        if methods is not None:
            _state_of(methods, self.where)
        _close(iterator)
        parts = "its own part of it" if self.own_parts else f"every {process_count}th element"
        self.description = (
            "read in its own order, and again from its start when it ends"
            + (f"; each process takes {parts}" if process_count > 1 else "")
            + ("" if methods else "; it has no state, so a resumed run reads up to its position")
        )

    def data(self, process: int) -> Any:
        """Return the data set that a process reads."""
        return find_data(self.config, self.config.train_split, process, self.lanes)

    def lane(self, number: int, position: list[Any] | None, pool: Executor) -> "IterableLane":
        """Open lane `number`, at its start or at an earlier `position()`."""
        return IterableLane(self, number, position)


class IterableLane:
    """The elements that one process takes of an iterable."""

    def __init__(self, stream: IterableStream, number: int, position: list[Any] | None):
        self._stream, self._number = stream, number
        self._every = 1 if stream.own_parts else stream.lanes
        self._taken, self._passes, self._at, state, since, check = position or [0, 0, 0, None, 0, 0]
        self._open(state)
        self._since = self._check = 0
        for _ in range(since):
            if self._read() is _END:
                break
        if (self._since, self._check) != (since, check):
            raise DataError(
                f"{stream.where} does not repeat the elements before the checkpoint, so the run "
                "cannot be resumed exactly: make its order a function of a seed, or give its "
                "iterator get_state and set_state"
            )

    def __next__(self) -> Sample:
        stream = self._stream
        while True:
            element = self._read()
            if element is _END:
                self._restart()
            elif (self._at + self._since - 1) % self._every == self._number % self._every:
                break
        where = f"element {self._at + self._since - 1} of {stream.where}"
        example = _or_filtered(_example(self._elements, element, where), stream.config)
        self._taken += 1
        return Sample(example, (self._taken - 1) * stream.lanes + self._number)

    def position(self) -> list[Any]:
        """Return the numbers of samples, passes and elements, a state, and what was read since."""
        return [self._taken, self._passes, self._at, self._state, self._since, self._check]

    def close(self) -> None:
        """Stop the iterator."""
        _close(self._iterator)

    def _open(self, state: str | None) -> None:
        data, where = self._stream.data(self._number), self._stream.where
        self._elements, self._state = Elements(self._stream.config, data), state
        if hasattr(data, "load_state_dict"):  # a state that is loaded is that of later passes too
            data = copy.copy(data)
        methods = _state_methods(None, data)
        if methods is not None and state is not None:
            with naming_errors(f"load_state_dict of {where}", "resume with the data of the run"):
                methods[1](_decoded(state))
        self._iterator = _start(data, where)
        self._methods = methods or _state_methods(self._iterator, data)
        if methods is None and self._methods is not None and state is not None:
            with naming_errors(f"set_state of {where}", "resume with the data of the run"):
                self._methods[1](_decoded(state))

    def _read(self) -> Any:
        """Read an element; take a state of the iterator before it, once in a block."""
        where = self._stream.where
        if self._since >= _BLOCK and self._methods is not None:
            self._state = _state_of(self._methods, where)
            self._at, self._since = self._at + self._since, 0
        element = _next(self._iterator, self._at + self._since, where)
        if element is not _END:
            self._since += 1
            self._check = _checksum(element, self._stream.config)
        return element

    def _restart(self) -> None:
        if self._at + self._since == 0:
            raise DataError(f"{self._stream.where} has no elements: give a data set that has")
        if self._passes == 0:
            count = f"{self._at + self._since:,}"
            _log.info("%s ended after %s elements: starting again", self._stream.where, count)
        _close(self._iterator)
        self._passes, self._at, self._since, self._check = self._passes + 1, 0, 0, 0
        self._open(None)


def _start(data: Any, where: str) -> Any:
    with naming_errors(f"iter of {where}", "correct it"):
        return iter(data)


def _next(iterator: Any, index: int, where: str) -> Any:
    """Return the next element; `_END` after the last one."""
    with naming_errors(f"element {index} of {where}", "correct it, or leave the element out"):
        return next(iterator, _END)


def _example(elements: Elements, element: Any, where: str) -> Example | BadSample:
    try:
        return elements.example(element, where)
    except BadSample as fault:
        return fault


def _or_filtered(example: Example | BadSample, config: DataConfig) -> Example | BadSample | None:
    """Return `FILTERED` for an element that was None, or that `data.filters` rejects."""
    if isinstance(example, BadSample):
        return FILTERED if example.kind == NO_EXAMPLE else example
    return example if passes(example, config.filters) else FILTERED


def _close(iterator: Any) -> None:
    if hasattr(iterator, "close"):
        with contextlib.suppress(ValueError):  # a generator that another thread is reading
            iterator.close()


def _state_methods(iterator: Any, data: Any) -> tuple[Callable, Callable] | None:
    """Return the functions that get and set the state: of the data set, else of its iterator."""
    for owner, get, set_ in (
        (data, "state_dict", "load_state_dict"),  # Hugging Face, torch
        (iterator, "get_state", "set_state"),  # grain
        (iterator, "state_dict", "load_state_dict"),
    ):
        if hasattr(owner, get) and hasattr(owner, set_):
            return getattr(owner, get), getattr(owner, set_)
    return None


def _state_of(methods: tuple[Callable, Callable], where: str) -> str:
    """Return a state as JSON; DataError if it is neither that nor bytes."""
    with naming_errors(f"the state of {where}", "correct it"):
        state = methods[0]()
    if isinstance(state, bytes):
        return json.dumps({"base64": base64.b64encode(state).decode()})
    try:
        return json.dumps({"json": state})
    except (TypeError, ValueError):
        raise DataError(
            f"the state of {where} is a {type(state).__name__} that is not JSON, and a checkpoint "
            "stores JSON: return bytes, or a dict of numbers and texts"
        ) from None


def _decoded(text: str) -> Any:
    state = json.loads(text)
    return base64.b64decode(state["base64"]) if "base64" in state else state["json"]


def _checksum(element: Any, config: DataConfig) -> int:
    """Return a checksum of the texts of an element, and of its image if that is no object."""
    get = getattr(element, "get", lambda _: None)
    wanted = (name.partition("/")[0] for name in wanted_features(config))
    image = get(config.image)
    data = image if isinstance(image, bytes) else b""
    if isinstance(image, np.ndarray):
        data = np.ascontiguousarray(image).data
    return zlib.crc32(data, zlib.crc32(repr([get(name) for name in wanted]).encode()))
