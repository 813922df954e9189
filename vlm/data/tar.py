"""Sequential reader of WebDataset tar files, which can start at any example.

Consecutive files that share a name up to the first dot are one example. `tarfile` is not used,
since positions need the offset of each example, and three headers per example must take
microseconds. Supports POSIX.1-2001 ustar and pax, and GNU long names and sizes.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vlm.data.storage import SequentialFile

BLOCK = 512  # bytes of a header; members are padded to a multiple
_SKIPPED = b"1234567"  # links, devices, folders
_MAX_META = 1 << 20  # bytes of a pax header or a long name; more means corruption
_MAX_PADDING = 1 << 20  # bytes of zeros after the last member; more means an incomplete download
_META = re.compile(r"__[^/]*__($|/)")  # reserved by webdataset


class CorruptFileError(Exception):
    """Error for a tar or Parquet file that is truncated or corrupt."""


class Group(NamedTuple):
    """One example: its members by extension, and the offset of the next example."""

    key: str
    parts: dict[str, bytes | None]  # None: skipped, since `wanted` is false for it
    end: int
    repeated: str | None = None  # extension of two of its members


def groups(
    file: SequentialFile,
    wanted: Callable[[str], bool] = lambda extension: True,
    *,
    whole: bool = True,
) -> Iterator[Group]:
    """Yield the examples of a tar file from the position of `file`, the start of an example.

    Members whose extension is not `wanted` are skipped. Names are split at the first dot, as in
    webdataset. Hidden members and those in `__NAME__` are ignored. A name without a dot is an
    example without an image, so that it is counted. Without `whole`, `file` is a part of an archive
    and has no end-of-archive marker.

    Raises:
        CorruptFileError: the file is truncated (raised after its complete examples), or data
            follows its end-of-archive marker.
        OSError: it cannot be read.
    """
    key, parts, repeated = None, {}, None
    while True:
        end = file.offset
        member = _next_member(file, whole)
        if member is None:
            break
        name, size, start, regular = member
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not regular or not stem or _META.match(name):
            file.skip(size + -size % BLOCK)
            continue
        now = f"{folder}/{stem}" if folder else stem
        if now != key:
            if key is not None:
                yield Group(key, parts, start, repeated)
            key, parts, repeated = now, {}, None
        extension = extension.lower()
        if extension in parts:
            repeated = extension
        if wanted(extension):
            data = file.read(size)
            if len(data) < size:
                raise CorruptFileError(f"{name} has {len(data):,} of its {size:,} bytes")
            parts[extension] = data
            file.skip(-size % BLOCK)
        else:
            parts[extension] = None
            file.skip(size + -size % BLOCK)
    if key is not None:
        yield Group(key, parts, end, repeated)
    if whole:
        _check_end(file)


def _check_end(file: SequentialFile) -> None:
    """Check that only zeros (record padding) follow an end-of-archive marker.

    Tar readers ignore another tar file there. Many zeros mean that the rest was never written.
    """
    for _ in range(_MAX_PADDING // (64 * BLOCK)):
        padding = file.read(64 * BLOCK)
        if padding.strip(b"\0"):
            raise CorruptFileError(
                f"data follows the end-of-archive marker before byte {file.offset:,}, as in files "
                "joined by cat: join them with tar --concatenate, or name each"
            )
        if len(padding) < 64 * BLOCK:
            return
    raise CorruptFileError(
        f"it holds nothing but zeros from byte {file.offset - _MAX_PADDING:,} on"
    )


def _next_member(file: SequentialFile, whole: bool) -> tuple[str, int, int, bool] | None:
    """Return (name, size, header offset, is a regular file), or None at the end of the archive."""
    start, name, size = file.offset, None, None
    while True:
        header = file.read(BLOCK)
        if not header and not whole and start == file.offset:
            return None
        if not header:
            raise CorruptFileError(
                f"it ends by byte {file.offset:,} without an end-of-archive marker"
            )
        if len(header) == BLOCK and not header.strip(b"\0"):  # the marker: two blocks of zeros
            return None
        if len(header) < BLOCK:
            raise CorruptFileError(f"the header at byte {file.offset - len(header):,} is cut")
        if _number(header[148:156]) != sum(header[:148]) + 256 + sum(header[156:]):
            raise CorruptFileError(f"there is no tar header at byte {file.offset - BLOCK:,}")
        length, kind = _number(header[124:136]), header[156:157]
        if kind in b"xgLK":
            if length > _MAX_META:
                raise CorruptFileError(f"the header at byte {file.offset - BLOCK:,} is damaged")
            meta = file.read(length)
            if len(meta) < length:
                raise CorruptFileError(f"the header at byte {start:,} is cut")
            file.skip(-length % BLOCK)
            if kind == b"L":
                name = meta.rstrip(b"\0").decode(errors="replace")
            elif kind == b"x":
                fields = _pax(meta)
                name = fields.get("path", name)
                if not fields.get("size", "0").isdecimal():
                    raise CorruptFileError(f"the header at byte {start:,} is damaged")
                size = int(fields["size"]) if "size" in fields else size
            continue
        if name is None:
            name, prefix = (
                field.partition(b"\0")[0].decode(errors="replace")
                for field in (header[:100], header[345:500] if header[257:262] == b"ustar" else b"")
            )
            if prefix and header[257:265] != b"ustar  \0":  # GNU stores times there
                name = f"{prefix}/{name}"
        regular = kind not in _SKIPPED
        return name, (length if size is None else size) if regular else 0, start, regular


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU: base 256
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    digits = field.strip(b" \0")
    try:
        return int(digits, 8) if digits else 0
    except ValueError:
        raise CorruptFileError("a header is damaged, or this is not a tar file") from None


def _pax(meta: bytes) -> dict[str, str]:
    fields = {}
    while meta:
        length, _, _ = meta.partition(b" ")
        try:
            line = meta[len(length) + 1 : int(length) - 1]
            meta = meta[int(length) :] if int(length) else b""
        except ValueError:
            break
        key, _, value = line.partition(b"=")
        fields[key.decode(errors="replace")] = value.decode(errors="replace")
    return fields
