"""Peak memory of opening an image of each format, and of how many the estimate falls short.

    python tests/inputs/decoding_memory.py                # 24 million pixels
    python tests/inputs/decoding_memory.py --width 4000 --height 2000

A process opens one image and prints the rise of its resident memory, in bytes per pixel, and the
estimate of `check_decoding`, which is what a limit on memory is compared with.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from image_bombs import png, saved  # noqa: E402


def pictures(width: int, height: int):
    """Yield names and files."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (height // 50, width // 50, 4), np.uint8)
    rgba = Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)
    rgb = rgba.convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6
    flat = np.ones((height, width), np.float32)
    yield "JPEG, turned", saved(rgb, "JPEG", exif=turned)
    yield "JPEG, progressive 4:2:0", saved(rgb, "JPEG", progressive=True)
    yield "JPEG, progressive 4:4:4", saved(rgb, "JPEG", progressive=True, subsampling=0)
    yield "JPEG, progressive CMYK", saved(rgb.convert("CMYK"), "JPEG", progressive=True)
    yield "PNG, 16-bit grey", png(width, height, 16, 0)
    yield "PNG, 16-bit RGBA", png(width, height, 16, 6)
    yield "PNG, RGBA", saved(rgba, "PNG", compress_level=1)
    yield "PNG, grey and alpha", saved(rgb.convert("LA"), "PNG", compress_level=1)
    palette = rgb.quantize(16)
    yield "PNG, palette", saved(palette, "PNG", compress_level=1, transparency=3)
    yield "PNG, 1 bit", saved(rgb.convert("1"), "PNG")
    yield "PNG, animated", saved(rgb, "PNG", save_all=True, append_images=[rgba], compress_level=1)
    yield "GIF, animated", saved(palette, "GIF", save_all=True, append_images=[rgb])
    yield "WEBP, lossless RGBA", saved(rgba, "WEBP", lossless=True, method=0)
    yield (
        "WEBP, animated",
        saved(rgb, "WEBP", method=0, save_all=True, append_images=[rgba], duration=99),
    )
    yield "AVIF, RGBA", saved(rgba, "AVIF", speed=10)
    yield "TIFF, float", saved(Image.fromarray(flat), "TIFF", compression="tiff_deflate")
    integers = Image.fromarray(flat.astype(np.int32))
    yield "TIFF, 32-bit integers", saved(integers, "TIFF", compression="tiff_deflate")
    strip = {"compression": "tiff_deflate", "tiffinfo": {278: height}}
    yield "TIFF, CMYK in one strip", saved(rgb.convert("CMYK"), "TIFF", **strip)
    lab = Image.new("LAB", (width, height))
    yield "TIFF, LAB", saved(lab, "TIFF", compression="tiff_deflate")
    yield "JPEG2000, RGBA", saved(rgba, "JPEG2000")
    yield "BMP", saved(rgb, "BMP")
    yield "PPM", saved(rgb, "PPM")


def measure(file: str) -> None:
    """Open a file, and print the rise of the peak memory and the estimate."""
    from vlm.inputs.decoding_limits import check_decoding
    from vlm.inputs.opening import open_image

    def kilobytes(key: str) -> int:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    open_image(np.zeros((4, 4, 3), np.uint8))
    data = pathlib.Path(file).read_bytes()
    with Image.open(file) as image:
        estimate = check_decoding(image, data, file, 1 << 40)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = kilobytes("VmRSS")
    opened = open_image(data)
    peak = kilobytes("VmHWM") - before
    print(json.dumps({"bytes": peak << 10, "estimate": estimate, "mode": opened.mode}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=6000)
    parser.add_argument("--height", type=int, default=4000)
    parser.add_argument("--file", help="measure this one in this process")
    options = parser.parse_args()
    if options.file:
        measure(options.file)
        return 0
    pixels, missed = options.width * options.height, 0
    with tempfile.TemporaryDirectory() as folder:
        for name, data in pictures(options.width, options.height):
            file = pathlib.Path(folder) / "image"
            file.write_bytes(data)
            line = [sys.executable, __file__, "--file", str(file)]
            found = json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE).stdout)
            short = found["bytes"] > found["estimate"] + (64 << 20)
            missed += short
            print(
                f"{name:26} {len(data):>12,} bytes of file, {found['bytes'] / pixels:6.2f} per "
                f"pixel of memory, estimated {found['estimate'] / pixels:6.2f}",
                "TOO LOW" if short else "",
                flush=True,
            )
    return missed


if __name__ == "__main__":
    sys.exit(main())
