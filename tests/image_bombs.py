"""Small image files that are expensive to decode."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def saved(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def scan_bomb(scans: int, width: int = 8000, height: int = 4000) -> bytes:
    """Return a black JPEG with further scans, each of which passes over all coefficients."""
    data = saved(Image.new("RGB", (width, height)), "JPEG", progressive=True, subsampling=0)
    # A Huffman table with one code, for "end of band, for 16,384 and more blocks".
    table = b"\xff\xc4" + struct.pack(">H", 20) + b"\x10" + bytes([1] + [0] * 15) + b"\xe0"
    bits = ("0" + "1" * 14) * -(-(width // 8) * (height // 8) // 32767)
    bits += "1" * (-len(bits) % 8)
    coded = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    # Refines one bit of the coefficients 1 to 63 of the first component.
    header = b"\xff\xda" + struct.pack(">H", 8) + bytes([1, 1, 0, 1, 63, 0x10])
    return data[:-2] + (table + header + coded.replace(b"\xff", b"\xff\x00")) * scans + b"\xff\xd9"


def png(width: int, height: int, depth: int, colour: int) -> bytes:
    """Return a black PNG of any depth, such as 16 bits per channel."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    row = bytes(1 + -(-width * channels * depth // 8))
    packer = zlib.compressobj(1)
    content = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()

    def chunk(kind: bytes, data: bytes = b"") -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND")
    return b"\x89PNG\r\n\x1a\n" + chunks


def tiff_of_one_tile(side: int) -> bytes:
    """Return a TIFF of 100 x 100 pixels in one compressed tile of `side` x `side`."""
    packer = zlib.compressobj(1)
    row = bytes(side)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    tags = {256: 100, 257: 100, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side}
    offset = 8 + 2 + 12 * (len(tags) + 2) + 4
    tags |= {324: offset, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags))
    return start + entries + struct.pack("<I", 0) + data


def slow_qoi(pixels: int) -> bytes:
    """Return a QOI file of a few MB that Pillow decodes in Python, at a microsecond a pixel."""
    side = int(pixels**0.5)
    header = b"qoif" + struct.pack(">IIBB", side, side, 4, 0)
    content = np.tile(np.array([0xFE, 1, 2, 3, 0xFE, 4, 5, 6], np.uint8), side * side // 2 + 1)
    return header + content.tobytes() + bytes(7) + b"\x01"
