"""Exchange of the shards of a state between processes that hold parts of it."""

import collections
import functools
import itertools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlm.cluster.processes import exchange_texts
from vlm.training.local_parts import Part, Shard, digest

_CHUNK = 2**24  # bytes that are sent at a time


class Holders(NamedTuple):
    """The processes that hold a shard, and its bytes."""

    size: int
    processes: list[int]

    @property
    def sender(self) -> int:
        return self.processes[0]


def combined(held: Mapping[Shard, Part]) -> tuple[dict[str, Any], dict[Shard, Holders]]:
    """Describe the state whose parts all processes hold; also return who holds each shard.

    The description has the data state as `data`, the digest of the `layout`, and the `bytes` of the
    whole state. All processes must call it, with the shards that each holds.
    """
    about: dict[str, Any] = {}
    for part in list(held.values())[:1]:
        about = {name: part.about[name] for name in ("data", "bytes")}
        about["layout"] = digest(part.about["layout"])
    own = [[*shard, part.sizes[shard]] for shard, part in held.items()]
    holders: dict[Shard, Holders] = {}
    for process, text in enumerate(exchange_texts(json.dumps([about, own]))):
        theirs, shards = json.loads(text)
        about = about or theirs
        for *value, size in shards:
            holders.setdefault(Shard.of(value), Holders(size, [])).processes.append(process)
    return about, holders


def pieces_of(abstract: Any, holders: Mapping[Shard, Holders]) -> dict[Shard, list[Shard]]:
    """Return the shards that the devices of this process need, each with those it is made of."""
    sources: dict[int, list[Shard]] = collections.defaultdict(list)
    for shard in holders:
        sources[shard.array].append(shard)
    pieces: dict[Shard, list[Shard]] = {}
    for number, x in enumerate(jax.tree.leaves(abstract)):
        for index in x.sharding.addressable_devices_indices_map(x.shape).values():
            piece = Shard.at(number, index, x.shape)
            pieces[piece] = [s for s in sources[number] if s.overlap(piece) is not None]
    return pieces


def send(
    shards: list[Shard],
    holders: Mapping[Shard, Holders],
    needed: set[Shard],
    values: dict[Shard, np.ndarray],
) -> None:
    """Send the bytes of shards to the processes that need them, into `values`.

    All processes must call it. The bytes of many shards go together, in chunks of one size, so that
    one program is compiled.
    """
    for sender in sorted({holders[shard].sender for shard in shards}):
        group = [shard for shard in shards if holders[shard].sender == sender]
        ends = list(itertools.accumulate(holders[shard].size for shard in group))
        spans = {s: slice(end - holders[s].size, end) for s, end in zip(group, ends, strict=True)}
        chunk = min(_CHUNK, -(-ends[-1] // 4) * 4)
        is_source = sender == jax.process_index()
        is_target = not needed.isdisjoint(set(group) - values.keys())
        size = -(-ends[-1] // chunk) * chunk
        content = np.zeros(size if is_source or is_target else chunk, np.uint8)
        if is_source:
            for shard, span in spans.items():
                content[span] = values[shard]
        for start in range(0, size, chunk):
            place = start if len(content) == size else 0  # others only take part
            words = content[place : place + chunk].view(np.uint32)  # sums of integers are exact
            words[:] = multihost_utils.broadcast_one_to_all(words, is_source)
        if is_target:
            for shard, span in spans.items():
                values.setdefault(shard, content[span])


def assembled(
    abstract: Any, pieces: Mapping[Shard, list[Shard]], values: Mapping[Shard, np.ndarray]
) -> Any:
    """Return the state in the shapes and shardings of `abstract`, from the bytes of its shards."""

    def make(number: int, x: jax.ShapeDtypeStruct) -> jax.Array:
        @functools.cache  # devices may hold the same piece
        def filled(piece: Shard) -> np.ndarray:
            array = np.empty(piece.shape, x.dtype)
            for source in pieces[piece]:
                part = values[source].view(x.dtype).reshape(source.shape)
                array[piece.overlap(source)] = part[source.overlap(piece)]
            return array

        return jax.make_array_from_callback(
            x.shape, x.sharding, lambda index: filled(Shard.at(number, index, x.shape))
        )

    leaves, tree = jax.tree.flatten(abstract)
    return tree.unflatten(make(number, x) for number, x in enumerate(leaves))
