"""Save one index from several processes at once, kill them at random, and count what was lost.

    python tests/heads/index_writers.py --saves 2000 --writers 4

Each writer loads the index, adds an item under an id of its own, saves, and answers a conflict by
`reload` and another save. A line in its log before and after each save tells what it knows. At the
end every item whose save returned must be in the index. A reader loads all the while, and checks
that it finds one whole generation with every item that it found before.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

from vlm.errors import CheckpointError, ConflictError
from vlm.heads.retrieval import RetrievalIndex

NONE_YET = "holds no index"
ATTEMPTS = 20  # saves of one item, of which all but the last may end in a conflict


class Model:
    """Encodes only the probes that identify the model of an index."""

    name, loss, logit_scale, logit_bias = "probe", "softmax", 10.0, 0.0

    def encode_text(self, texts):
        return np.eye(8, dtype=np.float32)[: len(texts)]

    encode_image = encode_text


def embedding(name: str) -> np.ndarray:
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal((1, 8)).astype(np.float32)
    return z / np.linalg.norm(z)


def write(folder: Path, log: Path, prefix: str) -> None:
    """Add items and save until killed."""
    with log.open("a", buffering=1) as file:
        for number in range(1 << 30):
            name = f"{prefix}-{number}"
            try:
                index = RetrievalIndex.load(folder, Model())
            except CheckpointError as error:
                if NONE_YET not in str(error):
                    raise
                index = RetrievalIndex(Model())
            index.add(embedding(name), ids=[name])
            for attempt in range(ATTEMPTS):
                file.write(f"try {name}\n")
                try:
                    index.save(folder)
                    file.write(f"saved {name}\n")
                    break
                except ConflictError:
                    file.write(f"conflict {name}\n")
                    assert name in index  # it keeps its items
                    if attempt + 1 < ATTEMPTS and index._items.folder:
                        index.reload()
                    else:
                        break


def read(folder: Path, log: Path) -> None:
    """Load the index until killed; each load has all items of the load before."""
    before: set = set()
    with log.open("a", buffering=1) as file:
        while True:
            try:
                index = RetrievalIndex.load(folder, Model())
            except CheckpointError as error:
                if NONE_YET not in str(error):
                    raise
                continue
            ids = set(index.ids)
            assert before <= ids, f"lost {before - ids}"
            z = index.embeddings()
            wanted = np.concatenate([embedding(name) for name in index.ids])
            np.testing.assert_allclose(z, wanted, atol=1e-6)
            before = ids
            file.write(f"loaded {len(ids)}\n")
            time.sleep(0.05)


def start(target, *args) -> int:
    """The id of a new process that runs `target`; it prints a traceback if that fails."""
    pid = os.fork()
    if pid == 0:
        try:
            target(*args)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


def measure(folder: Path, saves: int, writers: int, seed: int = 0) -> dict[str, int]:
    """Counts of what happened; see the head of this module."""
    rng = random.Random(seed)
    logs = folder / "logs"
    logs.mkdir(parents=True)
    index, killed = folder / "index", 0
    reader = start(read, index, logs / "reader")
    running: dict[int, int] = {}
    for number in range(writers):
        running[start(write, index, logs / f"{number}.0", f"{number}.0")] = number
    lives = [0] * writers

    def lines() -> list[str]:
        return [line for log in logs.glob("*.*") for line in log.read_text().splitlines()]

    def done() -> int:
        return sum(line.startswith(("saved", "conflict")) for line in lines())

    started = time.monotonic()
    try:
        while done() < saves:
            time.sleep(rng.uniform(0, 0.4))
            pid = rng.choice(list(running))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            assert os.WIFSIGNALED(status), "a writer failed: see its traceback"
            killed += 1
            number = running.pop(pid)
            lives[number] += 1
            name = f"{number}.{lives[number]}"
            running[start(write, index, logs / name, name)] = number
    finally:
        failed = 0
        for pid in [*running, reader]:
            os.kill(pid, signal.SIGKILL)
            failed += not os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    events = [line.split() for line in lines()]
    tried = {name for word, name in events if word == "try"}
    saved = {name for word, name in events if word == "saved"}
    held = set(RetrievalIndex.load(index, Model()).ids)
    rows = len(list(index.glob("rows-*")))
    return {
        "saves tried": sum(word == "try" for word, _ in events),
        "saves that returned": len(saved),
        "saves refused (conflict)": sum(word == "conflict" for word, _ in events),
        "processes killed": killed,
        "loads by the reader": len((logs / "reader").read_text().splitlines()),
        "processes that failed": failed,
        "items in the index": len(held),
        "items of saves that were killed, in the index": len(held - saved),
        "items saved and lost": len(saved - held),
        "items that nobody added": len(held - tried),
        "shards at the end": rows,
        "seconds": round(time.monotonic() - started),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--saves", type=int, default=2000)
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = measure(Path(place), given.saves, given.writers, given.seed)
    for name, count in found.items():
        print(f"{count:6,}  {name}")
    wrong = ("items saved and lost", "items that nobody added", "processes that failed")
    sys.exit(any(found[name] for name in wrong))
