"""Duplicate removal in one pass: of equal images, near duplicates, and images of an evaluation set.

An image is compared with the earlier ones that were kept, so the first one of a group stays. The
result depends on the order of the source alone. The signatures of the images of each shard are
stored beside the shards, so that a resumed preparation compares with all of them.

The perceptual hash is that of the library imagehash (`phash`), which follows Krawetz,
hackerfactor.com/blog/index.php?/archives/432-Looks-Like-It.html: the signs of the 64 lowest
frequencies of a cosine transform, relative to their median.
"""

import array
import itertools
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath
from PIL import Image

from vlm.data.dataset_stats import duplicate_key
from vlm.data.faults import BadSample

MAX_DISTANCE = 15  # bits; beyond, unrelated images are near

_HASH, _SAMPLED = 8, 32  # side of the hash, and of the image that is transformed
_COLOUR = 24  # largest difference of the mean colours of near duplicates, per channel
_CHECKED = 4  # pixels of a side, for each one of the transformed image, before it is reduced

Signatures = dict[str, bytes]  # by the name of the index


@runtime_checkable
class SignatureIndex(Protocol):
    """Signatures of images, and the search for one that is near another.

    Attributes:
        name: of its files, and of its entry in `Signatures`.
        kind: of the bad samples that it finds.
        size: bytes of a signature.
    """

    name: str
    kind: str
    size: int

    def add(self, signature: bytes) -> None: ...

    def has_near(self, signature: bytes) -> bool: ...


class EqualIndex:
    """Images that look equal: those with the same `duplicate_key`."""

    name, kind, size = "", "duplicate", 8

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def add(self, signature: bytes) -> None:
        self._seen.add(signature)

    def has_near(self, signature: bytes) -> bool:
        return signature in self._seen


class HashIndex:
    """Perceptual hashes, searched for one that differs in at most `distance` bits.

    The 64 bits are cut into `distance` + 1 bands. Of two hashes within the distance, one band is
    equal (Norouzi et al., 2012, "Fast search in Hamming space with multi-index hashing"), so only
    the hashes with an equal band are compared. It takes 12 bytes per image and band.

    The mean colours must be near too: the hash of an image of one colour, or of a drawing in
    another colour, is equal.
    """

    name, kind, size = "hash", "near duplicate", 12

    def __init__(self, distance: int):
        self._distance = distance
        edges = [64 * band // (distance + 1) for band in range(distance + 2)]
        self._bands = [(low, (1 << (high - low)) - 1) for low, high in itertools.pairwise(edges)]
        self._buckets: list[dict[int, tuple[array.array, bytearray]]] = [{} for _ in self._bands]

    def add(self, signature: bytes) -> None:
        value = int.from_bytes(signature[:8], "little")
        for (low, mask), buckets in zip(self._bands, self._buckets, strict=True):
            hashes, colours = buckets.setdefault(
                value >> low & mask, (array.array("Q"), bytearray())
            )
            hashes.append(value)
            colours += signature[8:]

    def has_near(self, signature: bytes) -> bool:
        value = int.from_bytes(signature[:8], "little")
        colour = np.frombuffer(signature, np.uint8)[8:].astype(np.int16)
        for (low, mask), buckets in zip(self._bands, self._buckets, strict=True):
            if (found := buckets.get(value >> low & mask)) is None:
                continue
            others = np.frombuffer(found[0], np.uint64)
            near = np.bitwise_count(others ^ np.uint64(value)) <= self._distance
            if near.any():
                colours = np.frombuffer(found[1], np.uint8).reshape(-1, 4)[near]
                if (np.abs(colours - colour).max(axis=1) <= _COLOUR).any():
                    return True
        return False


def perceptual_hash(image: Image.Image) -> bytes:
    """Compute the 64-bit perceptual hash of an image in mode RGB, and its mean colour (4 bytes).

    A large image is reduced by a box filter first, which changes at most a few bits.
    """
    from scipy.fft import dct

    smallest = _CHECKED * _SAMPLED
    if (factor := min(image.size) // smallest) > 1:
        image = image.reduce(factor)
    small = image.convert("L").resize((_SAMPLED, _SAMPLED), Image.Resampling.LANCZOS)
    waves = dct(dct(np.asarray(small, np.float64), axis=0), axis=1)
    low = np.asarray(waves)[:_HASH, :_HASH]
    mean = np.asarray(image.resize((1, 1), Image.Resampling.BOX)).tobytes()
    return np.packbits(low > np.median(low)).tobytes() + mean + b"\0"


def signatures_of(image: Image.Image, equal: bool, near: bool) -> Signatures:
    """Compute the signatures of an image for `EqualIndex` and `HashIndex`."""
    found = {EqualIndex.name: duplicate_key(image)} if equal else {}
    return found | ({HashIndex.name: perceptual_hash(image)} if near else {})


class SeenImages:
    """The images that were kept, and those of an evaluation set, by their signatures.

    Args:
        kept: indexes of the images that were kept.
        reference: indexes of an evaluation set, with the same names.
        reference_name: of the evaluation set, for `fault`.
    """

    def __init__(
        self,
        kept: Sequence[SignatureIndex],
        reference: Sequence[SignatureIndex] = (),
        reference_name: str = "",
    ):
        self.kept, self._reference, self._reference_name = kept, reference, reference_name

    def expect(self, name: str, signatures: Sequence[bytes]) -> None:
        """Let the indexes of a name search for a batch at once."""
        for index in (*self.kept, *self._reference):
            if index.name == name and hasattr(index, "expect"):
                index.expect(signatures)  # pyright: ignore[reportAttributeAccessIssue]

    def fault(self, signatures: Signatures) -> BadSample | None:
        """Return why an image is skipped; or None, and remember it."""
        for index in self._reference:
            if index.has_near(signatures[index.name]):
                why = f"{index.kind} of an image of {self._reference_name}"
                return BadSample("in evaluation set", "", why)
        for index in self.kept:
            if index.has_near(signatures[index.name]):
                return BadSample(index.kind, "", f"{index.kind} of an earlier image")
        for index in self.kept:
            index.add(signatures[index.name])
        return None


def write_signatures(
    folder: epath.Path, name: str, indexes: Sequence[SignatureIndex], rows: list[Signatures]
) -> None:
    """Write the signatures of images, one file for each index."""
    folder.mkdir(exist_ok=True)
    for index in indexes:
        _file(folder, name, index).write_bytes(b"".join(row[index.name] for row in rows))


def load_signatures(folder: epath.Path, name: str, indexes: Sequence[SignatureIndex]) -> None:
    """Add stored signatures to the indexes."""
    for index in indexes:
        data = _file(folder, name, index).read_bytes()
        for start in range(0, len(data), index.size):
            index.add(data[start : start + index.size])


def _file(folder: epath.Path, name: str, index: SignatureIndex) -> Any:
    return folder / (f"{name}.{index.name}" if index.name else name)
