"""TFRecord files of `tf.train.Example` records, as TFDS and img2dataset write them.

The offsets of the records are found once, by their lengths, and stored in the cache as those of tar
shards are. So each record can be read on its own. The lengths' checksums are checked then; those of
the data are not. Compressed files cannot be read in parts, and are refused.
"""

import struct
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt64

from vlm.config import DataConfig
from vlm.data.array_record import parse
from vlm.data.examples import Example, check_features, known_features
from vlm.data.faults import BadSample
from vlm.data.shard_index import Offsets, index_for
from vlm.data.shards import shard_fault
from vlm.data.splits import split_files
from vlm.data.storage import CHUNK, SequentialFile, read_range, size_of
from vlm.data.tar import CorruptFileError
from vlm.errors import DataError, warn_once
from vlm.paths import is_remote

_HEAD = struct.Struct("<QI")  # length of the data, and its checksum
_TAIL = 4  # bytes of the data's checksum
_SCANNED = 8 << 10  # bytes of a read between two lengths
_GZIP, _ZLIB = b"\x1f\x8b", b"x"


class Records(Offsets):
    """The records of some files as bytes, in order; reads one record per request."""

    def __init__(self, names: Sequence[str]):
        super().__init__(index_for(list(names), _offsets_of))
        self.files = list(names)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._first, index, "right")) - 1
        start, end = self._offsets[index + number : index + number + 2].tolist()
        name = self.files[number]
        where = f"record {index - int(self._first[number])} of {name}"
        try:
            data = read_range(name, start + _HEAD.size, end - _TAIL)
        except OSError as error:
            why = f"{where} cannot be read ({error})"
            raise BadSample.failed_read(where, why, error) from None
        if len(data) < end - start - _HEAD.size - _TAIL:
            why = f"{where} is cut off: the file is shorter than it was when it was first opened"
            raise BadSample("failed read", where, why)
        return data

    def count(self, number: int) -> int:
        """Return the records of a file."""
        return int(self._first[number + 1] - self._first[number])


class TfRecordSource:
    """Source over the records of some files, in order."""

    def __init__(self, names: Sequence[str], config: DataConfig):
        self._records, self._config = Records(names), config
        self.files, self.faults = self._records.files, self._records.faults
        if not len(self):
            fault = BadSample(**self.faults[0]) if self.faults else None
            why = fault or f"{config.source} holds no records"
            raise DataError(f"{why}: check data.source") from fault
        for fault in self.faults:
            warn_once(f"{fault['why']}: the records after that place are lost")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        where = f"record {index} of {self._config.source}"
        return parse(self._records[int(index)], self._config.image, where)


def open_split(config: DataConfig, split: str) -> TfRecordSource:
    """Open the files of a split; DataError if they are missing, or lack wanted features."""
    source = TfRecordSource(split_files(config.source, split, config.train_split), config)
    known = known_features(source, config, config.source)
    check_features(config, known, f"the data set {config.source}")
    return source


def _offsets_of(name: str) -> tuple[UInt64[np.ndarray, " n"], int, list[BadSample]]:
    """Return the offsets of the records of a file (and of the end), its size, and its faults."""
    offsets = [0]
    size, faults = 0, []
    file = SequentialFile(name, 0, CHUNK if is_remote(name) else _SCANNED)
    try:
        size = size_of(name)
        while file.offset < size:
            head = file.read(_HEAD.size)
            if (not offsets[-1] and head[:2] == _GZIP) or (head[:1] == _ZLIB and len(offsets) == 1):
                raise CorruptFileError(
                    "it is compressed, or not a TFRecord file: write it without compression"
                )
            if len(head) < _HEAD.size:
                raise CorruptFileError(f"it ends inside of record {len(offsets) - 1}")
            length, checksum = _HEAD.unpack(head)
            if checksum != masked_crc32c(head[:8]):
                raise CorruptFileError(f"the length of record {len(offsets) - 1} is corrupt")
            end = file.offset + length + _TAIL
            if end > size:
                raise CorruptFileError(f"it ends inside of record {len(offsets) - 1}")
            file.skip(length + _TAIL)
            offsets.append(end)
    except (OSError, CorruptFileError) as error:
        faults.append(shard_fault(error, name))
    finally:
        file.close()
    return np.array(offsets, np.uint64), size, faults


def masked_crc32c(data: bytes) -> int:
    """Return the checksum of a few bytes, as TFRecord files have it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _table()  # of CRC-32C (Castagnoli)
