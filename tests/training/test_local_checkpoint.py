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

from vlm.config import Experiment, LocalCheckpointConfig, MeshConfig
from vlm.errors import CheckpointError, ConfigError
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
    write_part(file, {"data": {"step": 7}, "layout": layout(state), "bytes": 0}, local_shards(state))
    return Part(file)


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
    part = write(file, {"x": jnp.arange(4.0), "y": jnp.ones(3)})
    good = file.read_bytes()
    header = good.index(b"\n")
    for place in [0, 20, header - 1, header + 1, len(good) - 1]:
        file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(CheckpointError, match="is corrupt"):
            again = Part(file)
            list(map(again.read, again.sizes))
    file.write_bytes(good[:-1])
    with pytest.raises(CheckpointError, match="is corrupt"):
        list(map(part.read, part.sizes))


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "a.part").mkdir()
    with pytest.raises(IsADirectoryError):
        write(tmp_path / "a.part", {"x": jnp.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["a.part"]


class Killed(Exception):
    pass


def killed(at: int, experiment: Experiment | None = None, **options) -> None:
    """Train up to a step, and end there without a last checkpoint."""
    with pytest.raises(Killed), steps(experiment, **options) as loop:
        for state, _ in loop:
            if int(state.step) == at:
                raise Killed


def parts(folder: Path) -> dict[int, Path]:
    """Return the parts of a run by their step."""
    found = {}
    for path in folder.rglob("*.part"):
        found[Part(path).about["origin"][0]] = path
    return found


@pytest.fixture(scope="module")
def interrupted(tiny, tmp_path_factory):
    """An uninterrupted run, and one killed at step 11, with a checkpoint at 6, local at 8 and 10"""
    folder = tmp_path_factory.mktemp("local")
    experiment = tiny(
        run_dir=str(folder / "run"),
        steps=12,
        log_every=1,
        checkpoint_every=0.5,
        vision={"dropout": 0.1, "depth": 1},
        text={"depth": 1},
        local_checkpoints=LocalCheckpointConfig(str(folder / "disk"), every=2),
    )
    whole = folder / "whole"
    train(dataclasses.replace(experiment, run_dir=str(whole), local_checkpoints={}))
    killed(11, experiment)
    assert sorted(parts(folder)) == [8, 10]
    return folder, whole


@pytest.fixture
def run(interrupted, tmp_path, caplog):
    """A copy of the killed run at the place it had, as its local checkpoints are of that place."""
    folder, whole = interrupted
    names = ("run", "disk")
    for name in names:
        shutil.copytree(folder / name, tmp_path / name)
    caplog.set_level(logging.INFO, "vlm.training")
    yield folder / "run", whole
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(tmp_path / name, folder / name)


def test_a_killed_run_ends_as_an_uninterrupted_one(run, caplog):
    run, whole = run
    train(resume=run)
    assert "starting from the local checkpoint of step 10: that of the run folder is of step 6" in (
        caplog.text
    )
    assert weights(run) == weights(whole)
    assert losses(run) == losses(whole)
    assert not parts(run.parent)  # the run folder has a newer checkpoint
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 10


def test_a_corrupt_one_is_skipped_for_the_one_before_it(run, caplog):
    run, whole = run
    newest = parts(run.parent)[10]
    newest.write_bytes(newest.read_bytes()[:-1])
    train(resume=run)
    assert f"{newest} is corrupt" in caplog.text
    assert "starting from the local checkpoint of step 8" in caplog.text
    assert weights(run) == weights(whole)


def test_a_write_that_was_cut_off_is_ignored(run, caplog):
    run, _ = run
    newest = parts(run.parent)[10]
    unfinished = newest.rename(newest.with_name(f"{newest.name}.unfinished"))
    killed(9, resume=run)
    assert "starting from the local checkpoint of step 8" in caplog.text
    assert not unfinished.exists()


def refused(caplog, why: str, step: int = 10) -> None:
    assert f"the local checkpoint of step {step} is not used: {why}" in caplog.text
    assert "starting from the local checkpoint" not in caplog.text


def test_settings_have_changed(run, caplog):
    run, _ = run
    changed = dataclasses.replace(Run.open(run).experiment, text_masking=0.1)
    killed(7, changed, resume=run)
    refused(caplog, "the settings have changed since")
    assert "no local checkpoint is newer than that of step 6 of the run folder" in caplog.text


def test_only_the_local_folder_or_interval_changes(run, caplog):
    run, _ = run
    e = Run.open(run).experiment
    local = dataclasses.replace(e.local_checkpoints, every=3)
    killed(11, dataclasses.replace(e, local_checkpoints=local), resume=run)
    assert "starting from the local checkpoint of step 10" in caplog.text


def test_parts_of_a_start_that_was_left_are_not_used(run, caplog):
    """A start from step 6 came after them: its step 8 may differ by rounding."""
    run, _ = run
    kept = run.parent / "away"
    (run.parent / "disk").rename(kept)
    killed(7, resume=run)
    shutil.rmtree(run.parent / "disk")
    kept.rename(run.parent / "disk")
    killed(9, resume=run)
    refused(caplog, "the run has gone back to step 6 since")
    assert sorted(parts(run.parent)) == [8]  # those of the earlier start are deleted
    killed(9, resume=run)
    assert "starting from the local checkpoint of step 8" in caplog.text


def test_another_run_in_the_same_place(run, caplog):
    run, _ = run
    experiment = Run.open(run).experiment
    shutil.rmtree(run)
    killed(3, experiment)
    refused(caplog, "it is of another run")


def test_a_copy_of_the_run_has_its_own(run, caplog):
    run, _ = run
    copied = run.with_name("copied")
    shutil.copytree(run, copied)
    killed(7, resume=copied)
    assert "no local checkpoint is newer" in caplog.text
    shutil.rmtree(copied)


def test_a_disk_that_fails_is_warned_of(run, caplog):
    run, whole = run
    folder = parts(run.parent)[10].parent
    shutil.rmtree(folder)
    with steps(resume=run) as loop:
        for _ in loop:
            shutil.rmtree(folder, ignore_errors=True)
    assert "process 0 of 1 could not write the local checkpoint of step 8" in caplog.text
    assert "(No such file or directory): free its disk; the run goes on" in caplog.text
    assert weights(run) == weights(whole)


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
    run = Run(tmp_path / "run", tiny())
    local = LocalCheckpoints(run)
    assert not any(map(local.is_scheduled, range(100)))
    assert local.restore({}, lambda _: True, after=-1) is None
