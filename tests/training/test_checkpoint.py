"""Retention of checkpoints, and that all hosts restore the same one."""

import json
import os
import shutil
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from vlm.errors import CheckpointError
from vlm.paths import as_path
from vlm.training import checkpoint
from vlm.training.checkpoint import Checkpoints

STATE = {"x": jnp.arange(4.0)}
ABSTRACT = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE
)


def write(folder, steps, **options) -> list[int]:
    with Checkpoints(as_path(folder), **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, {"x": STATE["x"] + step}, {"step": step})
        checkpoints.wait()
        rows = checkpoints.finished()
    assert [row["step"] for row in rows] == steps
    assert all(row["checkpoint/seconds"] >= row["checkpoint/stall"] >= 0 for row in rows)
    assert all(row["checkpoint/bytes"] == 16 for row in rows)
    return sorted(int(name) for name in os.listdir(folder))


def test_checkpoints_are_kept_by_number_and_by_the_hour(tmp_path):
    assert write(tmp_path / "a", [1, 2, 3, 4], keep=2) == [3, 4]
    assert write(tmp_path / "b", [1, 2, 3, 4], keep=2, keep_hours=1.0) == [1, 3, 4]
    assert write(tmp_path / "c", [1, 2, 3, 4], keep=1, keep_hours=1e-9) == [1, 2, 3, 4]


def test_orbax_does_not_ask_for_a_preemption(tmp_path, monkeypatch):
    """The training loop asks, with numbers of its own."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    assert write(tmp_path / "run", [1, 2], keep=2) == [1, 2]
    assert not asked


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of file sizes")
def test_a_checkpoint_that_could_not_be_written_is_not_reported(tmp_path):
    """A limit of the size of files stands for a full disk: the writer fails in its thread."""
    import resource

    state = {"x": jnp.asarray(np.random.default_rng(0).normal(size=200_000), jnp.float32)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Checkpoints(as_path(tmp_path / "run"), keep=3) as checkpoints:

        def fail(step: int) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
            checkpoints.save(step, state, {})
            while checkpoints.writing:
                time.sleep(0.01)

        checkpoints.save(1, state, {})
        checkpoints.wait()
        assert [row["step"] for row in checkpoints.finished()] == [1]
        try:
            fail(2)
            assert checkpoints.newest == 1
            with pytest.raises(CheckpointError, match="checkpoint 1 is complete and kept"):
                checkpoints.finished()
            assert checkpoints.finished() == []
            fail(3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, ignored)
        checkpoints.save(4, state, {})  # at the end of the run, say: that of 3 is logged
        checkpoints.wait()
        assert [row["step"] for row in checkpoints.finished()] == [4]
        assert checkpoints.steps() == [1, 4]


@pytest.fixture
def three(tmp_path):
    write(tmp_path / "run", [10, 20, 30], keep=3)
    with Checkpoints(as_path(tmp_path / "run"), keep=3) as checkpoints:
        yield checkpoints


def test_a_checkpoint_that_is_corrupt_for_another_host_is_skipped(three, monkeypatch, capsys):
    theirs = iter([json.dumps([" by process 1 of 2", "DATA_LOSS", True]), "null"])
    monkeypatch.setattr(checkpoint, "exchange_texts", lambda mine: [mine, next(theirs)])
    state, data = three.restore(ABSTRACT)
    assert data == {"step": 20}
    assert float(state["x"][0]) == 20
    logged = "".join(capsys.readouterr().err.split())
    assert logged == f"checkpoint30of{three.folder}iscorruptandisskipped"


def test_a_checkpoint_that_another_host_cannot_read_stops_all(three, monkeypatch):
    theirs = json.dumps([" by process 1 of 2", "UNAVAILABLE", False])
    monkeypatch.setattr(checkpoint, "exchange_texts", lambda mine: [mine, theirs])
    with pytest.raises(CheckpointError, match=r"read by process 1 of 2 \(UNAVAILABLE\), but may"):
        three.restore(ABSTRACT)
    assert sorted(int(name) for name in os.listdir(three.folder)) == [10, 20, 30]


def test_a_file_that_is_missing_for_a_moment_is_waited_for(three):
    """As on a shared disk that another host wrote to."""
    state = three.folder / "30" / "state"
    away = three.folder.parent / "away"
    shutil.move(state, away)
    back = threading.Timer(0.5, shutil.move, (away, state))
    back.start()
    restored = three.restore(ABSTRACT)
    back.join()
    assert restored[1] == {"step": 30}


def test_an_error_in_the_computation_is_not_reported_as_a_disk_error(three, monkeypatch):
    """The death of another process during a step reaches the writer; the watch reports it."""

    def save(*_, **__):
        raise jax.errors.JaxRuntimeError("Read error [10.0.0.2]:68: Connection reset by peer")

    monkeypatch.setattr(three._manager, "save", save)
    with pytest.raises(jax.errors.JaxRuntimeError, match="reset by peer"):
        three.save(40, STATE, {})


def test_processes_that_see_other_checkpoints_delete_none(three, monkeypatch):
    monkeypatch.setattr(checkpoint, "exchange_texts", lambda mine: [mine, "[20]"])
    with pytest.raises(CheckpointError, match=r"\[20, 30\] of .* are to be deleted, and .*\[20\]"):
        three.delete([20, 30])
    assert three.steps() == [10, 20, 30]


def test_checkpoints_are_deleted_as_they_are_on_the_disk(three):
    """As after a process of its own clock has kept another one by the hour."""
    shutil.rmtree(three.folder / "20")
    three.delete([20, 30])
    assert three.steps() == [10]
