"""Local checkpoints of one process: what a part holds, and which of them a restart may use."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from processes import losses, weights

from vlm.config import LocalCheckpointConfig, MeshConfig
from vlm.errors import CheckpointError, ConfigError
from vlm.paths import as_path
from vlm.sharding import make_mesh, placed
from vlm.training.local_checkpoint import LocalCheckpoints
from vlm.training.local_parts import Part, Shard, layout, local_shards, write_part
from vlm.training.loop import steps, train
from vlm.training.run import Run
from vlm.training.shard_exchange import assembled, combined, pieces_of


def state_on(mesh: MeshConfig) -> dict[str, jax.Array]:
    """A state of several types, sharded over `fsdp`."""
    key = jax.random.key(3)
    arrays = {
        "kernel": (jax.random.normal(key, (16, 8)), PartitionSpec("fsdp", "tensor")),
        "half": (jax.random.normal(key, (8, 4), jnp.bfloat16), PartitionSpec(None, "tensor")),
        "int8": (jnp.arange(-8, 8, dtype=jnp.int8), PartitionSpec("fsdp")),
        "special": (jnp.array([-0.0, jnp.nan, jnp.inf, 1e-45]), PartitionSpec()),
        "step": (jnp.int32(7), PartitionSpec()),
        "none": (jnp.zeros((0, 4)), PartitionSpec()),
    }
    on = make_mesh(mesh)
    return {name: jax.device_put(x, NamedSharding(on, spec)) for name, (x, spec) in arrays.items()}


def bits(state) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def write(file: Path, state) -> Part:
    about = {"data": {"step": 7}, "layout": layout(state), "bytes": 0}
    write_part(file, about, local_shards(state))
    return Part(file)


def read_all(file: Path) -> None:
    part = Part(file)
    for shard in part.sizes:
        part.read(shard)


@pytest.mark.parametrize("fsdp", [1, 4, 8])
def test_a_state_has_the_same_bits_on_another_mesh(tmp_path, fsdp):
    state, other = state_on(MeshConfig(fsdp=4, tensor=2)), state_on(MeshConfig(fsdp=fsdp))
    part = write(tmp_path / "a.part", state)
    # Each shard once, although the two devices of `tensor` have copies.
    assert sum(part.sizes.values()) == sum(x.nbytes for x in state.values())
    held = dict.fromkeys(part.sizes, part)
    about, holders = combined(held)
    assert about["data"] == {"step": 7}
    abstract = jax.tree.map(lambda x: placed(x, x.sharding), other)
    values = {shard: part.read(shard) for shard in held}
    restored = assembled(abstract, pieces_of(abstract, holders), values)
    assert bits(restored) == bits(state)
    for name, x in restored.items():
        assert (x.dtype, x.sharding) == (state[name].dtype, other[name].sharding)


def test_the_state_may_change_while_it_is_written():
    state = {"x": jnp.arange(8.0)}
    shards = local_shards(state)
    jax.jit(lambda s: {"x": s["x"] + 1}, donate_argnums=0)(state)
    np.testing.assert_array_equal(shards[Shard(0, ((0, 8),))], np.arange(8.0))


def test_every_changed_byte_of_a_part_is_found(tmp_path):
    file = tmp_path / "a.part"
    write(file, {"x": jnp.arange(4.0), "y": jnp.ones(3)})
    good = file.read_bytes()
    header = good.index(b"\n")
    for place in [0, 20, header - 1, header + 1, len(good) - 1]:
        file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(CheckpointError, match="is corrupt"):
            read_all(file)
    file.write_bytes(good[:-1])
    with pytest.raises(CheckpointError, match="is corrupt"):
        read_all(file)


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "a.part").mkdir()
    with pytest.raises(IsADirectoryError):
        write(tmp_path / "a.part", {"x": jnp.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["a.part"]


# -------------------------------------------------------------- which of them a restart may use


def parts(folder: Path) -> dict[int, Path]:
    """Return the parts in a folder by their step."""
    return {Part(path).about["origin"][0]: path for path in folder.rglob("*.part")}


def saved(run: Run, steps: tuple[int, ...]) -> None:
    """Record a start of a run one step before the first of these steps, and save at all."""
    run.record_start(steps[0] - 1, 100)
    with LocalCheckpoints(run) as local:
        for step in steps:
            local.save(step, STATE | {"step": jnp.int32(step)}, {"step": step})


def restored_step(run: Run, after: int = -1) -> int | None:
    """Return the step of the local checkpoint that a start of a run takes."""
    abstract = jax.tree.map(lambda x: placed(x, x.sharding), STATE)
    found = LocalCheckpoints(run).restore(abstract, lambda data: True, after)
    if found is None:
        return None
    state, data = found
    assert bits(state) == bits(STATE | {"step": jnp.int32(data["step"])})
    return data["step"]


STATE = {"kernel": jnp.arange(12.0).reshape(3, 4), "step": jnp.int32(0)}


@pytest.fixture
def run(tiny, tmp_path, caplog) -> Run:
    """A run that was killed, with local checkpoints at the steps 4 and 6."""
    caplog.set_level(logging.INFO, "vlm.training")
    local = LocalCheckpointConfig(str(tmp_path / "disk"), every=2)
    run = Run.create(tiny(run_dir=str(tmp_path / "run"), steps=100, local_checkpoints=local))
    saved(run, (2, 4, 6))
    assert sorted(parts(tmp_path)) == [4, 6]
    return run


def resumed(run: Run, **changes) -> Run:
    return Run.open(run.folder, lambda e: dataclasses.replace(e, **changes))


def test_the_newest_is_taken(run, caplog):
    assert restored_step(resumed(run)) == 6
    assert "starting from the local checkpoint of step 6: the run folder has none" in caplog.text
    assert restored_step(resumed(run), after=5) == 6
    assert "step 6: the run folder has that of step 5" in caplog.text


def test_one_that_is_no_newer_than_that_of_the_run_folder_is_not_taken(run, caplog):
    assert restored_step(resumed(run), after=6) is None
    assert "no local checkpoint is newer than that of step 6 of the run folder" in caplog.text


@pytest.mark.parametrize("lost", [1, 2000])  # of the bytes; the second cuts off the header
def test_a_truncated_one_is_skipped_for_the_one_before_it(run, tmp_path, caplog, lost):
    newest = parts(tmp_path)[6]
    newest.write_bytes(newest.read_bytes()[:-lost])
    assert restored_step(resumed(run)) == 4
    assert f"{newest} is corrupt" in caplog.text


def test_a_write_that_was_cut_off_is_ignored(run, tmp_path):
    newest = parts(tmp_path)[6]
    unfinished = newest.rename(newest.with_name(f"{newest.name}.unfinished"))
    assert restored_step(resumed(run)) == 4
    assert not unfinished.exists()


def test_none_is_taken_from_before_a_change_of_settings(run, caplog):
    assert restored_step(resumed(run, text_masking=0.1)) is None
    assert "step 6 is not used: the settings have changed since" in caplog.text


def test_another_interval_is_no_change(run):
    local = dataclasses.replace(run.experiment.local_checkpoints, every=3)
    assert restored_step(resumed(run, local_checkpoints=local)) == 6


def test_none_is_taken_that_an_earlier_start_has_left(run, tmp_path, caplog):
    """The second start came from step 3: its step 4 may differ from the other by rounding."""
    again = resumed(run)
    again.record_start(3, 100)
    assert restored_step(resumed(run)) is None
    assert "step 6 is not used: the run has gone back to step 3 since" in caplog.text
    saved(again, (4,))
    assert sorted(parts(tmp_path)) == [4]
    assert restored_step(resumed(run)) == 4


def test_one_is_taken_again_after_a_start_from_it(run):
    again = resumed(run)
    again.record_start(6, 100)
    assert restored_step(resumed(run)) == 6


def test_none_is_taken_from_before_a_rollback(run, caplog):
    row = {"step": 5, "total": 100, "left": 6, "rollbacks": 1, "reason": "", "skipped": 1}
    run.record_rollback(row)
    assert restored_step(resumed(run), after=5) is None
    assert "step 6 is not used: the run has gone back to step 5 since" in caplog.text


def test_phases_leave_them_valid(run):
    run.record_phase(1, 3, 100, {})
    assert restored_step(resumed(run)) == 6


def test_none_is_taken_of_an_earlier_run_in_the_same_folder(run, caplog):
    shutil.rmtree(run.folder)
    another = Run.create(run.experiment)
    assert restored_step(another) is None
    assert "step 6 is not used: it is of another run" in caplog.text
    another.record_start(0, 99)
    assert restored_step(resumed(another)) is None


def test_none_is_taken_of_a_run_that_this_one_was_copied_from(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "copied")
    copied = Run.open(tmp_path / "copied")
    assert restored_step(copied) is None
    saved(copied, (8,))
    assert restored_step(Run.open(tmp_path / "copied")) == 8
    assert restored_step(resumed(run)) == 6


def test_another_architecture_is_not_read(run, caplog):
    state = {**STATE, "kernel": jnp.zeros((3, 5))}
    abstract = jax.tree.map(lambda x: placed(x, x.sharding), state)
    assert LocalCheckpoints(resumed(run)).restore(abstract, lambda data: True, -1) is None
    assert "step 6 is not used: it has another architecture than the run" in caplog.text


def test_the_state_of_another_phase_is_not_read(run):
    found = LocalCheckpoints(resumed(run)).restore({}, lambda data: data["step"] != 6, -1)
    assert found == (None, {"step": 6})


# ----------------------------------------------------------------------------------- whole runs


def leave(loop: steps, at: int) -> None:
    """End a run after a step, without a last checkpoint."""
    with loop:
        for state, _ in loop:
            if int(state.step) == at:
                raise InterruptedError


@pytest.mark.slow
def test_a_run_ends_as_without_them(tiny, tmp_path, caplog):
    """It is left at step 11 without a checkpoint; one is at 6, local ones at 8 and 10."""
    caplog.set_level(logging.INFO, "vlm.training")
    folder, whole = tmp_path / "run", tmp_path / "whole"
    local = LocalCheckpointConfig(str(tmp_path / "disk"), every=2)
    smaller = {"vision": {"dropout": 0.1, "depth": 1}, "text": {"depth": 1}}
    experiment = tiny(steps=12, log_every=1, checkpoint_every=0.5, **smaller)
    train(dataclasses.replace(experiment, run_dir=str(whole)))
    changed = dataclasses.replace(experiment, run_dir=str(folder), local_checkpoints=local)
    with pytest.raises(InterruptedError):
        leave(steps(changed), 11)
    assert sorted(parts(tmp_path)) == [8, 10]
    train(resume=folder)
    assert "starting from the local checkpoint of step 10" in caplog.text
    assert weights(folder) == weights(whole)
    assert losses(folder) == losses(whole)
    assert not parts(tmp_path)  # the run folder has a newer checkpoint
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 10


def test_a_disk_that_fails_is_warned_of(tiny, tmp_path, caplog):
    disk = tmp_path / "disk"
    e = tiny(run_dir=str(tmp_path / "run"), local_checkpoints={"folder": str(disk), "every": 2})
    with steps(e) as loop:
        for _ in loop:
            shutil.rmtree(disk, ignore_errors=True)
    assert "process 0 of 1 could not write the local checkpoint of step 2" in caplog.text
    assert "(No such file or directory): free its disk; the run goes on" in caplog.text
    assert (tmp_path / "run" / "bundle").exists()


def test_the_folder_of_a_new_run_must_be_usable(tiny, tmp_path):
    (tmp_path / "file").touch()
    e = tiny(run_dir=str(tmp_path / "run"), local_checkpoints={"folder": str(tmp_path / "file")})
    with pytest.raises(ConfigError, match="process 0 of 1 cannot write local checkpoints to"):
        train(e)
    assert not (tmp_path / "run").exists()


def test_a_variable_that_is_not_set(monkeypatch):
    config = LocalCheckpointConfig("$VLM_TEST_DISK/vlm")
    with pytest.raises(ConfigError, match="has a variable that is not set on this host"):
        config.local_folder  # noqa: B018
    monkeypatch.setenv("VLM_TEST_DISK", "/disk")
    assert config.local_folder == "/disk/vlm"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"folder": "gs://bucket/a"}, "is no local folder"),
        ({"folder": ""}, "is no local folder"),
        ({"every": 5}, "has no effect: give local_checkpoints.folder"),
        ({"folder": "/disk", "every": 0}, "every is 0: choose a number from 1"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        LocalCheckpointConfig(**fields)


def test_nothing_is_written_by_default(tiny, tmp_path):
    local = LocalCheckpoints(Run(as_path(tmp_path / "run"), tiny()))
    assert not any(map(local.is_scheduled, range(100)))
    assert local.restore({}, lambda _: True, after=-1) is None
