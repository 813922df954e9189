"""Reader processes: blocked signals, exit with the parent, and shared memory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlm.data import workers
from vlm.errors import DataError

READ = """
import os, sys
from vlm.config import AugmentConfig, DataConfig, PreprocessConfig
from vlm.data.pipeline import train_batches
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import train_bpe

if __name__ == "__main__":
    config = DataConfig(source=sys.argv[1], eval_split=None, workers=2, prefetch=2)
    tokenizer = train_bpe(["a red square", "a blue stripe"], 262, 12)
    batches = train_batches(
        config, Preprocess(PreprocessConfig(image_size=16)), tokenizer, batch_size=4, seed=0
    )
    next(batches)
    print("reading", flush=True)
    while True:
        next(batches)
"""


def children(parent: int) -> list[int]:
    """The worker processes of a parent."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if int(words[1]) == parent and b"spawn_main" in line:
                found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_outlive_signals_and_not_their_run(tmp_path):
    import tiny

    script = tmp_path / "read.py"
    script.write_text(READ)
    run = subprocess.Popen(
        [sys.executable, script, tiny.folder() / "data"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert run.stdout.readline() == "reading\n"
        started = children(run.pid)
        assert len(started) == 2
        for worker in started:
            os.kill(worker, signal.SIGTERM)
            os.kill(worker, signal.SIGINT)
        time.sleep(1)
        assert children(run.pid) == started
        assert run.poll() is None
    finally:
        run.kill()
        run.wait()
    end = time.monotonic() + 30
    while any(Path(f"/proc/{worker}").exists() for worker in started):
        assert time.monotonic() < end, "a killed run left its workers behind"
        time.sleep(0.1)


def test_too_little_shared_memory_is_reported_before_it_is_used(monkeypatch):
    of = os.statvfs("/")
    small = os.statvfs_result((of.f_bsize, 4096, 16384, 16384, 16384, *tuple(of)[5:]))
    monkeypatch.setattr(workers.os, "statvfs", lambda _: small)  # 64 MB
    workers.check_shared_memory(2, 2, 2**20)
    with pytest.raises(DataError, match=r"workers 8 may hold 34 batches of 4 MiB .* 64 MiB free"):
        workers.check_shared_memory(8, 2, 2**22)
