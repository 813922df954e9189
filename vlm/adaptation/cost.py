"""Time and peak memory of a trial, measured, and time per image, to plan a trial."""

import os
import threading
import time
from typing import Any

import jax

from vlm.adaptation.labelled import Labelled
from vlm.bundle import Bundle
from vlm.heads.zero_shot import encode_images

INTERVAL = 0.02  # seconds between two memory readings
SAMPLE = 32  # images that are timed
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class ResourceMeter:
    """Context manager that measures `seconds` and the `peak` bytes of memory.

    The memory is an accelerator's, or else that of the whole process, including what it held
    before.
    """

    def __init__(self):
        self.seconds, self.peak = 0.0, 0
        self._done = threading.Event()

    def __enter__(self) -> "ResourceMeter":
        self._start = time.monotonic()
        self._read()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.monotonic() - self._start
        self._done.set()
        self._watcher.join()
        self._read()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self._read()

    def _read(self) -> None:
        self.peak = max(self.peak, _bytes_in_use())


def time_per_image(model: Bundle, labelled: Labelled, template: str) -> tuple[float, float]:
    """Measure the seconds for an image and a sentence, and those to compile before the first."""
    sample = list(labelled.images[:SAMPLE])
    names = [labelled.names[i] for i in labelled.target[:SAMPLE]]
    sentences = [template.replace("{}", name) for name in names]
    start = before = time.monotonic()
    for _ in range(2):  # the first time compiles
        before = time.monotonic()
        encode_images(model, sample)
        model.encode_text(sentences)
    return (time.monotonic() - before) / len(sample), before - start


def _bytes_in_use() -> int:
    on_devices = [(device.memory_stats() or {}).get("bytes_in_use") for device in jax.devices()]
    if any(value is not None for value in on_devices):
        return max(value or 0 for value in on_devices)
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * PAGE
    except OSError:  # not Linux: the peak since the process started
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
