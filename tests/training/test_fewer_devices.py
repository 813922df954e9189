"""A run on fewer devices: the same batch in more micro-batches, and the same losses."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import environment, losses, send_at, start, wait, write_config

from vlm.cluster import watch
from vlm.config import MeshConfig, PreprocessConfig
from vlm.data.interleave import ONE_EACH
from vlm.errors import ShardingError
from vlm.training.fewer_devices import devices_before, fitted, problem_of


@pytest.mark.parametrize(
    ("batch", "micro", "before", "now", "expected"),
    [
        (48, None, 4, 4, None),
        (48, None, 4, 8, None),
        (48, None, 4, 3, 24),  # 12 rows a device before, 8 now
        (48, None, 4, 2, 24),
        (48, None, 4, 1, 12),
        (48, 24, 4, 3, 12),  # 6 before, 4 now
        (48, 24, 4, 2, 12),
        (48, None, 4, 5, None),
        (64, None, 4, 3, None),  # refused later, since 3 does not divide 64
        (30, 15, 3, 1, 5),
    ],
)
def test_the_micro_batch_keeps_the_memory_of_a_device(tiny, batch, micro, before, now, expected):
    e = fitted(tiny(batch_size=batch, micro_batch_size=micro), before, now)
    assert (e.batch_size, e.micro_batch_size) == (batch, expected)
    if expected is not None:
        assert expected / now <= (micro or batch) / before


def test_a_micro_batch_that_another_field_excludes_is_not_chosen(tiny):
    """Here halves and quarters, since a batch at the sequence length 13 has 1,425 pairs."""
    e = tiny(
        batch_size=1200,
        sequence_lengths=(13, 16),
        vision={"max_patches": 16},
        preprocess=PreprocessConfig(
            image_size=16, resize="naflex", patch_size=4, kernel="bilinear", max_patches=16
        ),
    )
    assert fitted(e, 5, 3).micro_batch_size == 240


def test_the_data_axis_shrinks_and_grows(tiny):
    e = tiny(batch_size=48, mesh=MeshConfig(data=4, fsdp=2))
    # Micro-batches are new: parameters are still gathered a layer at a time, as memory allows.
    assert fitted(e, 8, 6).mesh == MeshConfig(data=-1, fsdp=2, gather="layer")
    assert fitted(e, 8, 16).mesh == MeshConfig(data=-1, fsdp=2)
    with pytest.raises(ShardingError, match="and there are 5: change the mesh, or leave one"):
        fitted(e, 8, 5)
    fixed = dataclasses.replace(e, mesh=MeshConfig(data=8))  # fsdp is 1, also of TPUs
    assert fitted(fixed, 8, 4).mesh == MeshConfig(data=-1, fsdp=1)
    default = dataclasses.replace(e, mesh=MeshConfig())  # fsdp is 1, of TPUs up to 16
    assert fitted(default, 8, 6).mesh == MeshConfig()
    assert fitted(default, 8, 6, tpu=True).mesh == MeshConfig(gather="layer")
    one_free = dataclasses.replace(e, mesh=MeshConfig(data=2, fsdp=-1))
    assert fitted(one_free, 8, 4).mesh == dataclasses.replace(one_free.mesh, gather="layer")


def row(devices: int, changes: tuple[str, ...] = (), **more) -> dict:
    changed = {name: [None, None] for name in changes}
    return {"devices": f"{devices} x cpu", "processes": devices, "changes": changed, **more}


def test_the_config_is_for_the_devices_of_the_last_start_that_chose_them():
    assert devices_before([]) is None
    assert devices_before([row(8), row(4)]) == 8
    assert devices_before([row(8), row(4, ("steps",)), row(4, phase=1)]) == 8
    assert devices_before([row(8), row(4, ("micro_batch_size",)), row(2)]) == 4
    assert devices_before([row(8), row(4, ("mesh.fsdp",)), row(8)]) == 4


def test_why_a_run_cannot_train_on_some_processes(tiny):
    rows = [row(4)]
    assert problem_of(tiny(batch_size=12), [], 3) == ""
    assert problem_of(tiny(batch_size=12), rows, 3) == ""
    assert "batch_size 16 does not divide over the 3 devices" in problem_of(tiny(), rows, 3)
    fsdp = tiny(batch_size=12, mesh=MeshConfig(fsdp=2))
    assert "does not multiply to the number of devices" in problem_of(fsdp, rows, 3)
    lanes = tiny(batch_size=12, data={"interleave": 4, "source": "a/*.tar"})
    assert problem_of(lanes, rows, 3) == "data.interleave 4 does not divide over 3 processes"
    assert problem_of(lanes, rows, 2) == ""
    default = tiny(batch_size=12, data={"source": "a/*.tar"})  # its lanes are in the history
    rows = [row(4, lanes=4), row(4, rollback={})]
    assert (
        problem_of(default, rows, 3) == "4 readers (data.interleave) do not divide over 3 processes"
    )
    assert problem_of(default, rows, 2) == ""
    iterable = [row(4, lanes=ONE_EACH)]
    assert problem_of(default, iterable, 2) == "each of 4 processes has its own data iterator"
    assert problem_of(default, iterable, 4) == ""


@pytest.mark.slow
def test_a_run_goes_on_with_three_of_four_devices(tiny, tmp_path):
    """It has the losses of the run on four, and says how it was fitted."""
    experiment = tiny(batch_size=12, steps=24, log_every=1, checkpoint_every=0.25)
    config, log = write_config(experiment, tmp_path / "config.json"), tmp_path / "log"
    whole, run = tmp_path / "whole", tmp_path / "run"
    wait(start([config, "--run-dir", whole], environment(4), log), log)
    process = start([config, "--run-dir", run], environment(4, **{watch.SUPERVISED: "1"}), log)
    send_at(signal.SIGTERM, 6, run, [process])
    wait(process, log, watch.STOPPED)
    output = wait(start(["--resume", run], environment(3), log), log)
    assert "micro_batch_size is 6 on 3 devices; it is None on the 4 that" in output
    np.testing.assert_allclose(losses(run), losses(whole), rtol=1e-5)
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert rows[-1]["fitted"] == {"micro_batch_size": [None, 6]}
    assert json.loads((run / "config.json").read_text())["micro_batch_size"] is None


@pytest.mark.slow
@pytest.mark.parametrize("local", [[], ["--local"]], ids=["", "local"])
def test_an_elastic_run_of_four_processes_ends_as_without_faults(local):
    script = Path(__file__).with_name("elastic_faults.py")
    options = ["--faults", "3", "--steps", "60", "--seed", "1", "--only", "shrinking", *local]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 faults" in done.stdout
