"""Parallel rendering of SVG to PNG, in processes, since the renderer holds the GIL.

The processes are interpreters that run this module, not `multiprocessing` workers. So nothing is
forked while JAX's threads run, and scripts need no `__main__` guard.
"""

import base64
import functools
import io
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlm.errors import DataError

_CHUNK = 128  # drawings per process


def draw_png(svg: str, size: int) -> bytes:
    """Render an SVG document as RGB PNG, `size` x `size` pixels, on white."""
    import resvg_py
    from PIL import Image

    rgba = resvg_py.svg_to_bytes(
        svg_string=svg, background="white", width=size, height=size, skip_system_fonts=True
    )
    out = io.BytesIO()
    Image.open(io.BytesIO(rgba)).convert("RGB").save(out, "PNG")
    return out.getvalue()


def draw_all(paths: Sequence[str], size: int) -> Iterator[bytes]:
    """Render SVG files as PNG, in order; DataError with the renderer's message if one fails."""
    chunks = [paths[i : i + _CHUNK] for i in range(0, len(paths), _CHUNK)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for drawn in pool.map(functools.partial(_draw, size=size), chunks):
            yield from drawn


def _draw(paths: Sequence[str], size: int) -> list[bytes]:
    """Render SVG files in a process of their own, which prints one file in base64 per line."""
    command = [sys.executable, "-m", __name__, str(size)]
    done = subprocess.run(
        command, input="\n".join(paths), capture_output=True, text=True, check=False
    )
    drawn = [base64.b64decode(line) for line in done.stdout.split("\n")[:-1]]
    if len(drawn) < len(paths):
        why = done.stderr.strip().splitlines()
        raise DataError(f"{paths[len(drawn)]} cannot be drawn: {why[-1] if why else 'no answer'}")
    return drawn


if __name__ == "__main__":
    for path in sys.stdin.read().splitlines():
        png = draw_png(Path(path).read_text("utf-8"), int(sys.argv[1]))
        sys.stdout.write(base64.b64encode(png).decode() + "\n")
