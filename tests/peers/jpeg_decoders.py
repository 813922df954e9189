"""Would another JPEG decoder pay? Crops of 80% to 224 pixels on one core, three ways, in turns.

    python tests/peers/jpeg_decoders.py            # needs: pip install simplejpeg

Pillow decodes a JPEG at 1/2, 1/4 or 1/8 where the crop allows (`augment.draft`), and that is what
training does; simplejpeg decodes at the same fraction, and Pillow crops and resizes what it gives.
Seen: 1.02x, 1.08x and 1.05x of Pillow at three sizes, the same pixels: not worth a second decoder.
"""

import argparse
import io
import time

import numpy as np
import simplejpeg
from PIL import Image

SIDE, SHARE = 224, 0.8


def photograph(width: int, height: int, seed: int) -> bytes:
    """A JPEG of smooth shapes and grain, quality 90."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    pixels = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def cropped(image: Image.Image) -> np.ndarray:
    w, h = image.width * SHARE**0.5, image.height * SHARE**0.5
    left, top = (image.width - w) / 2, (image.height - h) / 2
    box = (left, top, left + w, top + h)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box))


def smallest(width: int, height: int) -> tuple[int, int]:
    """As `Augment.smallest` says for such a crop."""
    spare = min(width, height) * SHARE**0.5 / SIDE
    fraction = next((n for n in (8, 4, 2) if spare >= n), 1)
    return width // fraction, height // fraction


def by_pillow(file: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(file))
    image.draft(None, smallest(*image.size))
    return cropped(image)


def by_simplejpeg(file: bytes) -> np.ndarray:
    height, width, _, _ = simplejpeg.decode_jpeg_header(file)
    width, height = smallest(width, height)
    pixels = simplejpeg.decode_jpeg(file, min_height=height, min_width=width)
    return cropped(Image.fromarray(pixels))


def by_simplejpeg_fast(file: bytes) -> np.ndarray:
    height, width, _, _ = simplejpeg.decode_jpeg_header(file)
    width, height = smallest(width, height)
    pixels = simplejpeg.decode_jpeg(
        file, fastdct=True, fastupsample=True, min_height=height, min_width=width
    )
    return cropped(Image.fromarray(pixels))


WAYS = {
    "Pillow": by_pillow,
    "simplejpeg": by_simplejpeg,
    "simplejpeg, fast and inexact": by_simplejpeg_fast,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    for width, height in ((640, 427), (1280, 960), (2560, 1920)):
        files = [photograph(width, height, seed) for seed in range(8)]
        seconds = {name: [] for name in WAYS}
        for _ in range(args.rounds):
            for name, way in WAYS.items():
                began = time.process_time()
                for file in files:
                    way(file)
                seconds[name].append((time.process_time() - began) / len(files))
        off = np.abs(by_pillow(files[0]).astype(int) - by_simplejpeg(files[0])).max()
        rates = {name: 1 / np.median(times) for name, times in seconds.items()}
        output = ", ".join(
            f"{name} {rate:.0f}/s ({rate / rates['Pillow']:.2f}x)" for name, rate in rates.items()
        )
        print(f"{width}x{height}: {output}; Pillow and simplejpeg differ by at most {off}")


if __name__ == "__main__":
    main()
