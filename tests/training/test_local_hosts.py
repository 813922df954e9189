"""Processes with local disks of their own: killed, replaced by empty ones, and fewer."""

import re
import shutil
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
from processes import environment, losses, send_at, start, wait, weights, write_config

from vlm.cluster import watch

pytestmark = pytest.mark.slow
STEPS, EVERY = 60, 5  # and one checkpoint of the run folder, at half of it
LOCAL = {"folder": "$LOCAL_DISK/vlm", "every": EVERY}


class Hosts:
    """Processes of a run over loopback, each with a disk of its own."""

    def __init__(self, arguments: list, folder: Path, count: int = 2, devices: int = 4):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.logs = [folder / f"log{i}" for i in range(count)]
        self.processes = []
        for i, log in enumerate(self.logs):
            several = {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(i),
                "VLM_HEARTBEAT_TIMEOUT": "8",
            }
            env = environment(devices, LOCAL_DISK=str(disk(folder, i)), **several)
            self.processes.append(start(arguments, env, log))

    def kill(self, host: int, step: int, run: Path) -> None:
        """Kill one process once the log has a step, and wait for the others to exit."""
        send_at(signal.SIGKILL, step, run, [self.processes[host]])
        codes = [-signal.SIGKILL if i == host else None for i in range(len(self.processes))]
        self.wait(*codes)
        others = [p.returncode for i, p in enumerate(self.processes) if i != host]
        assert all(code != 0 for code in others)

    def wait(self, *codes: int | None) -> str:
        """Return the output of process 0, once all have ended."""
        try:
            codes = codes or (0,) * len(self.processes)
            return [wait(*p) for p in zip(self.processes, self.logs, codes, strict=True)][0]
        finally:
            for process in self.processes:
                process.kill()


def disk(folder: Path, host: int) -> Path:
    return folder / f"disk{host}"


def started_from(output: str) -> int:
    """Return the step of the local checkpoint that a run was started from; -1 if from none."""
    match = re.search(r"starting from the local checkpoint of step ([\d,]+):", output)
    return int(match[1].replace(",", "")) if match else -1


@pytest.fixture(scope="module", params=[1, 8], ids=["data", "fsdp"])
def whole(request, tiny, tmp_path_factory):
    """An uninterrupted run, with whole copies of the state on both hosts or a half on each."""
    folder = tmp_path_factory.mktemp("whole")
    experiment = tiny(
        batch_size=24,
        steps=STEPS,
        log_every=1,
        checkpoint_every=0.5,
        checkpoint_minutes=None,
        vision={"dropout": 0.1, "width": 128, "depth": 1},
        text={"depth": 1},
        mesh={"fsdp": request.param},
        local_checkpoints=LOCAL,
    )
    config, run = write_config(experiment, folder / "config.json"), folder / "run"
    output = Hosts([config, "--run-dir", run], folder).wait()
    assert f"local checkpoints every {EVERY} steps" in output
    assert not list(folder.rglob("*.part"))  # the run folder has a newer one
    return config, run, request.param


def test_a_killed_run_goes_on_from_its_local_checkpoint(whole, tmp_path):
    config, reference, _ = whole
    run = tmp_path / "run"
    Hosts([config, "--run-dir", run], tmp_path).kill(1, 17, run)
    assert not list((run / "checkpoints").iterdir())
    again = Hosts(["--resume", run], tmp_path)
    again.kill(0, 43, run)
    first = again.logs[0].read_text()
    assert started_from(first) >= 15
    output = Hosts(["--resume", run], tmp_path).wait()
    assert started_from(output) >= 40, output
    assert "0 GB were sent" in output
    assert weights(run) == weights(reference)
    assert losses(run) == losses(reference)


def test_a_host_is_replaced_by_an_empty_one(whole, tmp_path):
    config, reference, fsdp = whole
    run = tmp_path / "run"
    Hosts([config, "--run-dir", run], tmp_path).kill(0, 43, run)
    shutil.rmtree(disk(tmp_path, 0))
    output = Hosts(["--resume", run], tmp_path).wait()
    if fsdp == 1:
        assert started_from(output) >= 40, output
        assert "0 GB were sent" not in output
    else:
        assert started_from(output) == -1
        assert "is not used: the processes hold" in output
        assert "no local checkpoint is newer than that of step 30" in output
    assert weights(run) == weights(reference)
    assert losses(run) == losses(reference)


def test_parts_of_two_steps_are_not_combined(whole, tmp_path):
    """The newest step that all have is taken, and not one that a host has not written."""
    config, reference, fsdp = whole
    run = tmp_path / "run"
    Hosts([config, "--run-dir", run], tmp_path).kill(1, 43, run)
    steps = {}
    for path in disk(tmp_path, 1).rglob("*.part"):
        steps[int(re.findall(r"step-(\d+)", path.name)[0])] = path
    steps[max(steps)].unlink()
    output = Hosts(["--resume", run], tmp_path).wait()
    newest = max(steps) if fsdp == 1 else max(steps) - EVERY
    assert started_from(output) == newest
    assert weights(run) == weights(reference)


def test_a_run_goes_on_with_one_of_two_processes(whole, tmp_path):
    config, reference, fsdp = whole
    if fsdp > 1:
        pytest.skip("one process lacks devices for the mesh")
    run = tmp_path / "run"
    Hosts([config, "--run-dir", run], tmp_path).kill(1, 43, run)
    output = Hosts(["--resume", run], tmp_path, count=1).wait()
    assert started_from(output) >= 40, output
    np.testing.assert_allclose(losses(run), losses(reference), rtol=1e-5)
