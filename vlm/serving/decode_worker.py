"""Child process that decodes images of requests within limits of memory and processor time.

`vlm.serving.decoding` starts it. It reads one JSON line per image from stdin, `[kind, bytes, name,
size]`, and the file from a shared memory file. It writes the result there, and a JSON line to
stdout: `["ok", shape]`, `["too_large", fact]` or `["bad", message]`.
"""

import importlib.machinery
import json
import os
import resource
import sys
import types
from typing import Any

CPU_SECONDS = 5  # for one image; a photo of 32 million pixels takes less than 1


def _without_jax() -> None:
    """Let annotations name `jax.Array` without importing JAX, which takes longer than all else."""
    stub = types.ModuleType("jax")
    stub.__spec__ = importlib.machinery.ModuleSpec("jax", None)
    stub.Array = type("Array", (), {})  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules.setdefault("jax", stub)


def main(settings: dict[str, Any], shared: int) -> None:
    """Decode images until stdin is closed.

    Args:
        settings: fields of the PreprocessConfig, `max_pixels`, `max_bytes`, and `memory`, the bytes
            that this process may allocate.
        shared: file descriptor for files and pixels.
    """
    _without_jax()
    import numpy as np
    from PIL import Image

    from vlm.config.inputs import PreprocessConfig
    from vlm.errors import DataError
    from vlm.inputs.decoding_limits import TooLargeError
    from vlm.inputs.preprocess import Preprocess

    memory = settings.pop("memory")
    limits = {name: settings.pop(name) for name in ("max_pixels", "max_bytes")}
    preprocess = Preprocess(PreprocessConfig(**settings), **limits)
    Image.preinit()
    Image.init()  # import the plugins of all formats now, not for the first image
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a library that prints does not disturb the replies
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory(memory)

    def result(kind: str, data: bytes, name: str, size: int) -> np.ndarray:
        if kind == "pixels":
            return preprocess.pixels(data, name)
        if kind == "thumbnail":
            from vlm.display import webp

            return np.frombuffer(webp(data, size, **limits), np.uint8)
        picture = preprocess.open(data, name)
        picture.thumbnail((size, size))
        return np.asarray(picture)

    replies.write('["ready"]\n')
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # warnings about the files of clients
    for line in sys.stdin.buffer:
        kind, length, name, size = json.loads(line)
        _limit_seconds(CPU_SECONDS)
        try:
            pixels = np.ascontiguousarray(result(kind, os.pread(shared, length, 0), name, size))
            os.pwrite(shared, pixels.data, 0)
            reply: list[Any] = ["ok", pixels.shape]
            del pixels
        except TooLargeError as error:
            reply = ["too_large", error.fact]
        except DataError as error:
            reply = ["bad", str(error)]
        except MemoryError:
            reply = ["too_large", "takes too much memory to decode"]
        except Exception as error:
            reply = ["bad", f"{name} cannot be decoded ({type(error).__name__})"]
        replies.write(json.dumps(reply) + "\n")


def _limit_memory(extra: int) -> None:
    """Let allocations fail beyond what is used now and `extra` bytes, where the system can."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            used = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData"))
    except (OSError, StopIteration):  # macOS, which does not enforce such limits
        return
    _limit(resource.RLIMIT_DATA, used + extra)


def _limit_seconds(seconds: int) -> None:
    """End this process after so many more seconds of processor time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + seconds)


def _limit(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (value if hard < 0 else min(value, hard), hard))
