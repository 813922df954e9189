"""A map from characters to strings in the form of SentencePiece's `precompiled_charsmap`.

`tokenizers.normalizers.Precompiled` applies it in one pass, however many characters it has. The
form is a trie as a double array (Yata's darts-clone), and behind it the strings, each ended by 0:
https://github.com/google/sentencepiece/blob/master/src/normalizer.h
"""

import struct
from collections.abc import Mapping

_VALUE = 1 << 31  # of a unit that holds the place of a string
_LEAF = 1 << 8  # of a unit behind which such a unit stands


def charsmap(table: Mapping[str, str]) -> bytes:
    """The bytes that `Precompiled` takes for a table of single characters."""
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
    """Place the children of the unit `at`, below which stand `keys`."""
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
