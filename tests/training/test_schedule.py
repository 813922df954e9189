"""Schedules, the length of a run, its stall messages, and its log in a bucket."""

import time

import pytest

from vlm.config import Experiment
from vlm.data.pipeline import TrainIterator, train_batches
from vlm.inputs.tokenizer import train_bpe
from vlm.paths import as_path
from vlm.sharding import make_mesh
from vlm.training import bucket_sync, interrupt, schedule, watchdog
from vlm.training.bucket_sync import BucketSync
from vlm.training.interrupt import Interrupted
from vlm.training.schedule import CheckpointSchedule, step_times
from vlm.training.step import Trainer
from vlm.training.watchdog import DATA, ActivityTimer


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("seconds", [0.1, 7.0, 40.0, 100.0])
def test_checkpoints_are_written_every_minute_at_any_step_time(monkeypatch, seconds):
    clock = Clock()
    monkeypatch.setattr(schedule, "time", clock)
    experiment = Experiment(checkpoint_every=1.0, checkpoint_minutes=1.0)
    checkpoint_schedule, saved = CheckpointSchedule(experiment, 0, 100_000), []
    for step in range(1, 50_000):
        ahead = step < 4 or (saved and clock.now == saved[-1])  # started, but not yet computed
        clock.now += 1e-3 if ahead else seconds
        if checkpoint_schedule.is_scheduled(step, writing=False):
            saved.append(clock.now)
        if clock.now > 2000:
            break
    gaps = [b - a for a, b in zip([1000.0, *saved], saved, strict=False)]
    assert len(gaps) >= 9
    assert all(60 <= gap <= 60 + 2 * seconds for gap in gaps)


def test_a_checkpoint_waits_for_the_last_one_and_fractions_count_too(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(schedule, "time", clock)
    checkpoint_schedule = CheckpointSchedule(
        Experiment(checkpoint_every=0.5, checkpoint_minutes=1.0), 0, 100
    )
    saved = []
    for step in range(1, 100):
        clock.now += 10
        if checkpoint_schedule.is_scheduled(step, writing=20 <= step < 40):
            saved.append(step)
    assert saved[:4] == [6, 12, 18, 40]
    assert 50 in saved
    assert 56 in saved  # a minute after the one at half of the run


def test_seconds_count_the_wait_for_data(tiny, monkeypatch):
    experiment = tiny(steps=None, seconds=30.0)
    tokenizer = train_bpe(["a red bar", "a blue square"], 300, 16)
    trainer = Trainer(experiment, make_mesh(experiment.mesh), tokenizer.config)
    batches = train_batches(
        experiment.data, trainer.preprocess, tokenizer, batch_size=16, seed=0
    )  # fmt: skip
    next(batches)
    before, quick = batches.get_state(), TrainIterator.__next__

    def take(seconds: float):
        def slowly(self):
            time.sleep(seconds)
            return quick(self)

        monkeypatch.setattr(TrainIterator, "__next__", slowly)

    take(0.5)
    assert min(step_times(trainer, batches, limit=3.0)) >= 0.5
    assert batches.get_state() == before  # the run trains on what was measured
    take(2.0)
    began = time.monotonic()
    step_times(trainer, batches, limit=1.0)
    assert time.monotonic() - began < 60  # one step, not all that could be measured
    batches.close()


def test_a_stalled_run_logs_its_activity(monkeypatch, capfd):
    monkeypatch.setattr(watchdog, "STALL_WARNING", 0.2)
    with ActivityTimer() as timed:
        timed.step = 7
        with timed(DATA):
            time.sleep(1.0)
        for _ in range(10):
            with timed("evaluating"):
                time.sleep(0.05)
        time.sleep(1.0)  # as where all hosts agree on the schedule
    output = " ".join(capfd.readouterr().err.split())
    assert "the run has been waiting for data for 0 s, at step 7" in output
    assert "the run has been between two steps for 0 s, at step 7" in output
    assert output.count("the run has been") <= 6  # after twice the time, and twice that
    assert "evaluating" not in output
    assert timed.seconds[DATA] >= 1.0
    assert "waiting for data" in timed.summary()


def test_the_activities_of_other_hosts_are_grouped():
    activities = {i: (f"host{i}", "waiting for data at step 3") for i in (1, 2, 3, 5, 6, 7)}
    assert watchdog.describe_processes(activities | {4: ("host4", "evaluating at step 2")}) == (
        "; processes 1 on host1, 2 on host2, 3 on host3, 5 on host5 and 2 more are waiting for "
        "data at step 3; process 4 on host4 is evaluating at step 2"
    )


def test_a_growing_log_is_visible_in_a_bucket(monkeypatch, tmp_path):
    monkeypatch.setattr(bucket_sync, "is_remote", lambda path: True)
    monkeypatch.setattr(bucket_sync, "PERIOD", 0.1)
    with BucketSync(as_path(tmp_path)) as copied, (copied.local / "log.jsonl").open("w") as log:
        assert copied.local != tmp_path
        for rows in range(1, 4):
            log.write("row\n")
            log.flush()
            end = time.monotonic() + 20
            while not (tmp_path / "log.jsonl").exists() or (
                (tmp_path / "log.jsonl").read_text() != "row\n" * rows
            ):
                assert time.monotonic() < end
                time.sleep(0.02)
        log.write("last\n")
        log.flush()
    assert (tmp_path / "log.jsonl").read_text() == "row\n" * 3 + "last\n"
    assert not copied.local.exists()


def test_on_a_disk_nothing_is_copied(tmp_path):
    with BucketSync(as_path(tmp_path)) as copied:
        assert copied.local == tmp_path
        copied.copy()


def test_a_short_shutdown_deadline_is_logged(monkeypatch):
    monkeypatch.setattr(interrupt, "SHUTDOWN_GRACE", 30.0)
    with Interrupted() as interrupted:
        assert not interrupted.is_due()
        interrupted._ask(15, None)
        assert interrupted.is_due()
        assert interrupted.announce(3, 5.0, 2) == "stop requested: saving step 3"
        output = interrupted.announce(3, 45.0, 2)
    assert (
        "took 45 s and 30 s of the 30 s shutdown grace period (VLM_SHUTDOWN_GRACE) are left"
        in output
    )
    assert output.endswith("resumes from step 2")
