"""Real `vlm train` processes: started, watched, killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from quick import QUICK

from vlm.config import Experiment, to_dict

KILLS = int(os.environ.get("VLM_KILLS", "1"))  # how often a run is killed and resumed; try 20
LIMIT = int(os.environ.get("VLM_LIMIT", "400"))  # seconds that a process may take


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """Environment of a process with so many devices, and the compilation cache of the session."""
    return os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
        "COLUMNS": "200",
        **more,
    }


def write_config(experiment: Experiment, file: Path) -> Path:
    file.write_text(json.dumps(to_dict(experiment)))
    return file


def start(arguments: Sequence[str | Path], env: dict[str, str], log: Path) -> subprocess.Popen:
    """Start `vlm train ARGUMENTS` in the background, with its output in `log`."""
    with log.open("w") as file:
        command = [sys.executable, "-m", "vlm", "train", *map(str, arguments)]
        return subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)


def wait(process: subprocess.Popen, log: Path, code: int | None = 0) -> str:
    """Output of the process, once it has ended with exit code `code`."""
    try:
        got = process.wait(LIMIT)
    finally:
        process.kill()
    output = log.read_text()
    assert code is None or got == code, f"exit code {got}:\n{output}"
    return output


def send_at(number: signal.Signals, step: int, run: Path, processes: list[subprocess.Popen]):
    """Send a signal to processes once the run's log has reached `step`."""
    end = time.monotonic() + LIMIT
    while last_step(run) < step:
        assert all(p.poll() is None for p in processes), "the run ended before the signal"
        assert time.monotonic() < end, "the run did not come so far"
        time.sleep(0.005)
    for process in processes:
        process.send_signal(number)


def last_step(run: Path) -> int:
    log = run / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    whole = [line for line in lines if line.endswith("}")]
    return json.loads(whole[-1])["step"] if whole else 0


def losses(run: Path) -> list[float]:
    """Return the loss of every logged step."""
    rows = map(json.loads, (Path(run) / "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def weights(run: Path) -> bytes:
    """Return the final parameters from disk."""
    return (Path(run) / "bundle" / "model.safetensors").read_bytes()
