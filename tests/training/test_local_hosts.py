"""Processes with local disks of their own: killed, replaced by empty ones, and fewer."""

import re
import shutil
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
from processes import environment, losses, send_at, start, wait, weights, write_config

pytestmark = pytest.mark.slow
STEPS, EVERY = 60, 5
LOCAL = {"folder": "$LOCAL_DISK/vlm", "every": EVERY}


class Hosts:
    """Processes of a run over loopback, each with four devices and a disk of its own."""

    def __init__(self, arguments: list, folder: Path, count: int = 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.logs = [folder / f"log{i}" for i in range(count)]
        self.processes = []
        for i, log in enumerate(self.logs):
            env = environment(
                4,
                JAX_COORDINATOR_ADDRESS=address,
                JAX_NUM_PROCESSES=str(count),
                JAX_PROCESS_ID=str(i),
                VLM_HEARTBEAT_TIMEOUT="8",
                LOCAL_DISK=str(disk(folder, i)),
            )
            self.processes.append(start(arguments, env, log))

    def kill(self, host: int, step: int, run: Path) -> str:
        """Kill one process once the log has a step; return the output of process 0 in the end."""
        send_at(signal.SIGKILL, step, run, [self.processes[host]])
        return self.wait(*(-signal.SIGKILL if p is self.processes[host] else None for p in self))

    def __iter__(self):
        return iter(self.processes)

    def wait(self, *codes: int | None) -> str:
        """Return the output of process 0, once all have ended."""
        try:
            codes = codes or (0,) * len(self.processes)
            outputs = [wait(*p) for p in zip(self, self.logs, codes, strict=True)]
            return " ".join(outputs[0].split())
        finally:
            for process in self:
                process.kill()


def disk(folder: Path, host: int) -> Path:
    return folder / f"disk{host}"


def started_from(output: str) -> int:
    """Return the step of the local checkpoint that a run was started from; -1 if from none."""
    match = re.search(r"starting from the local checkpoint of step (\d+):", output)
    return int(match[1]) if match else -1


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Return an uninterrupted run by the size of its `fsdp` axis, and its config.

    With 1, both hosts have a whole copy of the state; with 8, each has a half of it. There is a
    checkpoint of the run folder at half of the steps.
    """
    runs = {}

    def run(fsdp: int) -> tuple[Path, Path]:
        if fsdp in runs:
            return runs[fsdp]
        folder = tmp_path_factory.mktemp("whole")
        experiment = tiny(
            batch_size=24,
            steps=STEPS,
            log_every=1,
            checkpoint_every=0.5,
            checkpoint_minutes=None,
            vision={"dropout": 0.1, "width": 128, "depth": 1},
            text={"depth": 1},
            mesh={"fsdp": fsdp},
            local_checkpoints=LOCAL,
        )
        config = write_config(experiment, folder / "config.json")
        output = Hosts([config, "--run-dir", folder / "run"], folder).wait()
        assert f"local checkpoints every {EVERY} steps" in output
        assert not list(folder.rglob("*.part"))  # the run folder has a newer one
        runs[fsdp] = folder / "run", config
        return runs[fsdp]

    return run


def test_a_killed_host_comes_back_and_another_is_replaced_by_an_empty_one(whole, tmp_path):
    reference, config = whole(fsdp=1)
    run = tmp_path / "run"
    Hosts([config, "--run-dir", run], tmp_path).kill(1, 17, run)
    assert not list((run / "checkpoints").iterdir())
    output = Hosts(["--resume", run], tmp_path).kill(0, 43, run)
    assert started_from(output) >= 15
    assert "the run folder has none; 0 GB were sent" in output
    shutil.rmtree(disk(tmp_path, 0))
    output = Hosts(["--resume", run], tmp_path).wait()
    assert started_from(output) >= 40
    assert "the run folder has that of step 30; 0.00" in output  # GB were sent to process 0
    assert weights(run) == weights(reference)
    assert losses(run) == losses(reference)


def test_hosts_without_copies_combine_the_newest_step_that_both_have(whole, tmp_path):
    """And if one of them is empty, the run goes on from the run folder."""
    reference, config = whole(fsdp=8)
    run = tmp_path / "run"
    Hosts([config, "--run-dir", run], tmp_path).kill(1, 43, run)
    numbers = {p: int(re.findall(r"-step-(\d+)", p.name)[0]) for p in tmp_path.rglob("*.part")}
    newest = max(numbers.values())
    for path, step in numbers.items():
        if step == newest and path.is_relative_to(disk(tmp_path, 1)):
            path.unlink()  # as if it had been killed a moment earlier
    output = Hosts(["--resume", run], tmp_path).kill(0, 52, run)
    assert re.search(f"step {newest} is not used: the processes hold [1-9]", output)
    assert started_from(output) == newest - EVERY
    shutil.rmtree(disk(tmp_path, 0))
    output = Hosts(["--resume", run], tmp_path).wait()
    assert "is not used: the processes hold" in output
    assert "no local checkpoint is newer than that of step 30 of the run folder" in output
    assert weights(run) == weights(reference)
    assert losses(run) == losses(reference)


def test_one_of_two_processes_goes_on(whole, tmp_path):
    reference, config = whole(fsdp=1)
    run = tmp_path / "run"
    Hosts([config, "--run-dir", run], tmp_path).kill(1, 43, run)
    output = Hosts(["--resume", run], tmp_path, count=1).wait()
    assert started_from(output) >= 40
    np.testing.assert_allclose(losses(run), losses(reference), rtol=1e-5)
