"""Mutated image files: what `open_image` makes of them, beside strict Pillow.

    python tests/fuzz/images.py --cases 10000

A file is one of PNG, JPEG, WebP, AVIF and GIF, still or animated, in several modes; a mutation cuts
it, flips or overwrites bytes, drops, doubles or swaps parts, splices in parts of another file of
its format, gives it another's header, or changes its sizes, for PNG also with checksums that are
right again. Every second one is opened as in a program that lets Pillow fill up damaged files.

For each the result must equal what strict Pillow decodes, or be a DataError in one line with the
file's name; each case has 20 seconds. They run in processes of their own, so that a crash is seen.
"""

import argparse
import collections
import functools
import io
import pathlib
import signal
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
from PIL import Image, ImageFile

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from vlm.errors import DataError
from vlm.inputs.opening import FORMATS, open_image

SECONDS = 20
CHUNK = 1000  # cases of one process


@functools.cache
def originals() -> dict[str, list[bytes]]:
    """Good files of each format."""
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 256, (5, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    rgb = Image.fromarray(smooth)
    noise = Image.fromarray(rng.integers(0, 256, smooth.shape, np.uint8))
    alpha = rgb.copy()
    alpha.putalpha(noise.convert("L"))
    sixteen = Image.fromarray(rng.integers(0, 65536, smooth.shape[:2]).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [noise, rgb.rotate(90)], "duration": 50}

    def saved(image: Image.Image, form: str, **options) -> bytes:
        out = io.BytesIO()
        image.save(out, form, **options)
        return out.getvalue()

    return {
        "PNG": [
            *(saved(image, "PNG") for image in (rgb, noise, alpha, sixteen, rgb.convert("1"))),
            saved(rgb.quantize(16), "PNG", transparency=3),
            saved(rgb, "PNG", exif=exif, dpi=(72, 72)),
            saved(alpha, "PNG", **frames),
        ],
        "JPEG": [
            *(saved(image, "JPEG") for image in (rgb, noise, rgb.convert("L"))),
            saved(noise, "JPEG", progressive=True),
            saved(noise.convert("CMYK"), "JPEG"),
            saved(noise, "JPEG", exif=exif, restart_marker_rows=1, subsampling=0),
        ],
        "WEBP": [
            saved(rgb, "WEBP", exif=exif),
            saved(alpha, "WEBP", lossless=True),
            saved(alpha, "WEBP", quality=50),
            saved(noise, "WEBP", lossless=True),
            saved(alpha, "WEBP", **frames),
        ],
        "AVIF": [
            saved(rgb, "AVIF", exif=exif),
            saved(alpha, "AVIF", quality=90),
            saved(noise.convert("L"), "AVIF"),
            saved(rgb, "AVIF", **frames),
        ],
        "GIF": [
            *(saved(image, "GIF") for image in (rgb, noise.convert("L"), rgb.convert("1"))),
            saved(rgb.quantize(16), "GIF", transparency=3, interlace=True),
            saved(rgb, "GIF", **frames),
        ],
    }


# ----------------------------------------------------------------------------------- mutations


def place(data: bytes, rng, longest: int = 64) -> tuple[int, int]:
    start = int(rng.integers(len(data)))
    return start, min(len(data), start + 1 + int(rng.integers(longest)))


def cut(data: bytes, other: bytes, rng) -> bytes:
    return data[: int(rng.integers(1, len(data)))]


def flip(data: bytes, other: bytes, rng) -> bytes:
    out = bytearray(data)
    for _ in range(int(2 ** rng.uniform(0, 5))):
        out[rng.integers(len(out))] ^= 1 << int(rng.integers(8))
    return bytes(out)


def overwrite(data: bytes, other: bytes, rng) -> bytes:
    start, end = place(data, rng)
    fill = bytes(end - start) if rng.random() < 0.5 else rng.bytes(end - start)
    return data[:start] + fill + data[end:]


def drop(data: bytes, other: bytes, rng) -> bytes:
    start, end = place(data, rng)
    return data[:start] + data[end:]


def double(data: bytes, other: bytes, rng) -> bytes:
    start, end = place(data, rng)
    return data[:end] + data[start:end] * int(rng.integers(1, 4)) + data[end:]


def splice(data: bytes, other: bytes, rng) -> bytes:
    """The beginning of one and the end of another."""
    return data[: int(rng.integers(len(data)))] + other[int(rng.integers(len(other))) :]


def graft(data: bytes, other: bytes, rng) -> bytes:
    """A part of another, in place of as many bytes."""
    start, end = place(other, rng, 400)
    at = int(rng.integers(len(data)))
    return data[:at] + other[start:end] + data[at + end - start :]


def header(data: bytes, other: bytes, rng) -> bytes:
    """The first bytes of a file of any format."""
    files = [file for files in originals().values() for file in files]
    size = int(rng.integers(2, 48))
    return files[rng.integers(len(files))][:size] + data[size:]


def sizes(data: bytes, other: bytes, rng) -> bytes:
    """A number near the beginning, where width and height and lengths stand, is another."""
    at, width = int(rng.integers(4, min(64, len(data) - 4))), int(rng.choice([1, 2, 4]))
    number = int(rng.choice([0, 1, 2, 47, 49, 255, 256, 4096, 65535, 2**31 - 1, 2**32 - 1]))
    order = str(rng.choice(["big", "little"]))
    number = (number & 2 ** (8 * width) - 1).to_bytes(width, order)
    return data[:at] + number + data[at + width :]


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    out, at = [], 8
    while at + 8 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        out.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return out


def png_written(chunks: list[tuple[bytes, bytes]]) -> bytes:
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_parts(data: bytes, other: bytes, rng) -> bytes:
    """Chunks swapped, dropped, taken from another, mutated; with the right checksums."""
    chunks, others = png_chunks(data), png_chunks(other)
    i, j = int(rng.integers(len(chunks))), int(rng.integers(len(chunks)))
    match int(rng.integers(5)):
        case 0:
            chunks[i], chunks[j] = chunks[j], chunks[i]
        case 1:
            del chunks[i]
        case 2:
            chunks.insert(i, others[rng.integers(len(others))])
        case 3 if chunks[i][1]:
            mutate = [cut, flip, overwrite, drop, double][rng.integers(5)]
            body = chunks[i][1] if len(chunks[i][1]) > 1 else chunks[i][1] * 2
            chunks[i] = (chunks[i][0], mutate(body, other, rng))
        case _:  # the pixels themselves, packed again: too few, too many, other filters
            pixels = b"".join(body for kind, body in chunks if kind == b"IDAT")
            rows = [cut, flip, drop, double][rng.integers(4)](zlib.decompress(pixels), other, rng)
            first = next(k for k, (kind, _) in enumerate(chunks) if kind == b"IDAT")
            chunks = [chunk for chunk in chunks if chunk[0] != b"IDAT"]
            chunks.insert(first, (b"IDAT", zlib.compress(rows)))
    return png_written(chunks)


MUTATIONS = [cut, flip, flip, overwrite, drop, double, splice, graft, header, sizes]


def case(number: int) -> tuple[str, str, bytes]:
    """The format, the mutation and the bytes of one case; the same every time."""
    rng = np.random.default_rng(number)
    form = list(originals())[number % len(originals())]
    files = originals()[form]
    data, other = (files[rng.integers(len(files))] for _ in range(2))
    mutations = MUTATIONS + [png_parts] * 4 * (form == "PNG")
    mutate = mutations[rng.integers(len(mutations))]
    return form, mutate.__name__, mutate(data, other, rng)


# -------------------------------------------------------------------------------------- checks


def strict(data: bytes) -> np.ndarray | None:
    """What strict Pillow decodes, in RGB; None where it refuses."""
    try:
        image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
        image.load()
        return np.asarray(open_image(image))
    except Exception:
        return None


def outcome(data: bytes, *, lenient: bool = False) -> str:
    """ "equal" or "refused", which are right; "refused alone", where strict Pillow decodes; or what
    is wrong."""
    expected = strict(data)
    ImageFile.LOAD_TRUNCATED_IMAGES = lenient
    try:
        got = np.asarray(open_image(data, name="photo"))
    except DataError as error:
        if not str(error).startswith("photo ") or "\n" in str(error):
            return f"WRONG: says {error}"
        return "refused" if expected is None else "refused alone"
    except Exception as error:
        return f"WRONG: raises {type(error).__name__}: {error}"
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    if expected is None:
        return "WRONG: decodes what strict Pillow refuses"
    return "equal" if np.array_equal(got, expected) else "WRONG: other pixels than strict Pillow"


def run(first: int, count: int) -> collections.Counter:
    """The outcomes of these cases, by format; what is wrong is printed."""
    warnings.simplefilter("ignore")
    found: collections.Counter = collections.Counter()
    for number in range(first, first + count):
        form, mutation, data = case(number)
        print(f"case {number}", end="\r", file=sys.stderr, flush=True)
        signal.alarm(SECONDS)  # ends this process
        output = outcome(data, lenient=number // len(originals()) % 2 == 1)
        signal.alarm(0)
        if output.startswith("WRONG"):
            print(f"case {number} ({form}, {mutation}): {output}", flush=True)
            output = "WRONG"
        found[form, output] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--here", action="store_true", help="in this process")
    args = parser.parse_args()
    if args.here:
        for (form, output), count in sorted(run(args.first, args.cases).items()):
            print("found", form, count, output)
        return
    total: collections.Counter = collections.Counter()
    for first in range(args.first, args.first + args.cases, CHUNK):
        count = min(CHUNK, args.first + args.cases - first)
        line = [sys.executable, __file__, "--first", first, "--cases", count, "--here"]
        done = subprocess.run([str(word) for word in line], capture_output=True, text=True)
        for output in done.stdout.splitlines():
            if output.startswith("found "):
                _, form, number, outcome = output.split(" ", 3)
                total[form, outcome] += int(number)
            else:
                print(output)
        if done.returncode:
            last = done.stderr.replace("\r", "\n").strip().splitlines()[-1:]
            print(f"a process ended with {done.returncode} at {last}")
            total["all", "WRONG: a crash or a hang"] += 1
    for (form, output), count in sorted(total.items()):
        print(f"{form:5} {count:6,} {output}")
    sys.exit(any(output.startswith("WRONG") for _, output in total))


if __name__ == "__main__":
    main()
