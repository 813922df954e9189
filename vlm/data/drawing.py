"""Parallel rendering of SVG to PNG: one process per core, since the renderer holds the GIL.

The processes are interpreters that run this module, not `multiprocessing` workers. So nothing is
forked while JAX's threads run, and scripts need no `__main__` guard.
"""

import io
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import IO

from vlm.errors import DataError

_LENGTH = struct.Struct("<I")


def _pipes(worker: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes], IO[bytes]]:
    """Return stdin, stdout and stderr of a worker."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    assert worker.stderr is not None
    return worker.stdin, worker.stdout, worker.stderr


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
    """Render SVG files as PNG, in order.

    Raises:
        DataError: a file cannot be rendered, or the process died; includes its message.
    """
    count = max(1, min(_cores(), 8, len(paths)))
    command = [sys.executable, "-m", __name__, str(size)]
    workers = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(count)
    ]
    try:
        for k, worker in enumerate(workers):  # reads all before it writes: cannot block
            stdin, _, _ = _pipes(worker)
            stdin.write("\n".join(paths[k::count]).encode())
            stdin.close()
        for i, path in enumerate(paths):
            _, stdout, errors = _pipes(workers[i % count])
            head = stdout.read(_LENGTH.size)
            if len(head) < _LENGTH.size:
                why = errors.read().decode(errors="replace").strip().splitlines()
                raise DataError(f"{path} cannot be drawn: {why[-1] if why else 'no answer'}")
            yield stdout.read(_LENGTH.unpack(head)[0])
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            for pipe in _pipes(worker)[1:]:
                pipe.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serve(size: int) -> None:
    out = sys.stdout.buffer
    for path in sys.stdin.read().splitlines():
        with open(path, encoding="utf-8") as f:
            png = draw_png(f.read(), size)
        out.write(_LENGTH.pack(len(png)) + png)
        out.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
