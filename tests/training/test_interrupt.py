"""Stop signals go to a whole process group, and a run that waits for its data still saves."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from processes import LIMIT, environment, last_step, wait, write_config


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_that_waits_for_its_workers_saves_the_current_step(tiny, tmp_path, number):
    drawings, rows = tmp_path / "large", []
    drawings.mkdir()
    for i in range(16):  # takes a worker long to decode
        noise = np.random.default_rng(i).integers(0, 255, (1600, 1600, 3), dtype=np.uint8)
        Image.fromarray(noise).save(drawings / f"{i}.jpg")
        rows.append({"image": f"{i}.jpg", "caption": f"a drawing {i}", "split": "train"})
    (drawings / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    experiment = tiny(steps=10_000, log_every=1, data={"source": str(drawings), "workers": 2})
    config = write_config(experiment, tmp_path / "config.json")
    run, log = tmp_path / "run", tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "vlm", "train", config, "--run-dir", run],
            env=environment(GLIBC_TUNABLES="glibc.malloc.hugetlb=0"),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    end = time.monotonic() + LIMIT
    while last_step(run) < 2:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end
        time.sleep(0.05)
    os.killpg(process.pid, number)
    output = wait(process, log)
    left = last_step(run)
    assert f"stopped at step {left}; resume with" in output
    assert str(left) in os.listdir(run / "checkpoints")
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == left
