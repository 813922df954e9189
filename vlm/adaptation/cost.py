"""What a try costs: seconds, before it and after, and the most memory while it ran."""

import os
import threading
import time
from typing import Any

import jax

from vlm.adaptation.labelled import Labelled
from vlm.bundle import Bundle
from vlm.heads.zero_shot import encode_images

INTERVAL = 0.02  # seconds between two looks at the memory
SAMPLE = 32  # images that the pace is measured on
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class Cost:
    """Measures what happens inside `with`: `seconds`, and `peak` bytes of memory.

    The memory is an accelerator's, where there is one, and else that of the whole process, with
    all that it held before.
    """

    def __init__(self):
        self.seconds, self.peak = 0.0, 0
        self._done = threading.Event()

    def __enter__(self) -> "Cost":
        self._start = time.monotonic()
        self._look()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.monotonic() - self._start
        self._done.set()
        self._watcher.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, _held())


def pace_of(model: Bundle, labelled: Labelled, template: str) -> tuple[float, float]:
    """Seconds that a model takes for an image and a sentence; and to compile, before the first."""
    sample = list(labelled.images[:SAMPLE])
    names = [labelled.names[i] for i in labelled.target[:SAMPLE]]
    sentences = [template.replace("{}", name) for name in names]
    start = before = time.monotonic()
    for _ in range(2):  # the first time compiles
        before = time.monotonic()
        encode_images(model, sample)
        model.encode_text(sentences)
    return (time.monotonic() - before) / len(sample), before - start


def _held() -> int:
    """Bytes that are taken now."""
    on_devices = [(device.memory_stats() or {}).get("bytes_in_use") for device in jax.devices()]
    if any(value is not None for value in on_devices):
        return max(value or 0 for value in on_devices)
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * PAGE
    except OSError:  # another system than Linux: the most since the process began
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
