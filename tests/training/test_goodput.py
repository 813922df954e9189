"""Time of a run by purpose, over kills, resumes and failures."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from processes import environment, send_at, start, wait, write_config

import vlm
from vlm.errors import CheckpointError, VlmError
from vlm.paths import as_path
from vlm.training import watchdog
from vlm.training.goodput import FILE, PURPOSES, TimeTally
from vlm.training.goodput_log import GoodputLog
from vlm.training.history import read_rows
from vlm.training.watchdog import STEP, ActivityTimer


def rows_of(run) -> list[dict]:
    return read_rows(as_path(run) / FILE)


def test_work_after_the_step_that_a_run_returns_to_is_lost():
    rows = [
        {"step": 0, "began": "then"},
        {"step": 0, "start": 4.0},
        {"step": 0, "start": 6.0},
        {"step": 20, "compute": 4.0, "data": 1.0},
        {"step": 40, "compute": 4.0, "checkpoint": 0.5},
        {"step": 55, "compute": 3.0},  # killed here
        {"step": 40, "began": "now"},
        {"step": 40, "start": 8.0},
        {"step": 70, "compute": 6.0, "evaluation": 2.0},
        {"step": 20, "lost": 1.5},  # a rollback
        {"step": 90, "compute": 7.0},
        {"step": 90, "end": "finished"},
    ]
    tally = TimeTally(rows)
    assert tally.starts == 2
    expected = {"compute": 11.0, "data": 1.0, "start": 18.0, "lost": 3 + 4.5 + 8 + 1.5}
    assert {name: s for name, s in tally.seconds.items() if s} == pytest.approx(expected)
    assert sum(tally.seconds.values()) == pytest.approx(
        sum(row.get(name, 0.0) for row in rows for name in PURPOSES)
    )
    assert sum(tally.shares().values()) == pytest.approx(1.0)


def test_all_time_of_a_run_has_a_purpose(tiny, tmp_path):
    seen: list[dict] = []

    class Recorder(vlm.callbacks.Callback):
        def on_step(self, step, metrics):
            seen.append(dict(metrics))

    began = time.monotonic()
    run = tiny(run_dir=str(tmp_path / "run"), data={"eval_split": "test"}, eval_every=0.5)
    result = vlm.train(run, callbacks=[Recorder()])
    took = time.monotonic() - began
    tally = TimeTally(rows_of(result))
    assert 0.5 * took < sum(tally.seconds.values()) <= took
    assert all(tally.seconds[name] > 0 for name in ("compute", "evaluation", "start", "checkpoint"))
    assert tally.seconds["lost"] == 0
    for metrics in seen:
        shares = [metrics[f"goodput/{name}"] for name in PURPOSES]
        assert sum(shares) == pytest.approx(1.0)
        assert metrics["memory/host"] > 2**20
    assert rows_of(result)[-1] == {"step": 12, "end": "finished"}


def test_time_is_recorded_while_a_step_lasts(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "STALL_WARNING", 0.2)  # so that the watchdog looks often
    folder = as_path(tmp_path)

    def grows(seen: int) -> list[dict]:
        while len(rows_of(folder)) < seen + 3:
            time.sleep(0.02)
        return rows_of(folder)

    with ActivityTimer() as timed, GoodputLog(folder, folder, timed) as log:
        rows = grows(0)  # before the first step
        assert all("start" in row for row in rows[1:])
        log.record(0, force=True)
        with timed(STEP):
            rows = grows(len(rows) + 1)
        assert rows[-1]["compute"] > 0
        seconds = time.monotonic() - timed.began
    assert "end" in rows_of(folder)[-1]
    tally = TimeTally(rows_of(folder))
    assert tally.starts == 1
    assert sum(tally.seconds.values()) == pytest.approx(seconds, rel=0.2)
    assert min(tally.seconds.values()) >= 0


def test_lines_of_the_thread_have_the_step_of_the_main_thread(tmp_path, monkeypatch):
    """The log is some steps behind, and its lines never seem to go back."""
    monkeypatch.setattr(watchdog, "STALL_WARNING", 0.2)
    folder = as_path(tmp_path)
    with ActivityTimer() as timed, GoodputLog(folder, folder, timed) as log:
        log.record(1, force=True)
        timed.step = 7
        while rows_of(folder)[-1]["step"] < 7:
            time.sleep(0.02)
        before = len(rows_of(folder))
        while len(rows_of(folder)) == before:
            log.record(5)
    assert {row["step"] for row in rows_of(folder)[before:]} == {7}
    assert TimeTally(rows_of(folder)).seconds["lost"] == 0


def test_a_resumed_start_is_shown_before_it_has_restored(tmp_path):
    folder = as_path(tmp_path)
    with ActivityTimer() as timed, GoodputLog(folder, folder, timed) as log:
        log.record(9, force=True)
    assert rows_of(folder)[-1] == {"step": 9, "end": "stopped"}
    with ActivityTimer() as timed, GoodputLog(folder, folder, timed) as log:
        assert rows_of(folder)[-1]["step"] == 9
        assert "began" in rows_of(folder)[-1]
        log.restored(6)
        log.record(6, force=True)
        log.record(8, force=True)
    assert TimeTally(rows_of(folder)).starts == 2
    assert [row["step"] for row in rows_of(folder)[-3:]] == [8, 8, 8]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
@pytest.mark.parametrize("error", [None, CheckpointError("checkpoint 6 is kept")])
def test_the_error_of_a_full_disk_is_a_sentence_and_hides_no_other(tmp_path, error):
    folder = as_path(tmp_path)

    def run() -> None:
        with ActivityTimer() as timed, GoodputLog(folder, folder, timed) as log:
            log._file._open_file = full
            if error:
                raise error

    expected = str(error) if error else r"goodput.jsonl cannot be written \(.*resume the run"
    with open("/dev/full", "a") as full, pytest.raises(VlmError, match=expected):
        run()


@pytest.mark.untyped
def test_a_failed_and_a_stopped_run_say_how_they_ended(tiny, tmp_path):
    class Broken(vlm.callbacks.Callback):
        def on_step(self, step, metrics):
            raise OSError("the pager is off")

    failed = tmp_path / "failed"
    with pytest.raises(vlm.TrainingError):
        vlm.train(tiny(run_dir=str(failed)), callbacks=[Broken()])
    assert rows_of(failed)[-1]["end"] == "failed"
    assert "the pager is off" in rows_of(failed)[-1]["error"]
    with vlm.steps(tiny(run_dir=str(tmp_path / "stopped"))) as loop:
        for state, _ in loop:
            if int(state.step) == 3:
                break
    assert rows_of(tmp_path / "stopped")[-1] == {"step": 3, "end": "stopped"}


@pytest.mark.slow
def test_a_killed_run_has_lost_its_work_after_the_checkpoint(tiny, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    experiment = tiny(steps=400, log_every=1, checkpoint_every=0.5, run_dir=str(run))
    config = write_config(experiment, tmp_path / "config.json")
    first = start([config], environment(), log)
    send_at(signal.SIGKILL, 300, run, [first])
    wait(first, log, -signal.SIGKILL)
    assert "end" not in rows_of(run)[-1]
    before = TimeTally(rows_of(run)).seconds
    output = wait(start(["--resume", run], environment(), log), log)
    tally = TimeTally(rows_of(run))
    assert tally.starts == 2
    assert tally.seconds["start"] > before["start"]
    assert 0 < tally.seconds["lost"] < before["compute"] + before["data"] + before["other"]
    assert f"goodput over 2 starts, {sum(tally.seconds.values()):,.0f} s: compute" in output
    last = [json.loads(line) for line in Path(run / "log.jsonl").read_text().splitlines()][-2:]
    assert any("goodput/lost" in row for row in last)
