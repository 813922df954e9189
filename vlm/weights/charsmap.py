"""Writer of SentencePiece's `precompiled_charsmap`, a map from characters to strings.

`tokenizers.normalizers.Precompiled` applies it in one pass. The format is a trie in a double array
(darts-clone), followed by zero-terminated strings:
https://github.com/google/sentencepiece/blob/master/src/normalizer.h
"""

import struct
from collections.abc import Mapping

_VALUE = 1 << 31  # flag of a unit with the offset of a string
_LEAF = 1 << 8  # flag of a unit that has such a child


def charsmap(table: Mapping[str, str]) -> bytes:
    """Return the argument of `Precompiled` for a table of single characters."""
    places: dict[bytes, int] = {}
    blob = b""
    for char, target in table.items():
        places[char.encode()] = len(blob)
        blob += target.encode() + b"\0"
    units: dict[int, int] = {0: 0}
    bases: set[int] = set()
    _grow(units, bases, 0, places)
    array = [units.get(i, 0) for i in range((max(units) | 255) + 1)]
    trie = struct.pack(f"<{len(array)}I", *array)
    return struct.pack("<I", len(trie)) + trie + blob


def _grow(units: dict[int, int], bases: set[int], at: int, keys: Mapping[bytes, int]) -> None:
    """Insert the children of the unit `at`, whose subtree has `keys`."""
    children: dict[int, dict[bytes, int]] = {}
    for key, place in keys.items():
        children.setdefault(key[0] if key else 0, {})[key[1:]] = place
    base = 1
    while base in bases or any(base ^ label in units for label in children):
        base += 1
    bases.add(base)
    units[at] |= (at ^ base) << 10
    for label, below in children.items():
        if label == 0:
            units[at] |= _LEAF
            units[base] = _VALUE | below[b""]
        else:
            units[base ^ label] = label
    for label, below in children.items():
        if label:
            _grow(units, bases, base ^ label, below)
